"""What exact ranks, sparse training and reading a model's axes cost.

The k-th largest of many entries by bisection on their bits, against concatenating and sorting them;
a train step of a multilayer perceptron under jaxkit's sparse transformations, against the same step
dense; and the axes of an unrolled Transformer. All variants are measured in turn, in one process,
so that the ratios hold on a machine that does other things too; the times themselves are of this
machine.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments import Claim, Row, Run, figures, perceptron
from experiments.clock import timed
from jaxkit import masks, trace, tree


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    entries: int = 20_000_000
    """Entries to rank, in five leaves."""
    width: int = 2048
    """Units of the hidden layers: 2048 give 10 million parameters."""
    batch: int = 256
    """Examples of a train step."""
    every: int = 100
    """Steps between two changes of the mask."""
    layers: int = 48
    """Layers of the Transformer whose axes are read."""
    rounds: int = 12
    """How often each variant is measured; the median counts."""
    seed: int = 0
    """The seed."""


def run(settings: Settings, folder: Path | None) -> Run:
    """Measure each variant once a step."""
    key = jax.random.key(settings.seed)
    variants = ranks(key, settings) | training(key, settings) | tracing(settings)

    def step(i, state):
        return state, [
            {"round": i, "what": what, "variant": name, "seconds": timed(call)[0]}
            for (what, name), call in variants.items()
        ]

    return Run(lambda: jnp.zeros(()), step, settings.rounds)


def ranks(key, settings: Settings):
    """Return the variants that find the k-th largest entry, warmed up and agreeing."""
    side = round((settings.entries / 5) ** 0.5)
    leaves = [jax.random.normal(jax.random.fold_in(key, i), (side, side)) for i in range(5)]
    k = 5 * side * side // 10
    bisect = jax.jit(lambda leaves: tree.kth_largest(leaves, k))
    mask = jax.jit(lambda leaves: tree.topk(leaves, k))
    sort = jax.jit(lambda leaves: jnp.sort(jnp.concatenate([x.ravel() for x in leaves]))[-k])
    if bisect(leaves) != sort(leaves):
        raise ValueError("the k-th largest by bisection is not that of the sort")
    jax.block_until_ready(mask(leaves))
    return {
        ("rank", "sort"): partial(sort, leaves),
        ("rank", "kth_largest"): partial(bisect, leaves),
        ("rank", "topk"): partial(mask, leaves),
    }


def training(key, settings: Settings):
    """Return a train step of a multilayer perceptron under each transformation, warmed up."""
    sizes = [512, settings.width, settings.width, settings.width, 10]
    params = perceptron.init(key, sizes)
    x = jax.random.normal(key, (settings.batch, sizes[0]))
    y = jax.random.randint(key, (settings.batch,), 0, sizes[-1])

    def loss_fn(params):
        out = perceptron.forward(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()

    adam = optax.adamw(1e-3)
    mask = masks.topk(masks.random(key, params), sparsity=masks.erk(params, 0.9))
    out = {}
    for name, tx in {
        "dense": adam,
        "hold": optax.chain(adam, masks.hold(mask)),
        "sparse": masks.sparse(adam, mask),
        "rigl, no change": masks.rigl(adam, mask, every=10**9, end=10**9),
        "rigl, a change": masks.rigl(adam, mask, every=1, end=10**9),
        "rigl, a change by sorting": masks.sparse(adam, mask, update=by_sorting),
    }.items():

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, tx=tx):
            updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
            return optax.apply_updates(params, updates), state

        own = jax.tree.map(jnp.copy, params)
        at = [step(own, tx.init(own))]

        def call(at=at, step=step):
            at[0] = step(*at[0])
            return at[0]

        call()
        out["train", name] = call
    return out


def by_sorting(key, mask, params, grads, step):
    """Move three tenths of a leaf's live entries by sorting its scores, as jaxpruner does."""

    def first(scores, count):
        order = jnp.argsort(-scores.ravel())
        place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
        return (place < count).reshape(scores.shape)

    def change(path, w, m, g):
        moved = jnp.round(0.3 * m.sum()).astype(int)
        kept = first(jnp.where(m, jnp.abs(w), -1), m.sum() - moved)
        return kept | first(jnp.where(kept, -1, jnp.abs(g)), moved)

    chosen = tree.select(params)
    new = tree.map(change, params, mask, grads)
    return jax.tree.map(lambda bit, n, m: n if bit else m, chosen, new, mask)


