"""One training serves networks of every width.

SortedNet trains nested sub-networks together: in every step a few widths are drawn, and the
gradients of the truncated networks, each on its own mini-batch, are summed. Afterwards the first b
units of each layer are a network by themselves, for any b that was trained. A search in the shared
weights, as in "Structural Pruning of Pre-trained Language Models via Neural Architecture Search",
then finds which combinations of widths are worth their parameters.

Here a multilayer perceptron 64-128-128-10 is trained with Adam on digits, once with sub-networks
and once, with as many gradients, without. All combinations of widths are few enough to evaluate
each, so the true Pareto front is known, and what searches find of it. Networks are chosen on one
part of the held-out images, and judged on the other.

Mojtaba Valipour and others, arXiv 2309.00255; Aaron Klein and others, arXiv 2405.02267.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

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
from jaxkit import masks
from jaxkit.masks import nested, subnets


@dataclass(frozen=True)
class Settings:
    """What is trained and searched, and on what."""

    train: int = 1200
    """Images to train on."""
    test: int = 594
    """Held-out images: half of them to choose networks, half of them to judge those."""
    seeds: int = 4
    """Runs of each kind of training, and of each search."""
    widths: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    """Units that a hidden layer may have; the last is that of the full network."""
    networks: int = 2
    """Sub-networks, and batches, in a training step."""
    steps: int = 1000
    """Adam steps."""
    batch: int = 128
    """Images in a batch."""
    lr: float = 2e-3
    """Learning rate of Adam."""
    evaluations: int = 20
    """Networks that a search may evaluate."""
    seed: int = 0
    """The seed that all others come from."""


SORTED, PLAIN = ARMS = ("sorted", "standard")
CHUNKS = 10
LAYERS = ("hidden_0", "hidden_1")
AXES = {
    "layer_0": {"kernel": (None, LAYERS[0]), "bias": (LAYERS[0],)},
    "layer_1": {"kernel": LAYERS, "bias": (LAYERS[1],)},
    "layer_2": {"kernel": (LAYERS[1], None), "bias": (None,)},
}
REFERENCE = (1.0, 1.0)  # all wrong, at the size of the full network


def run(settings: Settings, folder: Path | None) -> Run:
    """Train all seeds of both kinds together in a few steps; the last step judges and searches."""
    if settings.steps % CHUNKS:
        raise ValueError(f"steps={settings.steps} is no multiple of {CHUNKS}")
    data = load(folder, train=settings.train, test=settings.test)
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    half = settings.test // 2
    held = {
        "validation": (data.x_test[:half], data.y_test[:half]),
        "test": (data.x_test[half:], data.y_test[half:]),
    }
    held = jax.tree.map(jnp.asarray, held)
    width = settings.widths[-1]
    first = partial(init, sizes=(data.x[0].size, width, width, data.classes))
    shapes = jax.eval_shape(first, jax.random.key(0))
    space = nested.sorted_space(shapes, dict.fromkeys(LAYERS, settings.widths), AXES)
    tx = optax.adam(settings.lr)
    base = jax.random.key(settings.seed)
    keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(settings.seeds))

    def loss_fn(params, batch):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    def start():
        params = jax.vmap(first)(keys)
        params = jax.tree.map(lambda w: jnp.stack([w] * len(ARMS)), params)
        return params, jax.vmap(jax.vmap(tx.init))(params)

    def train_one(state, key, p):
        """Take one step; p is the probability of a sub-network in place of the full network."""
        params, opt_state = state
        which, examples = jax.random.split(key)
        index = jax.random.randint(examples, (settings.networks, settings.batch), 0, len(x))
        drawn = nested.draw(which, space, settings.networks, p=p)
        losses, grads = nested.subnet_grad(loss_fn, params, drawn, (x[index], y[index]), AXES)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), losses.mean()

    @jax.jit
    def chunk(state, i):
        def step(state, number):
            own = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 1), number))
            every = jax.vmap(jax.vmap(train_one, (0, 0, None)), (0, None, 0))
            return every(state, own(keys), jnp.array([1.0, 0.0]))

        n = settings.steps // CHUNKS
        state, losses = lax.scan(step, state, i * n + jnp.arange(n))
        return state, losses.mean(0)

    def errors(params, unit_mask):
        """Return the errors of a sub-network, by set."""
        small = masks.apply(params, nested.subnet(params, unit_mask, AXES))
        wrong = lambda x, y: (logits(small, x).argmax(1) != y).mean()
        return {name: wrong(*images) for name, images in held.items()}

    grid = list(product(range(len(settings.widths)), repeat=len(LAYERS)))
    entries = [
        subnets.entries(shapes, jax.tree.map(np.asarray, space.masks(jnp.array(v))), AXES)
        for v in grid
    ]

    @jax.jit
    def judge(params):
        over_seeds = jax.vmap(lambda p, v: errors(p, space.masks(v)), (0, None))
        over_arms = jax.vmap(over_seeds, (0, None))
        return lax.map(lambda v: over_arms(params, v), jnp.array(grid))

    def step(i, state):
        if i < CHUNKS:
            state, losses = chunk(state, i)
            losses = np.asarray(losses, np.float64).round(5)
            done = (i + 1) * settings.steps // CHUNKS
            each = zip(ARMS, losses, strict=True)
            return state, [{"steps": done, "arm": arm, "loss": loss.tolist()} for arm, loss in each]
        found = {name: np.asarray(e, np.float64) for name, e in judge(state[0]).items()}
        rows: list[Row] = [
            {
                "arm": arm,
                "widths": [settings.widths[k] for k in vector],
                "entries": entries[j],
                **{name: error[j, a].round(5).tolist() for name, error in found.items()},
            }
            for a, arm in enumerate(ARMS)
            for j, vector in enumerate(grid)
        ]
        one = jax.jit(lambda params, unit_mask: errors(params, unit_mask)["validation"])
        for name, search in (("random", subnets.random_search), ("local", subnets.local_search)):
            for s in range(settings.seeds):
                params = jax.tree.map(lambda w, s=s: w[ARMS.index(SORTED), s], state[0])

                def objective(unit_mask, params=params):
                    count = subnets.entries(shapes, jax.tree.map(np.asarray, unit_mask), AXES)
                    return float(one(params, unit_mask)), count / entries[-1]

                key = jax.random.fold_in(keys[s], 2)
                points = search(key, space, objective, settings.evaluations).points
                rows.append({"search": name, "seed": s, "points": points.round(5).tolist()})
        return state, rows

    return Run(jax.jit(start), step, CHUNKS + 1, f"{data.name} {fingerprint(data)}")


# ---------------------------------------------------------------------------- what was found


def networks(rows: list[Row], arm: str):
    """Return the widths (n, 2), the parts of the full size (n,) and the errors (n, seeds)."""
    own = [row for row in rows if row.get("arm") == arm and "entries" in row]
    size = np.array([row["entries"] for row in own], float)
    errors = {name: np.array([row[name] for row in own]) for name in ("validation", "test")}
    return np.array([row["widths"] for row in own]), size / size.max(), errors


def uniform(rows: list[Row], arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the widths that both layers share, and the test accuracies (widths, seeds)."""
    widths, _, errors = networks(rows, arm)
    same = widths[:, 0] == widths[:, 1]
    return widths[same, 0], 1 - errors["test"][same]


