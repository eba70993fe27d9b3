"""The straight line between networks: no obstacle, a barrier, or a permuted basin.

"Qualitatively characterizing neural network optimization problems" finds that the loss falls all
the way along the straight line from the start of a training to its end. Between two trained
networks the line goes over a barrier. "Git Re-Basin: Merging Models modulo Permutation Symmetries"
finds that much of it is the order of the units: after the units of one network are permuted to fit
those of the other, the barrier is low, and lower in wider networks. "The Butterfly Effect: Neural
Network Training Trajectories Are Highly Sensitive to Initial Conditions" asks how little it takes
for two trainings to part: a push of a hundredth of the initial weights, even of a single weight,
at the start, and nothing of that size later on.

Here perceptrons learn the digits by SGD with momentum. The barrier is the largest rise of the
training loss above the segment between its values at both ends. Pairs of all widths are matched by
their weights, by their activations on the training images, and by a gradient through the matching.
A pushed network goes on with the same batches and the same optimizer state as its original.

Ian J. Goodfellow, Oriol Vinyals, Andrew M. Saxe, arXiv 1412.6544.
Samuel K. Ainsworth, Jonathan Hayase, Siddhartha Srinivasa, arXiv 2209.04836.
Gül Sena Altıntaş, Devin Kwok, Colin Raffel, David Rolnick, arXiv 2506.13234.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure

from experiments import Claim, Row, Run, figures
from experiments.data import fingerprint, load
from experiments.perceptron import init, logits
from jaxkit import probes, trace, weights


@dataclass(frozen=True)
class Settings:
    """What is trained, and how it is looked at."""

    train: int = 1000
    """Training images."""
    test: int = 500
    """Test images."""
    seeds: int = 3
    """Pairs of networks of each width, and pushed networks of each time."""
    widths: tuple[int, ...] = (32, 128, 512)
    """Units in each of the two hidden layers of a pair."""
    push_width: int = 64
    """Units in each of the four hidden layers of the networks that are pushed."""
    steps: int = 1200
    """Training steps."""
    batch: int = 64
    """Images in a batch."""
    lr: float = 0.1
    """The highest learning rate: after a warmup of 5% of the steps it falls as a cosine."""
    points: int = 50
    """Places on the line from the start to the end of a training."""
    between: int = 21
    """Places on the line between two networks."""
    learned_steps: int = 60
    """Steps of the gradient through the matching."""
    sigma: float = 0.01
    """The size of a push, 1 being that of the initial weights."""
    push_times: tuple[int, ...] = (0, 20, 50, 100, 200, 400, 800)
    """Steps before which a network is pushed."""
    seed: int = 0
    """The seed that all others come from."""


MATCHINGS = ("none", "weights", "activations", "gradient")


def run(settings: Settings, folder: Path | None) -> Run:
    """Train and compare the pairs, one width after the other; then push networks."""
    if max(settings.push_times) >= settings.steps:
        raise ValueError(f"{settings.push_times=} must be below steps={settings.steps}")
    data = load(folder, train=settings.train, test=settings.test)
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    x_test, y_test = jnp.asarray(data.x_test), jnp.asarray(data.y_test)
    base = jax.random.key(settings.seed)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.lr, settings.steps // 20, settings.steps
    )
    tx = optax.sgd(schedule, momentum=0.9)

    def loss_fn(params, rows=slice(None)):
        out = logits(params, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(out, y[rows]).mean()

    wrong = lambda params: (logits(params, x_test).argmax(1) != y_test).mean()

    def step_of(key):
        """Return a training step on the batches of a key."""

        def step(carry, i):
            params, state = carry
            rows = jax.random.randint(jax.random.fold_in(key, i), (settings.batch,), 0, len(y))
            updates, state = tx.update(jax.grad(loss_fn)(params, rows), state, params)
            return optax.apply_updates(params, updates), state

        return step

    def follow(key, params):
        """Return the end of a training, and 41 networks on the way."""
        step = step_of(key)
        every = np.linspace(0, settings.steps, 41).astype(int)

        def stretch(carry, ends):
            return lax.fori_loop(ends[0], ends[1], lambda i, c: step(c, i), carry), carry[0]

        ends = jnp.stack([every[:-1], every[1:]], 1)
        (params, _), path = lax.scan(stretch, (params, tx.init(params)), ends)
        return params, jax.tree.map(lambda p, last: jnp.concatenate([p, last[None]]), path, params)

    def pair(width):
        """Train two networks a seed, and look at the line from the start to the end of each."""
        sizes = (data.x[0].size, width, width, data.classes)

        def one(key):
            start = init(jax.random.fold_in(key, 0), sizes)
            end, path = follow(jax.random.fold_in(key, 1), start)
            t = jnp.linspace(0, 1, settings.points)
            coordinates = jax.vmap(lambda p: probes.along(p, start, end))(path)
            beyond = jnp.linspace(1, 1.5, 11)
            return end, {
                "t": jnp.concatenate([t, beyond[1:]]),
                "line": probes.line(loss_fn, start, end, jnp.concatenate([t, beyond[1:]])),
                "alpha": coordinates.alpha / coordinates.alpha[-1],
                "beta": coordinates.beta / coordinates.alpha[-1],
            }

        keys = jax.random.split(jax.random.fold_in(base, width), (settings.seeds, 2))
        return jax.vmap(jax.vmap(one))(keys)

    @jax.jit
    def compare(a, b):
        t = jnp.linspace(0, 1, settings.between)
        both = lambda p: jnp.stack([loss_fn(p), wrong(p)])
        curve = probes.line(both, a, b, t)
        distance = optax.tree.norm(optax.tree.sub(a, b))
        return {"loss": curve[:, 0], "error": curve[:, 1], "distance": distance}

    def matched(a, b):
        """Return b in the order of a, for every way to match them."""
        axes, roles = trace.axes(logits, a, x[:2]), trace.roles(logits, a, x[:2])
        tx = optax.adam(1e-2)
        learn = [slice(None)] * settings.learned_steps
        found = {
            "weights": weights.align(a, b, axes),
            "activations": weights.align_activations(logits, a, b, (x,), axes, roles),
            "gradient": weights.align_by_gradient(
                lambda p, _: loss_fn(p), a, b, axes, [0.0 for _ in learn], tx
            ).permutations,
        }
        return {"none": b} | {name: trace.permute(b, axes, p) for name, p in found.items()}

    def curves(a, b) -> Row:
        found = compare(a, b)
        values = lambda v: np.asarray(v, float).round(6).tolist()
        gap = float(probes.barrier(found["loss"]))
        return {name: values(v) for name, v in found.items()} | {"barrier": gap}

    def widths(i) -> list[Row]:
        ends, lines = jax.jit(pair, static_argnums=0)(settings.widths[i])
        rows = []
        for seed in range(settings.seeds):
            a, b = (jax.tree.map(lambda w, s=seed, j=j: w[s, j], ends) for j in range(2))
            looks = jax.tree.map(lambda v, s=seed: np.asarray(v[s], float).tolist(), lines)
            between = {name: curves(a, other) for name, other in matched(a, b).items()}
            width = settings.widths[i]
            rows.append({"kind": "pair", "width": width, "seed": seed} | looks | between)
        return rows

    sizes = (data.x[0].size, *[settings.push_width] * 4, data.classes)
    count = sum(a * b for a, b in pairwise(sizes))
    planned = [(time, settings.sigma, 1.0) for time in settings.push_times]
    planned += [(0, 0.0, 1.0), (0, settings.sigma, 1 / count)]

    @jax.jit
    def pushed(key):
        """Train one network a push, all on the same batches, and the original."""
        start = init(jax.random.fold_in(key, 0), sizes)
        std = jax.tree.map(jnp.std, start)
        step = step_of(jax.random.fold_in(key, 1))

        def one(push):
            time, sigma, fraction = push
            own = jax.random.fold_in(key, 2)

            def with_push(carry, i):
                params, state = carry
                there = probes.perturb(
                    own, params, sigma, std=std, fraction=fraction, where="**/kernel"
                ).params
                now = lambda p, q: jnp.where(i == time, q, p)
                return step((jax.tree.map(now, params, there), state), i), None

            steps = jnp.arange(settings.steps)
            return lax.scan(with_push, (start, tx.init(start)), steps)[0][0]

        lanes = jnp.array([(0, 0.0, 1.0), *planned], jnp.float32)
        return jax.vmap(one)((lanes[:, 0].astype(int), lanes[:, 1], lanes[:, 2]))

    def butterflies() -> list[Row]:
        rows = []
        for seed in range(settings.seeds):
            ends = pushed(jax.random.fold_in(jax.random.fold_in(base, 7), seed))
            nets = [jax.tree.map(lambda w, i=i: w[i], ends) for i in range(len(planned) + 1)]
            axes = trace.axes(logits, nets[0], x[:2])
            for (time, sigma, fraction), net in zip(planned, nets[1:], strict=True):
                back = trace.permute(net, axes, weights.align(nets[0], net, axes))
                rows.append(
                    {"kind": "push", "at": time, "sigma": sigma, "single": fraction < 1}
                    | {"seed": seed, "none": curves(nets[0], net)}
                    | {"weights": curves(nets[0], back)}
                )
        return rows

    def step(i, state):
        return state + 1, widths(i) if i < len(settings.widths) else butterflies()

    start = lambda: jnp.zeros((), jnp.int32)
    return Run(start, step, len(settings.widths) + 1, f"{data.name} {fingerprint(data)}")


# ----------------------------------------------------------------------------- what it shows


def pairs(rows: list[Row], width: int) -> list[Row]:
    """Return the rows of the pairs of a width."""
    return [row for row in rows if row["kind"] == "pair" and row["width"] == width]


def barriers(rows: list[Row], matching: str) -> np.ndarray:
    """Return the barriers of some rows after a matching."""
    return np.array([row[matching]["barrier"] for row in rows])


def pushes(rows: list[Row], sigma: float, single: bool = False) -> dict[int, list[Row]]:
    """Return the rows of the pushes of a size by their time."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        if row["kind"] == "push" and row["sigma"] == sigma and row["single"] == single:
            found.setdefault(row["at"], []).append(row)
    return found


