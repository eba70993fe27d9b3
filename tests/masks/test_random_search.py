"""Random search: exact counts, nested draws, and that it finds no better than one draw."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data import load
from experiments.perceptron import init, logits
from jaxkit import masks, trace

KEY = jax.random.key(0)


def net(params, x):
    h = jax.nn.relu(x @ params["a"]["w"] + params["a"]["b"])
    h = jax.nn.relu(h @ params["c"]["w"] + params["c"]["b"])
    return h @ params["out"]


def draw(key):
    keys = jax.random.split(key, 5)
    normal = jax.random.normal
    return {
        "a": {"w": normal(keys[0], (3, 10)), "b": normal(keys[1], (10,))},
        "c": {"w": normal(keys[2], (10, 7)), "b": normal(keys[3], (7,))},
        "out": normal(keys[4], (7, 2)),
    }


PARAMS = draw(KEY)
X = jax.random.normal(jax.random.key(1), (20, 3))
Y = jnp.sin(X[:, :2])
AXES = trace.axes(net, PARAMS, X)
A, C = trace.named(AXES)


def loss_fn(params, batch):
    return jnp.mean((net(params, batch[0]) - batch[1]) ** 2)


@pytest.fixture(scope="module")
def found():
    search = lambda key: masks.random_search(
        key, loss_fn, PARAMS, (X, Y), AXES, sparsity=0.6, draws=25, together=10
    )
    return jax.jit(search)(KEY)


def test_every_layer_keeps_its_exact_count(found):
    assert found.keep[A].sum() == 4 and found.keep[C].sum() == 3  # 0.4 of 10, and 2.8 of 7
    axes = {"w": ("hidden",)}
    draws = jax.vmap(lambda k: masks.random_units(k, {"w": jnp.ones(10)}, axes, 0.75)["hidden"])
    drawn = draws(jax.random.split(KEY, 500))
    assert (drawn.sum(1) == 2).all()  # 2.5 is rounded half to even
    assert np.abs(drawn.mean(0) - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / 500)


def test_losses_are_those_of_the_draws(found):
    for i in range(0, 25, 6):
        keep = masks.random_units(jax.random.fold_in(KEY, i), PARAMS, AXES, 0.6)
        sub = masks.apply(PARAMS, masks.units(PARAMS, keep, AXES))
        assert float(found.losses[i]) == pytest.approx(float(loss_fn(sub, (X, Y))), rel=1e-5)


def test_the_best_is_the_lowest(found):
    assert found.losses[found.best] == found.losses.min() <= jnp.median(found.losses)
    best = masks.random_units(jax.random.fold_in(KEY, found.best), PARAMS, AXES, 0.6)
    jax.tree.map(np.testing.assert_array_equal, found.keep, best)


def test_more_draws_find_no_worse(found):
    few = masks.random_search(KEY, loss_fn, PARAMS, (X, Y), AXES, sparsity=0.6, draws=7)
    np.testing.assert_allclose(few.losses, found.losses[:7], rtol=1e-5)
    assert found.losses.min() <= few.losses.min() * (1 + 1e-6)


def test_one_draw_is_the_random_control():
    one = masks.random_search(KEY, loss_fn, PARAMS, (X, Y), AXES, sparsity=0.6, draws=1)
    control = masks.random_units(jax.random.fold_in(KEY, 0), PARAMS, AXES, 0.6)
    jax.tree.map(np.testing.assert_array_equal, one.keep, control)


def test_a_loss_that_is_nan_is_not_the_lowest():
    params, axes = {"w": jnp.arange(4.0)[None]}, {"w": (None, "hidden")}

    def loss_fn(params, bad):
        """The sum of two of 0 ... 3, but NaN up to `bad`."""
        loss = params["w"].sum()
        return jnp.where(loss <= bad, jnp.nan, loss)

    search = lambda bad: masks.random_search(
        KEY, loss_fn, params, bad, axes, sparsity=0.5, draws=50, together=50
    )
    found = search(1.0)
    assert jnp.isnan(found.losses).any()
    assert found.losses[found.best] == 2 and found.keep["hidden"].tolist() == [True, False] * 2
    with pytest.raises(ValueError, match="the loss of all 50 draws is NaN"):
        search(9.0)
    assert jax.jit(search)(9.0).best == 0


def test_masked_and_shrunk_networks_agree(found):
    small, sizes, _ = masks.shrink(PARAMS, found.keep, AXES)
    assert sizes == {A: 4, C: 3}
    masked = masks.apply(PARAMS, masks.units(PARAMS, found.keep, AXES))
    np.testing.assert_allclose(net(small, X), net(masked, X), rtol=1e-5, atol=1e-6)


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match=rf"axis '{C}' of 7 units would be left without any: a"):
        masks.random_units(KEY, PARAMS, AXES, 0.94)
    with pytest.raises(ValueError, match=r"below 0.92857\d* was due"):
        masks.random_units(KEY, PARAMS, AXES, 0.95)
    masks.random_units(KEY, PARAMS, AXES, 0.92)
    with pytest.raises(ValueError, match=r"sparsity is 1.0, and a number in \[0, 1\)"):
        masks.random_units(KEY, PARAMS, AXES, 1.0)
    with pytest.raises(ValueError, match="draws=0, and at least one was due"):
        masks.random_search(KEY, loss_fn, PARAMS, (X, Y), AXES, sparsity=0.5, draws=0)
    pinned = lambda p, x: jax.nn.softmax(x @ p["w"]) @ p["v"]
    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="no axis may be cut"):
        masks.random_units(KEY, params, trace.axes(pinned, params, X), 0.5)
    with pytest.raises(TypeError, match="a typed key is due"):
        masks.random_units(jnp.zeros(2, jnp.uint32), PARAMS, AXES, 0.5)


@pytest.mark.slow
def test_the_best_draw_trains_no_better_than_the_first():
    """The paper's negative finding, on digits: six seeds, a tenth of the units, best of 100."""
    data = load(None, train=1400, test=397)
    sizes, seeds, steps = (64, 256, 256, 10), 6, 300
    first = jax.eval_shape(lambda: init(KEY, sizes))
    axes = trace.axes(logits, first, data.x[:2])
    tx = optax.adam(2e-3)

    def loss_fn(params, rows):
        out = logits(params, jnp.asarray(data.x)[rows])
        labels = jnp.asarray(data.y)[rows]
        return optax.softmax_cross_entropy_with_integer_labels(out, labels).mean()

    def train(key, params):
        """Train the small network without the removed units: the same function, fewer entries."""

        def step(state, i):
            params, opt_state = state
            rows = jax.random.choice(jax.random.fold_in(key, i), 1400, (64,))
            u, opt_state = tx.update(jax.grad(loss_fn)(params, rows), opt_state)
            return (optax.apply_updates(params, u), opt_state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
        return (logits(params, data.x_test).argmax(1) == data.y_test).mean()

    def compare(key):
        params = init(key, sizes)
        batch = jnp.arange(256)
        found = masks.random_search(key, loss_fn, params, batch, axes, sparsity=0.9)
        control = masks.random_units(jax.random.fold_in(key, 0), params, axes, 0.9)
        subs = []
        for keep in (found.keep, control):
            order = {n: jnp.argsort(~m, stable=True)[:26] for n, m in keep.items()}
            subs.append(trace.take(params, axes, order))
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), *subs)
        return found.losses, jax.vmap(train, (None, 0))(key, both)

    losses, accuracy = jax.jit(jax.vmap(compare))(jax.random.split(KEY, seeds))
    assert (losses.min(1) < jnp.median(losses, 1)).all()
    apart = np.asarray(accuracy[:, 0] - accuracy[:, 1], np.float64)
    error = apart.std(ddof=1) / np.sqrt(seeds)
    assert abs(apart.mean()) < 3 * error + 0.005, (apart.mean(), error)
    assert accuracy.min() > 0.85, accuracy
