"""How long to train before pruning depends on how much is pruned.

"A Three-regime Model of Network Pruning" trains a network at several temperatures (shorter training
is hotter), prunes it by magnitude to several densities (its load), and trains the pruned network
again, twice, with the data in two orders. How the two networks lie to each other, by linear mode
connectivity and by the similarity of their outputs (CKA), separates three regimes, and between them
the effect of temperature changes its sign: depending on the load, a hotter training before
pruning enhances or impairs the pruned network.

Here a multilayer perceptron 64-128-64-10 is trained with Adam on digits; one dense run is stopped
at several steps, as in the paper's sweep over epochs, and pruned to every density. Nothing of the
three regimes is to be expected at this size: the longest training is the best for every density,
and the two networks always lie in one basin. The same measure does find the barrier between
networks pruned from different dense ones, which is drawn beside them.

Yefan Zhou, Yaoqing Yang, Arin Chang, Michael W. Mahoney, arXiv 2305.18383.
"""

from dataclasses import dataclass
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
from jaxkit import masks, probes


@dataclass(frozen=True)
class Settings:
    """What is trained, pruned and trained again, and on what."""

    train: int = 1400
    """Images to train on."""
    test: int = 397
    """Images to test on."""
    seeds: int = 4
    """Dense networks, each pruned to every density."""
    hidden: tuple[int, ...] = (128, 64)
    """Units in the hidden layers."""
    dense_steps: tuple[int, ...] = (25, 50, 100, 200, 400, 800)
    """Adam steps before pruning: the temperatures, hottest first."""
    densities: tuple[float, ...] = (0.03, 0.06, 0.12, 0.25, 0.5)
    """Parts of the weights that are left: the loads, heaviest first."""
    steps: int = 200
    """Adam steps after pruning, with a rate that falls to zero on a cosine."""
    batch: int = 64
    """Images in a batch."""
    lr: float = 2e-3
    """Learning rate of Adam."""
    points: int = 11
    """Networks on the segment between two."""
    seed: int = 0
    """The seed that all others come from."""


