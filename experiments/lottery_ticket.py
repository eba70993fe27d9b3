"""Winning lottery tickets train as well as dense networks.

"The Lottery Ticket Hypothesis" trains a network, prunes a part of the weights with the smallest
final magnitudes, sets the others back to their *first* values, and repeats. The sparse networks
found so, the winning tickets, train to the accuracy of the dense network at a small part of its
weights. It is the first values that make them win: the same mask on newly drawn weights does
worse, and so does a mask shuffled within each layer on the first weights.

"Stabilizing the Lottery Ticket Hypothesis" sets the weights back not to the first ones but to those
after a few steps, which large networks need. It is the fourth arm, with masks of its own.

Here a multilayer perceptron 64-128-64-10 is trained with Adam on digits, all seeds and all
arms in one program. A fifth of the living weights goes in every round, a tenth in the output
layer, as in the paper's networks for MNIST, which are 784-300-100-10.

Jonathan Frankle, Michael Carbin, arXiv 1803.03635; Jonathan Frankle, Gintare Karolina Dziugaite,
Daniel M. Roy, Michael Carbin, arXiv 1903.01611.
"""

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
from matplotlib.ticker import NullFormatter

from experiments import Claim, Row, Run, figures
from experiments.data import fingerprint, load
from experiments.figures import count, percent
from experiments.perceptron import init, logits
from jaxkit import masks


@dataclass(frozen=True)
class Settings:
    """What is trained and pruned, and on what."""

    train: int = 1400
    """Images to train on."""
    test: int = 397
    """Images to test on."""
    seeds: int = 5
    """Tickets, each from its own first weights, with its controls."""
    hidden: tuple[int, ...] = (128, 64)
    """Units in the hidden layers."""
    rounds: int = 16
    """Times that weights are pruned."""
    prune: float = 0.2
    """The part of a layer's living weights that goes in a round."""
    prune_output: float = 0.1
    """The same, for the output layer."""
    steps: int = 400
    """Adam steps in a round."""
    rewind: int = 20
    """The step to which the fourth arm goes back."""
    batch: int = 64
    """Images in a batch."""
    lr: float = 2e-3
    """Learning rate of Adam."""
    test_every: int = 10
    """Steps between two tests."""
    seed: int = 0
    """The seed that all others come from."""


TICKET, REINIT, SHUFFLED, LATE = ARMS = (
    "winning ticket",
    "new weights",
    "shuffled mask",
    "rewound late",
)


def living(settings: Settings, sizes) -> list[dict[str, int]]:
    """Return how many weights of each layer live in each round, the dense one first."""
    for name, p in (("prune", settings.prune), ("prune_output", settings.prune_output)):
        if not 0 < p < 1:
            raise ValueError(f"{name}={p}: a number between 0 and 1 is due")
    parts = [settings.prune] * (len(sizes) - 2) + [settings.prune_output]
    alive = [a * b for a, b in pairwise(sizes)]
    out = []
    for number in range(settings.rounds + 1):
        out.append({f"layer_{i}": n for i, n in enumerate(alive)})
        gone = [round(p * n) for n, p in zip(alive, parts, strict=True)]
        if number < settings.rounds and min(gone) < 1:
            i = gone.index(0)
            raise ValueError(f"layer_{i} has {alive[i]} weights in round {number}: none would go")
        alive = [n - m for n, m in zip(alive, gone, strict=True)]
    return out


