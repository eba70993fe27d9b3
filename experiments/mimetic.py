"""Attention that starts out like trained attention learns sooner.

In trained vision Transformers the products of the attention weights look alike in every layer:
``W_Q W_K^T`` resembles the identity, ``W_V W_O`` its negative. "Mimetic Initialization of
Self-Attention Layers" starts there (``jaxkit.init.mimetic_attention``), which helps most where
images are few: the paper gains 5 points on CIFAR-10, with full training.

Here a small Transformer reads the digits as 16 patches of 2 by 2 pixels, with fixed positions (also
a part of the recipe, and given to both). Only the four attention kernels of each layer differ
between the two starts; the first weights of everything else, and the batches, are the same. One
statement is of large models that were trained for long: a small one stays where it starts.

Asher Trockman, J. Zico Kolter, arXiv 2305.09828.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure

from experiments import Claim, Row, Run, figures
from experiments.data import fingerprint, load
from experiments.figures import percent
from jaxkit import init


@dataclass(frozen=True)
class Settings:
    """What is trained, and on what."""

    train: int = 1400
    """Images to train on."""
    test: int = 397
    """Images to test on."""
    seeds: int = 5
    """Pairs of runs."""
    patch: int = 2
    """Pixels in each direction of a patch."""
    width: int = 32
    """Width of the Transformer, a multiple of 4 and of `heads`."""
    heads: int = 4
    """Attention heads of a layer."""
    layers: int = 2
    """Attention layers, each with a feed-forward block."""
    epochs: int = 15
    """Passes over the training images."""
    early: int = 5
    """Epochs after which the two starts are compared first."""
    batch: int = 32
    """Images in a batch."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    seed: int = 0
    """The seed that all others come from."""


USUAL, MIMETIC = ARMS = ("usual start", "mimetic start")


# -------------------------------------------------------------------------------- the network


