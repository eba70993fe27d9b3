"""What the papers found, at the size of a laptop: every training is vmapped over its settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from jaxkit import optim, probes

pytestmark = pytest.mark.slow
KEY = jax.random.key(0)


def digits(seed=0):
    """Return (images in rows, labels), shuffled."""
    found = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.data))
    x = jnp.asarray(found.data[order] / 16, jnp.float32)
    return x, jnp.asarray(found.target[order])


def mlp(params, x):
    """Layers of (kernel, bias), ReLU between them."""
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ params[-1][0] + params[-1][1]


def draw(key, sizes, gain=2.0):
    """Return params of `mlp`, the last layer at half the variance."""
    keys = jax.random.split(key, len(sizes) - 1)
    scale = [np.sqrt(gain / n) for n in sizes[:-1]]
    scale[-1] /= np.sqrt(2)
    shapes = zip(keys, scale, sizes[:-1], sizes[1:], strict=True)
    return [(s * jax.random.normal(k, (a, b)), jnp.zeros(b)) for k, s, a, b in shapes]


def entropy(params, batch):
    logits = mlp(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def train(tx, params, data, index, measure=lambda params: ()):
    """Return the params after the batches that the rows of `index` choose, and the measurements."""

    def step(carry, i):
        params, state = carry
        grads = jax.grad(entropy)(params, (data[0][i], data[1][i]))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), measure(params)

    (params, _), measured = jax.lax.scan(step, (params, tx.init(params)), index)
    return params, measured


# ------------------------------------------------------------------------------ gradient noise


@pytest.mark.parametrize(("depth", "steps", "variance"), [(3, 1500, 0.01), (6, 2500, 0.3)])
def test_gradient_noise_trains_what_starts_at_zero(depth, steps, variance):
    """All weights 0: but for the last bias no gradient ever, until noise breaks the symmetry."""
    x, y = digits()
    index = jax.random.randint(jax.random.key(1), (steps, 32), 0, 1400)
    start = jax.tree.map(jnp.zeros_like, draw(KEY, [64] + [50] * depth + [10]))

    def accuracy(variance):
        tx = optax.chain(optim.gradient_noise(variance, key=KEY), optax.sgd(0.1))
        params, _ = train(tx, start, (x, y), index)
        return jnp.mean(jnp.argmax(mlp(params, x[1400:]), axis=1) == y[1400:])

    without, noisy = jax.jit(jax.vmap(accuracy))(jnp.array([0.0, variance]))
    assert without <= 0.15 and noisy >= 0.8, (without, noisy)


# ---------------------------------------------------------------------- batch size and horizon


def test_plain_sgd_keeps_up_with_adam_at_batch_one_and_not_in_large_batches():
    """One pass over 1280 digits, best test loss over the rates.

    The half-life of Adam's squares is fixed in examples. (SGD keeps up in one pass, as language
    models make: after four epochs its best is 1.2 times Adam's, at batch 1 too.)
    """
    x, y = digits()
    held, n = (x[1280:], y[1280:]), 1280

    def best(batch, rates, make):
        steps = n // batch

        def loss(rate, key):
            order, own = jax.random.split(key)
            index = jax.random.permutation(order, n).reshape(steps, batch)
            falling = optax.linear_schedule(1.0, 0.0, steps)
            schedule = lambda t: rate * jnp.minimum((t + 1) / (0.05 * steps + 1), 1) * falling(t)
            start = draw(own, [64, 32, 10])
            start[-1] = jax.tree.map(jnp.zeros_like, start[-1])
            params, _ = train(make(schedule), start, (x, y), index)
            return entropy(params, held)

        keys = jax.random.split(KEY, 6)
        found = jax.jit(jax.vmap(jax.vmap(loss, (None, 0)), (0, None)))(rates, keys).mean(1)
        at = int(np.nanargmin(found))
        assert 0 < at < len(rates) - 1, found  # the best rate is inside the sweep
        return float(found[at])

    octaves = lambda low, high: 2.0 ** jnp.arange(low, high, 0.5)
    adam = lambda batch: lambda s: optax.adam(s, b2=optim.rescale_decay(0.95, 256, batch))
    ratio = best(1, octaves(-3.5, -1), optax.sgd) / best(1, octaves(-7, -4.5), adam(1))
    assert ratio <= 1.05, ratio
    larger = best(64, octaves(-1, 2), optax.sgd) / best(64, octaves(-5, -2), adam(64))
    assert larger > 1.5, larger


def test_large_batches_need_as_many_updates_rather_than_as_many_epochs():
    """Batches of 16 and 144: 4 epochs, the same at a rate times 3, and 9 times as many."""
    x, y = digits()
    n, small, large = 1296, 16, 144
    updates = 4 * n // small
    regime = lambda rate: optax.piecewise_constant_schedule(
        rate, {updates // 2: 0.1, 3 * updates // 4: 0.1}
    )

    def run(batch, schedule, epochs):
        tx = optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(schedule, momentum=0.9))

        def accuracy(key):
            order, own = jax.random.split(key)
            shuffle = lambda k: jax.random.permutation(k, n).reshape(-1, batch)
            index = jax.vmap(shuffle)(jax.random.split(order, epochs)).reshape(-1, batch)
            params, _ = train(tx, draw(own, [64, 32, 10]), (x, y), index)
            return jnp.mean(jnp.argmax(mlp(params, x[n:]), axis=1) == y[n:])

        return float(jax.jit(jax.vmap(accuracy))(jax.random.split(KEY, 3)).mean())

    factor = large // small
    squeezed = lambda rate: optim.stretch(regime(rate), 1 / factor)
    reference = run(small, regime(0.05), 4)
    plain, faster = run(large, squeezed(0.05), 4), run(large, squeezed(0.15), 4)
    longer = run(large, regime(0.15), 4 * factor)
    assert plain < faster - 0.05 and faster < reference - 0.03, (plain, faster, reference)
    assert longer > reference - 0.005, (longer, reference)


def test_distance_from_the_start_grows_as_the_logarithm_of_time():
    """At constant rates; better than by a power law or a root, which fit the first steps."""
    x, y = digits()
    start = draw(KEY, [64, 64, 10])
    index = jax.random.randint(jax.random.key(1), (4000, 32), 0, 1400)
    away = lambda params: optax.tree.norm(optax.tree.sub(params, start))
    walk = lambda rate: train(optax.sgd(rate), start, (x, y), index, away)[1]
    distance = np.asarray(jax.jit(jax.vmap(walk))(jnp.array([0.1, 0.3])))
    t = np.unique(np.geomspace(20, 4000, 80).astype(int))

    def explained(basis, values):
        line = np.polyval(np.polyfit(basis, values, 1), basis)
        return 1 - np.var(values - line) / np.var(values)

    for path in distance:
        found = explained(np.log(t), path[t - 1])
        power = explained(np.log(t), np.log(path[t - 1]))
        assert found > 0.98 and found > power and found > explained(np.sqrt(t), path[t - 1])


def test_rewarming_learns_new_data_by_its_peak_whatever_the_warmup_and_forgets_old_data():
    """700 upright digits, then 700 turned by 90 degrees: test losses on both."""
    x, y = digits()
    turned = jnp.rot90(x.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    old, new = (x[:700], y[:700]), (turned[700:1400], y[700:1400])
    losses = lambda p: (entropy(p, (x[1400:], y[1400:])), entropy(p, (turned[1400:], y[1400:])))
    peak, floor, steps = 3e-3, 3e-5, 600
    table = lambda schedule: jax.vmap(schedule)(jnp.arange(steps)).astype(jnp.float32)
    again = lambda peak, warmup: table(optim.rewarm(peak, steps, start=floor, warmup=warmup))
    tables = [table(optax.constant_schedule(floor)), again(peak / 10, 0.01)]
    tables = jnp.stack([*tables, *(again(peak, w) for w in (0.0, 0.01, 0.02))])
    index = jax.random.randint(KEY, (2, steps, 32), 0, 700)
    first = table(optim.rewarm(peak, steps, floor=0.01))

    @jax.jit
    def continued():
        adamw = lambda rates: optax.adamw(lambda t: rates[t % steps], weight_decay=0.1)
        start = draw(KEY, [64, 64, 64, 10])

        def step(carry, each, data):
            params, state, rates = carry
            grads = jax.grad(entropy)(params, (data[0][each], data[1][each]))
            updates, state = adamw(rates).update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state, rates), losses(params)

        state = adamw(first).init(start)
        on_old = lambda carry, i: (step(carry, i, old)[0], None)
        (params, state, _), _ = jax.lax.scan(on_old, (start, state, first), index[0])
        # the moments go on with their own count; the schedule counts the new steps
        go_on = lambda rates: jax.lax.scan(
            lambda carry, i: step(carry, i, new), (params, state, rates), index[1]
        )[1]
        return losses(params), jax.vmap(go_on)(tables)

    (before, _), (upstream, downstream) = continued()
    end = np.asarray(downstream[:, -1])
    constant, low, none, short, long = end
    assert constant > 5 * low > 10 * short, end
    assert max(none, short, long) < 1.15 * min(none, short, long), end
    # old data: the loss jumps at once, and ends the higher the higher the peak
    assert np.all(upstream[2:, 20] > 5 * before)
    assert np.all(upstream[2:, -1] > 1.5 * upstream[0, -1]), upstream[:, -1]


# --------------------------------------------------------------------- one epoch, many epochs


@pytest.fixture(scope="module")
def epochs():
    """Train students of noisy teachers for 20,000 examples, of which so many are distinct.

    Returns {(distinct, dropout): (test loss, online losses, losses on fresh batches)}, over seeds.
    The online loss is that of a batch before the update on it.
    """
    steps, batch, noise = 2000, 10, 0.3

    def run(key, distinct, dropout):
        keys = jax.random.split(key, 8)
        inner = 2 * jax.random.normal(keys[0], (20, 16)) / np.sqrt(20)
        outer = jax.random.normal(keys[1], (16,)) / 4

        def sample(key, n):
            x = jax.random.normal(key, (n, 20))
            e = noise * jax.random.normal(jax.random.fold_in(key, 1), (n,))
            return x, jnp.tanh(x @ inner) @ outer + e

        data, fresh = sample(keys[2], steps * batch), sample(keys[3], steps * batch)
        # every epoch in an order of its own
        place = jnp.arange(steps * batch)
        order = jnp.lexsort((jax.random.uniform(keys[4], place.shape), place // distinct))
        index = (order % distinct).reshape(steps, batch)

        def loss(p, x, y, keep=1.0):
            return jnp.mean(((jnp.tanh(x @ p["up"] + p["b"]) * keep) @ p["down"] - y) ** 2)

        params = {
            "up": jax.random.normal(keys[5], (20, 64)) / np.sqrt(20),
            "b": jnp.zeros(64),
            "down": jax.random.normal(keys[6], (64,)) / 8,
        }
        tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

        def step(carry, each):
            params, state = carry
            i, t = each
            x, y = data[0][i], data[1][i]
            unseen = [jax.lax.dynamic_slice_in_dim(v, t * batch, batch) for v in fresh]
            online = loss(params, x, y), loss(params, *unseen)
            keep = jax.random.bernoulli(jax.random.fold_in(keys[7], t), 1 - dropout, (batch, 64))
            grads = jax.grad(loss)(params, x, y, keep / (1 - dropout))
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), online

        carry = (params, tx.init(params))
        (params, _), online = jax.lax.scan(step, carry, (index, jnp.arange(steps)))
        return loss(params, *sample(keys[7], 2000)), *online

    settings = [(20_000, 0.0), (20_000, 0.1), (2000, 0.0), (500, 0.0), (500, 0.1)]
    distinct, dropout = (jnp.array(v) for v in zip(*settings, strict=True))
    seeds = jax.vmap(run, (0, None, None))
    found = jax.jit(jax.vmap(seeds, (None, 0, 0)))(jax.random.split(KEY, 4), distinct, dropout)
    return {s: [np.asarray(v[i]) for v in found] for i, s in enumerate(settings)}


def test_in_one_epoch_the_loss_before_each_update_is_a_test_loss(epochs):
    def deviation(setting):
        _, online, fresh = epochs[setting]
        gap = (online - fresh)[:, 500:]
        return gap.mean(1) / (gap.std(1) / np.sqrt(gap.shape[1]))

    assert np.all(np.abs(deviation((20_000, 0.0))) < 3)
    assert np.all(deviation((2000, 0.0)) < -5) and np.all(deviation((500, 0.0)) < -20)


def test_one_epoch_is_better_than_many_over_fewer_data_and_dropout_helps_only_those(epochs):
    test = {setting: found[0] for setting, found in epochs.items()}
    excess = {setting: (v - 0.09).mean() for setting, v in test.items()}
    assert np.all(test[20_000, 0.0] < test[2000, 0.0]) and np.all(test[2000, 0.0] < test[500, 0.0])
    assert excess[500, 0.0] > 1.5 * excess[20_000, 0.0], excess
    assert np.all(test[500, 0.1] < test[500, 0.0]), test
    assert excess[20_000, 0.1] > 0.97 * excess[20_000, 0.0], excess


def test_decay_and_ensembles_add_up_and_the_law_of_members_has_a_limit():
    """100 digits to learn from, 1697 to test; 8 members; test losses."""
    x, y = digits()
    held = y[100:]
    loss = lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, held).mean()

    def member(key, decay):
        own, order = jax.random.split(key)
        index = jax.random.randint(order, (1000, 32), 0, 100)
        tx = optax.adamw(3e-3, weight_decay=decay)
        params, _ = train(tx, draw(own, [64, 64, 10]), (x[:100], y[:100]), index)
        return mlp(params, x[100:])

    members = jax.vmap(member, (0, None))

    @jax.jit
    def losses(decays):
        logits = jax.vmap(members, (None, 0))(jax.random.split(KEY, 8), decays)
        # ensembles of 1, 2, 4 and 8: groups that do not overlap, logits averaged
        groups = lambda k: logits.reshape(len(decays), 8 // k, k, *logits.shape[2:]).mean(2)
        return jnp.stack(
            [jax.vmap(jax.vmap(loss))(groups(k)).mean(1) for k in (1, 2, 4, 8)], axis=1
        )

    weak, strong = np.asarray(losses(jnp.array([0.01, 0.1])), np.float64)
    assert np.all(np.diff(weak) < 0) and np.all(np.diff(strong) < 0)
    assert np.all(strong < 0.98 * weak) and strong[-1] < 0.98 * strong[0], (weak, strong)
    for curve in (weak, strong):
        law = optim.fit_asymptote(np.array([1.0, 2.0, 4.0, 8.0]), curve)
        assert law.limit < curve[-1] and law.exponent > 0.5, law
        # what the ensemble of 8 is worth is more than one member
        assert law.inverse(curve[-1]) > 4


# -------------------------------------------------------------------------- large steps


@pytest.fixture(scope="module")
def diagonal():
    """SGD on f(x) = <u v, x>, 20 examples of 30 features, 3 of which count; 8 data sets.

    A plateau at the large step after a linear warmup, then the same number of steps at 0.005.
    Returns, by (start, step, warmup): |u v - beta|, train loss, sharpness, entries above 0.01,
    rank of the gradients above 0.01 of the largest singular value.
    """
    n, d, steps = 20, 30, 10_000
    beta = jnp.zeros(d).at[:3].set(1.0)

    def run(key, start, large, warmup):
        x = jax.random.normal(key, (n, d))
        y = x @ beta

        def step(carry, t):
            u, v = carry
            i = jax.random.randint(jax.random.fold_in(key, t), (), 0, n)
            rising = large * jnp.minimum((t + 1) / jnp.maximum(warmup, 1), 1)
            rate = jnp.where(t < steps, rising, 0.005)
            error = x[i] @ (u * v) - y[i]
            return (u - rate * error * x[i] * v, v - rate * error * x[i] * u), None

        begin = (jnp.full(d, start), jnp.zeros(d))
        (u, v), _ = jax.lax.scan(step, begin, jnp.arange(2 * steps))
        net = lambda p, x: x @ (p["u"] * p["v"])
        params = {"u": u, "v": v}
        loss = lambda p: 0.5 * jnp.mean((net(p, x) - y) ** 2)
        flat = lambda w: loss({"u": w[:d], "v": w[d:]})
        sharp = jnp.linalg.eigvalsh(jax.hessian(flat)(jnp.concatenate([u, v])))[-1]
        rank = probes.gradient_rank(net, params, x, tolerance=1e-2)
        found = jnp.linalg.norm(u * v - beta), loss(params), sharp
        return *found, jnp.sum(jnp.abs(u * v) > 1e-2), rank

    settings = [(1.0, 0.005, 0), (1.0, 0.2, 1000), (1.0, 0.2, 0), (0.1, 0.005, 0)]
    start, large, warmup = (jnp.array(v) for v in zip(*settings, strict=True))
    seeds = jax.vmap(run, (0, None, None, None))
    keys = jax.random.split(KEY, 8)
    found = jax.jit(jax.vmap(seeds, (None, 0, 0, 0)))(keys, start, large, warmup)
    return {s: [np.asarray(v[i]) for v in found] for i, s in enumerate(settings)}


def test_large_steps_find_the_sparse_predictor(diagonal):
    small, large = diagonal[1.0, 0.005, 0], diagonal[1.0, 0.2, 1000]
    stable = np.isfinite(large[0])  # near the largest stable step, which depends on the data
    assert stable.sum() >= 5, large[0]
    for found in (small, [v[stable] for v in large]):
        assert np.all(found[1] < 1e-4)  # compared at equal training loss
    error, sharp, entries = ((small[i][stable], large[i][stable]) for i in (0, 2, 3))
    assert np.all(error[1] < error[0]) and np.median(error[1]) < np.median(error[0]) / 2, error
    assert np.all(sharp[1] < sharp[0]), sharp
    assert np.mean(entries[1]) < np.mean(entries[0]) - 3, entries
    rank = small[4][stable], large[4][stable]
    assert np.all(rank[1] <= rank[0]) and rank[1].min() < rank[0].min(), rank


def test_without_warmup_the_large_step_diverges_and_a_small_start_is_sparse_already(diagonal):
    warm, cold = diagonal[1.0, 0.2, 1000][0], diagonal[1.0, 0.2, 0][0]
    assert np.isnan(cold).sum() > np.isnan(warm).sum() + 2, (warm, cold)
    assert np.median(diagonal[0.1, 0.005, 0][0]) < np.median(diagonal[1.0, 0.005, 0][0]) / 2
