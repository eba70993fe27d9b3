"""Time to target: optimizers on four small workloads.

AlgoPerf scores a training algorithm by the time it takes to a validation target, on several
workloads: with its hyperparameters tuned for each workload, or with one configuration for all.
SOAP's paper reports over 40% fewer iterations than AdamW's. "How far away are truly
hyperparameter-free learning algorithms?" finds that methods without a learning rate do poorly with
the defaults of their papers, and that the best of them, with one calibrated configuration for all
workloads, come close to NadamW calibrated alike.

Here the workloads are a perceptron on digits that are shifted by up to a pixel, a logistic
regression on the breast-cancer data, a student of a noisy teacher network on ill-conditioned
inputs, and a model of the next character of CPython's documentation. Time is counted in steps, all
of the same batch: the time that a step of such small models takes is that of the machine and of the
compiler (the figure has it for the last workload, and no claim is made of it: SOAP and Fira run one
by one, the others all rates and seeds at once). The target is what tuned AdamW reaches in half of
the steps, so that it reaches all of them by construction. Rates are constant after a short warmup,
so that no horizon is hidden in a schedule; every optimizer is tried at the same multiples of the
default rate of its paper or of optax (SGD has none: its 0.03 is ours, and it is not among the
defaults). Of Prodigy and DoG, that find their rate, the multiples of what they find are tried; DoG
is without the averaging of weights that its authors recommend.

George E. Dahl and others, arXiv 2306.07179 (AlgoPerf); Priya Kasimbeg, Vincent Roulet, Naman
Agarwal, Sourabh Medapati, Fabian Pedregosa, Atish Agarwala, George E. Dahl, arXiv 2505.24005
(hyperparameter-free); Nikhil Vyas and others, arXiv 2409.11321 (SOAP); Xi Chen and others,
arXiv 2410.01623 (Fira); Michael R. Zhang, James Lucas, Geoffrey Hinton, Jimmy Ba, arXiv 1907.08610
(Lookahead).
"""

import time
import warnings
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
    """What is trained, and how it is scored."""

    train: int = 1200
    """Digits to train on."""
    test: int = 500
    """Digits to validate on."""
    seeds: int = 3
    """Runs of each configuration; of their times the median counts."""
    width: int = 64
    """Units in the hidden layer of the three networks."""
    steps: int = 600
    """Steps of a run."""
    batch: int = 64
    """Examples in a batch."""
    every: int = 10
    """Steps between two validations."""
    warmup: int = 20
    """Steps in which the rate rises."""
    factor: float = 3.0
    """The ratio of one learning rate to the next."""
    ladder: tuple[int, ...] = (-1, 0, 1, 2, 3, 4)
    """The learning rates: the default times these powers of `factor`."""
    decay: float = 0.01
    """Decoupled weight decay of all kin of Adam."""
    rank: int = 8
    """Rank of Fira's projections."""
    target: float = 0.5
    """The part of the steps in which tuned AdamW reaches the target."""
    tau_max: float = 4.0
    """Where the performance profile ends: at so many times the fewest steps."""
    seed: int = 0
    """The seed that all others come from."""


class Workload(NamedTuple):
    """Something to train: ``init(key)``, ``loss(params, examples)``, and examples, as trees."""

    init: Callable
    loss: Callable
    train: Any
    held_out: Any


class Method(NamedTuple):
    """An optimizer: ``make(schedule)``, its default rate, and the weights to evaluate."""

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    rate: float
    read: Callable = lambda state, params: params


WORKLOADS = ("digits", "breast cancer", "teacher", "characters")
SGD, ADAMW, NADAMW, SOAP, FIRA, LOOKAHEAD, FREE, PRODIGY, DOG = METHODS = (
    "SGD, momentum",
    "AdamW",
    "NadamW",
    "SOAP",
    "Fira",
    "Lookahead",
    "schedule-free",
    "Prodigy",
    "DoG",
)
WITHOUT_RATE = (PRODIGY, DOG)
DIVERGED = 1e6
# batched decompositions of several matrices can wait for each other forever in jaxlib's pool of
# threads, on a CPU of few cores: the runs of these are in one program, but one after the other
ONE_BY_ONE = (SOAP, FIRA)


