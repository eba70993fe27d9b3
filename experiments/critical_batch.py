"""The critical batch size grows with the data.

Up to the critical batch size, twice the batch needs half of the steps to the same loss; beyond it,
steps fall no more and data are wasted. "How Does Critical Batch Size Scale in Pre-training?"
measures it as the batch size with 20% more data than linear scaling would need, from the fewest
steps to a target over all hyperparameters, with a constant learning rate after a warmup and
averaged weights, so that no horizon is built in. It grows with the amount of data as D^0.47, and at
equal data hardly with the number of parameters N.

Here the model is a perceptron that reads a few characters of CPython's documentation and scores the
next, trained with Adam. The amount of data D sets the target, as in the paper: it is the held-out
loss that the reference batch reaches after D examples. Averages of the weights with several decays
are kept in each run, and learning rate and decay with the fewest steps count; between two
validations the loss is interpolated in the logarithms. The exponent of the data comes out as in the
paper; that of the parameters does not at this size, where the wider model reaches a lower loss with
the same data. ``--data`` takes a folder with other text, in ``.txt`` files.

Hanlin Zhang, Depen Morwani, Nikhil Vyas, Jingfeng Wu, Difan Zou, Udaya Ghai, Dean Foster,
Sham Kakade, arXiv 2410.21676.
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

from experiments import Claim, Row, Run, characters, figures
from experiments.characters import fingerprint, logits
from jaxkit import optim, tree


@dataclass(frozen=True)
class Settings:
    """What is trained, at which batch sizes."""

    widths: tuple[int, ...] = (32, 128)
    """Units in the hidden layer: the sizes of the model, in rising order."""
    examples: tuple[int, ...] = (8_192, 16_384, 32_768)
    """Examples at the reference batch, of which each sets a target, in rising order."""
    batches: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    """Batch sizes in rising order; the first is the reference."""
    slack: float = 1.5
    """A run has so many times the reference's examples ..."""
    floor: int = 150
    """... and at least this number of steps more."""
    lr: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
    """Learning rates of Adam."""
    averages: tuple[float, ...] = (0.0, 0.8, 0.95, 0.98, 0.995)
    """Decays of the averages of the weights, 0 for none."""
    warmup: int = 10
    """Steps in which the rate rises."""
    seeds: int = 3
    """Runs of each configuration; the mean of their losses counts."""
    validations: int = 40
    """Validations of a run, evenly in the logarithm of the steps."""
    held_out: int = 1024
    """Characters to validate on."""
    context: int = 4
    """Characters that the model reads."""
    embed: int = 16
    """Numbers for a character."""
    overhead: float = 0.2
    """The part of more data that defines the critical batch size."""
    seed: int = 0
    """The seed that all others come from."""


def checkpoints(settings: Settings, batch: int) -> np.ndarray:
    """Return the steps at which a run with this batch size is validated."""
    last = settings.slack * settings.examples[-1] / batch + settings.floor
    first = min(settings.examples[0] / settings.batches[-1], 8)
    return np.unique(np.geomspace(first, last, settings.validations).round().astype(int))


