"""What a step of SOAP, of Fira and of DP-SGD costs, beside other packages.

SOAP and Fira update the leaves of a small Transformer, in jaxkit and in pytorch_optimizer; an
update that renews the bases is timed apart, and spread over the updates between two of them. The
clipped sum of DP-SGD is that of a multilayer perceptron, in jaxkit and by
``optax.contrib.differentially_private_aggregate`` of gradients example by example.

All are measured in turn, in rounds; the time of the processors is measured as well. Each library
has a process of its own, with equally many processors, so that the threads of one do not wait for
those of the other. On a machine that does other things too, torch's threads wait for each other
for long, and the median round flatters jaxkit: each library's fastest round decides.
pytorch_optimizer (and torch) are not part of jaxkit: where they are missing, jaxkit is measured
alone.

JAX's decompositions are OpenBLAS's, whose threads wait for each other actively: with several, a
busy machine can make them slower manyfold. They get ``lapack_threads`` (``OPENBLAS_NUM_THREADS``).
"""

import importlib.util
import itertools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments import Claim, Row, Run, figures, perceptron
from experiments.clock import timed
from jaxkit import optim

OURS, THEIRS, OPTAX = "jaxkit", "pytorch_optimizer", "optax"
CYCLE = 5  # updates between two renewals as they are measured
CLIP = 1.0


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    width: int = 512
    """The width of the Transformer."""
    layers: int = 2
    """Its layers: four matrices of (width, width) each, and two of (width, 4 width)."""
    soap_every: int = 10
    """SOAP's updates between two renewals of the bases."""
    fira_every: int = 200
    """Fira's updates between two projections."""
    rank: int = 128
    """The rank of Fira's projection."""
    hidden: int = 512
    """Units of the perceptron's three hidden layers: 512 make about a million parameters."""
    batch: int = 256
    """Examples of a lot."""
    threads: int = 2
    """Processors of each library."""
    lapack_threads: int = 1
    """Those of JAX's decompositions."""
    rounds: int = 12
    """How often each is measured."""
    seed: int = 0
    """The seed."""


def run(settings: Settings, folder: Path | None) -> Run:
    """Measure each optimizer once a step, in an order that turns round."""
    calls = {OURS: worker(settings, settings.lapack_threads)}
    if importlib.util.find_spec("pytorch_optimizer") and importlib.util.find_spec("torch"):
        calls[THEIRS] = worker(settings, settings.threads)

    def step(i, state):
        rows = []
        for what in ("SOAP", "Fira"):
            for library in list(calls)[:: 1 if i % 2 else -1]:
                found = calls[library].submit(cycle, library, what, settings).result()
                rows.append({"round": i, "what": what, "library": library} | found)
        found = calls[OURS].submit(private, settings).result()
        rows += [{"round": i, "what": "DP-SGD"} | row for row in found]
        return state, rows

    return Run(lambda: jnp.zeros(()), step, settings.rounds)


def worker(settings: Settings, lapack_threads: int) -> ProcessPoolExecutor:
    """Return a process of its own, started, with its number of threads."""
    names = {"OMP_NUM_THREADS": settings.threads, "OPENBLAS_NUM_THREADS": lapack_threads}
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(1, spawn, initializer=confine, initargs=(settings.threads,))
    with mock.patch.dict(os.environ, {name: str(n) for name, n in names.items()}):
        executor.submit(confine, settings.threads).result()
    return executor