def methods(settings: Settings) -> dict[str, Method]:
    """Return the optimizers by name."""
    decay: dict[str, Any] = {"weight_decay": settings.decay}
    free = lambda rate: optax.contrib.schedule_free_adamw(rate, **decay)
    prodigy = lambda rate: optax.contrib.prodigy(rate, safeguard_warmup=True, **decay)
    found = {
        SGD: Method(lambda rate: optax.sgd(rate, momentum=0.9), 0.03),
        ADAMW: Method(lambda rate: optax.adamw(rate, **decay), 1e-3),
        NADAMW: Method(lambda rate: optax.nadamw(rate, **decay), 1e-3),
        SOAP: Method(lambda rate: optim.soap(rate, **decay), 3e-3),
        FIRA: Method(lambda rate: optim.fira(rate, rank=settings.rank, **decay), 1e-3),
        LOOKAHEAD: Method(
            lambda rate: optim.lookahead(optax.adamw(rate, **decay)),
            1e-3,
            lambda state, params: state.slow,
        ),
        FREE: Method(free, 2.5e-3, optax.contrib.schedule_free_eval_params),
        PRODIGY: Method(prodigy, 1.0),
        DOG: Method(lambda rate: optax.contrib.dog(rate), 1.0),
    }
    return {name: found[name] for name in METHODS}


def workloads(settings: Settings, folder: Path | None) -> tuple[dict[str, Workload], str]:
    """Return the workloads by name, and what names the data."""
    from sklearn.datasets import load_breast_cancer

    cross = optax.softmax_cross_entropy_with_integer_labels
    data = load(folder, train=settings.train, test=settings.test)
    sizes = (data.x[0].size, settings.width, data.classes)
    digits = Workload(
        lambda key: perceptron.init(key, sizes),
        lambda params, batch: cross(perceptron.logits(params, batch[0]), batch[1]).mean(),
        (shifted(data.x), np.tile(data.y, 9)),
        (shifted(data.x_test)[::9], np.tile(data.y_test, 9)[::9]),
    )

    a, b = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(settings.seed).permutation(len(a))
    a, b = ((a - a.mean(0)) / a.std(0))[order].astype(np.float32), b[order].astype(np.float32)
    first = 2 * len(a) // 3

    def logistic(params, batch):
        out = batch[0] @ params["kernel"][:, 0] + params["bias"][0]
        return optax.sigmoid_binary_cross_entropy(out, batch[1]).mean()

    cancer = Workload(
        lambda key: {"kernel": jnp.zeros((a.shape[1], 1)), "bias": jnp.zeros(1)},
        logistic,
        (a[:first], b[:first]),
        (a[first:], b[first:]),
    )

    inputs, units = 32, 16
    keys = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), 1), 4)
    turn = jnp.linalg.qr(jax.random.normal(keys[0], (inputs, inputs)))[0]
    turn = jnp.arange(1.0, inputs + 1)[:, None] ** -0.75 * turn  # eigenvalues 1 to 1/181
    teacher = perceptron.init(keys[1], (inputs, units, 1))

    def net(params, z):
        hidden = jnp.tanh(z @ params["layer_0"]["kernel"] + params["layer_0"]["bias"])
        return (hidden @ params["layer_1"]["kernel"] + params["layer_1"]["bias"])[:, 0]

    def lesson(key, count, noise):
        z = jax.random.normal(key, (count, inputs)) @ turn
        more = jax.random.normal(jax.random.fold_in(key, 1), (count,))
        return z, net(teacher, z) + noise * more

    student = Workload(
        lambda key: perceptron.init(key, (inputs, settings.width, 1)),
        lambda params, batch: jnp.mean((net(params, batch[0]) - batch[1]) ** 2),
        lesson(keys[2], 20_000, 0.1),
        lesson(keys[3], 500, 0.0),
    )

    text, context = characters.load(), 4
    reader = Workload(
        lambda key: characters.init(key, text.classes, context, 16, settings.width),
        lambda params, batch: cross(characters.logits(params, batch[0]), batch[1]).mean(),
        characters.windows(text.train, context),
        tuple(part[::80] for part in characters.windows(text.test, context)),
    )
    name = f"{data.name} {fingerprint(data)}, {text.name} {characters.fingerprint(text)}"
    tasks = [
        task._replace(
            train=jax.tree.map(jnp.asarray, task.train),
            held_out=jax.tree.map(jnp.asarray, task.held_out),
        )
        for task in (digits, cancer, student, reader)
    ]
    return dict(zip(WORKLOADS, tasks, strict=True)), name