def run(settings: Settings, folder: Path | None) -> Run:
    """Go on with the dense training, prune, train again and compare; a step is a temperature."""
    data = load(folder, train=settings.train, test=settings.test)
    if settings.batch > settings.train:
        raise ValueError(f"batch={settings.batch} is more than train={settings.train}")
    if list(settings.dense_steps) != sorted({*settings.dense_steps, 0} - {0}):
        raise ValueError(f"dense_steps={settings.dense_steps}: steps in rising order were due")
    if list(settings.densities) != sorted(set(settings.densities)):
        raise ValueError(f"densities={settings.densities}: densities in rising order were due")
    if not all(0 < density <= 1 for density in settings.densities):
        raise ValueError(f"densities={settings.densities}: numbers in (0, 1] were due")
    sizes = (data.x[0].size, *settings.hidden, data.classes)
    base = jax.random.key(settings.seed)
    seeds = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(settings.seeds))
    dense = optax.adam(settings.lr)

    def start():
        params = jax.vmap(lambda key: init(key, sizes))(seeds)
        return {"params": params, "adam": jax.vmap(dense.init)(params)}

    def train(tx, key, state, first, last, x, y):
        """Take the steps from `first` up to `last`, whose batches they and the key choose."""

        def loss_fn(params, rows):
            out = logits(params, x[rows])
            return optax.softmax_cross_entropy_with_integer_labels(out, y[rows]).mean()

        def step(i, state):
            params, opt_state = state
            rows = jax.random.choice(
                jax.random.fold_in(key, i), settings.train, (settings.batch,), replace=False
            )
            updates, opt_state = tx.update(jax.grad(loss_fn)(params, rows), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return lax.fori_loop(first, last, step, state)

    @jax.jit
    def heat(x, y, state, first, last):
        order = lambda key: jax.random.fold_in(key, 0)
        each = lambda key, params, adam: train(dense, order(key), (params, adam), first, last, x, y)
        params, adam = jax.vmap(each)(seeds, state["params"], state["adam"])
        return {"params": params, "adam": adam}

    @jax.jit
    def cells(x, y, x_test, y_test, params, densities):
        schedule = optax.cosine_decay_schedule(settings.lr, settings.steps)
        wrong = lambda params, x, y: (logits(params, x).argmax(1) != y).mean()

        def cell(key, params, density):
            scores = masks.magnitude(params)
            mask = masks.topk(scores, sparsity=1 - density, where="**/kernel")
            tx = masks.sparse(optax.adam(schedule), mask)
            pruned = masks.apply(params, mask)

            def again(order):
                start = (pruned, tx.init(pruned))
                key_of_order = jax.random.fold_in(key, order)
                return train(tx, key_of_order, start, 0, settings.steps, x, y)[0]

            both = jax.vmap(again)(jnp.arange(1, 3))
            a, b = (jax.tree.map(lambda w, i=i: w[i], both) for i in range(2))
            path = probes.lmc(lambda p: wrong(p, x, y), a, b, points=settings.points)
            return a, {
                "test": jax.vmap(lambda p: wrong(p, x_test, y_test))(both).mean(),
                "train": jax.vmap(lambda p: wrong(p, x, y))(both).mean(),
                "lmc": path.lmc,
                "cka": probes.cka(logits(a, x), logits(b, x)),
            }

        def per_seed(density):
            trained, found = jax.vmap(cell, (0, 0, None))(seeds, params, density)
            others = jax.tree.map(lambda w: jnp.roll(w, 1, 0), trained)
            error = lambda p: wrong(p, x, y)
            between = lambda a, b: probes.lmc(error, a, b, points=settings.points).lmc
            return found | {"lmc_others": jax.vmap(between)(trained, others)}

        before = jax.vmap(lambda p: wrong(p, x_test, y_test))(params)
        return lax.map(per_seed, densities), before

    def step(i, state):
        first, last = (0, *settings.dense_steps)[i : i + 2]
        state = heat(data.x, data.y, state, first, last)
        found, before = cells(
            data.x,
            data.y,
            data.x_test,
            data.y_test,
            state["params"],
            jnp.array(settings.densities),
        )
        values = lambda x: np.asarray(x, np.float64).round(5).tolist()
        rows: list[Row] = [
            {"dense_steps": last, "density": density, "before": values(before)}
            | {name: values(x[d]) for name, x in found.items()}
            for d, density in enumerate(settings.densities)
        ]
        return state, rows

    return Run(jax.jit(start), step, len(settings.dense_steps), f"{data.name} {fingerprint(data)}")


# ----------------------------------------------------------------------------- what it shows


class Grid(NamedTuple):
    """(temperatures,), (loads,), and (temperatures, loads, seeds) of each measure."""

    dense_steps: np.ndarray
    density: np.ndarray
    test: np.ndarray
    lmc: np.ndarray
    lmc_others: np.ndarray
    cka: np.ndarray


def grid(rows: list[Row]) -> Grid:
    """Gather the rows of the whole grid."""
    steps = np.unique([row["dense_steps"] for row in rows])
    density = np.unique([row["density"] for row in rows])
    cell = {(row["dense_steps"], row["density"]): row for row in rows}
    table = lambda name: np.array([[cell[s, d][name] for d in density] for s in steps])
    return Grid(steps, density, *(table(name) for name in Grid._fields[2:]))


def harm(found: Grid) -> np.ndarray:
    """Return how much more error the hottest training leaves than the coldest: (loads, seeds)."""
    return found.test[0] - found.test[-1]


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare the runs with the statements of the paper."""
    found = grid(rows)
    low, high = (percent(found.density[i]) for i in (0, -1))
    effect = harm(found)
    mean = effect.mean(1)
    error = effect.std(1, ddof=1) / np.sqrt(effect.shape[1]) if effect.shape[1] > 1 else 0 * mean
    best = found.dense_steps[found.test.mean(2).argmin(0)]
    lmc, others, cka = (x.mean(2) for x in (found.lmc, found.lmc_others, found.cka))
    cold = -1
    points = ", ".join(
        f"{100 * m:+.1f} ± {100 * e:.1f} at {percent(d)}"
        for m, e, d in zip(mean, error, found.density, strict=True)
    )
    return [
        Claim(
            "Depending on the load, a hotter training enhances or impairs the pruned network",
            "the effect of temperature changes its sign with the density (CIFAR-10, PreResNet-20)",
            f"test error after the shortest less that after the longest training, in points: "
            f"{points}; the best of the trainings had "
            f"{', '.join(map(str, best))} steps",
            bool((mean > 2 * error).any() and (mean < -2 * error).any()),
        ),
        Claim(
            "Under a heavy load the pruned networks are poorly connected, under a light one well",
            "a barrier of training error at the lowest density, less than half of it at the "
            "highest",
            f"LMC {lmc[cold, 0]:.3f} at {low} and {lmc[cold, -1]:.3f} at {high}, after the longest "
            "training",
            bool(lmc[cold, 0] < min(2 * lmc[cold, -1], -0.01)),
        ),
        Claim(
            "Under a light load they are more similar",
            "CKA of the outputs is higher by 0.01 or more at the highest density",
            f"CKA {cka[cold, 0]:.3f} at {low} and {cka[cold, -1]:.3f} at {high}, after the longest "
            "training",
            bool(cka[cold, 0] <= cka[cold, -1] - 0.01),
        ),
        Claim(
            "The measure finds barriers: between networks pruned from different dense ones",
            "LMC below -0.1 for the lightest load, after the longest training",
            f"{others[cold, -1]:.3f}, and between two orders of the data {lmc[cold, -1]:.3f} (over "
            f"the whole grid from {lmc.min():.3f} to {lmc.max():.3f})",
            bool(others[cold, -1] < -0.1),
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw error and connectivity over load and temperature, and the effect of temperature."""
    found = grid(rows)
    figure, (a, b, c, d) = figures.panels(2, 2, (10, 7.6))
    maps = (
        (a, 100 * found.test.mean(2), "a  Test error of the pruned networks (%)", "viridis_r"),
        (b, found.lmc.mean(2), "b  LMC between two orders of the data", "viridis"),
        (c, found.lmc_others.mean(2), "c  LMC between different dense networks", "viridis"),
    )
    span = {"vmin": min(found.lmc.mean(2).min(), found.lmc_others.mean(2).min()), "vmax": 0.0}
    for axes, values, title, colors in maps:
        limits = {} if axes is a else span
        axes.imshow(values.T, cmap=colors, aspect="auto", origin="lower", **limits)
        low, high = (values.min(), values.max()) if axes is a else span.values()
        dark = (values < (low + high) / 2) != colors.endswith("_r")
        for i, column in enumerate(values):
            for j, value in enumerate(column):
                text = f"{value:.1f}" if axes is a else f"{value:.3f}"
                color = "white" if dark[i, j] else "black"
                axes.text(i, j, text, ha="center", va="center", color=color, fontsize=8.5)
        axes.set_xticks(range(len(found.dense_steps)), [str(s) for s in found.dense_steps])
        axes.set_yticks(range(len(found.density)), [f"{100 * p:g}" for p in found.density])
        axes.grid(visible=False)
        axes.set(title=title, xlabel="Adam steps before pruning (hot to cold)")
        axes.set_ylabel("weights left (%)")
    effect = 100 * harm(found)
    x = 100 * found.density
    figures.band(d, x, effect, figures.BLUE, "hottest less coldest", marker="o", markersize=4)
    d.axhline(0, color=figures.GREY, ls=":", lw=1.2)
    d.set_xscale("log")
    d.set_xticks(x, [f"{p:g}" for p in x])
    d.minorticks_off()
    d.set(title="d  What a hot training costs", xlabel="weights left (%)")
    d.set_ylabel("more test error (points)")
    figure.supxlabel(
        f"{figures.note(settings.seeds)} Above 0 in d, a longer training before pruning is better.",
        fontsize=8.5,
        color="#555",
    )
    return figure
