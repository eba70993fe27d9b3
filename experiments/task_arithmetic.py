"""Task vectors add up, and get in each other's way.

"Editing Models with Task Arithmetic" fine-tunes one pretrained model on several tasks. The
difference to the pretrained weights is the task's vector: added, the model learns the task;
subtracted, it forgets it and keeps the others; and the sum of many vectors is one model for many
tasks. The more there are, the more they interfere. TIES-Merging (which trims, and elects signs),
DARE (which drops at random), Model Breadcrumbs (which masks both tails) and PCB-Merging (which lets
entries compete) say how to lose less.

Here a perceptron is pretrained on a few digits in all positions of a square, and fine-tuned on
digits in one of them: as they are, turned by a quarter, turned by a half, ..., all by one head. The
scale of the merged vectors is chosen on held-out images, all scales in one program. An average,
a Fisher-weighted average and Model Stock have no scale: for them it is 1. An accuracy is normalized
by that of the model that was fine-tuned on the task.

Trimming is no gain here. All weights of so small a network move, and with six tasks TIES,
Breadcrumbs and PCB are a point below the plain sum, with 512 units as with 128. But with a scale
that was chosen for two tasks, PCB and TIES lose far less than the sum as tasks are added.

Gabriel Ilharco, Marco Tulio Ribeiro, Mitchell Wortsman, Suchin Gururangan, Ludwig Schmidt, Hannaneh
Hajishirzi, Ali Farhadi, arXiv 2212.04089. TIES: arXiv 2306.01708. DARE: arXiv 2311.03099. DAREx:
arXiv 2410.09344. Breadcrumbs: arXiv 2312.06795. PCB: arXiv 2410.02396. Fisher: arXiv 2111.09832.
Model Stock: arXiv 2403.19522.
"""

from dataclasses import dataclass
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
from jaxkit import weights


@dataclass(frozen=True)
class Settings:
    """What is fine-tuned and merged."""

    pretrain: int = 100
    """Images to pretrain on."""
    train: int = 700
    """Images to fine-tune on."""
    held_out: int = 300
    """Images to choose scales by."""
    test: int = 400
    """Images to test on."""
    tasks: int = 6
    """Positions of the digits, at most the 8 of a square."""
    seeds: int = 3
    """Pretrained models."""
    hidden: int = 2
    """Hidden layers."""
    width: int = 128
    """Units in each of them."""
    pretrain_steps: int = 200
    """Steps of pretraining, by SGD with momentum at a learning rate of 0.05."""
    steps: int = 200
    """Steps of fine-tuning, by Adam."""
    lr: float = 1e-3
    """The learning rate of fine-tuning."""
    batch: int = 64
    """Images in a batch."""
    subsets: int = 2
    """Sets of n of the tasks that are merged, for each n."""
    scales: tuple[float, ...] = (
        0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0,
    )  # fmt: skip
    """Scales of the merged vectors; 1 is one of them."""
    drop_rate: float = 0.97
    """What DARE drops of a single vector; of merged ones it drops half."""
    seed: int = 0
    """The seed that all others come from."""


STYLES = {
    "task arithmetic": (figures.BLUE, "o"),
    "TIES": (figures.RED, "s"),
    "DARE": (figures.SKY, "v"),
    "DARE + TIES": (figures.PURPLE, "^"),
    "Breadcrumbs": (figures.ORANGE, "D"),
    "PCB": (figures.GREEN, "P"),
    "average": (figures.GREY, "x"),
    "Fisher average": (figures.GREY, "+"),
    "Model Stock": (figures.GREY, "_"),
}
WITHOUT_SCALE = ("average", "Fisher average", "Model Stock")


def divisors(settings: Settings) -> np.ndarray:
    """Return the q of DAREx, from 1 - p, that of DARE, to 1."""
    return (1 - settings.drop_rate) ** np.linspace(1, 0, 13)


def turned(images, task: int):
    """Turn images by quarters; from the fifth task on, mirrored ones."""
    images = images[:, :, ::-1] if task >= 4 else images
    return jnp.rot90(images, task % 4, (1, 2))


def masked(fishers, key, mask) -> dict[str, weights.Method]:
    """Return the ways to merge in which a weight of 0 leaves a model out."""
    add = weights.task_arithmetic(mask)
    half = lambda then: weights.dare(key, drop_rate=0.5, then=then)
    return {
        "task arithmetic": add,
        "TIES": weights.ties(weights=mask),
        "DARE": half(add),
        "DARE + TIES": half(weights.ties(sparsity=0, weights=mask)),
        "Breadcrumbs": weights.breadcrumbs(then=add),
        "average": weights.average(mask),
        "Fisher average": weights.fisher_average(fishers, weights=mask),
    }


