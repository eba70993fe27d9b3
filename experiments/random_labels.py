"""Networks fit random labels.

"Understanding deep learning requires rethinking generalization" trains the same network on the
true labels and on five corruptions of the data, drawn once: random labels, a part of the labels
random, one shuffle of the pixels for all images, a shuffle for every image, and Gaussian noise in
place of the images. The network fits all of them, with and without explicit regularization, so
what it *can* fit does not explain why it generalizes. The same was proved by construction: two
layers with 2n + d weights fit any labels of n examples in d dimensions.

Here a multilayer perceptron is trained with SGD and momentum on digits, every condition and every
seed in one program. The paper's figures are of CIFAR-10 and larger networks. One of its statements
needs a larger network here, too: with random shifts, the default one cannot fit random labels in
its time, and 512 units can (``--width 512 --epochs 600 --lr-decay 0.995`` reached 100% with one
seed).

Chiyuan Zhang, Samy Bengio, Moritz Hardt, Benjamin Recht, Oriol Vinyals, arXiv 1611.03530.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cache, partial
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
from experiments.figures import count, percent
from experiments.perceptron import init, logits
from jaxkit import data as corruptions
from jaxkit import tree


@dataclass(frozen=True)
class Settings:
    """What is trained, and on what."""

    train: int = 1408
    """Images to train on."""
    test: int = 389
    """Images to test on."""
    seeds: int = 5
    """Runs of every condition, each with its own corruption and initialization."""
    epochs: int = 140
    """Passes over the training images."""
    width: int = 128
    """Units in each hidden layer."""
    depth: int = 2
    """Hidden layers."""
    batch: int = 128
    """Images in a batch."""
    lr: float = 0.1
    """Learning rate of SGD."""
    lr_decay: float = 0.99
    """What the learning rate is multiplied by after every epoch."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Coefficient of the L2 penalty, where it is on."""
    shift: int = 1
    """Pixels by which images are shifted at random, at most, where it is on."""
    corruption: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    """Fractions of random labels between none and all."""
    epochs_per_step: int = 5
    """Epochs between two tests."""
    seed: int = 0
    """The seed that all others come from."""


class Cell(NamedTuple):
    """One condition: which images, what part of the labels is random, what regularizes."""

    name: str
    images: int = 0  # a row of IMAGES
    p: float = 0.0
    decay: bool = False
    shift: bool = False


IMAGES = ("as they are", "shuffled pixels", "random pixels", "Gaussian noise")
FIVE = ("true labels", "shuffled pixels", "random pixels", "Gaussian noise", "random labels")
REGULARIZED = {
    "none": ("true labels", "random labels"),
    "weight decay": ("true labels, decay", "random labels, decay"),
    "shifts": ("true labels, shifts", "random labels, shifts"),
    "both": ("true labels, decay, shifts", None),
}


def cells(settings: Settings) -> list[Cell]:
    """Return the conditions, the uncorrupted first."""
    return [
        Cell("true labels"),
        *(Cell(name, images) for images, name in enumerate(IMAGES[1:], 1)),
        *(Cell(f"{100 * p:g}% random labels", p=p) for p in settings.corruption),
        Cell("random labels", p=1.0),
        Cell("true labels, decay", decay=True),
        Cell("true labels, shifts", shift=True),
        Cell("true labels, decay, shifts", decay=True, shift=True),
        Cell("random labels, decay", p=1.0, decay=True),
        Cell("random labels, shifts", p=1.0, shift=True),
    ]


# ------------------------------------------------------------------------------- the runs