def tracing(settings: Settings):
    """Return what reads the axes of a Transformer, and what traces it."""
    d, heads, size, hidden = 64, 4, 16, 256
    shapes = {
        "query": (d, heads, size),
        "key": (d, heads, size),
        "value": (d, heads, size),
        "out": (heads, size, d),
        "up": (d, hidden),
        "down": (hidden, d),
    }
    layer = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    params = [layer] * settings.layers

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)

    def apply_fn(params, x):
        for p in params:
            y = norm(x)
            q, k, v = (jnp.einsum("td,dhs->ths", y, p[name]) for name in ("query", "key", "value"))
            weights = jax.nn.softmax(jnp.einsum("ths,uhs->htu", q, k) / 4)
            x = x + jnp.einsum("htu,uhs,hsd->td", weights, v, p["out"])
            x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
        return x

    x = jax.ShapeDtypeStruct((8, d), jnp.float32)
    found = trace.named(trace.axes(apply_fn, params, x))
    if (
        len(found) != 4 * settings.layers
    ):  # heads, query and key, value, hidden; the output is fixed
        raise ValueError(f"{len(found)} axes were found in {settings.layers} layers of 4")
    unseen = lambda: lambda params, x: apply_fn(params, x)  # JAX remembers the functions it traced
    return {
        ("trace", "make_jaxpr"): lambda: jax.make_jaxpr(unseen())(params, x) and None,
        ("trace", "axes"): lambda: trace.axes(unseen(), params, x) and None,
    }


def medians(rows: list[Row]) -> dict[tuple[str, str], float]:
    """Return the median seconds of every variant."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["what"], row["variant"]), []).append(row["seconds"])
    return {name: float(np.median(values)) for name, values in found.items()}


def overheads(settings: Settings, rows: list[Row]) -> dict[str, float]:
    """Return what each transformation adds to a dense step, as a part of it."""
    time_of = {name: s for (what, name), s in medians(rows).items() if what == "train"}
    dense, still = time_of["dense"], time_of["rigl, no change"]
    rigl = still + (time_of["rigl, a change"] - still) / settings.every
    times = {"hold": time_of["hold"], "sparse": time_of["sparse"], "rigl": rigl}
    return {name: s / dense - 1 for name, s in times.items()}


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare the ratios with what jaxkit promises."""
    time_of, extra = medians(rows), overheads(settings, rows)
    ratio = time_of["rank", "sort"] / time_of["rank", "kth_largest"]
    whole = time_of["rank", "sort"] / time_of["rank", "topk"]
    entries = f"{settings.entries / 1e6:g} million entries"
    still = time_of["train", "rigl, no change"]
    own, other = (
        time_of["train", name] - still for name in ("rigl, a change", "rigl, a change by sorting")
    )
    axes = time_of["trace", "axes"]
    return [
        Claim(
            f"The axes of an unrolled Transformer of {settings.layers} layers are read in seconds",
            "less than 5 s",
            f"{axes:.2f} s, {time_of['trace', 'make_jaxpr']:.2f} s of it for its jaxpr",
            axes < 5,
        ),
        Claim(
            f"The exact k-th largest of {entries} is found faster than by a sort",
            "at least 5 times",
            f"{ratio:.1f} times",
            ratio >= 5,
        ),
        Claim(
            f"The mask of the k largest of {entries} is made faster than a sort alone",
            "at least 5 times",
            f"{whole:.1f} times",
            whole >= 5,
        ),
        Claim(
            "The mask is changed faster than by sorting every leaf, the algorithm of jaxpruner",
            "at least twice as fast",
            f"{other / own:.1f} times" if own > 0 else f"{own:.3f} s against {other:.3f} s",
            other > 2 * own,
        ),
        *(
            Claim(
                f"{name} adds little to a train step at batch {settings.batch}",
                f"less than {100 * most:.0f} %",
                f"{100 * extra[name]:+.1f} %",
                extra[name] < most,
            )
            for name, most in {"hold": 0.05, "sparse": 0.1, "rigl": 0.1}.items()
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw the median times of all variants."""
    time_of = medians(rows)
    figure, axes = figures.panels(1, 3, (12, 3.2))
    titles = {
        "rank": f"a  Ranking {settings.entries / 1e6:g} million entries",
        "train": f"b  One train step, batch {settings.batch}",
        "trace": f"c  A Transformer of {settings.layers} layers",
    }
    for panel, (what, title) in zip(axes, titles.items(), strict=True):
        names = [name for kind, name in time_of if kind == what]
        values = [1e3 * time_of[what, name] for name in names]
        colors = [figures.GREY, *[figures.BLUE] * (len(names) - 1)]
        panel.bar_label(panel.barh(names, values, color=colors, height=0.6), fmt="%.0f", padding=4)
        panel.invert_yaxis()
        panel.grid(axis="y", visible=False)
        panel.margins(x=0.12)
        panel.set(title=title, xlabel="milliseconds (median)")
    return figure
