"""The learning rate should fall to zero, and rise again for new data.

Of the schedules without knowledge of the problem, linear decay to zero has the best worst case for
the last iterate, and "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement"
finds it better than the cosine in practice; refined from the gradient norms of an earlier run, a
schedule warms up and falls faster at the end, and is better still. UBA shifts the odds of the
cosine and is to be better at every budget; sharpDARTS anneals by a power of the cosine. To go on
with new data, "Continual Pre-Training of Large Language Models: How to (re)warm your model?" raises
the rate again: old and new loss first rise, and the new data are learned better than at the low
rate that the first training ended with.

Here a perceptron learns digits that are shifted at random, by SGD with momentum, and a model of
CPython's documentation learns the next character, by Adam; for each schedule and each number of
steps the peak rate is the best of a grid on one half of the held-out data, and the loss is that on
the other half. Refined schedules come from the gradients of the run with linear decay at its best
rate (l2 norms for SGD, l1 norms for Adam), the mean over the seeds of their logarithms. For the
last panel a perceptron learns upright digits with AdamW, and goes on with other ones turned by a
right angle; the moments of Adam are kept.

Aaron Defazio, Ashok Cutkosky, Harsh Mehta, Konstantin Mishchenko, arXiv 2310.07831 (linear decay,
refinement); Anda Tang, Yiming Dong, Yutao Zeng, Zhou Xun, Zhouchen Lin, arXiv 2505.24452 (UBA);
Andrew Hundt, Varun Jain, Gregory D. Hager, arXiv 1903.09900 (sharpDARTS); Kshitij Gupta and others,
arXiv 2308.04014 (re-warming).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure

from experiments import Claim, Row, Run, characters, figures, perceptron
from experiments.data import fingerprint, load, shifted
from jaxkit import optim


@dataclass(frozen=True)
class Settings:
    """What is trained, and for how long."""

    train: int = 1200
    """Digits to train on; for re-warming, half of them upright and half of them turned."""
    test: int = 597
    """Held-out digits: half of them to choose the rate, half of them to judge it."""
    seeds: int = 6
    """Runs of each configuration."""
    width: int = 64
    """Units in the hidden layer of both networks."""
    budgets: tuple[int, ...] = (100, 300, 900)
    """Steps of a run, in rising order."""
    batch: int = 32
    """Examples in a batch."""
    sgd: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
    """Peak rates of SGD with momentum, for the digits."""
    adam: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    """Peak rates of Adam, for the characters."""
    phi: tuple[float, ...] = (0.5, 1.0)
    """Shapes of UBA (2 is the cosine, 0 a constant)."""
    power: float = 10.0
    """The power of the cosine power annealing."""
    first: int = 600
    """Steps on the upright digits."""
    second: int = 600
    """Steps on the turned ones."""
    peak: float = 3e-3
    """Peak rate of AdamW, before and after."""
    floor: float = 0.01
    """The rate at the end of the first training, as a part of the peak."""
    every: int = 10
    """Steps between two validations of the continued training."""
    seed: int = 0
    """The seed that all others come from."""


WORKLOADS = ("digits", "characters")
CONSTANT, LINEAR, COSINE, POWER, REFINED = (
    "constant",
    "linear",
    "cosine",
    "cosine power",
    "refined",
)
FLOOR, REWARM, AT_ONCE, LOW = CONTINUED = (
    "constant floor",
    "re-warmed, 1% warmup",
    "re-warmed at once",
    "re-warmed to a tenth",
)
DIVERGED = 1e6


def uba_name(phi: float) -> str:
    """Name a schedule of UBA's family."""
    return f"UBA {phi:g}"


def names(settings: Settings) -> tuple[str, ...]:
    """Return the names of the schedules; the refined one is the last."""
    return (CONSTANT, LINEAR, COSINE, *map(uba_name, settings.phi), POWER, REFINED)


def shapes(settings: Settings, steps: int) -> np.ndarray:
    """Return all schedules but the refined one, with a peak of 1: (schedules, steps)."""
    every = (
        optax.constant_schedule(1.0),
        optax.linear_schedule(1.0, 0.0, steps),
        optax.cosine_decay_schedule(1.0, steps),
        *(optim.uba(1.0, steps, phi=phi) for phi in settings.phi),
        optim.cosine_power(1.0, steps, power=settings.power),
    )
    t = jnp.arange(steps)
    return np.stack([np.broadcast_to(schedule(t), (steps,)) for schedule in every])


class Workload(NamedTuple):
    """``init(key)``, ``loss(params, examples)``, examples, and what trains it at which rates."""

    init: Callable
    loss: Callable
    train: Any
    held_out: Any
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation]
    rates: tuple[float, ...]
    norm: Any


