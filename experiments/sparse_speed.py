"""What sparsity is worth in time: formats against the dense product, and smaller networks.

A matrix with zeros, multiplied by a batch, in the formats of ``jaxkit.masks``: entries (BCOO, BCSR
of ``jax.experimental.sparse``), blocks, N:M, and with whole units removed. And two networks, whose
units ``masks.shrink`` removes. Every variant is measured in turn, in one process, and the fastest
tenth of the rounds decides, so that the ratios hold on a machine that does other things too. Where
a format is faster than the dense product depends on the machine: the crossover is read off what was
measured.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import Claim, Row, Run, figures
from experiments.clock import timed
from jaxkit import masks, trace

COLORS = {
    "BCOO": figures.RED,
    "BCSR": figures.ORANGE,
    "blocks": figures.BLUE,
    "N:M": figures.PURPLE,
    "units removed": figures.GREEN,
}


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    width: int = 1024
    """Inputs and outputs of the matrix."""
    batch: int = 64
    """Rows that are multiplied by it."""
    block: int = 32
    """The side of a block."""
    hidden: int = 1024
    """Units of each hidden layer of the perceptron."""
    channels: int = 64
    """Channels of the convolutional network."""
    sparsities: tuple[float, ...] = (0.5, 0.75, 0.875, 0.9375, 0.96875, 0.984375, 0.9921875)
    """The fractions of zeros of the matrix; those below 0.9 also of the networks' units."""
    rounds: int = 40
    """How often each variant is measured; the fastest tenth counts."""
    seed: int = 0
    """The seed."""


def run(settings: Settings, folder: Path | None) -> Run:
    """Measure each variant once a step."""
    key = jax.random.key(settings.seed)
    variants = products(key, settings) | networks(key, settings)

    def step(i, state):
        return state, [
            {
                "round": i,
                "what": what,
                "variant": name,
                "sparsity": sparsity,
                "seconds": timed(call)[0],
                "bytes": size,
            }
            for (what, name, sparsity), (call, size) in variants.items()
        ]

    return Run(lambda: jnp.zeros(()), step, settings.rounds)