def counted() -> dict[str, weights.Method]:
    """Return those that depend on how many models there are."""
    return {"PCB": weights.pcb(), "Model Stock": weights.model_stock()}


def run(settings: Settings, folder: Path | None) -> Run:
    """Fine-tune on every task and look at single vectors; then merge two, three, ... of them."""
    if not 2 <= settings.tasks <= 8:
        raise ValueError(f"tasks={settings.tasks}: 2 to 8 positions of a square are due")
    if 1.0 not in settings.scales:
        raise ValueError("scales: 1 has to be one of them")
    sizes = (settings.pretrain, settings.train, settings.held_out)
    data = load(folder, train=sum(sizes), test=settings.test)
    if data.x.shape[1] != data.x.shape[2]:
        raise ValueError(f"{data.name} has images of {data.x.shape[1:3]}; squares are due")
    order = np.random.default_rng(settings.seed).permutation(sum(sizes))
    a, b, c = np.split(order, np.cumsum(sizes)[:-1])
    every = lambda images: jnp.stack([turned(images, t) for t in range(settings.tasks)])
    x, held, test = every(data.x), every(data.x[c]), every(data.x_test)
    y, y_held, y_test = (jnp.asarray(labels) for labels in (data.y, data.y[c], data.y_test))
    layers = (data.x[0].size, *[settings.width] * settings.hidden, data.classes)
    key = jax.random.key(settings.seed)
    keys = [jax.random.fold_in(key, i) for i in range(settings.seeds)]
    scales, tasks = jnp.array(settings.scales), jnp.arange(settings.tasks)

    def loss_fn(params, x, y):
        out = logits(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()

    def train(tx, params, batches):
        """Take a step on each batch: the tasks and the rows of its images."""

        def step(carry, batch):
            params, state = carry
            which, rows = batch
            grads = jax.grad(loss_fn)(params, x[which, rows], y[rows])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, (params, tx.init(params)), batches)[0][0]

    def batches(seed: int):
        """Draw the batches of a seed: of any task to pretrain, then of each task."""
        rng = np.random.default_rng([settings.seed, seed])
        mixed, own = ((n, settings.batch) for n in (settings.pretrain_steps, settings.steps))
        any_task = rng.integers(settings.tasks, size=mixed), rng.choice(a, mixed)
        which = np.broadcast_to(np.arange(settings.tasks)[:, None, None], (settings.tasks, *own))
        return any_task, (which, rng.choice(b, which.shape))

    @jax.jit
    def tuned(key, batches):
        mixed, own = batches
        base = train(optax.sgd(0.05, momentum=0.9), init(key, layers), mixed)
        models = jax.vmap(lambda batches: train(optax.adam(settings.lr), base, batches))(own)
        return {"base": base, "models": models}

    def empty():
        shape = jax.eval_shape(tuned, key, batches(0))
        return jax.tree.map(lambda w: jnp.zeros((settings.seeds, *w.shape), w.dtype), shape)

    def accuracies(params, which):
        """Return the accuracy on the held-out and the test images of some tasks: (2, tasks)."""
        right = lambda images, y: (logits(params, images).argmax(-1) == y).mean()
        return jnp.stack(
            [jax.vmap(lambda t: right(held[t], y_held))(which),
             jax.vmap(lambda t: right(test[t], y_test))(which)]
        )  # fmt: skip

    def many(params, which):
        """Return those of many models, one after another."""
        return lax.map(lambda p: accuracies(p, which), params)

    @jax.jit
    def apart(state):
        """Return what the pretrained model gets right of all tasks, and each model of its own."""
        both = jax.tree.map(
            lambda w, b: jnp.concatenate([w, b[None]]), state["models"], state["base"]
        )
        each = many(both, tasks)
        return {
            "base": each[-1],
            "own": jnp.stack([each[t, :, t] for t in range(settings.tasks)], 1),
        }

    @jax.jit
    def alone(key, state, noise):
        """Look at the vector of each task by itself, and at one of noise of its size."""
        base, models = state["base"], state["models"]
        add = weights.task_arithmetic()
        norm = jnp.linalg.norm

        def one(task):
            model = jax.tree.map(lambda w: w[task], models)
            random = jax.tree.map(
                lambda w, b, r: b + r[task] * norm(w - b) / norm(r[task]), model, base, noise
            )

            def dropped(q):
                method = weights.dare(key, drop_rate=settings.drop_rate, q=q)
                return weights.merge(base, [model], method)

            both = jax.tree.map(lambda *ws: jnp.stack(ws), model, random)
            minus = lambda model, s: weights.merge(base, [model], add, scale=-s)
            away = jax.vmap(lambda model: jax.vmap(lambda s: minus(model, s))(scales))(both)
            away = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), away)
            spared = jax.vmap(dropped)(jnp.array(divisors(settings)))
            found = many(jax.tree.map(lambda *ws: jnp.concatenate(ws), away, spared), tasks)
            n = len(scales)
            forget, astray, dare = found[:n], found[n : 2 * n], found[2 * n :, :, task]
            return {"forget": forget, "astray": astray, "dare": dare}

        return lax.map(one, tasks)

    @jax.jit
    def fishers(models):
        def one(task):
            model = jax.tree.map(lambda w: w[task], models)
            return weights.fisher(logits, model, x[task, b[:100]])

        return lax.map(one, tasks)

    def sweep(base, models, ways, which):
        """Return the accuracies of every method and scale: (methods, scales, 2, tasks)."""
        sweeps = [
            jax.vmap(lambda s, m=method: weights.merge(base, models, m, scale=s))(scales)
            for method in ways.values()
        ]
        found = many(jax.tree.map(lambda *ws: jnp.concatenate(ws), *sweeps), which)
        return found.reshape(len(sweeps), len(scales), *found.shape[1:])

    @jax.jit
    def some(key, state, fishers, mask):  # one program for any number of tasks
        return sweep(state["base"], state["models"], masked(fishers, key, mask), tasks)

    @jax.jit
    def these(state, which):
        models = jax.tree.map(lambda w: w[which], state["models"])
        return sweep(state["base"], models, counted(), which)

    def merged(key, state, fishers, which, own):
        """Return the normalized accuracies of every method at every scale: (scales, 2)."""
        mask = np.isin(np.arange(settings.tasks), which)
        found = np.asarray(some(key, state, fishers, jnp.float32(mask)))[..., which]
        names = [*masked(fishers, key, mask), *counted()]
        both = np.concatenate([found, np.asarray(these(state, which))])
        return dict(zip(names, (both / own[:, which]).mean(-1), strict=True))

    at = lambda state, seed: jax.tree.map(lambda w: w[seed], state)

    def first(seed: int, state) -> Row:
        here, rng = at(state, seed), np.random.default_rng([settings.seed, seed, 1])
        noise = jax.tree.map(
            lambda w: rng.standard_normal(w.shape, dtype=np.float32), here["models"]
        )
        found = jax.device_get(apart(here) | {"single": alone(keys[seed], here, noise)})
        rounded = jax.tree.map(lambda v: np.round(v, 4).tolist(), found)
        return {"seed": seed, "tasks": 1} | rounded

    def step(i, state):
        if i == 0:
            each = [tuned(keys[seed], batches(seed)) for seed in range(settings.seeds)]
            state = jax.tree.map(lambda *ws: jnp.stack(ws), *each)
            return state, [first(seed, state) for seed in range(settings.seeds)]
        n, rows = i + 1, []
        starts = range(settings.subsets if n < settings.tasks else 1)
        sets = [(np.arange(n) + start) % settings.tasks for start in starts]
        for seed in range(settings.seeds):
            here = at(state, seed)
            own, f = np.asarray(apart(here)["own"]), fishers(here["models"])
            found = [merged(keys[seed], here, f, which, own) for which in sets]
            for name in STYLES:
                values = np.round([each[name] for each in found], 4)
                kinds = {"held_out": values[..., 0], "test": values[..., 1]}
                row = {"seed": seed, "tasks": n, "method": name}
                rows.append(row | {kind: v.tolist() for kind, v in kinds.items()})
        return state, rows

    return Run(empty, step, settings.tasks, f"{data.name} {fingerprint(data)}")