def run(settings: Settings, folder: Path | None) -> Run:
    """Train every condition and seed together; a step is a few epochs and a test."""
    data = load(folder, train=settings.train, test=settings.test)
    if settings.batch > settings.train:
        raise ValueError(f"batch={settings.batch} is more than train={settings.train}")
    if settings.epochs % settings.epochs_per_step:
        raise ValueError(f"epochs={settings.epochs} is no multiple of {settings.epochs_per_step=}")
    every = cells(settings)
    names = [cell.name for cell in every]
    column = {
        field: jnp.array([getattr(cell, field) for cell in every]) for field in Cell._fields[1:]
    }
    base = jax.random.key(settings.seed)
    seeds = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(settings.seeds))
    draw = partial(corrupted, classes=data.classes, ps=column["p"])

    @cache
    def sets():
        over_seeds = jax.jit(jax.vmap(draw, (0, None, None, None)))
        return over_seeds(seeds, data.x, data.y, data.x_test)

    sizes = (data.x[0].size, *[settings.width] * settings.depth, data.classes)

    def optimizer(decay):
        batches = settings.train // settings.batch
        lr = optax.exponential_decay(settings.lr, batches, settings.lr_decay, staircase=True)
        penalty = optax.add_decayed_weights(settings.weight_decay * decay, mask=tree.select)
        return optax.chain(penalty, optax.sgd(lr, settings.momentum))

    def start():
        params = jax.vmap(lambda key: init(jax.random.fold_in(key, 1), sizes))(seeds)
        params = jax.tree.map(lambda w: jnp.broadcast_to(w, (len(every), *w.shape)), params)
        return params, jax.vmap(jax.vmap(optimizer(0.0).init))(params)

    def train_one(state, image_set, y, images, decay, shift, order, key):
        """Take one SGD step of one run."""
        params, opt_state = state
        x, y = image_set[images, order], y[order]
        x = jnp.where(shift, moved(key, x, settings.shift), x)

        def loss_fn(params):
            out = logits(params, x)
            loss = optax.softmax_cross_entropy_with_integer_labels(out, y).mean()
            return loss, (out.argmax(1) == y).mean()

        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer(decay).update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (loss, accuracy)

    def test_one(params, image_set, y, images):
        return (logits(params, image_set[images]).argmax(1) == y).mean()

    def over_seeds_and_cells(fn, seed_axes, cell_axes):
        return jax.vmap(jax.vmap(fn, seed_axes), cell_axes)

    train_all = over_seeds_and_cells(
        train_one, (0, 0, 0, None, None, None, 0, 0), (0, None, 1, 0, 0, 0, None, None)
    )
    test_train = over_seeds_and_cells(test_one, (0, 0, 0, None), (0, None, 1, 0))
    test_test = over_seeds_and_cells(test_one, (0, 0, None, None), (0, None, None, 0))

    @jax.jit
    def epochs(sets, first, state):
        def epoch(state, number):
            keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 2), number))(
                seeds
            )
            used = settings.train // settings.batch * settings.batch
            order = jax.vmap(lambda key: jax.random.permutation(key, settings.train)[:used])(keys)
            order = order.reshape(len(seeds), -1, settings.batch).swapaxes(0, 1)

            def batch(state, now):
                i, order = now
                shifts = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
                own = (column["images"], column["decay"], column["shift"])
                return train_all(state, sets["x"], sets["y"], *own, order, shifts)

            state, measured = lax.scan(batch, state, (jnp.arange(len(order)), order))
            return state, jax.tree.map(lambda m: m.mean(0), measured)

        numbers = first + jnp.arange(settings.epochs_per_step)
        state, (loss, accuracy) = lax.scan(epoch, state, numbers)
        train = test_train(state[0], sets["x"], sets["y"], column["images"])
        test = test_test(state[0], sets["x_test"], data.y_test, column["images"])
        return state, (loss, accuracy, train, test)

    def step(i, state):
        first = i * settings.epochs_per_step
        state, measured = epochs(sets(), first, state)
        loss, accuracy, train, test = (np.asarray(m, np.float64).round(5) for m in measured)
        batches = settings.train // settings.batch
        hardest = np.asarray(sets()["y"][0, names.index("random labels")])
        rows: list[Row] = [construction(seeds[0], data.x, hardest, data.classes)] if i == 0 else []
        for e in range(settings.epochs_per_step):
            for c, cell in enumerate(every):
                row: Row = {"steps": (first + e + 1) * batches, "condition": cell.name}
                row |= {"loss": loss[e, c].tolist(), "accuracy": accuracy[e, c].tolist()}
                if e + 1 == settings.epochs_per_step:
                    row |= {"train": train[c].tolist(), "test": test[c].tolist()}
                rows.append(row)
        return state, rows

    return Run(
        jax.jit(start),
        step,
        settings.epochs // settings.epochs_per_step,
        f"{data.name} {fingerprint(data)}",
    )


def corrupted(key, x, y, x_test, *, classes, ps):
    """Return the images of every kind, to train and to test, and the labels of every condition."""
    key = jax.random.fold_in(key, 0)
    images, any_labels = jnp.concatenate([x, x_test]), jnp.zeros(len(x) + len(x_test))
    moments = {"mean": x.mean((0, 1, 2)), "std": x.std((0, 1, 2))}
    kinds = jnp.stack(
        [
            images,
            corruptions.shuffled_pixels(key, images, any_labels)[0],
            corruptions.random_pixels(key, images, any_labels)[0],
            corruptions.gaussian(key, images, any_labels, **moments)[0],
        ]
    )
    labels = jax.vmap(lambda p: corruptions.random_labels(key, x, y, classes=classes, p=p)[1])(ps)
    return {"x": kinds[:, : len(x)], "x_test": kinds[:, len(x) :], "y": labels}