def quarter_turn(images):
    """Turn images by a right angle."""
    return np.rot90(images, axes=(1, 2)).copy()


def workloads(settings: Settings, folder: Path | None) -> tuple[dict[str, Workload], Any, str]:
    """Return the workloads by name, the images, and what names the data."""
    cross = optax.softmax_cross_entropy_with_integer_labels
    halves = lambda *parts: tuple(tuple(jnp.asarray(p[i::2]) for p in parts) for i in range(2))
    data = load(folder, train=settings.train, test=settings.test)
    sizes = (data.x[0].size, settings.width, data.classes)
    digits = Workload(
        lambda key: perceptron.init(key, sizes),
        lambda params, batch: cross(perceptron.logits(params, batch[0]), batch[1]).mean(),
        (jnp.asarray(shifted(data.x)), jnp.asarray(np.tile(data.y, 9))),
        halves(data.x_test, data.y_test),
        lambda rate: optax.sgd(rate, momentum=0.9),
        settings.sgd,
        "l2",
    )
    text, context = characters.load(), 4
    before, here = (part[::50] for part in characters.windows(text.test, context))
    reader = Workload(
        lambda key: characters.init(key, text.classes, context, 16, settings.width),
        lambda params, batch: cross(characters.logits(params, batch[0]), batch[1]).mean(),
        tuple(jnp.asarray(part) for part in characters.windows(text.train, context)),
        halves(before, here),
        lambda rate: optax.adam(rate),
        settings.adam,
        "l1",
    )
    name = f"{data.name} {fingerprint(data)}, {text.name} {characters.fingerprint(text)}"
    return dict(zip(WORKLOADS, (digits, reader), strict=True)), data, name