# ----------------------------------------------------------------------------- what it shows


def curves(rows: list[Row], method: str, n: int, kind: str = "test") -> np.ndarray:
    """Return the normalized accuracy of a method: (seeds, sets of n tasks, scales)."""
    return np.array([r[kind] for r in rows if r["tasks"] == n and r.get("method") == method])


def places(settings: Settings, rows: list[Row], method: str, n: int) -> np.ndarray:
    """Return the place of the scale that is best on held-out data: (seeds, sets)."""
    held = curves(rows, method, n, "held_out")
    if method in WITHOUT_SCALE:
        return np.full(held.shape[:2], settings.scales.index(1.0))
    return held.argmax(-1)


def chosen(settings: Settings, rows: list[Row], method: str, n: int) -> np.ndarray:
    """Return the normalized accuracy at that scale, for every seed."""
    best = places(settings, rows, method, n)[..., None]
    return np.take_along_axis(curves(rows, method, n), best, -1).mean((1, 2))


def kept(settings: Settings, rows: list[Row], method: str, n: int) -> np.ndarray:
    """Return it at the scale that is best for two tasks, on average over their sets."""
    fixed = curves(rows, method, 2, "held_out").mean(1).argmax(-1)
    return np.take_along_axis(curves(rows, method, n).mean(1), fixed[:, None], -1)[:, 0]