def largest_rise(settings: Settings, row: Row) -> float:
    """Return the largest rise from one place to the next between start and end, of both nets."""
    return float(np.diff(np.array(row["line"])[:, : settings.points], axis=1).max())


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare the runs with the statements of the papers."""
    of = lambda width, matching: barriers(pairs(rows, width), matching).mean()
    low, high = settings.widths[0], settings.widths[-1]
    rises = [largest_rise(settings, row) for row in rows if row["kind"] == "pair"]
    starts = np.mean([np.array(r["line"])[:, 0] for r in rows if r["kind"] == "pair"])
    ratios = {m: [of(w, m) / of(w, "none") for w in settings.widths] for m in MATCHINGS[1:]}
    listed = lambda values: ", ".join(map(figures.percent, values))
    of_push = pushes(rows, settings.sigma)
    early, late = (barriers(of_push[f(of_push)], "none").mean() for f in (min, max))
    again = [row["none"]["distance"] for row in pushes(rows, 0.0)[0]]
    single = barriers(pushes(rows, settings.sigma, True)[0], "none")
    aligned = barriers(of_push[min(of_push)], "weights").mean()
    return [
        Claim(
            "From the start to the end of a training the loss falls all the way",
            "no rise (maxout, convolutional and recurrent networks)",
            f"largest rise {max(rises):.1g}, of a loss of {starts:.1f} at the start",
            max(rises) <= 1e-3,
        ),
        Claim(
            "Between two trained networks there is a barrier",
            "at every width",
            ", ".join(f"{of(w, 'none'):.2f} (width {w})" for w in settings.widths),
            all(of(w, "none") > 0.1 for w in settings.widths),
        ),
        Claim(
            "Matching the weights lowers it, more so in wider networks",
            "to about 0 for wide networks (MNIST, CIFAR-10)",
            f"to {listed(ratios['weights'])} of it (widths {settings.widths})",
            ratios["weights"][-1] < 0.5 and ratios["weights"][-1] < ratios["weights"][0],
        ),
        Claim(
            "Matching the activations does so, too",
            "about as matching the weights does",
            f"to {listed(ratios['activations'])} of it",
            ratios["activations"][-1] < 0.5,
        ),
        Claim(
            "Learning the permutations lowers it most in narrow networks",
            "below matching the weights",
            f"{of(low, 'gradient'):.3f}, and {of(low, 'weights'):.3f} by weights (width {low})",
            bool(of(low, "gradient") < of(low, "weights")),
        ),
        Claim(
            "Without a push a training repeats to the bit",
            "distance 0",
            f"distance {max(again):g}",
            max(again) == 0,
        ),
        Claim(
            "A small push at the start leads to another basin, and late in training it does not",
            "a barrier early, none late (ResNet-20 on CIFAR-10)",
            f"barrier {early:.2g} (step {min(of_push)}), {late:.2g} (step {max(of_push)})",
            bool(early > 100 * max(late, 1e-7)),
        ),
        Claim(
            "A single weight, pushed at the start, is enough",
            "a barrier",
            f"barrier {single.mean():.2g}, from {single.min():.2g} to {single.max():.2g}",
            bool(single.min() > 100 * max(late, 1e-7)),
        ),
        Claim(
            "Matching the weights does not bring the pushed networks together",
            "most of the barrier stays",
            f"{figures.percent(aligned / early)} of it stays (step {min(of_push)}; width {high} "
            f"of independent starts: {figures.percent(ratios['weights'][-1])})",
            bool(aligned > 0.5 * early),
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw the lines, the barriers by width, and those of the pushes."""
    figure, (a, b, c, d) = figures.panels(2, 2, (11, 7.6))
    colors = dict(
        zip(
            MATCHINGS,
            (figures.GREY, figures.BLUE, figures.GREEN, figures.ORANGE),
            strict=True,
        )
    )
    for width, color in zip(
        settings.widths, (figures.SKY, figures.BLUE, figures.PURPLE), strict=False
    ):
        found = pairs(rows, width)
        lines = np.concatenate([np.array(row["line"]) for row in found])
        figures.band(a, found[0]["t"][0], lines.T, color, f"width {width}")
    a.axvline(1, color="#bbb", linewidth=1)
    a.set_yscale("log")
    a.set(title="a  From the start (0) to the end (1), and beyond", xlabel="place on the line")
    a.set_ylabel("training loss")
    a.legend()

    width = settings.widths[-1]
    t = np.linspace(0, 1, settings.between)
    for name, color in colors.items():
        curves = np.array([row[name]["loss"] for row in pairs(rows, width)])
        figures.band(b, t, curves.T, color, "as they are" if name == "none" else f"by {name}")
    b.set(title=f"b  Between two networks of width {width}", xlabel="place on the line")
    b.set_ylabel("training loss")
    b.legend(title="second network matched")

    for name, color in colors.items():
        values = np.array([barriers(pairs(rows, w), name) for w in settings.widths])
        label = "as they are" if name == "none" else f"by {name}"
        c.errorbar(settings.widths, values.mean(1), figures.spread(values), marker="o", color=color,
                   label=label)  # fmt: skip
    c.set_xscale("log", base=2)
    c.set_xticks(settings.widths, [str(w) for w in settings.widths])
    c.set(title="c  The barrier, by width", xlabel="units in a hidden layer", ylabel="barrier")
    c.set_yscale("log")
    c.legend()

    found = pushes(rows, settings.sigma)
    times = sorted(found)
    for name, color, line in (("none", figures.GREY, "-"), ("weights", figures.BLUE, ":")):
        values = np.maximum([barriers(found[time], name) for time in times], 1e-7)
        label = "pushed and original" if name == "none" else "matched by weights"
        figures.band(d, times, values, color, label, marker="o", linestyle=line)
    single = barriers(pushes(rows, settings.sigma, True)[0], "none")
    d.errorbar([0], [single.mean()], figures.spread(single[None]), marker="*", markersize=11,
               color=figures.RED, linestyle="none", label="one weight")  # fmt: skip
    d.set_yscale("log")
    d.set(title=f"d  A push of {settings.sigma:g} of the initial weights")
    d.set_ylabel("barrier (none: 1e-7)")
    d.set_xlabel("step before which it comes")
    d.legend()
    figure.supxlabel(figures.note(settings.seeds), fontsize=8.5, color="#555")
    return figure