def run(settings: Settings, folder: Path | None) -> Run:
    """Train one workload for one budget in a step; the last step trains on."""
    if list(settings.budgets) != sorted(set(settings.budgets)) or settings.budgets[0] < 10:
        raise ValueError(f"budgets={settings.budgets}: 10 or more, in rising order, were due")
    if settings.second % settings.every:
        raise ValueError(f"second={settings.second} is no multiple of {settings.every=}")
    tasks, data, name = workloads(settings, folder)
    base = jax.random.key(settings.seed)
    keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(settings.seeds))

    def train(task: Workload, table, rate, params, batches):
        """Return both held-out losses at the end, and the gradient norm of every step."""
        tx = task.optimizer(lambda t: rate * table[t])

        def step(carry, batch):
            params, state = carry
            grads = jax.grad(task.loss)(params, jax.tree.map(lambda x: x[batch], task.train))
            updates, state = tx.update(grads, state, params)
            norm = optax.tree.norm(grads, ord=2 if task.norm == "l2" else 1)
            return (optax.apply_updates(params, updates), state), norm

        (params, _), norms = lax.scan(step, (params, tx.init(params)), batches)
        losses = jnp.stack([task.loss(params, part) for part in task.held_out])
        return jnp.minimum(jnp.nan_to_num(losses, nan=DIVERGED), DIVERGED), norms

    def budget(number, steps) -> list[Row]:
        """Train with every schedule, and with the refined one, at all rates and seeds."""
        task = tasks[WORKLOADS[number]]
        rng = np.random.default_rng((settings.seed, number))
        shape = (settings.seeds, steps, settings.batch)
        batches = jnp.asarray(rng.integers(len(task.train[1]), size=shape), jnp.int32)
        params, rates = jax.vmap(task.init)(keys), jnp.array(task.rates)

        @jax.jit
        def every(table, params, batches):
            one = lambda *args: train(task, *args)
            seeds = jax.vmap(one, (None, None, 0, 0))
            return jax.vmap(seeds, (None, 0, None, None))(table, rates, params, batches)

        def follow(table):
            found = every(jnp.asarray(table, jnp.float32), params, batches)
            return [np.asarray(x, np.float64) for x in found]

        tables = shapes(settings, steps)
        losses, norms = zip(*map(follow, tables), strict=True)
        best = losses[1][..., 0].mean(1).argmin()  # the rate of the linear schedule
        norms = np.exp(np.log(norms[1][best] + 1e-12).mean(0))
        refined = np.asarray(optim.refined(norms, norm=task.norm)(jnp.arange(steps)))
        losses = [*losses, follow(refined)[0]]
        shown = np.unique(np.linspace(0, steps - 1, 101).round().astype(int))
        return [
            {
                "workload": WORKLOADS[number],
                "steps": steps,
                "schedule": schedule,
                "rates": list(task.rates),
                "choose": loss[..., 0].round(5).tolist(),
                "judge": loss[..., 1].round(5).tolist(),
                "shape": np.asarray(table, np.float64)[shown].round(5).tolist(),
                "warmup": int(np.argmax(table)),
            }
            for schedule, loss, table in zip(
                names(settings), losses, [*tables, refined], strict=True
            )
        ]

    half = settings.train // 2
    turned, y_turned = jnp.asarray(quarter_turn(data.x[half:])), jnp.asarray(data.y[half:])
    upstream = jnp.asarray(data.x_test), jnp.asarray(data.y_test)
    downstream = jnp.asarray(quarter_turn(data.x_test)), upstream[1]
    images = tasks[WORKLOADS[0]].loss

    adam = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    spans = settings.second // settings.every

    def go_on(carry, table, x, y, batches):
        """Train with AdamW, at the rates of a table."""

        def step(carry, now):
            (params, state), (rate, batch) = carry, now
            grads = jax.grad(images)(params, (x[batch], y[batch]))
            updates, state = adam.update(grads, state, params)
            params = jax.tree.map(lambda w, u: w - rate * u, params, updates)
            return (params, state), None

        return lax.scan(step, carry, (table, batches))[0]

    @jax.jit
    def continued(tables, key, order):
        """Train on upright digits, then with every table on turned ones; return the losses."""
        params = tasks[WORKLOADS[0]].init(key)
        x, y = jnp.asarray(data.x[:half]), jnp.asarray(data.y[:half])
        decay = optax.cosine_decay_schedule(settings.peak, settings.first, settings.floor)
        start = (params, adam.init(params))
        start = go_on(start, decay(jnp.arange(settings.first)), x, y, order[: settings.first])
        rest = order[settings.first :].reshape(spans, settings.every, -1)
        both = lambda params: jnp.stack([images(params, test) for test in (upstream, downstream)])

        def one(table):
            def span(carry, now):
                carry = go_on(carry, now[0], turned, y_turned, now[1])
                return carry, both(carry[0])

            now = (table.reshape(spans, settings.every), rest)
            return jnp.concatenate([both(start[0])[None], lax.scan(span, start, now)[1]])

        return jax.vmap(one)(tables)

    def rewarming() -> list[Row]:
        low = settings.floor * settings.peak
        again = lambda peak, warmup: optim.rewarm(
            peak, settings.second, start=low, warmup=warmup, floor=low / peak
        )
        schedules = {
            FLOOR: optax.constant_schedule(low),
            REWARM: again(settings.peak, 0.01),
            AT_ONCE: again(settings.peak, 0.0),
            LOW: again(settings.peak / 10, 0.01),
        }
        t = jnp.arange(settings.second)
        tables = jnp.stack([jnp.broadcast_to(schedules[n](t), t.shape) for n in CONTINUED])
        rng = np.random.default_rng((settings.seed, len(WORKLOADS)))
        shape = (settings.seeds, settings.first + settings.second, settings.batch)
        order = jnp.asarray(rng.integers(half, size=shape), jnp.int32)
        losses = jax.vmap(continued, (None, 0, 0), 1)(tables, keys, order)
        losses = np.asarray(losses, np.float64).round(5)
        return [
            {
                "continued": name,
                "upstream": loss[..., 0].tolist(),
                "downstream": loss[..., 1].tolist(),
            }
            for name, loss in zip(CONTINUED, losses, strict=True)
        ]

    def step(i, state):
        if i < len(WORKLOADS) * len(settings.budgets):
            number, place = divmod(i, len(settings.budgets))
            return state, budget(number, settings.budgets[place])
        return state, rewarming()

    count = len(WORKLOADS) * len(settings.budgets) + 1
    return Run(lambda: jnp.zeros(()), step, count, name)


# ----------------------------------------------------------------------------- what it shows


def cells(settings: Settings) -> list[tuple[str, int]]:
    """Return all workloads and budgets."""
    return [(workload, steps) for workload in WORKLOADS for steps in settings.budgets]


def own_row(rows: list[Row], workload: str, steps: int, schedule: str) -> Row:
    """Return the row of one schedule."""
    asked = (workload, steps, schedule)
    (row,) = (r for r in rows if (r.get("workload"), r.get("steps"), r.get("schedule")) == asked)
    return row


def chosen(row: Row) -> int:
    """Return the position of the best rate, by the first half of the held-out data."""
    return int(np.mean(row["choose"], axis=1).argmin())