def moved(key, images, most):
    """Shift every image by up to `most` pixels in each direction; zeros come in."""

    def one(image, offset):
        padded = jnp.pad(image, ((most, most), (most, most), (0, 0)))
        return lax.dynamic_slice(padded, (*offset, 0), image.shape)

    return jax.vmap(one)(images, jax.random.randint(key, (len(images), 2), 0, 2 * most + 1))


def construction(key, x, y, classes) -> Row:
    """Fit the labels with the two-layer network of 2n + d weights."""
    x, first = np.unique(x.reshape(len(x), -1), axis=0, return_index=True)
    net = corruptions.two_layer(key, x, y[first])
    error = np.abs(corruptions.evaluate(net, x) - y[first]).max()
    n, d = x.shape
    return {
        "n": n,
        "d": d,
        "classes": classes,
        "weights": sum(part.size for part in net),
        "error": float(error),
    }


# ----------------------------------------------------------------------------- what it shows


class Curves(NamedTuple):
    """One condition: (epochs,) steps; (epochs, seeds) loss and accuracy; (seeds,) at the end."""

    steps: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    train: np.ndarray
    test: np.ndarray


def curves(rows: list[Row]) -> dict[str, Curves]:
    """Gather the rows by condition."""
    own = defaultdict(list)
    for row in rows:
        if "condition" in row:
            own[row["condition"]].append(row)
    return {
        name: Curves(
            *(np.array([row[key] for row in found]) for key in ("steps", "loss", "accuracy")),
            *(np.array(found[-1][key]) for key in ("train", "test")),
        )
        for name, found in own.items()
    }


def time_to_fit(curve: Curves) -> np.ndarray:
    """Return, for each seed, the steps until an epoch passes without an error, or inf."""
    perfect = curve.accuracy >= 1
    return np.where(perfect.any(0), curve.steps[perfect.argmax(0)], np.inf)


