"""A hundred layers train where the signal gets through.

Whether a deep network trains is decided before its first step. Each layer multiplies the size of
the signal, forward, and of the gradient, backward, by a factor that the initialization sets; a
hundred layers raise it to the hundredth power. Glorot's and He's variances are right for one
activation each: with another one, or in a plain sum of residual branches, the signal dies or
explodes. ``jaxkit.init.advise`` finds the layer, from one batch and before any training. Six
initializations keep the signal, and with them the same networks train: ZerO, the edge of chaos,
LSUV, IDInit, ReZero and DeepScaleLM.

Here networks of 100 layers are trained with Adam on digits, every one with the best of the learning
rates. Chains have 100 kernels one after another; at the edge of chaos they are orthogonal. Residual
networks have 49 blocks ``x + F(x)`` of two kernels with a ReLU between them, none of them
normalized, but for DeepScaleLM's: ``sqrt(1 - b) x + sqrt(b) F(LN(x))`` with b = 1/49. (It trains
without its factors as well at this depth.) With tanh and He's variance nothing dies: gradients grow
a hundredfold and examples become unlike each other, of which the probe does not warn.

Jiawei Zhao, Florian Schäfer, Anima Anandkumar, arXiv 2110.12661 (ZerO); Soufiane Hayou, Arnaud
Doucet, Judith Rousseau, arXiv 1902.06853 (edge of chaos); Dmytro Mishkin, Jiri Matas,
arXiv 1511.06422 (LSUV); Yu Pan, Chaozheng Wang, Zekai Wu, Qifan Wang, Min Zhang, Zenglin Xu,
arXiv 2503.04626 (IDInit); Thomas Bachlechner, Bodhisattwa Prasad Majumder, Huanru Henry Mao,
Garrison W. Cottrell, Julian McAuley, arXiv 2003.04887 (ReZero); Akhil Kedia, Mohd Abbas Zaidi,
Sushil Khyalia, Jungho Jung, Harshith Goka, Haejun Lee, arXiv 2403.09635 (DeepScaleLM).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from experiments.signal_figure import draw_signals, packed, rounded, unpacked
from jaxkit import init
from jaxkit.init.advise import Advice, advise


@dataclass(frozen=True)
class Settings:
    """What is trained, and on what."""

    train: int = 1400
    """Images to train on."""
    test: int = 397
    """Images to test on."""
    seeds: int = 3
    """Runs of every network, each from its own weights."""
    depth: int = 100
    """Layers, an even number from 8 on."""
    width: int = 64
    """Units in a layer."""
    sigma_b: float = 0.1
    """Standard deviation of the biases at the edge of chaos."""
    steps: int = 300
    """Adam steps."""
    batch: int = 32
    """Images in a batch."""
    lr: tuple[float, ...] = (2e-4, 1e-3)
    """Learning rates of Adam, of which every network gets its best."""
    average: int = 10
    """Steps that a point of the loss curve is the mean of."""
    probe: int = 128
    """Images that `advise` reads."""
    seed: int = 0
    """The seed that all others come from."""


class Net(NamedTuple):
    """A network and its initialization: ``apply(params, x)``, ``start(key, x) -> params``."""

    name: str
    apply: Callable
    start: Callable


DIES = ("ReLU, Glorot", "GELU, He", "residual, He")
CHAOTIC = "tanh, He"
TRAINS = (
    "ReLU, ZerO",
    "tanh, edge of chaos",
    "residual, LSUV",
    "residual, IDInit",
    "residual, ReZero",
    "residual, DeepScaleLM",
)


# ------------------------------------------------------------------------------- the networks


def dense(layer, x):
    """Apply a kernel and a bias."""
    return x @ layer["kernel"] + layer["bias"]


def chain(phi):
    """Return a network of one kernel after another."""

    def apply(params, x):
        x = phi(dense(params["first"], x))
        x, _ = lax.scan(lambda x, layer: (phi(dense(layer, x)), None), x, params["hidden"])
        return dense(params["head"], x)

    return apply


def residual(blocks: int, wire: init.Wire | None = None, normal=lambda x: x):
    """Return a network of blocks ``skip * x + branch * alpha * F(normal(x))``."""
    wire = init.Wire(*jnp.ones((3, blocks))) if wire is None else wire

    def apply(params, x):
        def block(x, now):
            layer, wire = now
            branch = lambda x: dense(layer["down"], init.relu_one(dense(layer["up"], normal(x))))
            wire = wire._replace(branch=wire.branch * layer.get("alpha", 1))
            return init.residual(branch, x, wire), None

        x, _ = lax.scan(block, dense(params["first"], x), (params["blocks"], wire))
        return dense(params["head"], normal(x))

    return apply


def layer_norm(x):
    """Bring the last axis to mean 0 and variance 1."""
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def layers(draw):
    """Draw a stack of kernels, each with a key of its own."""
    return lambda key, shape, dtype: jax.vmap(lambda key: draw(key, shape[1:], dtype))(
        jax.random.split(key, shape[0])
    )


def networks(settings: Settings, inputs: int, classes: int) -> list[Net]:
    """Return the networks, those that fail first."""
    if settings.depth < 8 or settings.depth % 2:
        raise ValueError(f"depth={settings.depth}: an even number from 8 on is due")
    width, blocks = settings.width, settings.depth // 2 - 1
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    layer = lambda n, m, *stack: {"kernel": spec(*stack, n, m), "bias": spec(*stack, m)}
    ends = {"first": layer(inputs, width), "head": layer(width, classes)}
    plain = ends | {"hidden": layer(width, width, settings.depth - 2)}
    branch = {name: layer(width, width, blocks) for name in ("up", "down")}
    summed, gated = (ends | {"blocks": branch | more} for more in ({}, {"alpha": spec(blocks)}))

    zeros = jax.nn.initializers.zeros
    normal = lambda gain: jax.nn.initializers.variance_scaling(gain**2, "fan_in", "normal")
    glorot, he, lecun = jax.nn.initializers.glorot_normal(), normal(2**0.5), normal(1.0)
    edge = init.edge_of_chaos(jnp.tanh, settings.sigma_b)
    scale = init.deepscale(width, blocks, expansion=1.0)
    unit = jax.nn.initializers.normal(scale.feed_forward)

    def drawn(shapes, draw, bias=zeros, **special):
        """Draw all kernels, those of the branches or the ends as `special` says."""
        rules = [(f"**/{name}/kernel", how) for name, how in special.items()]
        rules += [("blocks/*/kernel" if "blocks" in shapes else "hidden/kernel", layers(draw))]
        rules += [("*/kernel", draw), ("**/bias", bias)]
        rules += [("**/alpha", zeros)] if "alpha" in shapes.get("blocks", {}) else []
        return lambda key, x: init.rules(*rules)(key, shapes)

    def calibrated(key, x):
        return init.lsuv(key, sums, drawn(summed, lecun)(key, x), x, warn=False)[0]

    relu, gelu, tanh = (chain(phi) for phi in (init.relu_one, jax.nn.gelu, jnp.tanh))
    sums = residual(blocks)
    scaled = residual(blocks, init.deepscale_wire(blocks, sublayers=1), layer_norm)
    orthogonal, biases = init.orthogonal(edge.sigma_w), jax.nn.initializers.normal(edge.sigma_b)
    near_zero = {"down": layers(init.idiz()), "head": lecun}
    starts = {
        "ReLU, Glorot": (relu, drawn(plain, glorot)),
        "GELU, He": (gelu, drawn(plain, he)),
        "residual, He": (sums, drawn(summed, he)),
        "tanh, He": (tanh, drawn(plain, he)),
        "ReLU, ZerO": (relu, drawn(plain, init.zero())),
        "tanh, edge of chaos": (tanh, drawn(plain, orthogonal, biases)),
        "residual, LSUV": (sums, calibrated),
        "residual, IDInit": (sums, drawn(summed, init.idi(), **near_zero)),
        "residual, ReZero": (sums, drawn(gated, he)),
        "residual, DeepScaleLM": (scaled, drawn(summed, unit, first=lecun, head=lecun)),
    }
    return [Net(name, *starts[name]) for name in (*DIES, CHAOTIC, *TRAINS)]


def theory(settings: Settings) -> dict[str, tuple[str, float]]:
    """Return what one layer (or block) multiplies, and by what, in a wide network."""
    q = 1.0
    for _ in range(settings.depth):
        q = init.variance_map(jnp.tanh, q, sigma_w=2**0.5)
    chaos = init.susceptibilities(jnp.tanh, q, sigma_w=2**0.5).perpendicular
    return {
        "ReLU, Glorot": ("output", math.sqrt(init.variance_map(jax.nn.relu, 1.0))),
        "GELU, He": ("output", math.sqrt(2) * float(jax.grad(jax.nn.gelu)(0.0))),
        "residual, He": ("output", math.sqrt(3)),
        "tanh, He": ("backward", math.sqrt(chaos)),
    }


# ----------------------------------------------------------------------------------- the runs


def run(settings: Settings, folder: Path | None) -> Run:
    """Probe and train a network with every seed and learning rate; a step is a network."""
    data = load(folder, train=settings.train, test=settings.test)
    if settings.steps % settings.average:
        raise ValueError(f"steps={settings.steps} is no multiple of {settings.average=}")
    if not 2 <= settings.probe <= settings.train:
        raise ValueError(f"probe={settings.probe}: 2 to train={settings.train} images are due")
    x, x_test = (jnp.asarray(part).reshape(len(part), -1) for part in (data.x, data.x_test))
    y, y_test = jnp.asarray(data.y), jnp.asarray(data.y_test)
    nets = networks(settings, x.shape[1], data.classes)
    base = jax.random.key(settings.seed)
    seeds = [jax.random.fold_in(base, i) for i in range(settings.seeds)]
    batch, probe = jax.random.fold_in(base, settings.seeds), x[: settings.probe]

    @partial(jax.jit, static_argnums=0)
    def train(apply, params):
        def loss_fn(params, rows):
            out = apply(params, x[rows])
            return optax.softmax_cross_entropy_with_integer_labels(out, y[rows]).mean()

        def one(lr, params):
            tx = optax.adam(lr)

            def step(state, i):
                params, opt_state = state
                rows = jax.random.choice(jax.random.fold_in(batch, i), len(x), (settings.batch,))
                loss, grads = jax.value_and_grad(loss_fn)(params, rows)
                updates, opt_state = tx.update(grads, opt_state, params)
                return (optax.apply_updates(params, updates), opt_state), loss

            numbers = jnp.arange(settings.steps)
            (params, _), loss = lax.scan(step, (params, tx.init(params)), numbers)
            right = lambda x, y: (apply(params, x).argmax(1) == y).mean()
            return loss.reshape(-1, settings.average).mean(1), right(x, y), right(x_test, y_test)

        over_seeds = jax.vmap(one, (None, 0))
        return jax.vmap(over_seeds, (0, None))(jnp.array(settings.lr), params)

    def step(i, state):
        net = nets[i]
        starts = [net.start(key, probe) for key in seeds]
        rows: list[Row] = [{"net": net.name, "advice": packed(advise(net.apply, starts[0], probe))}]
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
        loss, train_, test = (np.asarray(m, np.float64) for m in train(net.apply, params))
        for at, lr in enumerate(settings.lr):
            row: Row = {"net": net.name, "lr": lr, "loss": rounded(loss[at].T)}
            rows.append(row | {"train": rounded(train_[at]), "test": rounded(test[at])})
        return state, rows

    return Run(lambda: jnp.zeros(()), step, len(nets), f"{data.name} {fingerprint(data)}")


# ----------------------------------------------------------------------------- what it shows


class Found(NamedTuple):
    """One network: its probe, and (steps, seeds) loss, (seeds,) accuracies at the best rate."""

    advice: Advice
    lr: float
    loss: np.ndarray
    train: np.ndarray
    test: np.ndarray


def gather(rows: list[Row]) -> dict[str, Found]:
    """Return what every network did with the learning rate that brought its loss lowest."""
    out = {}
    for probe in (row for row in rows if "advice" in row):
        own = [row for row in rows if row["net"] == probe["net"] and "lr" in row]
        final = [np.nan_to_num(np.array(row["loss"])[-3:].mean(), nan=np.inf) for row in own]
        best = own[int(np.argmin(final))]
        numbers = (np.array(best[key]) for key in ("loss", "train", "test"))
        out[probe["net"]] = Found(unpacked(probe["advice"]), best["lr"], *numbers)
    return out


def named(advice: Advice) -> list[str]:
    """Return the leaves at which the probe says that the signal dies, explodes or blurs."""
    kinds = ("forward-dies", "forward-explodes", "backward-dies", "backward-explodes", "alike")
    return [verdict.path for verdict in advice.verdicts if verdict.kind in kinds]


def rate(advice: Advice, field: str) -> float:
    """Return the factor by which the second half of the layers (or blocks) multiplies a signal."""
    hidden = [row for row in advice.rows if row.path.startswith(("hidden", "blocks/up"))]
    values = np.array([getattr(row, field) for row in hidden[len(hidden) // 2 :]])
    slope = np.polyfit(np.arange(len(values)), np.log(values), 1)[0]
    return float(np.exp(slope if field == "output" else -slope))


def listed(pairs) -> str:
    """Write what belongs to each network."""
    return "; ".join(f"{name}: {what}" for name, what in pairs)


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare the runs with what the theory leads one to expect."""
    found = gather(rows)
    good = {name: found[name].test.mean() for name in TRAINS}
    bad = {name: found[name].test.mean() for name in (*DIES, CHAOTIC)}
    leaf = {name: named(found[name].advice) for name in (*DIES, *TRAINS)}
    wide = theory(settings)
    rates = {name: rate(found[name].advice, field) for name, (field, _) in wide.items()}
    close = [abs(np.log(rates[name] / due)) < np.log(1.05) for name, (_, due) in wide.items()]
    spared = [name for name in TRAINS if leaf[name]]
    return [
        Claim(
            f"{settings.depth} layers train with each of the six initializations",
            "test accuracy above 85%",
            listed((name, percent(value)) for name, value in good.items()),
            min(good.values()) > 0.85,
        ),
        Claim(
            "With a variance meant for another activation, or He's in a plain residual sum, the "
            "same networks do not train",
            "test accuracy below 50% with the best learning rate",
            listed((name, percent(value)) for name, value in bad.items()),
            max(bad.values()) < 0.5,
        ),
        Claim(
            "The probe names the leaf where the signal dies or explodes before any training",
            "one in each of the three networks where it does, none in the six that train",
            listed((name, leaf[name][0] if leaf[name] else "none") for name in DIES)
            + f"; none in {len(TRAINS) - len(spared)} of the {len(TRAINS)} that train",
            all(leaf[name] for name in DIES) and not spared,
        ),
        Claim(
            "It dies at the rate that the kernel map has for wide networks",
            "signal, a layer or block: "
            + listed((name, f"{due:.3f}") for name, (_, due) in wide.items() if name in DIES)
            + "; gradient: "
            + listed((name, f"{due:.3f}") for name, (_, due) in wide.items() if name == CHAOTIC)
            + " (within 5%)",
            listed((name, f"{value:.3f}") for name, value in rates.items()),
            all(close),
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw loss curves, accuracies and the probes of all networks."""
    found = gather(rows)
    figure, axes = figures.panels(3, 2, (10.5, 11.5))
    warm = (figures.RED, figures.ORANGE, "#8c2d04", figures.PURPLE)
    cool = (figures.BLUE, figures.SKY, figures.GREEN, "#9aa3b5", "#7fbf7b", "#444444")
    styles = {
        name: {"color": c, "linestyle": (0, (4, 1.6))}
        for name, c in zip((*DIES, CHAOTIC), warm, strict=True)
    }
    styles |= {name: {"color": c, "linestyle": "-"} for name, c in zip(TRAINS, cool, strict=True)}
    losses, bars = axes[:2]
    for name, one in found.items():
        steps = settings.average * (0.5 + np.arange(len(one.loss)))
        losses.plot(steps, one.loss.mean(1), label=name, **styles[name])
        low, high = one.loss.min(1), one.loss.max(1)
        losses.fill_between(steps, low, high, color=styles[name]["color"], alpha=0.18, linewidth=0)
    losses.set_ylim(0, 3)
    losses.set(title="a  Training loss", xlabel="Adam steps", ylabel="loss (nats)")

    places = -np.arange(len(found))
    tests = 100 * np.stack([one.test for one in found.values()])
    bars.barh(places, tests.mean(1), color=[styles[name]["color"] for name in found])
    reach = figures.spread(tests).clip(0)
    bars.errorbar(tests.mean(1), places, xerr=reach, fmt="none", color="#333")
    bars.set_yticks(places, list(found))
    bars.set(title="b  Test accuracy", xlabel="test accuracy (%)", xlim=(0, 100))
    bars.grid(axis="y", visible=False)

    thin = {"linewidth": 1.0, "zorder": 1.5}
    styles |= {name: styles[name] | thin for name in TRAINS}
    draw_signals(axes[2:], {name: one.advice for name, one in found.items()}, styles)
    for letter, panel in zip("cdef", axes[2:], strict=True):
        panel.set_title(f"{letter}  {panel.get_title(loc='left')}")
    figure.legend(*losses.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    note = (
        f"{figures.note(settings.seeds)} c to f: before training; a cross: the leaf that is named."
        "\nThe loss of residual, He is far above a. In c and d, IDInit's branches end in kernels "
        "of 1e-6, and ReZero's have no gradient yet."
    )
    figure.supxlabel(note, fontsize=8.5, color="#555")
    return figure