def losses(settings: Settings, rows: list[Row], schedule: str) -> np.ndarray:
    """Return the losses at the best rates: (workloads and budgets, seeds)."""
    found = [own_row(rows, *cell, schedule) for cell in cells(settings)]
    return np.array([row["judge"][chosen(row)] for row in found])


class Gain(NamedTuple):
    """A schedule against another: the logarithm of the ratio of their losses.

    mean, error: over all workloads, budgets and seeds, and its standard error from the seeds.
    wins: in how many workloads and budgets the mean is lower.
    """

    mean: float
    error: float
    wins: int
    of: int

    def __str__(self) -> str:
        """Write it in percent."""
        mean, error = (100 * np.expm1(x) for x in (self.mean, self.error))
        return f"{mean:+.1f} ± {error:.1f}%, lower in {self.wins} of {self.of}"

    @property
    def lower(self) -> bool:
        """Whether the loss is lower by more than two standard errors."""
        return bool(self.mean < -2 * self.error)


def gain(settings: Settings, rows: list[Row], schedule: str, other: str) -> Gain:
    """Compare two schedules on the same seeds and batches."""
    ratio = np.log(losses(settings, rows, schedule) / losses(settings, rows, other))
    error = ratio.mean(0).std(ddof=1) / np.sqrt(settings.seeds) if settings.seeds > 1 else 0.0
    wins = int((ratio.mean(1) < 0).sum())
    return Gain(float(ratio.mean()), float(error), wins, len(ratio))