def nbytes(packed: Any) -> int:
    """Return the memory of all arrays in a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(packed))


def products(key, settings: Settings):
    """Return the products of a batch and a matrix in every format, warmed up and right."""
    n = settings.width
    w = jax.random.normal(key, (n, n)) / n**0.5
    x = jax.random.normal(jax.random.fold_in(key, 1), (settings.batch, n))
    scores = {"kernel": jnp.abs(w)}
    dense = jax.jit(lambda x, w: x @ w)
    by_matrix = jax.jit(lambda x, m: (m @ x.T).T)
    packed_product = jax.jit(masks.sparse_matmul)
    out = {("product", "dense", 0.0): (partial(dense, x, w), w.nbytes)}

    def add(name, sparsity, fn, matrix, mask):
        want = x @ jnp.where(mask, w, 0)
        got = fn(x, matrix)
        if not jnp.abs(got - want).max() <= 1e-5 * jnp.abs(want).max():
            raise ValueError(f"{name} at {sparsity} does not compute the masked product")
        out["product", name, sparsity] = (partial(fn, x, matrix), nbytes(matrix))

    for s in settings.sparsities:
        mask = masks.topk(scores, sparsity=s)["kernel"]
        add("BCOO", s, dense, masks.to_bcoo(w, mask), mask)
        add("BCSR", s, by_matrix, masks.to_bcsr(w.T, mask.T), mask)
        side = settings.block
        mask = masks.blocks(scores, {-2: side, -1: side}, sparsity=s)["kernel"]
        add("blocks", s, packed_product, masks.pack_blocks(w, mask, (side, side)), mask)
        mask = masks.topk({"unit": jnp.linalg.norm(w, axis=0)}, sparsity=s, where="unit")["unit"]
        small = w[:, np.flatnonzero(mask)]
        out["product", "units removed", s] = (partial(dense, x, small), small.nbytes)
        jax.block_until_ready(dense(x, small))
    for kept, group in ((2, 4), (1, 4), (1, 8)):
        mask = masks.n_of_m(scores, kept, group)["kernel"]
        packed = masks.pack_n_of_m(w, mask, kept, group)
        add("N:M", 1 - kept / group, packed_product, packed, mask)
    return out


def networks(key, settings: Settings):
    """Return two networks, masked and shrunk, warmed up and agreeing."""
    draw = jax.nn.initializers.he_normal()
    own = iter(jax.random.split(key, 16))
    sizes = [784, settings.hidden, settings.hidden, settings.hidden, 10]
    perceptron = {f"layer_{i}": draw(next(own), size) for i, size in enumerate(pairwise(sizes))}
    c = settings.channels
    channels = [3, c, c, 2 * c, 2 * c]
    network = {
        f"layer_{i}": draw(next(own), (3, 3, *size)) for i, size in enumerate(pairwise(channels))
    } | {"head": draw(next(own), (2 * c, 10))}

    def dense(params, x):
        for i in range(len(params)):
            x = (jax.nn.relu(x) if i else x) @ params[f"layer_{i}"]
        return x

    def convolutions(params, x):
        for i in range(len(params) - 1):
            stride = (2, 2) if i % 2 else (1, 1)
            numbers = ("NHWC", "HWIO", "NHWC")
            kernel = params[f"layer_{i}"]
            x = jax.lax.conv_general_dilated(x, kernel, stride, "SAME", dimension_numbers=numbers)
            x = jax.nn.relu(x)
        return x.sum((1, 2)) @ params["head"]

    flat = jax.random.normal(next(own), (settings.batch, 784))
    images = jax.random.normal(next(own), (max(1, settings.batch // 8), 32, 32, 3))
    out = {}
    for name, fn, params, x in (
        ("perceptron", dense, perceptron, flat),
        ("convolutional network", convolutions, network, images),
    ):
        axes = trace.axes(fn, params, x)
        scores = {a.name: jax.random.uniform(key, (a.size,)) for a in trace.named(axes).values()}
        call = jax.jit(fn)
        for s in (0.0, *(s for s in settings.sparsities if s < 0.9)):
            layers = dict.fromkeys(scores, s)
            units = masks.topk(scores, sparsity=layers, where="**")
            masked = masks.apply(params, masks.units(params, units, axes))
            small, _, _ = masks.shrink(params, units, axes)
            want, got = call(masked, x), call(small, x)
            if not jnp.abs(got - want).max() <= 1e-4 * jnp.abs(want).max():
                raise ValueError(f"the shrunk {name} does not compute what the masked one does")
            out[name, "masked", s] = (partial(call, masked, x), nbytes(masked))
            out[name, "shrunk", s] = (partial(call, small, x), nbytes(small))
    return out


# ------------------------------------------------------------------------------------- the findings


def table(rows: list[Row], value: str = "seconds") -> dict[tuple[str, str], dict[float, float]]:
    """Return a value by what and variant, then by sparsity: one that a tenth of the rounds reach.

    (That is a time in which hardly anything else was going on; the very least may be a fluke.)
    """
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for row in rows:
        here = found.setdefault((row["what"], row["variant"]), {})
        here.setdefault(row["sparsity"], []).append(row[value])
    low = lambda values: float(np.quantile(values, 0.1))
    return {name: {s: low(v) for s, v in here.items()} for name, here in found.items()}


def crossover(times: dict[float, float], dense: float) -> float | None:
    """Return the sparsity from which on a format is faster than the dense product.

    It is interpolated in the logarithms of density and time; None where it never is. Only the last
    stretch counts: from there on every measured sparsity is faster.

    >>> crossover({0.5: 4.0, 0.75: 1.0, 0.875: 0.5}, 2.0)
    0.6464466094067263
    >>> crossover({0.5: 4.0, 0.75: 3.0}, 2.0) is None
    True
    """
    points = sorted(times.items(), reverse=True)
    if points[0][1] > dense:
        return None
    for (high, fast), (low, slow) in pairwise(points):
        if slow > dense:
            part = np.log(dense / fast) / np.log(slow / fast)
            return float(1 - (1 - high) * ((1 - low) / (1 - high)) ** part)
    return points[-1][0]


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Say from where on each format pays, and what it is worth to remove units."""
    times = table(rows)
    dense = times["product", "dense"][0.0]
    at = {name: crossover(times["product", name], dense) for name in COLORS}

    def percent(s):
        if s is None:
            return "nowhere"
        least = " (the least that was measured)" if s == min(settings.sparsities) else ""
        return f"from {figures.percent(s)} on{least}"

    # masked, a network costs the same at every sparsity
    gain = lambda name: min(times[name, "masked"].values()) / times[name, "shrunk"][0.5]
    slower = times["product", "N:M"][0.5] / dense
    pays = lambda name, sparsity: (s := at[name]) is not None and s <= sparsity
    size = f"{settings.width} x {settings.width}, batch {settings.batch}"
    return [
        *(
            Claim(
                f"{what} are faster than dense ({size})",
                "from 90% on at the latest",
                percent(at[name]),
                pays(name, 0.9),
            )
            for name, what in (
                ("blocks", f"Blocks of {settings.block} x {settings.block}"),
                ("BCSR", "Rows of single entries (BCSR)"),
            )
        ),
        Claim(
            f"A list of single entries (BCOO) is not worth it below 95% zeros ({size})",
            "slower than dense at 95%",
            percent(at["BCOO"]),
            not pays("BCOO", 0.95),
        ),
        Claim(
            "2:4 saves memory, not time, without instructions for it",
            "no faster than dense",
            f"{slower:.2f} times the dense time",
            slower >= 1,
        ),
        *(
            Claim(
                f"Half the units of every hidden layer removed: the {name} is faster",
                "at least 1.5 times",
                f"{gain(name):.2f} times",
                gain(name) >= 1.5,
            )
            for name in ("perceptron", "convolutional network")
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw the times of the formats, their memory, and the times of the networks."""
    times, sizes = table(rows), table(rows, "bytes")
    figure, (a, b, c) = figures.panels(1, 3, (12.5, 3.9))
    for panel, values, label in ((a, times, "time"), (b, sizes, "memory")):
        dense = values["product", "dense"][0.0]
        for name, color in COLORS.items():
            points = sorted(values["product", name].items())
            density = [1 - s for s, _ in points]
            style = "o:" if name == "units removed" else "o-"  # over blocks, whose memory is equal
            panel.plot(
                density, [v / dense for _, v in points], style, ms=4, color=color, label=name
            )
        panel.axhline(1, color=figures.GREY, linestyle="--", label="dense")
        panel.set(xscale="log", yscale="log", xlabel="entries that are not zero")
        panel.set_ylabel(f"{label}, of the dense product's" if panel is a else f"{label}, of dense")
        panel.set_xticks([1 - s for s in settings.sparsities])
        panel.set_xticklabels([f"{100 * (1 - s):.3g}%" for s in settings.sparsities], fontsize=8)
        panel.minorticks_off()
        panel.invert_xaxis()
    a.set_title(f"a  One product, {settings.width} x {settings.width}, batch {settings.batch}")
    b.set_title("b  Memory of the matrix")
    a.legend(fontsize=8, loc="upper right")
    for name, color in (("perceptron", figures.BLUE), ("convolutional network", figures.GREEN)):
        for variant, style in (("masked", "--"), ("shrunk", "-")):
            points = sorted(times[name, variant].items())
            full = min(times[name, "masked"].values())
            c.plot(
                [1 - s for s, _ in points],
                [v / full for _, v in points],
                "o" + style,
                ms=4,
                color=color,
                label=f"{name}, {variant}",
            )
    c.set(ylim=(0, None), xlabel="units left in every hidden layer", ylabel="time, of all units'")
    c.invert_xaxis()
    c.set_title("c  Networks without some of their units")
    c.legend(fontsize=8, handlelength=4)
    return figure
