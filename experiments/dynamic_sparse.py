"""Sparse training works if the mask may move.

At 98% sparsity a network whose random mask never changes trains badly if every layer is equally
sparse, and stays behind if thin layers are denser. Four methods keep or reach that sparsity and
train nearly as well as the dense network. "SET" drops the weights nearest zero every few steps and
grows as many at random, "RigL" grows where the gradient is largest. "To prune, or not to prune"
trains dense and prunes along a cubic. "GraNet" prunes along the cubic from a half-sparse network,
and exchanges weights as RigL does.

Here a multilayer perceptron 64-256-256-10 is trained with SGD and momentum on digits, all seeds of
a method in one program. GraNet is said to be better than gradual pruning and than RigL; on digits
they are within a point of each other, and the table says which way it falls. The first masks of
SET, RigL and GraNet are Erdős-Rényi-Kernel, the static one is uniform or ERK.

Decebal Constantin Mocanu et al., arXiv 1707.04780; Utku Evci et al., arXiv 1911.11134; Michael Zhu,
Suyog Gupta, arXiv 1710.01878; Shiwei Liu et al., arXiv 2106.10404.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure

from experiments import Claim, Row, Run, figures
from experiments.data import fingerprint, load
from experiments.figures import percent
from experiments.perceptron import init, logits
from jaxkit import masks, tree


@dataclass(frozen=True)
class Settings:
    """What is trained, how sparse, and on what."""

    train: int = 1257
    """Images to train on."""
    test: int = 540
    """Images to test on."""
    seeds: int = 3
    """Runs of every method."""
    sparsity: float = 0.98
    """The fraction of zeros in the end."""
    initial_sparsity: float = 0.5
    """Where GraNet begins."""
    width: int = 256
    """Units in each of the two hidden layers."""
    steps: int = 1200
    """SGD steps."""
    every: int = 50
    """Steps between two changes of a mask, and between two tests."""
    stop: float = 0.75
    """The part of the training after which masks stay (GraNet's exchange goes on)."""
    drop_rate: float = 0.3
    """The share of the living weights that SET and RigL move, at first."""
    batch: int = 64
    """Images in a batch."""
    lr: float = 0.1
    """Learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""
    seed: int = 0
    """The seed that all others come from."""


DENSE, UNIFORM, STATIC, SET, RIGL, GRADUAL, GRANET = METHODS = (
    "dense",
    "static, uniform",
    "static, ERK",
    "SET",
    "RigL",
    "gradual pruning",
    "GraNet",
)


def optimizer(settings: Settings, method: str, key) -> optax.GradientTransformationExtraArgs:
    """Return SGD, wrapped by a method; its first mask is drawn from the key."""
    tx = optax.sgd(settings.lr, settings.momentum)
    every, end = settings.every, int(settings.stop * settings.steps)

    def drawn(allocation, sparsity):
        return lambda p: masks.topk(masks.random(key, p), sparsity=allocation(p, sparsity))

    first = drawn(masks.erk, settings.sparsity)
    moving = {"every": every, "end": end, "drop_rate": settings.drop_rate}
    match method:
        case "dense":
            return masks.sparse(tx, lambda p: jax.tree.map(lambda w: jnp.ones_like(w, bool), p))
        case "static, uniform":
            return masks.sparse(tx, drawn(masks.uniform, settings.sparsity))
        case "static, ERK":
            return masks.sparse(tx, first)
        case "SET":
            return masks.set(tx, first, key=key, **moving)
        case "RigL":
            return masks.rigl(tx, first, **moving)
        case "gradual pruning":
            return masks.gradual(tx, settings.sparsity, end=end, every=every)
        case _:
            return masks.granet(
                tx,
                settings.sparsity,
                end=end,
                steps=settings.steps,
                every=every,
                mask=drawn(masks.erk, settings.initial_sparsity),
                initial_sparsity=settings.initial_sparsity,
            )


# ------------------------------------------------------------------------------- the runs


def run(settings: Settings, folder: Path | None) -> Run:
    """Train all methods side by side; a step goes from one change of the masks to the next."""
    data = load(folder, train=settings.train, test=settings.test)
    if settings.steps % settings.every:
        raise ValueError(f"steps={settings.steps} is no multiple of every={settings.every}")
    if not 0 < settings.stop <= 1:
        raise ValueError(f"stop={settings.stop}: a part of the training in (0, 1] is due")
    x, y, x_test, y_test = map(jnp.asarray, (data.x, data.y, data.x_test, data.y_test))
    sizes = (data.x[0].size, settings.width, settings.width, data.classes)
    base = jax.random.key(settings.seed)
    seeds = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(settings.seeds))

    def start():
        def one(key, method):
            params = init(jax.random.fold_in(key, 1), sizes)
            state = optimizer(settings, method, jax.random.fold_in(key, 2)).init(params)
            return masks.apply(params, masks.current(state)), state

        return {m: jax.vmap(lambda key, m=m: one(key, m))(seeds) for m in METHODS}

    def train(method, key, params, state, first):
        """Take the steps of one run between two changes."""
        tx = optimizer(settings, method, jax.random.fold_in(key, 2))

        def step(carry, i):
            params, state = carry
            rows = jax.random.randint(jax.random.fold_in(key, i), (settings.batch,), 0, len(y))

            def loss_fn(params):
                out = logits(params, x[rows])
                return optax.softmax_cross_entropy_with_integer_labels(out, y[rows]).mean()

            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        state = optax.tree.set(state, step=first)  # the same for all seeds: cond stays cond
        numbers = first + jnp.arange(settings.every)
        (params, state), loss = lax.scan(step, (params, state), numbers)
        test = (logits(params, x_test).argmax(1) == y_test).mean()
        alive = sum(jnp.count_nonzero(m) for m in tree.chosen(_floats(state)).values())
        zeros = sum((w != 0).sum() for w in tree.chosen(params).values())
        return (params, state), (loss.mean(), test, alive, zeros)

    @jax.jit
    def all_methods(states, first):
        out = {}
        for method in METHODS:
            over_seeds = jax.vmap(
                lambda key, params, state, method=method: train(method, key, params, state, first)
            )
            out[method] = over_seeds(seeds, *states[method])
        return {m: state for m, (state, _) in out.items()}, {m: got for m, (_, got) in out.items()}

    def step(i, states):
        first = i * settings.every
        states, measured = all_methods(states, jnp.int32(first))
        weights = sum(a * b for a, b in pairwise(sizes))
        rows: list[Row] = []
        for method in METHODS:
            values = (np.asarray(v, np.float64).round(5) for v in measured[method])
            loss, test, alive, nonzero = values
            row: Row = {"steps": first + settings.every, "method": method, "weights": weights}
            row |= {"loss": loss.tolist(), "test": test.tolist()}
            rows.append(row | {"alive": alive.tolist(), "nonzero": nonzero.tolist()})
        return states, rows

    return Run(
        jax.jit(start),
        step,
        settings.steps // settings.every,
        f"{data.name} {fingerprint(data)}",
    )


def _floats(state):
    """Return the mask as a tree like params."""
    return jax.tree.map(lambda m: m.astype(jnp.float32), masks.current(state))


# ----------------------------------------------------------------------------- what it shows


class Curves(NamedTuple):
    """One method: (tests,) steps; (tests, seeds) accuracy, density, and entries that are not 0."""

    steps: np.ndarray
    test: np.ndarray
    density: np.ndarray
    nonzero: np.ndarray


def curves(rows: list[Row]) -> dict[str, Curves]:
    """Gather the rows by method."""
    own = defaultdict(list)
    for row in rows:
        own[row["method"]].append(row)
    column = lambda found, key: np.array([row[key] for row in found])
    return {
        name: Curves(
            column(found, "steps"),
            column(found, "test"),
            column(found, "alive") / found[0]["weights"],
            column(found, "nonzero") / found[0]["weights"],
        )
        for name, found in own.items()
    }


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare the runs with the statements of the papers."""
    found = curves(rows)
    last = {name: curve.test[-1] for name, curve in found.items()}
    mean = {name: test.mean() for name, test in last.items()}
    moving = (SET, RIGL, GRADUAL, GRANET)
    sparse = (UNIFORM, STATIC, *moving)
    due = 1 - settings.sparsity
    weights = rows[0]["weights"]
    off = max(
        abs(found[name].density[-1] * weights - round(due * weights)).max() for name in sparse
    )
    extra = max((found[name].nonzero - found[name].density).max() for name in sparse)

    def versus(a: str, b: str) -> str:
        return f"{a} {percent(mean[a])}, {b} {percent(mean[b])}"

    return [
        Claim(
            "Every sparse network ends at the sparsity it was given, with exact zeros",
            f"{round(due * weights)} weights of {weights} (a few more or less by rounding a layer)",
            f"at most {off:.0f} off; no entry outside a mask is not zero"
            if extra <= 0
            else "entries outside the masks are not zero",
            bool(off <= 3 and extra <= 0),
        ),
        Claim(
            f"A random mask that stays, uniform over the layers, fails at {percent(1 - due)}",
            "20 points below dense or worse, in the mean",
            versus(UNIFORM, DENSE),
            bool(mean[UNIFORM] < mean[DENSE] - 0.2),
        ),
        Claim(
            "RigL trains at a sparsity where a static mask of the same layer densities does worse",
            "better, for every seed",
            versus(RIGL, STATIC),
            bool((last[RIGL] > last[STATIC]).all()),
        ),
        Claim(
            "So does SET, that needs no dense gradient",
            "better, in the mean",
            versus(SET, STATIC),
            bool(mean[SET] > mean[STATIC]),
        ),
        Claim(
            "Growing where the gradient is large is better than growing at random",
            "RigL above SET, in the mean",
            versus(RIGL, SET),
            bool(mean[RIGL] > mean[SET]),
        ),
        Claim(
            "All that move or prune come close to the dense network",
            "within 6 points, the lowest seed",
            "lowest: " + ", ".join(f"{name} {percent(last[name].min())}" for name in moving),
            bool(min(last[name].min() for name in moving) > mean[DENSE] - 0.06),
        ),
        Claim(
            "Neuroregeneration helps: GraNet is better than gradual pruning",
            "above, on CIFAR and ImageNet; here above, or within 0.5 points of it",
            versus(GRANET, GRADUAL),
            bool(mean[GRANET] > mean[GRADUAL] - 0.005),
        ),
        Claim(
            "GraNet, which begins with half of the weights, is better than RigL",
            "above, in the mean",
            versus(GRANET, RIGL),
            bool(mean[GRANET] > mean[RIGL]),
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw accuracy and density over the training."""
    found = curves(rows)
    figure, (a, b) = figures.panels(1, 2, (10, 4.3))
    colors = {
        DENSE: figures.GREY,
        UNIFORM: figures.RED,
        STATIC: figures.ORANGE,
        SET: figures.PURPLE,
        RIGL: figures.BLUE,
        GRADUAL: figures.GREEN,
        GRANET: figures.SKY,
    }
    for name, color in colors.items():
        dash = {DENSE: (0, (4, 2)), GRANET: (0, (3, 1))}.get(name, "-")
        figures.band(a, found[name].steps, 100 * found[name].test, color, name, linestyle=dash)
    a.set(title="a  A mask that moves trains", xlabel="SGD steps", ylabel="test accuracy (%)")
    a.set_ylim(0, 102)
    a.legend(loc="lower right", ncols=2)
    for name in (DENSE, GRADUAL, GRANET, RIGL):
        label = "SET, RigL, static" if name == RIGL else name
        dash = (0, (4, 2)) if name == DENSE else "-"
        figures.band(
            b, found[name].steps, 100 * found[name].density, colors[name], label, linestyle=dash
        )
    b.set_yscale("log")
    b.set_ylim(100 * (1 - settings.sparsity) / 1.6, 140)
    ticks = [100, 50, 20, 10, 5, 2]
    b.set_yticks(ticks, [str(tick) for tick in ticks])
    b.set_yticks([], minor=True)
    b.set(title="b  How many weights are left", xlabel="SGD steps", ylabel="density (%)")
    b.legend()
    for axes in (a, b):
        axes.set_xlim(0, settings.steps)
    figure.supxlabel(figures.note(settings.seeds), fontsize=8.5, color="#555")
    return figure