def course(rows: list[Row], name: str, test: str) -> np.ndarray:
    """Return the losses of a continued training, (validations, seeds)."""
    (row,) = (row for row in rows if row.get("continued") == name)
    return np.array(row[test]).T


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare the runs with the statements of the papers."""
    against = lambda schedule, other: gain(settings, rows, schedule, other)
    flat, linear, power = (
        against(*pair) for pair in ((LINEAR, CONSTANT), (LINEAR, COSINE), (POWER, COSINE))
    )
    refined = against(REFINED, LINEAR)
    shifted = {phi: against(uba_name(phi), COSINE) for phi in settings.phi}
    warm = [own_row(rows, *cell, REFINED)["warmup"] / cell[1] for cell in cells(settings)]
    end = {n: course(rows, n, "downstream")[-1].mean() for n in CONTINUED}
    old = {n: course(rows, n, "upstream").mean(1) for n in CONTINUED}
    quarter = len(old[REWARM]) // 4 + 1
    jump = old[REWARM][1:quarter].max()
    apart = abs(np.log(end[REWARM] / end[AT_ONCE]))
    at_edge = sum(chosen(row) in (0, len(row["rates"]) - 1) for row in rows if "schedule" in row)
    total = sum("schedule" in row for row in rows)
    return [
        Claim(
            "Linear decay to zero is better than a constant rate",
            "a lower held-out loss, by more than two standard errors",
            f"{flat} (the best rate was at the end of the grid in {at_edge} of {total} cases)",
            flat.lower,
        ),
        Claim(
            "Linear decay is as good as the cosine, or better",
            "better on most of the paper's problems; here not worse by two standard errors",
            str(linear),
            linear.mean <= 2 * linear.error,
        ),
        Claim(
            "A refined schedule is better than linear decay",
            "a lower loss, by more than two standard errors",
            str(refined),
            refined.lower,
        ),
        Claim(
            "Refinement finds a warmup",
            "the peak is at 2% of the steps or later, for every workload and budget",
            f"at {', '.join(f'{100 * w:.0f}%' for w in warm)}",
            min(warm) >= 0.02,
        ),
        Claim(
            "UBA is better than the cosine at every budget",
            "a lower loss everywhere, with one of the two shapes for all",
            "; ".join(f"phi {phi:g}: {g}" for phi, g in shifted.items()),
            any(g.wins == g.of for g in shifted.values()),
        ),
        Claim(
            "Cosine power annealing is better than the cosine",
            "a lower loss, by more than two standard errors",
            str(power),
            power.lower,
        ),
        Claim(
            "Re-warmed, the network learns the new data better than at the rate it ended with",
            "a lower loss on the new data",
            f"{end[REWARM]:.3f}, and {end[FLOOR]:.3f}; {end[LOW]:.3f} re-warmed to a tenth",
            bool(end[REWARM] < end[FLOOR]),
        ),
        Claim(
            "The loss on the old data first rises",
            "above its start, in the first quarter",
            f"{old[REWARM][0]:.3f} to {jump:.2f}, and {old[REWARM][-1]:.2f} in the end",
            bool(jump > old[REWARM][0]),
        ),
        Claim(
            "A larger peak learns more of the new data and forgets more of the old",
            "both, for the peak against a tenth of it",
            f"new {end[REWARM]:.3f} and {end[LOW]:.3f}, old {old[REWARM][-1]:.2f} and "
            f"{old[LOW][-1]:.2f}",
            bool(end[REWARM] < end[LOW] and old[REWARM][-1] > old[LOW][-1]),
        ),
        Claim(
            "How long the warmup is hardly matters",
            "the loss on the new data differs by less than 15% between 0% and 1%",
            f"{end[AT_ONCE]:.3f} and {end[REWARM]:.3f}",
            bool(apart < np.log(1.15)),
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw the schedules, what they reach, and the continued training."""
    figure, (a, b, c, d, e, f) = figures.panels(2, 3, (14, 8.4))
    known = {
        CONSTANT: figures.GREY,
        LINEAR: figures.BLUE,
        COSINE: figures.ORANGE,
        POWER: figures.PURPLE,
        REFINED: figures.RED,
    }
    greens = dict(zip(map(uba_name, settings.phi), (figures.SKY, figures.GREEN), strict=False))
    colors = {name: (known | greens).get(name, "#222") for name in names(settings)}
    longest = settings.budgets[-1]
    for name, color in colors.items():
        for workload, dashes in zip(WORKLOADS, ("-", "--"), strict=True):
            if name != REFINED and workload != WORKLOADS[0]:
                continue
            shape = own_row(rows, workload, longest, name)["shape"]
            label = f"{name}, {workload}" if name == REFINED else name
            x = np.linspace(0, 100, len(shape))
            a.plot(x, shape, color=color, ls=dashes, lw=1.6, label=label)
    a.set(title="a  Schedules", xlabel=f"steps done (% of {longest})", ylim=(-0.48, 1.05))
    a.set_yticks(np.linspace(0, 1, 6))
    a.set_ylabel("rate, as a part of the peak")
    a.legend(fontsize=8, loc="lower center", ncols=2)

    width = 0.8 / len(colors)
    for axes, workload, letter in ((b, WORKLOADS[0], "b"), (c, WORKLOADS[1], "c")):
        first = [k for k, cell in enumerate(cells(settings)) if cell[0] == workload]
        places = np.arange(len(first))
        base = losses(settings, rows, LINEAR)[first]
        for k, (name, color) in enumerate(colors.items()):
            value = 100 * (losses(settings, rows, name)[first] / base - 1)
            offset = (k - (len(colors) - 1) / 2) * width
            axes.bar(places + offset, value.mean(1), width, yerr=figures.spread(value),
                     color=color, error_kw={"lw": 0.8, "ecolor": "#444"})  # fmt: skip
        axes.axhline(0, color="#222", lw=0.8)
        axes.set_xticks(places, [str(n) for n in settings.budgets])
        axes.grid(visible=False, axis="x")
        how = "SGD with momentum" if workload == WORKLOADS[0] else "Adam"
        axes.set(title=f"{letter}  {workload.capitalize()}, {how}")
        axes.set(xlabel="steps in all (colours as in a)")
        axes.set_ylabel("held-out loss (% more than with linear decay)")

    best = np.inf
    for name, color in colors.items():
        row = own_row(rows, WORKLOADS[1], longest, name)
        means = np.mean(row["judge"], axis=1)
        d.plot(row["rates"], means, color=color, marker="o", ms=3.5, lw=1.4)
        best = min(best, means.min())
    d.set_xscale("log")
    rates = settings.adam
    d.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8)
    d.minorticks_off()
    d.set(title=f"d  The peak rate: {WORKLOADS[1]}, {longest} steps", xlabel="peak rate of Adam")
    d.set(ylabel="held-out cross-entropy (nats)", ylim=(best - 0.03, best + 0.6))

    arms = {
        FLOOR: (figures.GREY, "-"),
        REWARM: (figures.RED, "-"),
        AT_ONCE: (figures.ORANGE, "--"),
        LOW: (figures.BLUE, "-"),
    }
    for axes, test, title in ((e, "downstream", "e  New data"), (f, "upstream", "f  Old data")):
        for name, (color, dashes) in arms.items():
            found = course(rows, name, test)
            steps = settings.every * np.arange(len(found))
            figures.band(axes, steps, found, color, name, ls=dashes)
        axes.set(title=f"{title}, while it trains on the new", xlabel="steps on the new data")
        axes.set(ylabel="test cross-entropy (nats)", yscale="log")
        low, high = axes.get_ylim()
        ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low <= t <= high]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
    e.legend(fontsize=8.5)
    figure.supxlabel(figures.note(settings.seeds), fontsize=8.5, color="#555")
    return figure