def run(settings: Settings, folder: Path | None) -> Run:
    """Train one workload with one optimizer in a step: all rates and seeds in one program."""
    if settings.steps % settings.every:
        raise ValueError(f"steps={settings.steps} is no multiple of {settings.every=}")
    if 0 not in settings.ladder:
        raise ValueError(f"ladder={settings.ladder}: 0, the default rate, is due")
    if not 0 < settings.target < 1:
        raise ValueError(f"target={settings.target}: a number in (0, 1) was due")
    tasks, name = workloads(settings, folder)
    arms = methods(settings)
    base = jax.random.key(settings.seed)
    keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(settings.seeds))
    ladder = settings.factor ** np.array(settings.ladder, float)
    validations = settings.steps // settings.every
    shape = (settings.seeds, validations, settings.every, settings.batch)

    def curve(task: Workload, method: Method, rate, params, batches):
        """Return the loss on the held-out data after every few steps of one run."""
        tx = method.make(lambda t: rate * jnp.minimum(1.0, (t + 1) / settings.warmup))

        def step(carry, batch):
            params, state = carry
            examples = jax.tree.map(lambda x: x[batch], task.train)
            grads = jax.grad(task.loss)(params, examples)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def span(carry, batches):
            params, state = carry = lax.scan(step, carry, batches)[0]
            return carry, task.loss(method.read(state, params), task.held_out)

        return lax.scan(span, (params, tx.init(params)), batches)[1]

    def step(i, state):
        number, arm = i // len(METHODS), METHODS[i % len(METHODS)]
        workload, method = WORKLOADS[number], arms[arm]
        task = tasks[workload]
        one = lambda rate, params, batches: curve(task, method, rate, params, batches)
        rates = jnp.asarray(method.rate * ladder, jnp.float32)
        rng = np.random.default_rng((settings.seed, number))  # the same batches for all optimizers
        batches = rng.integers(len(jax.tree.leaves(task.train)[0]), size=shape)
        given = rates, jax.vmap(task.init)(keys), jnp.asarray(batches, jnp.int32)
        over_seeds = jax.vmap(one, (None, 0, 0))
        over_rates = jax.vmap(over_seeds, (0, None, None))
        if arm in ONE_BY_ONE:
            over_rates = lambda rates, *rest: lax.map(
                lambda rate: lax.map(lambda own: one(rate, *own), rest), rates
            )
        every = jax.jit(over_rates)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*its rank is")  # Fira's on small matrices
            compiled = every.lower(*given).compile()
        began = time.perf_counter()
        losses = np.asarray(compiled(*given), np.float64)
        seconds = (time.perf_counter() - began) / settings.steps
        losses = np.minimum(np.nan_to_num(losses, nan=DIVERGED), DIVERGED)
        row = {
            "workload": workload,
            "method": arm,
            "rates": (method.rate * ladder).round(6).tolist(),
            "milliseconds": round(1000 * seconds, 3),
            "loss": losses.round(5).tolist(),
        }
        return state, [row]

    return Run(lambda: jnp.zeros(()), step, len(WORKLOADS) * len(METHODS), name)