def stack(*trees):
    """Stack the leaves of trees along a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def run(settings: Settings, folder: Path | None) -> Run:
    """Train tickets and controls, then prune; a step is a round."""
    data = load(folder, train=settings.train, test=settings.test)
    if settings.batch > settings.train:
        raise ValueError(f"batch={settings.batch} is more than train={settings.train}")
    if settings.steps % settings.test_every:
        raise ValueError(f"steps={settings.steps} is no multiple of {settings.test_every=}")
    if not 0 <= settings.rewind < settings.steps:
        raise ValueError(f"rewind={settings.rewind}: a step before steps={settings.steps} was due")
    sizes = (data.x[0].size, *settings.hidden, data.classes)
    alive = living(settings, sizes)
    part = {name: {"kernel": settings.prune, "bias": 0.0} for name in alive[0]}
    part[list(part)[-1]]["kernel"] = settings.prune_output
    base = jax.random.key(settings.seed)
    seeds = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(settings.seeds))

    def start():
        params = jax.eval_shape(lambda: init(base, sizes))
        ones = jax.tree.map(lambda w: jnp.ones((settings.seeds, *w.shape), bool), params)
        return {"mask": ones, "late": ones}

    def train(key, params, mask, first, number, x, y):
        """Take `number` steps of one sparse network, idle before `first`, and test it."""
        tx = masks.sparse(optax.adam(settings.lr), mask)

        def loss_fn(params, rows):
            out = logits(params, x[rows])
            return optax.softmax_cross_entropy_with_integer_labels(out, y[rows]).mean()

        def step(state, i):
            params, old = state
            rows = jax.random.choice(
                jax.random.fold_in(key, i), settings.train, (settings.batch,), replace=False
            )
            updates, new = tx.update(jax.grad(loss_fn)(params, rows), old, params)
            moved = (optax.apply_updates(params, updates), new)
            return jax.tree.map(lambda a, b: jnp.where(i >= first, a, b), moved, state), None

        def stretch(state, numbers):
            state, _ = lax.scan(step, state, numbers)
            return state, (logits(state[0], data.x_test).argmax(1) == data.y_test).mean()

        params = masks.apply(params, mask)
        numbers = jnp.arange(number).reshape(-1, min(number, settings.test_every))
        (params, _), test = lax.scan(stretch, (params, tx.init(params)), numbers)
        return params, test

    @jax.jit
    def one_round(x, y, number, mask, late):
        def one_seed(key, mask, late):
            first, *rest = jax.random.split(key, 4)
            other, order, permute = (jax.random.fold_in(k, number) for k in rest)
            params = init(first, sizes)
            rewound = params
            if k := settings.rewind:
                every = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
                rewound, _ = train(jax.random.fold_in(rest[1], 0), params, every, 0, k, x, y)
            starts = stack(params, init(other, sizes), params, rewound)
            kept = stack(mask, mask, masks.shuffle(permute, mask), late)
            idle = jnp.array([0, 0, 0, settings.rewind])
            arm = lambda start, mask, idle: train(order, start, mask, idle, settings.steps, x, y)
            trained, test = jax.vmap(arm)(starts, kept, idle)
            two = jnp.array([ARMS.index(TICKET), ARMS.index(LATE)])
            scores = masks.magnitude(jax.tree.map(lambda w: w[two], trained))
            old = stack(mask, late)
            new = jax.vmap(lambda mask, scores: masks.prune(mask, scores, part))(old, scores)
            last = number == settings.rounds
            return jax.tree.map(lambda a, b: jnp.where(last, a, b), old, new), test

        return jax.vmap(one_seed)(seeds, mask, late)

    def step(i, state):
        pruned, test = one_round(data.x, data.y, i, state["mask"], state["late"])
        mask, late = (jax.tree.map(lambda m, a=a: m[:, a], pruned) for a in range(2))
        density = sum(alive[i].values()) / sum(alive[0].values())
        accuracy = np.asarray(test, np.float64).round(5)  # (seeds, arms, tests)
        rows: list[Row] = [
            {"round": i, "density": round(density, 6), "arm": arm, "test": accuracy[:, a].tolist()}
            for a, arm in enumerate(ARMS)
        ]
        return {"mask": mask, "late": late}, rows

    return Run(jax.jit(start), step, settings.rounds + 1, f"{data.name} {fingerprint(data)}")


# ----------------------------------------------------------------------------- what it shows


class Arm(NamedTuple):
    """One arm: (rounds,) density, (tests,) steps, and (rounds, seeds, tests) test accuracy."""

    density: np.ndarray
    steps: np.ndarray
    test: np.ndarray


def arms(settings: Settings, rows: list[Row]) -> dict[str, Arm]:
    """Gather the rows by arm."""
    out = {}
    for name in ARMS:
        own = [row for row in rows if row["arm"] == name]
        test = np.array([row["test"] for row in own])
        steps = settings.test_every * (1 + np.arange(test.shape[-1]))
        out[name] = Arm(np.array([row["density"] for row in own]), steps, test)
    return out


def time_to_learn(arm: Arm, accuracy: float) -> np.ndarray:
    """Return the steps to a test accuracy, (rounds, seeds), or inf."""
    there = arm.test >= accuracy
    return np.where(there.any(-1), arm.steps[there.argmax(-1)], np.inf)


def below_a_fifth(arm: Arm) -> int:
    """Return the first round with at most a fifth of the weights, or the last round."""
    return int(np.argmax(arm.density <= 0.2)) or len(arm.density) - 1


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare the runs with the statements of the paper."""
    found = arms(settings, rows)
    ticket, new = found[TICKET], found[REINIT]
    final = {name: arm.test[..., -1].mean(-1) for name, arm in found.items()}
    dense = final[TICKET][0]
    fifth = below_a_fifth(ticket)
    sparsest = percent(ticket.density[-1])
    goal = 0.95 * dense
    times = [time_to_learn(arm, goal).mean(-1) for arm in (ticket, new)]

    def apart(control: str) -> float:
        return final[TICKET][-1] - final[control][-1]

    def difference(control: str) -> str:
        return (
            f"{100 * apart(control):.1f} points: {percent(final[TICKET][-1])} "
            f"and {percent(final[control][-1])}"
        )

    return [
        Claim(
            "A winning ticket with less than a fifth of the weights is as good as the whole",
            "test accuracy of the dense network or better (within half a point)",
            f"{percent(final[TICKET][fifth])} with {percent(ticket.density[fifth])} of the "
            f"weights, {percent(dense)} with all",
            final[TICKET][fifth] >= dense - 0.005,
        ),
        Claim(
            "It learns faster than the dense network",
            f"fewer steps to {percent(goal)} test accuracy",
            f"{count(times[0][fifth])}, and {count(times[0][0])}",
            times[0][fifth] < times[0][0],
        ),
        Claim(
            "The same mask on new weights learns more slowly than the dense network",
            f"more steps to {percent(goal)} test accuracy",
            f"{count(times[1][fifth])}, and {count(times[0][0])}",
            times[1][fifth] > times[0][0],
        ),
        Claim(
            f"With {sparsest} of the weights left, the ticket beats its mask on new weights",
            "by more than 3 points of test accuracy",
            difference(REINIT),
            apart(REINIT) > 0.03,
        ),
        Claim(
            f"With {sparsest} of the weights left, it beats its mask shuffled within the layers",
            "by more than 10 points of test accuracy",
            difference(SHUFFLED),
            apart(SHUFFLED) > 0.1,
        ),
        Claim(
            f"With {sparsest} of the weights left, late rewinding does no harm to a small network",
            "test accuracy of the ticket from the first weights or better (within a point)",
            difference(LATE),
            apart(LATE) < 0.01,
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw accuracy and learning time against the weights left, and learning curves."""
    found = arms(settings, rows)
    figure, (a, b, c) = figures.panels(1, 3, (12.6, 4.4))
    colors = (figures.BLUE, figures.RED, figures.GREEN, figures.ORANGE)
    styles = zip(colors, "os^v", strict=True)
    goal = 0.95 * found[TICKET].test[0, :, -1].mean()
    for (name, arm), (color, marker) in zip(found.items(), styles, strict=True):
        look = {"marker": marker, "markersize": 4}
        figures.band(a, 100 * arm.density, 100 * arm.test[..., -1], color, name, **look)
        times = time_to_learn(arm, goal)
        shown = np.isfinite(times).all(-1)
        figures.band(b, 100 * arm.density[shown], times[shown], color, name, **look)
    for axes in (a, b):
        axes.set_xscale("log")
        axes.invert_xaxis()
        ticks = [t for t in (100, 50, 20, 10, 5, 2, 1) if t >= 99 * found[TICKET].density[-1]]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("weights left (%)")
    a.axhline(100 * found[TICKET].test[0, :, -1].mean(), color=figures.GREY, ls=":", lw=1.2)
    a.set(title="a  Tickets keep the accuracy", ylabel="test accuracy (%)")
    a.legend(loc="lower left")
    b.set(title="b  Tickets learn sooner", ylabel=f"steps to {percent(goal)} test accuracy")
    b.set_ylim(bottom=0)

    density = found[TICKET].density
    chosen = dict.fromkeys((0, below_a_fifth(found[TICKET]), len(density) - 1))
    shades = (figures.GREY, figures.ORANGE, figures.PURPLE)
    for r, color in zip(chosen, shades, strict=False):
        for name, dash in ((TICKET, "-"), (REINIT, (0, (3, 1.5)))):
            if r == 0 and name == REINIT:
                continue
            label = f"{percent(density[r])}, {name}" if r else "dense"
            mean = 100 * found[name].test[r].mean(0)
            c.plot(found[name].steps, mean, color=color, linestyle=dash, label=label)
    c.set(title="c  Learning curves", xlabel="Adam steps", ylabel="test accuracy (%)")
    c.legend(loc="lower right")
    note = f"{figures.note(settings.seeds)} In b, a line ends where not every seed gets there."
    figure.supxlabel(note, fontsize=8.5, color="#555")
    return figure