def confine(threads: int) -> None:
    """Leave this process the first processors that it has, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


# --------------------------------------------------------------------------------- SOAP and Fira


def leaves(settings: Settings) -> list[list[np.ndarray]]:
    """Return the params of the Transformer, and a few gradients."""
    rng, d = np.random.default_rng(settings.seed), settings.width
    layer = [(d, d)] * 4 + [(d, 4 * d), (4 * d, d), (4 * d,)] + [(d,)] * 5
    draw = lambda: [rng.standard_normal(shape, np.float32) for shape in layer * settings.layers]
    return [draw() for _ in range(3)]


def cycle(library: str, what: str, settings: Settings) -> Row:
    """Return the seconds of an update, and of one that renews the bases."""
    call = (ours if library == OURS else theirs)(what, settings)
    *plain, renewal = [timed(call) for _ in range(CYCLE)]
    seconds, cpu = np.mean(plain, axis=0)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "renewal seconds": renewal[0],
        "renewal cpu": renewal[1],
    }


@cache
def ours(what: str, settings: Settings) -> Callable[[], Any]:
    """Return an update by jaxkit; the next renewal is `CYCLE` updates away."""
    soap, fira = optim.soap(every=CYCLE), optim.fira(rank=settings.rank, every=CYCLE)
    tx = soap if what == "SOAP" else fira
    params, *grads = jax.tree.map(jnp.asarray, leaves(settings))
    turn = itertools.cycle(grads)

    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    update = jax.jit(update, donate_argnums=(0, 1))
    at = [(params, tx.init(params))]

    def call():
        at[0] = update(*at[0], next(turn))
        return at[0]

    for _ in range(1 + CYCLE):  # SOAP looks at one gradient first
        jax.block_until_ready(call())
    return call


@cache
def theirs(what: str, settings: Settings) -> Callable[[], Any]:
    """Return an update by pytorch_optimizer; the next renewal is `CYCLE` updates away."""
    import pytorch_optimizer  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(settings.threads)
    start, *grads = [[torch.tensor(x) for x in tensors] for tensors in leaves(settings)]
    params, turn = [torch.nn.Parameter(x) for x in start], itertools.cycle(grads)
    if what == "SOAP":
        tx = pytorch_optimizer.SOAP(params, precondition_frequency=CYCLE)
    else:
        low = {"rank": settings.rank, "update_proj_gap": CYCLE, "scale": 1.0}
        low |= {"projection_type": "std", "params": [p for p in params if p.dim() == 2]}
        tx = pytorch_optimizer.Fira([low, {"params": [p for p in params if p.dim() < 2]}])

    def call():
        for p, g in zip(params, next(turn), strict=True):
            p.grad = g
        tx.step()

    for _ in range(CYCLE + (what == "SOAP")):  # its Fira counts from one
        call()
    return call


# ----------------------------------------------------------------------------------------- DP-SGD


@cache
def sums(settings: Settings) -> tuple[dict[str, Callable[[], Any]], list[Row], float]:
    """Return the clipped sums by library, what memory they take, and how far they are apart."""
    key = jax.random.key(settings.seed)
    sizes = [784, *[settings.hidden] * 3, 10]
    params = perceptron.init(key, sizes)
    x = jax.random.normal(key, (settings.batch, sizes[0]))
    batch = x, jax.random.randint(key, (settings.batch,), 0, sizes[-1])

    def loss_fn(params, example):
        x, label = example
        out = perceptron.forward(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(out, label)

    aggregate = optax.contrib.differentially_private_aggregate(CLIP, 0.0, key=key)

    def by_optax(params, batch):
        grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch)
        return aggregate.update(grads, aggregate.init(params))[0]

    def by_jaxkit(params, batch):
        options = {"clip": CLIP, "noise_multiplier": 0.0, "lot_size": settings.batch}
        return optim.dp_gradient(key, loss_fn, params, batch, **options)

    calls, memory = {}, []
    for library, fn in ((OURS, by_jaxkit), (OPTAX, by_optax)):
        program = jax.jit(fn).lower(params, batch).compile()
        calls[library] = lambda program=program: program(params, batch)
        memory.append({"library": library, "bytes": temporary(program)})
    a, b = (calls[library]() for library in (OURS, OPTAX))
    gap = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), a, b)))
    return calls, memory, gap / max(float(jnp.abs(g).max()) for g in jax.tree.leaves(b))


def temporary(program: Any) -> int:
    """Return the bytes that a compiled program needs besides its arguments and results."""
    return program.memory_analysis().temp_size_in_bytes


def private(settings: Settings) -> list[Row]:
    """Return the seconds and the memory of each clipped sum, and how far they are apart."""
    calls, memory, gap = sums(settings)
    rows = []
    for row in memory:
        seconds, cpu = timed(calls[row["library"]])
        rows.append(row | {"seconds": seconds, "cpu": cpu, "difference": gap})
    return rows


# ------------------------------------------------------------------------------------- the findings


def column(rows: list[Row], what: str, library: str, value: str) -> np.ndarray:
    """Return a value of every round."""
    want = {"what": what, "library": library}
    return np.array([row[value] for row in rows if want.items() <= row.items()])


def spread_out(settings: Settings, rows: list[Row], what: str, library: str, value: str):
    """Return the mean cost of an update of every round, renewals included."""
    every = {"SOAP": settings.soap_every, "Fira": settings.fira_every}[what]
    plain = column(rows, what, library, value)
    return plain + (column(rows, what, library, f"renewal {value}") - plain) / every


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare the costs with those of the other packages, if they were there."""
    there = column(rows, "SOAP", THEIRS, "seconds").size > 0
    leaf = f"matrices of {settings.width} x {settings.width} and {settings.width} x "
    size = f"{leaf}{4 * settings.width}, {settings.threads} threads"

    def at_most(statement, cost) -> Claim:
        if not there:
            measured = "not measured: there was no pytorch_optimizer"
            return Claim(statement, "at most its time", measured, False)
        ratio = cost(OURS, "seconds") / cost(THEIRS, "seconds")
        best = float(cost(OURS, "seconds").min() / cost(THEIRS, "seconds").min())
        cpu = cost(OURS, "cpu").min() / cost(THEIRS, "cpu").min()
        measured = (
            f"{best:.2f} times in the fastest rounds ({cpu:.2f} times by the processors' time); "
            f"{np.median(ratio):.2f} times in the median round, from {ratio.min():.2f} to "
            f"{ratio.max():.2f}"
        )
        return Claim(statement, "at most its time", measured, best <= 1)

    out = []
    for what, every in (("SOAP", settings.soap_every), ("Fira", settings.fira_every)):
        out += [
            at_most(
                f"An update of {what} takes no longer than pytorch_optimizer's, the bases renewed "
                f"every {every} ({size})",
                lambda *which, what=what: spread_out(settings, rows, what, *which),
            ),
            at_most(
                f"An update of {what} that renews the bases takes no longer either",
                lambda library, value, what=what: column(rows, what, library, f"renewal {value}"),
            ),
        ]
    ratio = column(rows, "DP-SGD", OPTAX, "seconds") / column(rows, "DP-SGD", OURS, "seconds")
    space = column(rows, "DP-SGD", OPTAX, "bytes") / column(rows, "DP-SGD", OURS, "bytes")
    gap = column(rows, "DP-SGD", OURS, "difference").max()
    faster, smaller = float(np.median(ratio)), float(np.median(space))
    return [
        *out,
        Claim(
            "A clipped sum is cheaper than by gradients example by example (perceptron of "
            f"{settings.hidden} units, batch {settings.batch})",
            "half the time, or half the memory",
            f"{faster:.1f} times as fast (rounds from {ratio.min():.1f} to {ratio.max():.1f}), "
            f"in a part of 1/{smaller:.0f} of the memory",
            faster >= 2 or smaller >= 2,
        ),
        Claim("Both sums are equal", "to 0.00001 of the largest", f"{gap:.1e}", bool(gap < 1e-5)),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw the median costs of all."""
    figure, axes = figures.panels(1, 3, (12, 2.6))
    for panel, what, title in zip(
        axes, ("SOAP", "Fira", "DP-SGD"), ("a  SOAP", "b  Fira", "c  DP-SGD"), strict=True
    ):
        labels, values, colors = [], [], []
        for library in (THEIRS, OPTAX, OURS):
            plain = column(rows, what, library, "seconds")
            if not plain.size:
                continue
            found = {"": plain}
            if what != "DP-SGD":
                renewal = column(rows, what, library, "renewal seconds")
                whole = spread_out(settings, rows, what, library, "seconds")
                found = {", on average": whole, ", plain": plain, ", renewal": renewal}
            labels += [library + name for name in found]
            values += [1e3 * float(np.median(seconds)) for seconds in found.values()]
            colors += [figures.BLUE if library == OURS else figures.GREY] * len(found)
        panel.bar_label(panel.barh(labels, values, color=colors, height=0.6), fmt="%.0f", padding=4)
        panel.invert_yaxis()
        panel.grid(axis="y", visible=False)
        panel.margins(x=0.14)
        panel.set(title=title, xlabel="milliseconds (median)")
    return figure