# ----------------------------------------------------------------------------- what it shows


def curves(rows: list[Row], workload: str, method: str) -> np.ndarray:
    """Return the losses (rates, seeds, validations) of an optimizer on a workload."""
    (row,) = (row for row in rows if (row["workload"], row["method"]) == (workload, method))
    return np.array(row["loss"])


def targets(settings: Settings, rows: list[Row]) -> dict[str, float]:
    """Return the loss that AdamW at its best rate reaches in the part of the steps."""
    last = max(int(settings.target * settings.steps) // settings.every, 1)
    best = lambda loss: np.median(loss[:, :, :last].min(2), axis=1).min()
    return {name: float(best(curves(rows, name, ADAMW))) for name in WORKLOADS}


def times(settings: Settings, rows: list[Row]) -> np.ndarray:
    """Return the steps to the target: (methods, workloads, rates, seeds)."""
    goal = targets(settings, rows)
    steps = settings.every * (1 + np.arange(settings.steps // settings.every))

    def each(method, workload):
        loss = curves(rows, workload, method)
        one = lambda metric: optim.reached(steps, metric, goal[workload], maximize=False)
        return [[one(seed) for seed in rate] for rate in loss]

    return np.array([[each(method, name) for name in WORKLOADS] for method in METHODS])


class Scores(NamedTuple):
    """The results of both rulesets.

    steps: with rates tuned by workload, (methods, workloads); tuned: what `algoperf` says of it.
    rate: the calibrated rate of each method, as a position in the ladder.
    one: `algoperf` of one rate for all workloads, the calibrated ones first, then the defaults.
    """

    steps: np.ndarray
    tuned: optim.TimeToResult
    rate: np.ndarray
    one: optim.TimeToResult

    @property
    def calibrated(self) -> np.ndarray:
        """The scores of the calibrated rates."""
        return self.one.score[: len(METHODS)]

    @property
    def default(self) -> np.ndarray:
        """The scores of the default rates."""
        return self.one.score[len(METHODS) :]


def score(settings: Settings, rows: list[Row]) -> Scores:
    """Score all optimizers."""
    found = times(settings, rows)
    steps = np.median(found.min(2), axis=2)
    tuned = optim.algoperf(steps, tau_max=settings.tau_max)
    fixed = np.median(found, axis=3)  # (methods, workloads, rates)
    rate = np.array([optim.calibrate_jointly(each.T, tau_max=settings.tau_max) for each in fixed])
    calibrated = fixed[np.arange(len(METHODS)), :, rate]
    default = fixed[:, :, settings.ladder.index(0)]
    one = optim.algoperf(np.concatenate([calibrated, default]), tau_max=settings.tau_max)
    return Scores(steps, tuned, rate, one)


def ratio(steps: np.ndarray, method: str, other: str) -> float:
    """Return the geometric mean over the workloads of the steps of one over those of another."""
    a, b = steps[METHODS.index(method)], steps[METHODS.index(other)]
    return float(np.exp(np.mean(np.log(a / b)))) if np.isfinite(a).all() else np.inf


def microseconds(settings: Settings, rows: list[Row], method: str) -> float:
    """Return what a step of one run took on the last workload, here and this time."""
    (row,) = (r for r in rows if (r["workload"], r["method"]) == (WORKLOADS[-1], method))
    return 1000 * row["milliseconds"] / (len(settings.ladder) * settings.seeds)


def number(steps: float) -> str:
    """Write steps, that may be infinite."""
    return f"{steps:.0f}" if np.isfinite(steps) else "missed"


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare the scores with the statements of the papers."""
    found = score(settings, rows)
    at = METHODS.index
    tuned, calibrated = found.tuned.score, found.calibrated

    def against(method, other=ADAMW):
        pairs = zip(found.steps[at(method)], found.steps[at(other)], strict=True)
        each = ", ".join(f"{number(a)} and {number(b)}" for a, b in pairs)
        total = ratio(found.steps, method, other)
        many = f"{total:.2f} of {other}'s steps" if np.isfinite(total) else "a target missed"
        return f"{many} (by workload {each})"

    ranking = [METHODS[i] for i in np.argsort(-tuned, kind="stable")]
    half = ranking[: (len(METHODS) + 1) // 2]
    champion = max(WITHOUT_RATE, key=lambda name: calibrated[at(name)])
    best, nadamw = calibrated[at(champion)], calibrated[at(NADAMW)]
    poor = {name: found.default[at(name)] for name in WITHOUT_RATE}
    top = ", ".join(f"{name} {tuned[at(name)]:.2f}" for name in ranking)
    return [
        Claim(
            "SOAP needs fewer steps than AdamW",
            "on every workload",
            against(SOAP),
            bool((found.steps[at(SOAP)] < found.steps[at(ADAMW)]).all()),
        ),
        Claim(
            "SOAP needs over 40% fewer",
            "at most 0.60 of the steps (language models of 360m and 660m)",
            f"{ratio(found.steps, SOAP, ADAMW):.2f}, the geometric mean over the workloads",
            ratio(found.steps, SOAP, ADAMW) <= 0.6,
        ),
        Claim(
            "Fira, of low rank, is as fast as full-rank Adam",
            "at or below its perplexity (LLaMA 60M to 1B): at most 1.1 of the steps",
            f"{against(FIRA)}, at rank {settings.rank}",
            ratio(found.steps, FIRA, ADAMW) <= 1.1,
        ),
        Claim(
            "Lookahead is faster than the optimizer inside it",
            "fewer steps",
            against(LOOKAHEAD),
            ratio(found.steps, LOOKAHEAD, ADAMW) < 1,
        ),
        Claim(
            "AdamW and NadamW are near the top",
            "both in the upper half of the tuned scores",
            top,
            {ADAMW, NADAMW} <= set(half),
        ),
        Claim(
            "No optimizer dominates",
            "none is the fastest on every workload (a score of 1)",
            f"{ranking[0]} is the best, with {tuned.max():.2f}, and the fastest on "
            f"{(found.tuned.ratio[at(ranking[0])] == 1).sum()} of {len(WORKLOADS)} workloads",
            bool(tuned.max() < 1),
        ),
        Claim(
            "With their defaults, methods without a learning rate do poorly",
            "at most half of the score of calibrated NadamW",
            ", ".join(f"{name} {value:.2f}" for name, value in poor.items())
            + f", and NadamW {nadamw:.2f}",
            bool(max(poor.values()) <= nadamw / 2),
        ),
        Claim(
            "Calibrated, the best of them is close to calibrated NadamW, and not above it",
            "0 to 0.2 below",
            f"{champion} {best:.2f}, and NadamW {nadamw:.2f}",
            bool(0 <= nadamw - best <= 0.2),
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw the performance profile, the steps, the scores, and the loss on one workload."""
    found = score(settings, rows)
    figure, (a, b, c, d) = figures.panels(2, 2, (12.4, 8.6))
    palette = (figures.GREY, figures.BLUE, figures.SKY, figures.RED, figures.ORANGE)
    colors = dict(
        zip(METHODS, (*palette, figures.GREEN, figures.PURPLE, "#222", "#222"), strict=True)
    )
    lines = dict.fromkeys(METHODS, "-") | {PRODIGY: "--", DOG: ":", LOOKAHEAD: "-."}
    order = np.argsort(-found.tuned.score, kind="stable")

    tau = np.linspace(1, settings.tau_max, 601)
    for rank, i in enumerate(order):
        name = METHODS[i]
        share = found.tuned.profile(tau)[i] + 0.008 * (len(order) / 2 - rank)  # apart
        a.plot(tau, share, color=colors[name], ls=lines[name], label=name)
    a.set(title="a  Performance profile, rates tuned by workload", ylim=(-0.06, 1.08))
    a.set(
        xlabel="steps, as a multiple of the fewest (colours as in d; lines set a little apart)",
        ylabel="share of workloads at the target",
    )

    shown = np.minimum(found.tuned.ratio, settings.tau_max)[order]
    b.imshow(np.log(shown), cmap="viridis_r", aspect="auto", vmax=np.log(settings.tau_max))
    for j, i in enumerate(order):
        for k, steps in enumerate(found.steps[i]):
            text = number(steps)
            color = "white" if shown[j, k] > 0.55 * settings.tau_max else "black"
            b.text(k, j, text, ha="center", va="center", fontsize=9, color=color)
        cost = f"{microseconds(settings, rows, METHODS[i]):.0f}"
        b.text(len(WORKLOADS), j, cost, ha="center", va="center", fontsize=9, color="#555")
    b.set_xlim(-0.5, len(WORKLOADS) + 0.5)
    b.set_xticks(range(len(WORKLOADS) + 1), [*WORKLOADS, "µs a step"])
    b.set_yticks(range(len(order)), [METHODS[i] for i in order])
    b.grid(visible=False)
    b.set(title="b  Steps to the target (colour: multiple of the fewest)")

    places = np.arange(len(order))[::-1]
    bars = (
        ("tuned by workload", found.tuned.score, figures.BLUE),
        ("one rate, calibrated", found.calibrated, figures.ORANGE),
        ("one rate, the default", found.default, figures.GREY),
    )
    for k, (label, values, color) in enumerate(bars):
        values = np.where((np.array(METHODS) == SGD) & (k == 2), np.nan, values)[order]
        c.barh(places + 0.27 * (1 - k), values, 0.25, color=color, label=label)
        for place, value in zip(places, values, strict=True):
            if value < 0.005:
                c.text(0.005, place + 0.27 * (1 - k), "0", color=color, va="center", fontsize=7.5)
    c.set_yticks(places, [METHODS[i] for i in order])
    c.set(title="c  AlgoPerf score", xlabel="score (1: the fastest everywhere)", xlim=(0, 1))
    c.legend(loc="lower right", framealpha=0.9, frameon=True, edgecolor="none")

    name = WORKLOADS[-1]
    steps = settings.every * (1 + np.arange(settings.steps // settings.every))
    reached = np.median(times(settings, rows)[:, WORKLOADS.index(name)], axis=2)
    for i, method in enumerate(METHODS):
        loss = curves(rows, name, method)
        best = (
            reached[i].argmin() if np.isfinite(reached[i]).any() else loss[..., -1].mean(1).argmin()
        )
        d.plot(steps, np.median(loss[best], axis=0), color=colors[method], ls=lines[method], lw=1.4,
               label=method)  # fmt: skip
    goal = targets(settings, rows)[name]
    d.axhline(goal, color=figures.GREY, ls=":", lw=1.2)
    d.annotate("target", (steps[-1], goal), color="#555", fontsize=8.5, ha="right", va="bottom")
    d.set(title=f"d  Loss on {name}, each at its best rate")
    d.legend(loc="upper right", ncols=2, fontsize=8.5, frameon=True, edgecolor="none")
    low = min(np.median(curves(rows, name, m), axis=1).min() for m in METHODS)
    d.set(xlabel="steps", ylabel="held-out cross-entropy (nats)", ylim=(low - 0.05, goal + 0.9))
    figure.supxlabel(
        f"Steps are medians of {settings.seeds} seeds, in units of {settings.every}. Targets are "
        f"what AdamW reaches in {100 * settings.target:.0f}% of the {settings.steps} steps. "
        f"A step's time: on {WORKLOADS[-1]}, of one run.",
        fontsize=8.5,
        color="#555",
    )
    return figure