def sweep(settings: Settings) -> dict[float, str]:
    """Return the conditions with a part of the labels random, by that part."""
    return {cell.p: cell.name for cell in cells(settings) if cell[1] == cell[3] == cell[4] == 0}


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare the runs with the statements of the paper."""
    built, found = rows[0], curves(rows)
    chance = 1 / built["classes"]
    true, random = found["true labels"], found["random labels"]
    images = [found[name] for name in FIVE[1:4]]
    best = max((found[name].test.mean() for name, _ in REGULARIZED.values()), default=0.0)
    times = [time_to_fit(curve).mean() for curve in (true, random)]
    slower = times[1] / times[0] if np.isfinite(times[0]) else np.inf
    noise = np.maximum(*(time_to_fit(found[name]) for name in FIVE[2:4]))
    errors = [1 - found[name].test.mean() for name in sweep(settings).values()]
    decayed, moved_ = found["random labels, decay"], found["random labels, shifts"]

    def trained(*curves: Curves) -> str:
        lowest = min(curve.train.min() for curve in curves)
        return f"{percent(lowest)} (the lowest of {settings.seeds} seeds)"

    def complete(*curves: Curves) -> bool:
        return min(curve.train.min() for curve in curves) >= 0.999

    return [
        Claim(
            "The network fits random labels completely",
            "training accuracy 100%",
            trained(random),
            complete(random),
        ),
        Claim(
            "From random labels it learns nothing that helps on new images",
            f"test accuracy at chance, {percent(chance)} (within 5 points)",
            percent(random.test.mean()),
            abs(random.test.mean() - chance) < 0.05,
        ),
        Claim(
            "It fits shuffled pixels, random pixels and Gaussian noise completely",
            "training accuracy 100%",
            trained(*images),
            complete(*images),
        ),
        Claim(
            "Noise in place of the images is fitted sooner than random labels are",
            "fewer steps, for every seed",
            f"{count(noise.mean())}, and {count(times[1])}",
            bool((noise < time_to_fit(random)).all()),
        ),
        Claim(
            "Random labels take only a small factor longer to fit than true labels",
            "1 to 4 times on CIFAR-10; below 10 here",
            f"{slower:.1f} times the steps to the first epoch without an error: "
            f"{count(times[1])}, and {count(times[0])}",
            bool(slower < 10),
        ),
        Claim(
            "Test error grows steadily with the part of the labels that is random",
            "every step of the sweep has a larger error",
            "from " + " to ".join(percent(error) for error in errors),
            bool((np.diff(errors) > 0).all()),
        ),
        Claim(
            "True labels generalize without explicit regularization, which adds little",
            "3.3 points of test accuracy (85.8 to 89.1%, Inception on CIFAR-10); below 5 here",
            f"{100 * (best - true.test.mean()):.1f} points "
            f"({percent(true.test.mean())} to {percent(best)})",
            best - true.test.mean() < 0.05,
        ),
        Claim(
            "Weight decay does not keep the network from fitting random labels",
            "training accuracy 100%",
            trained(decayed),
            complete(decayed),
        ),
        Claim(
            "Nor do random crops (here: shifts)",
            "training accuracy 99.9% (Inception on CIFAR-10); above 99% here",
            trained(moved_),
            moved_.train.min() >= 0.99,
        ),
        Claim(
            "Two layers with 2n + d weights fit any labels of n examples in d dimensions",
            f"{2 * built['n'] + built['d']} weights, every error below 1e-6",
            f"{built['weights']} weights, largest error {built['error']:.0e} on {built['n']} "
            "random labels",
            built["weights"] == 2 * built["n"] + built["d"] and built["error"] < 1e-6,
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw the figure 1 of the paper, and its comparison of regularizers."""
    found = curves(rows)
    figure, (a, b, c, d) = figures.panels(2, 2, (10, 7.4))

    colors = (figures.BLUE, figures.GREEN, figures.ORANGE, figures.PURPLE, figures.RED)
    dashes = ("-", (0, (4, 2)), "-", (0, (1, 1.2)), "-")
    for name, color, dash in zip(FIVE, colors, dashes, strict=True):
        figures.band(a, found[name].steps, found[name].loss, color, name, linestyle=dash)
    slowest = time_to_fit(found["random labels"]).max()
    a.set_xlim(0, min(1.4 * slowest, found["random labels"].steps[-1]))
    a.set_ylim(bottom=0)
    a.set(title="a  Every corruption is fitted", xlabel="SGD steps")
    a.set_ylabel("training loss (nats)")
    a.legend()

    parts = np.array(list(sweep(settings)))
    swept = [found[name] for name in sweep(settings).values()]
    base = time_to_fit(found["true labels"]).mean()
    times = np.stack([time_to_fit(curve) for curve in swept])
    factors = np.where(np.isfinite(times), times, np.nan) / base
    errors = 100 * np.stack([1 - curve.test for curve in swept])
    for axes, values, color in ((b, factors, figures.RED), (c, errors, figures.BLUE)):
        shown = np.isfinite(values).all(1)
        axes.errorbar(
            100 * parts[shown],
            values[shown].mean(1),
            figures.spread(values[shown]),
            color=color,
            marker="o",
        )
        axes.set_xlabel("labels replaced by random ones (%)")
        axes.set_ylim(bottom=0)
    b.set(title="b  Fitting random labels takes longer", ylabel="time to fit (true labels = 1)")
    c.set(title="c  Test error grows with the corruption", ylabel="test error (%)")
    chance = 100 * (1 - 1 / rows[0]["classes"])
    c.axhline(chance, color=figures.GREY, linestyle=":", linewidth=1.2)
    c.annotate("chance", (0, chance), (2, -3), textcoords="offset points", va="top", color="#555")

    bars = [("true", kind, name) for kind, (name, _) in REGULARIZED.items()]
    bars += [("random", kind, name) for kind, (_, name) in REGULARIZED.items() if name]
    places = np.arange(len(bars)) + np.array([0.6 * (label == "random") for label, *_ in bars])
    fields = (("train", "training", figures.SKY, -0.2), ("test", "test", figures.BLUE, 0.2))
    for field, label, color, offset in fields:
        values = 100 * np.stack([getattr(found[name], field) for *_, name in bars])
        d.bar(
            places + offset,
            values.mean(1),
            0.38,
            color=color,
            label=label,
        )
        d.errorbar(
            places + offset, values.mean(1), figures.spread(values), fmt="none", color="#333"
        )
    d.set_xticks(places, [kind.replace(" ", "\n") for _, kind, _ in bars])
    d.grid(axis="x", visible=False)
    d.set_ylim(0, 112)
    d.set(title="d  With and without explicit regularization", ylabel="accuracy (%)")
    for label in ("true", "random"):
        middle = np.mean(
            [place for place, bar in zip(places, bars, strict=True) if bar[0] == label]
        )
        d.annotate(
            f"{label} labels",
            (middle, 0),
            (0, -36),
            ("data", "axes fraction"),
            "offset points",
            ha="center",
            va="top",
            fontweight="bold",
        )
    d.legend(ncols=2, loc="upper right")
    figure.supxlabel(figures.note(settings.seeds), fontsize=8.5, color="#555")
    return figure