def run(settings: Settings, folder: Path | None) -> Run:
    """Train one width with one batch size in a step: all rates and seeds in one program."""
    for name in ("widths", "examples", "batches"):
        values = getattr(settings, name)
        if list(values) != sorted(set(values)) or values[0] < 1:
            raise ValueError(f"{name}={values}: whole numbers in rising order were due")
    if len(settings.batches) < 3:
        raise ValueError(f"batches={settings.batches}: three or more are due for a fit")
    text = characters.load(folder)
    before, here = (jnp.asarray(part) for part in characters.windows(text.train, settings.context))
    held = characters.windows(text.test, settings.context)
    stride = max(len(held[1]) // settings.held_out, 1)
    held = [jnp.asarray(part[::stride][: settings.held_out]) for part in held]
    base = jax.random.key(settings.seed)
    keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(settings.seeds))
    decays = jnp.array(settings.averages)
    sizes = (text.classes, settings.context, settings.embed)

    def loss_fn(params, before, here):
        out = logits(params, before)
        return optax.softmax_cross_entropy_with_integer_labels(out, here).mean()

    def train(rate, params, rows, ends):
        """Return the held-out loss of every average (validations, averages) of one run."""
        tx = optax.adam(lambda t: rate * jnp.minimum(1.0, (t + 1) / settings.warmup), b2=0.99)

        def step(t, carry):
            params, state, means = carry
            batch = rows[t]
            grads = jax.grad(loss_fn)(params, before[batch], here[batch])
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            # a decay of at most t / (t + 1): the plain mean of the first steps
            decay = jnp.minimum(decays, t / (t + 1.0))
            mix = lambda m, w: w + jnp.expand_dims(decay, tuple(range(1, m.ndim))) * (m - w)
            return params, state, jax.tree.map(mix, means, params)

        def span(carry, ends):
            carry = lax.fori_loop(ends[0], ends[1], step, carry)
            return carry, jax.vmap(lambda mean: loss_fn(mean, *held))(carry[2])

        means = jax.tree.map(lambda w: jnp.stack([w] * len(decays)), params)
        return lax.scan(span, (params, tx.init(params), means), ends)[1]

    every = jax.jit(
        jax.vmap(jax.vmap(train, (None, 0, 0, None)), (0, None, None, None)),
    )

    def step(i, state):
        width = settings.widths[i // len(settings.batches)]
        batch = settings.batches[i % len(settings.batches)]
        params = jax.vmap(lambda key: characters.init(key, *sizes, width))(keys)
        steps = checkpoints(settings, batch)
        rng = np.random.default_rng((settings.seed, batch))
        rows = rng.integers(len(here), size=(settings.seeds, steps[-1], batch), dtype=np.int32)
        ends = jnp.stack([jnp.array([0, *steps[:-1]]), jnp.array(steps)], 1)
        losses = np.asarray(every(jnp.array(settings.lr), params, rows, ends), np.float64)
        losses = np.nan_to_num(losses, nan=1e6, posinf=1e6)
        row = {
            "width": width,
            "parameters": sum(w.size for w in tree.flatten(params).values()) // settings.seeds,
            "batch": batch,
            "steps": steps.tolist(),
            "loss": losses.round(5).tolist(),
        }
        return state, [row]

    count = len(settings.widths) * len(settings.batches)
    return Run(lambda: jnp.zeros(()), step, count, f"{text.name} {fingerprint(text)}")


# ----------------------------------------------------------------------------- what it shows


class Found(NamedTuple):
    """What the runs of a width give for an amount of data.

    target: the loss. steps: the fewest at every batch size, inf if it was not reached.
    law: the fit, or None where there is none.
    """

    target: float
    steps: np.ndarray
    law: optim.BatchLaw | None


def crossing(steps: np.ndarray, losses: np.ndarray, target: float) -> float:
    """Return the step at which a loss first meets a target, between two by their logarithms.

    >>> crossing(np.array([1, 4, 16]), np.array([4.0, 2.0, 1.0]), 2.0)
    4.0
    """
    (hits,) = np.nonzero(losses <= target)
    if not len(hits):
        return np.inf
    k = hits[0]
    if k == 0:
        return float(steps[0])
    (a, b), (x, y) = np.log(losses[k - 1 : k + 1]), np.log(steps[k - 1 : k + 1])
    return float(np.exp(x + (y - x) * (a - np.log(target)) / (a - b)))


def curves(rows: list[Row], width: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return steps and losses (rates, seeds, validations, averages) by batch size."""
    own = sorted((row for row in rows if row["width"] == width), key=lambda row: row["batch"])
    return [(np.array(row["steps"]), np.array(row["loss"])) for row in own]


def find(settings: Settings, rows: list[Row], width: int, data: int, seeds=slice(None)) -> Found:
    """Find the target and the fewest steps to it, and fit the law."""
    every = [(steps, loss[:, seeds].mean(1)) for steps, loss in curves(rows, width)]
    steps, loss = every[0]
    at = np.log(data / settings.batches[0])
    every_one = lambda loss: [one for rate in np.moveaxis(loss, -1, 1) for one in rate]
    reached = [np.interp(at, np.log(steps), np.log(one)) for one in every_one(loss)]
    target = np.exp(min(reached))
    fewest = [min(crossing(steps, one, target) for one in every_one(loss)) for steps, loss in every]
    sizes, fewest = np.array(settings.batches, float), np.array(fewest)
    there = np.isfinite(fewest)
    try:
        law = optim.critical_batch(
            sizes[there], fewest[there], optimal=settings.batches[0], overhead=settings.overhead
        )
    except ValueError:  # no floor in the steps, or too few of them
        law = None
    return Found(float(target), fewest, law)


def table(settings: Settings, rows: list[Row]) -> list[list[Found]]:
    """Return what was found by width and amount of data."""
    return [[find(settings, rows, w, d) for d in settings.examples] for w in settings.widths]


def critical(found: list[list[Found]]) -> np.ndarray:
    """Return the critical batch sizes (widths, data), NaN where there is no fit."""
    return np.array([[f.law.critical if f.law else np.nan for f in line] for line in found])


def misfit(settings: Settings, found: Found) -> float:
    """Return the root mean square of the law's error, as a part of the steps."""
    if found.law is None:
        return np.inf
    law = found.law.floor + found.law.slope / np.array(settings.batches)
    there = np.isfinite(found.steps)
    return float(np.sqrt(np.mean(np.log(law / found.steps)[there] ** 2)))


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare the fits with the statements of the paper."""
    found = table(settings, rows)
    sizes = critical(found)
    data = np.array(settings.examples, float)
    parameters = np.array(
        [next(r["parameters"] for r in rows if r["width"] == w) for w in settings.widths], float
    )
    complete = bool(np.isfinite(sizes).all())
    slope = lambda x, y: float(np.polyfit(np.log(x), np.log(y), 1)[0])
    by_data = [slope(data, line) if complete else np.nan for line in sizes]
    by_size = [slope(parameters, line) if complete else np.nan for line in sizes.T]
    more = 100 * settings.overhead
    worst = max(misfit(settings, f) for line in found for f in line)
    name = lambda values: ", ".join(f"{v:.0f}" for v in values)
    each = "; ".join(
        f"{name(line)} at width {w}" for w, line in zip(settings.widths, sizes, strict=True)
    )
    outside = sum(bool(f.law and f.law.extrapolated) for line in found for f in line)
    cost = [
        line[-1].steps * np.array(settings.batches) / (line[-1].steps[0] * settings.batches[0])
        for line in found
    ]
    batches = np.array(settings.batches)
    pairs = list(zip(cost, np.nan_to_num(sizes[:, -1]), strict=True))
    below = [c[batches <= size].max() for c, size in pairs if size >= batches[0]]
    above = [c[batches >= 2 * size].min() for c, size in pairs if size <= batches[-1] / 2]
    return [
        Claim(
            "Steps to the target follow a + b / B",
            "with an error of at most 10% (root mean square of the logarithm, in the worst fit)",
            f"{100 * worst:.1f}%",
            worst <= 0.1,
        ),
        Claim(
            "The critical batch size grows with the data, about as its root",
            "D^0.47: an exponent from 0.3 to 0.65 for every width",
            f"D^{' and D^'.join(f'{k:.2f}' for k in by_data)}: {each}, for {name(data)} examples"
            + (f" ({outside} of them outside the batch sizes tried)" if outside else ""),
            bool(complete and all(0.3 <= k <= 0.65 for k in by_data)),
        ),
        Claim(
            "At equal data it hardly depends on the size of the model",
            "an exponent of N within 0.15 of 0, in the mean over the data",
            f"N^{np.mean(by_size):.2f} ({' to '.join(f'{n:,.0f}' for n in parameters[[0, -1]])} "
            "parameters)",
            bool(complete and abs(np.mean(by_size)) <= 0.15),
        ),
        Claim(
            "Up to the critical batch size a larger batch costs little data, beyond it much",
            f"at most {more + 10:.0f}% more up to it, and over {more:.0f}% from twice of it on",
            f"at most {100 * max(below, default=np.nan) - 100:.0f}%, and at least "
            f"{100 * min(above, default=np.nan) - 100:.0f}%; at a batch of {batches[-1]} "
            + " and ".join(f"{c[-1]:.1f}" for c in cost)
            + " times the data",
            bool(
                complete
                and max(below, default=np.inf) <= 1.1 + settings.overhead
                and min(above, default=0) > 1 + settings.overhead
            ),
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw steps and data against the batch size, and the critical batch size against the data."""
    found = table(settings, rows)
    figure, (a, b, c) = figures.panels(1, 3, (13, 4.3))
    sizes = np.array(settings.batches, float)
    fine = np.geomspace(sizes[0], sizes[-1], 200)
    colors = (figures.BLUE, figures.RED, figures.GREEN, figures.ORANGE)
    marks = ("o", "s", "D", "^")
    shades = np.linspace(0.35, 1, len(settings.examples))
    for w, line in enumerate(found):
        for d, one in enumerate(line):
            style = {"color": colors[w % 4], "alpha": shades[d]}
            top = d + 1 == len(line)
            label = f"width {settings.widths[w]}" if top else None
            a.plot(sizes, one.steps, marks[w % 4], ms=5, label=label, **style)
            if one.law is not None:
                law = one.law.floor + one.law.slope / fine
                a.plot(fine, law, lw=1.2, **style)
                if top:
                    reference = law[0] * fine[0]
                    b.plot(fine, law * fine / reference, lw=1.2, **style)
                    b.plot(sizes, one.steps * sizes / reference, marks[w % 4], label=label, **style)
    start = found[0][-1].steps[0]
    scaling = start * sizes[0] / fine
    a.plot(fine, scaling, color=figures.GREY, ls=":", lw=1.2, label="linear scaling")
    ticks = [int(n) for n in sizes]
    for axes in (a, b):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(ticks, [str(t) for t in ticks], fontsize=8.5)
        axes.set_xlabel("batch size")
        axes.minorticks_off()
    a.set(title="a  Steps to the target", ylabel="fewest steps")
    a.legend(title="pale: less data", loc="upper right")
    limit = 1 + settings.overhead
    b.axhline(limit, color=figures.GREY, ls=":", lw=1.2)
    b.annotate(f"{100 * settings.overhead:.0f}% more", (sizes[-1], 0.98 * limit), color="#555",
               fontsize=8.5, ha="right", va="top")  # fmt: skip
    b.set_yticks((1, 2, 4, 8), ["1", "2", "4", "8"])
    b.set(
        title="b  What a larger batch costs", ylabel="data, as a multiple of the smallest batch's"
    )

    data = np.array(settings.examples, float)
    for w, line in enumerate(critical(found)):
        label = f"width {settings.widths[w]}"
        c.plot(data, line, marks[w % 4] + "-", color=colors[w % 4], label=label)
        for k in range(settings.seeds):
            one = slice(k, k + 1)
            alone = [find(settings, rows, settings.widths[w], d, one) for d in settings.examples]
            c.plot(data, critical([alone])[0], marks[w % 4], color=colors[w % 4], alpha=0.4, ms=3.5)
    if np.isfinite(sizes := critical(found)).any():
        root = np.nanmean(sizes) * (data / np.exp(np.log(data).mean())) ** 0.47
        c.plot(data, root, color=figures.GREY, ls=":", lw=1.2, label="slope 0.47")
    c.set_xscale("log")
    c.set_yscale("log")
    c.set_xticks(data, [f"{d / 1000:.0f}k" for d in data])
    c.minorticks_off()
    low, high = c.get_ylim()
    marks_y = [m for m in (5, 10, 20, 30, 50, 80, 120, 200, 300, 500, 1000) if low <= m <= high]
    c.set_yticks(marks_y, [str(m) for m in marks_y])
    c.set(title="c  The critical batch size", xlabel="examples at the smallest batch (data)")
    c.set_ylabel("batch size")
    c.legend(loc="upper left")
    figure.supxlabel(
        f"Losses are means of {settings.seeds} seeds; small marks in c: each seed alone. Lines in "
        "a and b: fits of a + b / B.",
        fontsize=8.5,
        color="#555",
    )
    return figure