def patches(images, size: int):
    """Cut images into patches: (n, patches, pixels), row by row."""
    n, height, width, channels = images.shape
    if height % size or width % size:
        raise ValueError(f"patch={size} does not divide images of {height} by {width} pixels")
    cut = jnp.asarray(images).reshape((n, height // size, size, width // size, size, channels))
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, size * size * channels)


def shapes(settings: Settings, pixels: int, classes: int):
    """Return the shapes of the parameters; those of the layers are stacked."""
    d, h = settings.width, settings.heads
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    dense = lambda n, m, *stack: {"kernel": spec(*stack, n, m), "bias": spec(*stack, m)}
    into, out = (settings.layers, d, h, d // h), (settings.layers, h, d // h, d)
    return {
        "embed": dense(pixels, d),
        "attention": {name: {"kernel": spec(*into)} for name in ("query", "key", "value")}
        | {"out": {"kernel": spec(*out)}},
        "up": dense(d, 2 * d, settings.layers),
        "down": dense(2 * d, d, settings.layers),
        "head": dense(d, classes),
    }


def start(key, shapes, mimetic: bool):
    """Draw the parameters, the attention kernels in one of two ways."""
    lecun = partial(jax.nn.initializers.variance_scaling, 1.0, "fan_in", "truncated_normal")
    zeros = jax.nn.initializers.zeros
    params = init.rules(
        ("attention/out/kernel", lecun(in_axis=(1, 2), out_axis=3, batch_axis=0)),
        ("attention/*/kernel", lecun(in_axis=1, out_axis=(2, 3), batch_axis=0)),
        (["up/kernel", "down/kernel"], lecun(in_axis=1, out_axis=2, batch_axis=0)),
        ("**/kernel", lecun()),
        ("**/bias", zeros),
    )(key, shapes)
    change = init.mimetic_attention(layout="ldhk", out_layout="lhkd")
    return change(key, params) if mimetic else params


def dense(layer, x):
    """Apply a kernel and a bias."""
    return x @ layer["kernel"] + layer["bias"]


def normal(x):
    """Bring the last axis to mean 0 and variance 1."""
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def logits(params, x, positions):
    """Classify sequences of patches."""

    def layer(x, params):
        kernels = params["attention"]
        y = normal(x)
        q, k, v = (
            jnp.einsum("ntd,dhk->nthk", y, kernels[name]["kernel"])
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(q, k, v)
        x = x + jnp.einsum("nthk,hkd->ntd", y, kernels["out"]["kernel"])
        return x + dense(params["down"], jax.nn.gelu(dense(params["up"], normal(x)))), None

    stacked = {name: params[name] for name in ("attention", "up", "down")}
    x, _ = lax.scan(layer, dense(params["embed"], x) + positions, stacked)
    return dense(params["head"], normal(x).mean(1))


def products(params):
    """Return ``W_Q W_K^T``, the mean over heads, and ``W_V W_O`` of the first layer."""
    q, k, v, o = (params["attention"][n]["kernel"][0] for n in ("query", "key", "value", "out"))
    return jnp.einsum("dhk,ehk->de", q, k) / q.shape[1], jnp.einsum("dhk,hke->de", v, o)


# ----------------------------------------------------------------------------------- the runs


def run(settings: Settings, folder: Path | None) -> Run:
    """Train both starts with every seed; a step is an epoch."""
    data = load(folder, train=settings.train, test=settings.test)
    if settings.batch > settings.train:
        raise ValueError(f"batch={settings.batch} is more than train={settings.train}")
    if settings.width % settings.heads:
        raise ValueError(f"width={settings.width} is no multiple of heads={settings.heads}")
    if not 1 <= settings.early <= settings.epochs:
        raise ValueError(f"early={settings.early}: an epoch up to {settings.epochs} is due")
    x, x_test = (patches(part, settings.patch) for part in (data.x, data.x_test))
    y, y_test = jnp.asarray(data.y), jnp.asarray(data.y_test)
    grid = (data.x.shape[1] // settings.patch, data.x.shape[2] // settings.patch)
    positions = init.sincos_2d(*grid, settings.width)
    specs = shapes(settings, x.shape[-1], data.classes)
    base = jax.random.key(settings.seed)
    seeds = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(settings.seeds))
    tx = optax.adam(settings.lr)

    def begin():
        arms = [jax.vmap(lambda k, m=m: start(k, specs, m))(seeds) for m in (False, True)]
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arms)
        return params, jax.vmap(jax.vmap(tx.init))(params)

    def loss_fn(params, rows):
        out = logits(params, x[rows], positions)
        return optax.softmax_cross_entropy_with_integer_labels(out, y[rows]).mean()

    def epoch(key, number, state):
        used = settings.train // settings.batch * settings.batch
        order = jax.random.permutation(jax.random.fold_in(key, number), settings.train)[:used]

        def batch(state, rows):
            params, opt_state = state
            loss, grads = jax.value_and_grad(loss_fn)(params, rows)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        state, loss = lax.scan(batch, state, order.reshape(-1, settings.batch))
        return state, loss.mean(), (logits(state[0], x_test, positions).argmax(1) == y_test).mean()

    epochs = jax.jit(jax.vmap(jax.vmap(epoch, (0, None, 0)), (None, None, 0)))

    def rows_of(state) -> list[Row]:
        pairs = jax.jit(jax.vmap(jax.vmap(products)))(state[0])
        qk, vo = (np.asarray(m, np.float64).round(4) for m in pairs)
        diagonal = lambda m: np.trace(m, axis1=1, axis2=2).round(4) / settings.width
        return [
            {"arm": arm, "qk": qk[a, 0].tolist(), "vo": vo[a, 0].tolist()}
            | {"qk diagonal": diagonal(qk[a]).tolist(), "vo diagonal": diagonal(vo[a]).tolist()}
            for a, arm in enumerate(ARMS)
        ]

    def step(i, state):
        rows = rows_of(state) if i == 0 else []
        state, *measured = epochs(seeds, i, state)
        loss, test = (np.asarray(m, np.float64).round(5) for m in measured)
        for a, arm in enumerate(ARMS):
            row: Row = {"epoch": i + 1, "arm": arm}
            rows.append(row | {"loss": loss[a].tolist(), "test": test[a].tolist()})
        return state, rows + (rows_of(state) if i + 1 == settings.epochs else [])

    return Run(jax.jit(begin), step, settings.epochs, f"{data.name} {fingerprint(data)}")


# ----------------------------------------------------------------------------- what it shows


class Arm(NamedTuple):
    """One start: (epochs, seeds) loss and test accuracy, (seeds,) diagonals at start and end."""

    loss: np.ndarray
    test: np.ndarray
    qk: np.ndarray
    vo: np.ndarray


def arms(rows: list[Row]) -> dict[str, Arm]:
    """Gather the rows by start."""
    out = {}
    for name in ARMS:
        own = [row for row in rows if row["arm"] == name]
        curves = ([row[key] for row in own if "epoch" in row] for key in ("loss", "test"))
        ends = ([row[key] for row in own if key in row] for key in ("qk diagonal", "vo diagonal"))
        out[name] = Arm(*map(np.array, curves), *map(np.array, ends))
    return out


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare the two starts with the statements of the paper."""
    found = arms(rows)
    usual, mimetic = found[USUAL], found[MIMETIC]

    def accuracy(after: int) -> tuple[str, bool]:
        pair = usual.test[after - 1], mimetic.test[after - 1]
        wins = int((pair[1] > pair[0]).sum())
        gain = pair[1].mean() - pair[0].mean()
        text = f"{percent(pair[1].mean())} and {percent(pair[0].mean())}: {100 * gain:+.1f} points"
        return f"{text}, ahead with {wins} of {settings.seeds} seeds", bool(gain > 0)

    early, last = accuracy(settings.early), accuracy(settings.epochs)
    lower = mimetic.loss < usual.loss
    first = lambda d: f"from {d[0].mean():.3f} to {d[-1].mean():.3f}"
    return [
        Claim(
            f"After {settings.early} epochs the mimetic start is ahead of the usual one",
            "a higher test accuracy, mean over the seeds",
            early[0],
            early[1],
        ),
        Claim(
            f"After {settings.epochs} epochs it still is",
            "a higher test accuracy, mean over the seeds (5 points on CIFAR-10)",
            last[0],
            last[1],
        ),
        Claim(
            "It learns faster: its training loss is the lower one",
            "in every epoch, mean over the seeds",
            f"in {int((mimetic.loss.mean(1) < usual.loss.mean(1)).sum())} of {settings.epochs} "
            f"epochs; in {percent(lower.mean())} of all pairs of epochs",
            bool((mimetic.loss.mean(1) < usual.loss.mean(1)).all()),
        ),
        Claim(
            "Training brings the usual start to where the mimetic one is: the diagonal of "
            "W_Q W_K^T is positive then, that of W_V W_O negative",
            "a tenth of the mimetic start's or more (in the paper, large models trained for long)",
            f"W_Q W_K^T {first(usual.qk)}, mimetic {mimetic.qk[0].mean():.2f}; "
            f"W_V W_O {first(usual.vo)}, mimetic {mimetic.vo[0].mean():.2f}",
            bool(
                usual.qk[-1].mean() > 0.1 * mimetic.qk[0].mean()
                and usual.vo[-1].mean() < 0.1 * mimetic.vo[0].mean()
            ),
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw learning curves, and the products of the weights at the start and at the end."""
    found = arms(rows)
    figure = Figure(figsize=(11.5, 5.0), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    left, right = halves
    a, b = left.subplots(2, 1, sharex=True)
    for (name, arm), color in zip(found.items(), (figures.RED, figures.BLUE), strict=True):
        epochs = 1 + np.arange(len(arm.loss))
        figures.band(a, epochs, 100 * arm.test, color, name)
        figures.band(b, epochs, arm.loss, color, name)
    a.set(title="a  It is ahead early", ylabel="test accuracy (%)")
    a.legend(loc="lower right")
    b.set(title="b  Training loss", xlabel="epoch", ylabel="loss (nats)", yscale="log")

    panels = right.subplots(2, 4)
    for row, (key, label) in enumerate((("qk", "$W_Q W_K^T$"), ("vo", "$W_V W_O$"))):
        shown = [(arm, when) for arm in ARMS for when in (0, -1)]
        for axes, (arm, when) in zip(panels[row], shown, strict=True):
            matrix = np.array([r[key] for r in rows if r["arm"] == arm and key in r][when])
            axes.imshow(matrix, cmap="RdBu_r", vmin=-0.8, vmax=0.8)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            if row == 0:
                moment = "after training" if when else "before"
                axes.set_title(f"{arm},\n{moment}", fontsize=8.5, loc="center")
        panels[row][0].set_ylabel(label)
    right.suptitle(
        "c  The products of the weights (layer 1; blue is negative, red positive)",
        fontsize=10.5,
        fontweight="bold",
        x=0.02,
        ha="left",
    )
    figure.supxlabel(figures.note(settings.seeds), fontsize=8.5, color="#555")
    return figure