def singles(rows: list[Row]) -> list[Row]:
    """Return the rows about single vectors."""
    return [row for row in rows if row["tasks"] == 1]


def forgetting(rows: list[Row], kind: str) -> dict[str, np.ndarray]:
    """Return test accuracies when a vector is subtracted: of its task, and the others' mean.

    (seeds, tasks, scales); `after` is (seeds, tasks, 2): both, and the others' before, where the
    held-out accuracy of the others is still 95% of what it was.
    """
    targets, others, after = [], [], []
    for row in singles(rows):
        found, base = np.array(row["single"][kind]), np.array(row["base"])  # tasks, scales, 2, on
        n = len(found)
        for t in range(n):
            rest = [u for u in range(n) if u != t]
            control, before = found[t][:, :, rest].mean(-1), base[:, rest].mean(-1)
            fine = np.flatnonzero(control[:, 0] >= 0.95 * before[0])
            i = fine[found[t][fine, 0, t].argmin()] if len(fine) else None
            targets.append(found[t][:, 1, t])
            others.append(control[:, 1])
            values = (base[1, t], before[1]) if i is None else (found[t][i, 1, t], control[i, 1])
            after.append([*values, base[1, t], before[1]])
    shape = (len(singles(rows)), -1)
    reshape = lambda values: np.array(values).reshape(*shape, len(values[0]))
    return {"target": reshape(targets), "others": reshape(others), "after": reshape(after)}


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare what was merged with the statements of the papers."""
    of = lambda method, n=settings.tasks: chosen(settings, rows, method, n)
    fixed = lambda method: kept(settings, rows, method, settings.tasks)
    n = settings.tasks
    forget, astray = (forgetting(rows, kind)["after"].mean((0, 1)) for kind in ("forget", "astray"))
    base = np.array([np.mean(np.divide(r["base"][1], r["own"][1])) for r in singles(rows)])
    scale_of = lambda count: np.array(settings.scales)[
        places(settings, rows, "task arithmetic", count)
    ]
    dare = np.array([row["single"]["dare"] for row in singles(rows)])  # seeds, tasks, qs, sets
    best = dare[..., 0].argmax(-1)[..., None]
    with_q = float(np.take_along_axis(dare[..., 1], best, -1).mean())
    plain = float(dare[:, :, 0, 1].mean())
    ties, arithmetic, crumbs, pcb = map(of, ("TIES", "task arithmetic", "Breadcrumbs", "PCB"))
    rest = {name: of(name).mean() for name in STYLES if name != "PCB"}
    strongest = max(rest, key=lambda name: rest[name])
    both = lambda x, y: f"{percent(x.mean())}, and {percent(y.mean())}"
    return [
        Claim(
            "The sum of two vectors is one model for two tasks",
            "nearly that of two models (pairs of CLIP's tasks); at least 95%",
            f"{percent(of('task arithmetic', 2).mean())}; {percent(base.mean())} before",
            bool(of("task arithmetic", 2).mean() >= 0.95),
        ),
        Claim(
            f"The sum of {n} vectors is better at their tasks than the pretrained model",
            "for every seed; with more tasks the accuracy falls",
            both(arithmetic, base),
            bool((arithmetic > base).all() and arithmetic.mean() < of("task arithmetic", 2).mean()),
        ),
        Claim(
            "A vector that is subtracted makes the model forget its task, and keep the others",
            "a fall by ten points and more, at 95% of the accuracy of the others",
            f"from {percent(forget[2])} to {percent(forget[0])}; the others from "
            f"{percent(forget[3])} to {percent(forget[1])}",
            bool(forget[0] <= forget[2] - 0.1 and forget[1] >= 0.93 * forget[3]),
        ),
        Claim(
            "A random vector of the same size does not",
            "a fall of less than half of that",
            f"from {percent(astray[2])} to {percent(astray[0])}; the others to "
            f"{percent(astray[1])}",
            bool(astray[2] - astray[0] < (forget[2] - forget[0]) / 2),
        ),
        Claim(
            "The more vectors are added, the smaller is the best scale",
            f"smaller for {n} than for two",
            f"{scale_of(n).mean():.2f}, and {scale_of(2).mean():.2f}",
            bool(scale_of(n).mean() < scale_of(2).mean()),
        ),
        Claim(
            f"TIES keeps more of {n} tasks than task arithmetic",
            "higher (T5, CLIP; 7 to 11 tasks)",
            both(ties, arithmetic),
            bool(ties.mean() > arithmetic.mean()),
        ),
        Claim(
            f"With the scale of two tasks, Breadcrumbs keep more of {n} than task arithmetic",
            "higher: the hyperparameters stay when tasks are added",
            both(fixed("Breadcrumbs"), fixed("task arithmetic")),
            bool(fixed("Breadcrumbs").mean() > fixed("task arithmetic").mean()),
        ),
        Claim(
            f"With the best scales, Breadcrumbs keep more of {n} tasks than task arithmetic",
            "higher (CLIP, 8 tasks)",
            both(crumbs, arithmetic),
            bool(crumbs.mean() > arithmetic.mean()),
        ),
        Claim(
            f"PCB keeps more of {n} tasks than any other method",
            "+3.5 points to the strongest (ViT-B/32), +4.3 (T5-base)",
            f"{percent(pcb.mean())}, and {percent(rest[strongest])} {strongest}",
            bool(pcb.mean() > rest[strongest]),
        ),
        Claim(
            f"DARE: half of the entries of {n} vectors can go without loss",
            "at most one point less than task arithmetic",
            both(of("DARE"), arithmetic),
            bool(of("DARE").mean() >= arithmetic.mean() - 0.01),
        ),
        Claim(
            f"DAREx: with {percent(settings.drop_rate)} of one vector dropped, a larger divisor q "
            "than 1 - p is better",
            "more than 30% better at high drop rates (COLA, SST2); here by five points",
            f"{percent(with_q)}, and {percent(plain)} with q = 1 - p",
            bool(with_q >= plain + 0.05),
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw the sweeps, the accuracy by the number of tasks, and what is forgotten."""
    figure, (a, b, c, d) = figures.panels(2, 2, (11.5, 8))
    n, counts = settings.tasks, list(range(2, settings.tasks + 1))
    base = float(np.mean([np.divide(r["base"][1], r["own"][1]) for r in singles(rows)]))
    for name, (color, mark) in STYLES.items():
        style = {"color": color, "marker": mark, "ms": 5, "label": name}
        style |= {"lw": 1.0, "ls": "--"} if name in WITHOUT_SCALE else {}
        a.plot(settings.scales, 100 * curves(rows, name, n).mean((0, 1)), **style)
        values = np.array([chosen(settings, rows, name, k).mean() for k in counts])
        b.plot(counts, 100 * values, **style)
    for panel in (a, b, c):
        label = "the pretrained model"
        panel.axhline(100 * base, color="#222", linestyle=":", linewidth=1.3, label=label)
        panel.set_ylabel("normalized accuracy (%)")
    a.set(xscale="log", xlabel="scale", title=f"a  {n} tasks: every scale")
    a.set_ylim(max(0.0, 100 * base - 25), None)
    a.legend(fontsize=8, loc="lower left")
    b.set_title("b  More tasks, the scale chosen on held-out data")
    for name in ("task arithmetic", "TIES", "Breadcrumbs", "PCB"):
        color, mark = STYLES[name]
        values = 100 * np.array([kept(settings, rows, name, k) for k in counts])
        figures.band(c, counts, values, color, name, marker=mark, ms=5)
    c.set_title("c  More tasks, the scale that was best for two")
    c.legend(fontsize=8, loc="lower left")
    for panel in (b, c):
        panel.set_xticks(counts)
        panel.set_xlabel("tasks")
    for kind, color, what in (
        ("forget", figures.RED, "the task's vector"),
        ("astray", figures.GREY, "a random one"),
    ):
        found = forgetting(rows, kind)
        for which, line in (("target", "-"), ("others", "--")):
            values = 100 * found[which].mean(1).T
            label = f"{what}: {'its task' if which == 'target' else 'the others'}"
            figures.band(d, settings.scales, values, color, label, linestyle=line)
    d.set(xscale="log", xlabel="scale of what is subtracted", ylabel="test accuracy (%)")
    d.set_title("d  A vector is subtracted")
    d.legend(fontsize=8, loc="lower left")
    figure.supxlabel(figures.note(settings.seeds), fontsize=8.5, color="#555")
    return figure
