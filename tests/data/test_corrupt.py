import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkit import data

KEY = jax.random.key(7)


def images(n=40, channels=3):
    x = jax.random.uniform(jax.random.key(1), (n, 4, 5, channels))
    return x, jnp.arange(n) % 10


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_fraction_of_changed_labels(p):
    n, classes = 40_000, 10
    y = jnp.arange(n) % classes
    _, noisy = data.random_labels(KEY, jnp.zeros((n, 1)), y, classes=classes, p=p)
    due = p * (classes - 1) / classes
    assert abs(float((noisy != y).mean()) - due) < 3 * np.sqrt(due * (1 - due) / n)


def test_random_labels_are_uniform_and_independent_of_the_true_ones():
    n, classes = 50_000, 5
    y = jnp.arange(n) % classes
    _, noisy = data.random_labels(KEY, jnp.zeros((n, 1)), y, classes=classes)
    table = np.zeros((classes, classes))
    np.add.at(table, (np.asarray(y), np.asarray(noisy)), 1)
    due = n / classes**2
    chi_square = ((table - due) ** 2 / due).sum()
    assert chi_square < 45.3  # the 99.9 % point of chi-square with 20 degrees of freedom


def test_corrupted_labels_stay_corrupted_as_p_grows():
    x, y = jnp.zeros((2000, 1)), jnp.zeros(2000, jnp.int8)
    sweep = jax.vmap(lambda p: data.random_labels(KEY, x, y, classes=100, p=p)[1])
    low, high, none, all_ = sweep(jnp.array([0.2, 0.7, 0.0, 1.0]))
    assert low.dtype == jnp.int8
    assert (none == y).all()
    assert (high[low != y] == low[low != y]).all()
    assert (all_[high != y] == high[high != y]).all()
    assert 0 < (low != y).sum() < (high != y).sum() < (all_ != y).sum()


def test_shuffled_pixels_is_one_permutation_for_every_set():
    x, y = images()
    index = jnp.arange(20.0).reshape(1, 4, 5, 1)
    order = data.shuffled_pixels(KEY, index, y[:1])[0].ravel().astype(int)
    assert sorted(order.tolist()) == list(range(20))
    assert order.tolist() != list(range(20))
    shuffled, labels = data.shuffled_pixels(KEY, x, y)
    np.testing.assert_array_equal(shuffled.reshape(40, 20, 3), x.reshape(40, 20, 3)[:, order])
    np.testing.assert_array_equal(labels, y)


def test_a_dense_network_cannot_see_shuffled_pixels():
    x, y = images(channels=1)
    w = jax.random.normal(jax.random.key(2), (20, 7))
    index = jnp.arange(20.0).reshape(1, 4, 5, 1)
    order = data.shuffled_pixels(KEY, index, y[:1])[0].ravel().astype(int)
    shuffled = data.shuffled_pixels(KEY, x, y)[0].reshape(40, 20)
    np.testing.assert_allclose(shuffled @ w[order], x.reshape(40, 20) @ w, atol=1e-6)


def test_random_pixels_permutes_every_image_on_its_own():
    index = jnp.broadcast_to(jnp.arange(20).reshape(1, 4, 5, 1), (200, 4, 5, 2))
    out, _ = data.random_pixels(KEY, index, jnp.arange(200))
    np.testing.assert_array_equal(out[..., 0], out[..., 1])  # channels move together
    orders = np.asarray(out[..., 0]).reshape(200, 20)
    assert all(sorted(row) == list(range(20)) for row in orders.tolist())
    assert len({tuple(row) for row in orders.tolist()}) == 200
    counts = np.stack([(orders == j).sum(0) for j in range(20)])
    assert ((counts - 10.0) ** 2 / 10).sum() < 440.0  # chi-square, 361 degrees, 99.8 % point


def test_random_pixels_of_an_image_depends_on_its_position_alone():
    x, y = images()
    whole, part = data.random_pixels(KEY, x, y)[0], data.random_pixels(KEY, x[:9], y[:9])[0]
    np.testing.assert_array_equal(whole[:9], part)


def test_gaussian_has_the_moments_of_each_channel():
    n = 5000
    x = jnp.stack([jnp.full((n, 4, 4), 2.0), images(n, 1)[0][:, :4, :4, 0]], -1)
    noise, _ = data.gaussian(KEY, x, jnp.arange(n))
    assert (noise[..., 0] == 2).all()
    entries = n * 16
    mean, std = x[..., 1].mean(), x[..., 1].std()
    assert abs(noise[..., 1].mean() - mean) < 4 * std / np.sqrt(entries)
    assert abs(noise[..., 1].std() - std) < 4 * std / np.sqrt(2 * entries)
    given, _ = data.gaussian(KEY, x[:10], jnp.arange(10), mean=jnp.array([0.0, 5.0]), std=0.0)
    np.testing.assert_array_equal(given, jnp.broadcast_to(jnp.array([0.0, 5.0]), (10, 4, 4, 2)))


CORRUPTIONS = {
    "random_labels": lambda key, x, y: data.random_labels(key, x, y, classes=10, p=0.5),
    "shuffled_pixels": data.shuffled_pixels,
    "random_pixels": data.random_pixels,
    "gaussian": data.gaussian,
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_jit_keys_dtypes_and_sharding(name):
    corrupt = CORRUPTIONS[name]
    x, y = images()
    eager, jitted = corrupt(KEY, x, y), jax.jit(corrupt)(KEY, x, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), eager, jitted)
    again, other = corrupt(KEY, x, y), corrupt(jax.random.key(8), x, y)
    assert all((a == b).all() for a, b in zip(eager, again, strict=True))
    assert not all((a == b).all() for a, b in zip(eager, other, strict=True))
    half = corrupt(KEY, x.astype(jnp.bfloat16), y.astype(jnp.int8))
    assert (half[0].dtype, half[1].dtype) == (jnp.bfloat16, jnp.int8)

    mesh = Mesh(np.array(jax.devices()[:8]), "data")
    split = jax.device_put((x, y), NamedSharding(mesh, P("data")))
    sharded = jax.jit(corrupt)(KEY, *split)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), eager, sharded)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_bad_keys_and_shapes(name):
    x, y = images(4)
    with pytest.raises(TypeError, match="typed key"):
        CORRUPTIONS[name](jax.random.PRNGKey(0), x, y)
    with pytest.raises(ValueError, match=r"x\(4, 4, 5, 3\) and y\(3,\) came"):
        CORRUPTIONS[name](KEY, x, y[:3])


def test_bad_labels_and_probabilities():
    x = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"p=1.5: a probability in \[0, 1\]"):
        data.random_labels(KEY, x, jnp.arange(3), classes=3, p=1.5)
    with pytest.raises(ValueError, match=r"labels in \[0, 3\).* from 1 to 3"):
        data.random_labels(KEY, x, jnp.arange(1, 4), classes=3)
    with pytest.raises(ValueError, match="at least one class"):
        data.random_labels(KEY, x, jnp.arange(3), classes=0)
    with pytest.raises(TypeError, match="integer labels"):
        data.random_labels(KEY, x, jnp.ones(3), classes=3)
    with pytest.raises(TypeError, match="float images"):
        data.gaussian(KEY, jnp.zeros((3, 2), jnp.uint8), jnp.arange(3))