def volumes(settings: Settings, rows: list[Row], search: str) -> np.ndarray:
    """Return the part of the true front's hypervolume found by each evaluation, (n, seeds)."""
    _, size, errors = networks(rows, SORTED)
    reference = jnp.array(REFERENCE)
    volume = jax.jit(lambda points: subnets.hypervolume(points, reference))
    out = []
    for row in rows:
        if row.get("search") == search:
            every = np.stack([errors["validation"][:, row["seed"]], size], 1)
            best = float(volume(every.astype(np.float32)))
            points = np.array(row["points"], np.float32)
            so_far = [
                np.where(np.arange(len(points))[:, None] <= i, points, np.inf)
                for i in range(len(points))
            ]
            out.append([float(volume(p)) / best for p in so_far])
    return np.array(out).T


def smallest(settings: Settings, rows: list[Row], arm: str, drop: float = 0.05):
    """Choose on validation the smallest network that loses less than `drop` of the accuracy.

    Returns its part of the full size and its part of the full test accuracy, for each seed.
    """
    _, size, errors = networks(rows, arm)
    accuracy = {name: 1 - e for name, e in errors.items()}
    kept = accuracy["validation"] >= (1 - drop) * accuracy["validation"][size.argmax()]
    chosen = np.where(kept, size[:, None], np.inf).argmin(0)
    seeds = np.arange(len(chosen))
    full = accuracy["test"][size.argmax()]
    return size[chosen], accuracy["test"][chosen, seeds] / full


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare the runs with the statements of the papers."""
    widths, sorted_ = uniform(rows, SORTED)
    _, plain = uniform(rows, PLAIN)
    wide = widths >= widths[-1] / 8
    narrow = int(np.flatnonzero(wide)[0])
    ratio = (sorted_ / sorted_[-1])[wide].min()
    loss = plain[-1].mean() - sorted_[-1].mean()
    size, kept = smallest(settings, rows, SORTED)
    plain_size, _ = smallest(settings, rows, PLAIN)
    local, random = (volumes(settings, rows, name)[-1] for name in ("local", "random"))
    return [
        Claim(
            "Sub-networks perform nearly as the full network does",
            "at least 96% of its accuracy; here from an eighth of the width on",
            f"{percent(ratio)} (the lowest of widths from {widths[narrow]} and of "
            f"{settings.seeds} seeds)",
            bool(ratio >= 0.96),
        ),
        Claim(
            "Truncated after standard training, they do not",
            f"below 75% at width {widths[narrow]}",
            f"{percent(plain[narrow].mean())}, and {percent(sorted_[narrow].mean())} if sorted",
            bool(plain[narrow].mean() < 0.75),
        ),
        Claim(
            "The full network does not suffer from the others",
            "at most 1.5 points less accuracy",
            f"{100 * loss:.1f} points ({percent(plain[-1].mean())} to "
            f"{percent(sorted_[-1].mean())})",
            bool(loss <= 0.015),
        ),
        Claim(
            "Half of the parameters can go at less than 5% lower performance",
            "at most 50% of the parameters, at least 95% of the test accuracy",
            f"{percent(size.mean())} of the parameters, {percent(kept.mean())} of the accuracy",
            bool(size.mean() <= 0.5 and kept.mean() >= 0.95),
        ),
        Claim(
            "Training with sub-networks is what makes the small ones good",
            "standard training needs at least twice the parameters for the same",
            f"{percent(plain_size.mean())} of the parameters, not {percent(size.mean())}",
            bool(plain_size.mean() >= 2 * size.mean()),
        ),
        Claim(
            "A search evaluates few of the networks to come near to the true front",
            f"95% of its hypervolume, with {settings.evaluations} of {len(widths) ** 2}",
            f"{percent(local.mean())} by local search, {percent(random.mean())} at random",
            bool(local.mean() >= 0.95),
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw accuracy by width, all sub-networks with their front, and what searches find."""
    figure, (a, b, c) = figures.panels(1, 3, (12, 3.9))
    colors = {SORTED: figures.BLUE, PLAIN: figures.RED}
    labels = {SORTED: "trained with sub-networks", PLAIN: "trained alone, then truncated"}
    for arm in ARMS:
        widths, accuracy = uniform(rows, arm)
        figures.band(a, widths, 100 * accuracy, colors[arm], labels[arm], marker="o", markersize=4)
    a.set_xscale("log", base=2)
    a.set_xticks(widths, [str(w) for w in widths])
    a.set_ylim(0, 128)
    a.set_yticks(range(0, 101, 20))
    a.set(title="a  Truncation", xlabel="units kept in both hidden layers")
    a.set_ylabel("test accuracy (%)")
    a.legend(loc="upper left")

    for arm in ARMS:
        _, size, errors = networks(rows, arm)
        error = np.maximum(errors["validation"][:, 0], 1 / settings.test)  # half an image, for none
        front = np.asarray(subnets.pareto(np.stack([error, size], 1)))
        front = np.flatnonzero(front)[np.argsort(size[front])]
        b.scatter(100 * size, 100 * error, 12, color=colors[arm], alpha=0.45, linewidths=0)
        b.step(100 * size[front], 100 * error[front], where="post", color=colors[arm])
    b.set(xscale="log", yscale="log", title="b  The sub-networks of one run")
    b.set_xticks((1, 3, 10, 30, 100), ["1", "3", "10", "30", "100"])
    b.set_yticks((1, 3, 10, 30, 100), ["1", "3", "10", "30", "100"])
    b.minorticks_off()
    note = "lines: fronts of error and size\n(no error: drawn as half an image)"
    b.annotate(note, (0.05, 0.06), xycoords="axes fraction", color="#555", fontsize=8.5)
    b.set(xlabel="parameters (% of the full network)", ylabel="validation error (%)")

    number = 1 + np.arange(settings.evaluations)
    for name, color in (("local", figures.GREEN), ("random", figures.GREY)):
        found = 100 * volumes(settings, rows, name)
        figures.band(c, number, found, color, f"{name} search")
    c.axhline(100, color=figures.GREY, linestyle=":", linewidth=1.2)
    c.set(title="c  Search in the shared weights", xlabel="networks evaluated")
    c.set(ylabel="hypervolume (% of the true front's)", ylim=(None, 101))
    c.legend(loc="lower right")
    figure.supxlabel(figures.note(settings.seeds), fontsize=8.5, color="#555")
    return figure
