"""ZerO and IDInit: exact matrices, rank, symmetry breaking, and gradients at the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import linen

from jaxkit.init.identity import hadamard, idi, idiz, relu_one, zero

KEY = jax.random.key(0)
FACTORIES = [zero, idi, idiz]


# ------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("factory", FACTORIES)
def test_layouts_are_the_same_matrices(factory):
    dense = factory()(KEY, (6, 12))
    assert dense.dtype == jnp.float32
    np.testing.assert_array_equal(factory(in_axis=-1, out_axis=-2)(KEY, (12, 6)), dense.T)
    heads = factory(in_axis=0, out_axis=(1, 2))(KEY, (6, 3, 4))
    np.testing.assert_array_equal(heads.reshape(6, 12), dense)
    assert factory()(KEY, (6, 12), jnp.bfloat16).dtype == jnp.bfloat16
    assert factory()(KEY, (0, 3)).shape == (0, 3)


@pytest.mark.parametrize("factory", [zero, idiz])
def test_a_stack_and_groups_repeat_the_kernel(factory):
    one = factory()(KEY, (3, 6, 4))
    stack = factory(batch_axis=0)(KEY, (5, 3, 6, 4))
    assert bool((stack == one).all())
    grouped = factory(feature_group_count=2)(KEY, (3, 6, 8))
    np.testing.assert_array_equal(grouped, jnp.concatenate([one, one], -1))


@pytest.mark.parametrize("factory", FACTORIES)
def test_jit_vmap_and_flax(factory):
    init = factory()
    jitted = jax.jit(init, static_argnums=(1, 2))
    np.testing.assert_array_equal(jitted(KEY, (3, 4, 6), None), init(KEY, (3, 4, 6)))
    keys = jax.random.split(KEY, 3)
    many = jax.vmap(lambda key: init(key, (4, 6)))(keys)
    np.testing.assert_array_equal(many, jnp.stack([init(key, (4, 6)) for key in keys]))
    params = linen.Dense(6, kernel_init=init).init(KEY, jnp.ones((1, 4)))["params"]
    assert params["kernel"].shape == (4, 6)


@pytest.mark.parametrize("factory", FACTORIES)
def test_out_sharding(factory):
    axis_types = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=axis_types)
    with jax.set_mesh(mesh):
        spec = jax.sharding.PartitionSpec("a", "b")
        kernel = factory()(KEY, (4, 8), jnp.float32, spec)
        assert kernel.sharding.spec == spec
    np.testing.assert_array_equal(np.asarray(kernel), factory()(KEY, (4, 8)))


@pytest.mark.parametrize("factory", FACTORIES)
def test_bad_input(factory):
    with pytest.raises(ValueError, match="two or more dimensions"):
        factory()(KEY, (4,))
    with pytest.raises(ValueError, match="overlap"):
        factory(in_axis=-1)(KEY, (4, 4))
    with pytest.raises(ValueError, match="not all axes"):
        factory(in_axis=3)(KEY, (4, 4))
    with pytest.raises(ValueError, match="do not divide"):
        factory(feature_group_count=3)(KEY, (3, 4, 4))
    with pytest.raises(ValueError, match="at least one group"):
        factory(feature_group_count=0)
    with pytest.raises(TypeError, match="float dtype"):
        factory()(KEY, (4, 4), jnp.int32)


# --------------------------------------------------------------------------------------- ZerO


def test_hadamard_is_sylvester_and_orthonormal():
    for n in (1, 2, 16):
        oracle = scipy.linalg.hadamard(n) / np.sqrt(n)
        np.testing.assert_allclose(hadamard(n), oracle, rtol=1e-7)
        np.testing.assert_allclose(hadamard(n) @ hadamard(n), np.eye(n), atol=1e-6)
    for n in (0, 3, 12):
        with pytest.raises(ValueError, match="power of two"):
            hadamard(n)


def test_zero_is_the_papers_algorithm():
    with jax.enable_x64(True):
        draw = lambda n, m: np.asarray(zero()(KEY, (n, m), jnp.float64))
        np.testing.assert_array_equal(draw(5, 5), np.eye(5))
        np.testing.assert_array_equal(draw(7, 4), np.eye(7, 4))
        for n, m in ((64, 128), (64, 100), (5, 6), (1, 3)):
            p = 2 ** int(np.ceil(np.log2(m)))
            oracle = np.eye(m, p) @ (scipy.linalg.hadamard(p) / np.sqrt(p)) @ np.eye(p, n)
            np.testing.assert_allclose(draw(n, m), oracle.T, atol=1e-15)
            assert set(np.unique(np.abs(draw(n, m)))) == {p**-0.5}
        wide = draw(64, 128)
        np.testing.assert_allclose(wide @ wide.T, np.eye(64), atol=1e-12)
        ragged = draw(64, 100)
        error = np.abs(ragged @ ragged.T - np.eye(64)).max()
        assert 0.2 < error < 0.25  # as the docstring says


def test_zero_is_deterministic():
    for shape in ((4, 4), (4, 10), (3, 3, 4, 10)):
        first, second = (zero()(jax.random.key(seed), shape) for seed in (0, 1))
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("size", [(3, 3), (2, 4), (1, 1), (5, 2)])
def test_zero_convolution_is_the_identity(size):
    x = jax.random.normal(KEY, (2, 7, 6, 3))
    kernel = zero()(KEY, (*size, 3, 3))
    dims = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
    np.testing.assert_array_equal(y, x)
    depthwise = zero(feature_group_count=3)(KEY, (*size, 1, 3))
    y = jax.lax.conv_general_dilated(
        x, depthwise, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=3
    )
    np.testing.assert_array_equal(y, x)


def test_zero_convolutions_need_relu_one():
    x = jax.random.normal(KEY, (2, 4))
    stem = jnp.zeros((4, 4))

    def loss(params, relu):
        h = relu(x @ params["stem"])  # exactly zero
        return (relu(h + h @ params["branch"]) @ jnp.ones(4)).sum()

    grad = lambda relu: jax.grad(loss)({"stem": stem, "branch": jnp.zeros((4, 4))}, relu)["stem"]
    assert float(jnp.abs(grad(relu_one)).max()) > 0.1
    np.testing.assert_array_equal(grad(jax.nn.relu), 0)
    points = jnp.array([-2.0, -0.0, 0.0, 3.0])
    np.testing.assert_array_equal(relu_one(points), jax.nn.relu(points))


def test_partial_identity_degenerates_and_zero_does_not():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
    width = 128

    @jax.jit
    def train(params):
        def loss(params, i):
            h = x[i]
            for w in params[:-1]:
                h = jax.nn.relu(h @ w)
            logits = h @ params[-1]
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[i, None], 1).mean()

        def step(params, key):
            grads = jax.grad(loss)(params, jax.random.randint(key, (64,), 0, len(x)))
            return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads), None

        return jax.lax.scan(step, params, jax.random.split(KEY, 2000))[0]

    shapes = [(64, width), (width, width), (width, 10)]
    rank = lambda params: np.linalg.matrix_rank(np.asarray(params[1]) - np.eye(width), tol=1e-4)
    partial = rank(train([jnp.eye(*shape) for shape in shapes]))
    broken = rank(train([zero()(KEY, shape) for shape in shapes]))
    assert partial <= 64
    assert broken > 64


# ------------------------------------------------------------------------------------- IDInit


def test_idi_tiles_the_identity():
    square = idi(noise=0.0)(KEY, (5, 5))
    np.testing.assert_array_equal(square, np.eye(5))
    wide = np.asarray(idi(noise=0.0, tau=2.0)(KEY, (4, 6)))
    np.testing.assert_array_equal(wide[:2], 2 * np.array([[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 1]]))
    tall = np.asarray(idi(noise=0.0)(KEY, (6, 4)))
    assert np.linalg.matrix_rank(tall) == 4
    np.testing.assert_array_equal(tall, np.asarray(idi(noise=0.0)(KEY, (4, 6))).T)


def test_idi_noise_is_on_the_identity_alone():
    noisy = np.asarray(idi(noise=0.1)(KEY, (128, 1024)))
    on = np.asarray(idi(noise=0.0)(KEY, (128, 1024))) == 1
    assert (noisy[~on] == 0).all()
    assert abs(noisy[on].mean() - 1) < 4 * 0.1 / np.sqrt(1024)
    assert abs(noisy[on].std() / 0.1 - 1) < 4 / np.sqrt(2 * 1024)
    np.testing.assert_array_equal(noisy, idi(noise=0.1)(KEY, (128, 1024)))
    assert (idi(noise=0.1)(jax.random.key(1), (128, 1024)) != noisy).any()


def test_idi_convolution_copies_a_tap_of_a_channel():
    kernel = np.asarray(idi(noise=0.0)(KEY, (2, 3, 4, 24)))
    for j in range(24):
        row, column, channel = (j % 6) // 3, j % 3, j // 6
        expected = np.zeros((2, 3, 4))
        expected[row, column, channel] = 1
        np.testing.assert_array_equal(kernel[..., j], expected)
    assert np.linalg.matrix_rank(idi(noise=0.0)(KEY, (3, 3, 2, 7)).reshape(-1, 7)) == 7


@pytest.mark.parametrize("depth", [1, 100])
def test_a_residual_stack_of_idiz_is_nearly_the_identity(depth):
    with jax.enable_x64(True):
        first = idi(noise=0.0)(KEY, (8, 8), jnp.float64)
        last = idiz()(KEY, (8, 8), jnp.float64)

        @jax.jit
        def stack(x):
            block = lambda _, x: x + jax.nn.relu(x @ first) @ last
            return jax.lax.fori_loop(0, depth, block, x)

        x = jax.random.normal(KEY, (4, 8), jnp.float64)
        bound = (1 + 1e-6) ** depth - 1
        rounding = 4 * depth * jnp.finfo(jnp.float64).eps
        assert bool((jnp.abs(stack(x) - x) <= (bound + rounding) * jnp.abs(x)).all())
        positive = jnp.abs(x)
        np.testing.assert_allclose(stack(positive) / positive - 1, bound, atol=rounding)


def test_copies_cancel_in_pairs():
    up, down = idi(noise=0.0)(KEY, (4, 16)), idiz(eps=1.0)(KEY, (16, 4))
    np.testing.assert_array_equal(up @ down, 0)
    assert np.linalg.matrix_rank(down) == 4


def test_gradients_at_the_start():
    x = jax.random.normal(KEY, (6, 8))
    params = {"first": idi()(KEY, (8, 8)), "last": idiz()(KEY, (8, 8))}
    target = jax.random.normal(jax.random.key(1), (6, 8))

    def loss(params):
        return ((x + jax.nn.relu(x @ params["first"]) @ params["last"] - target) ** 2).sum()

    grads = jax.tree.map(lambda g: float(jnp.abs(g).max()), jax.grad(loss)(params))
    assert 1e-6 < grads["first"] < 1e-4
    assert 1 < grads["last"] < 100
    grads = jax.grad(loss)({**params, "last": jnp.zeros((8, 8))})
    np.testing.assert_array_equal(grads["first"], 0)


@pytest.mark.parametrize(("noise", "separate"), [(0.0, False), (1e-6, True)])
def test_noise_separates_the_copies(noise, separate):
    x = jax.random.normal(KEY, (64, 4))
    target = jnp.sin(2 * x)
    first, second = jax.random.split(KEY)
    params = [idi(noise=noise)(first, (4, 8)), idi(noise=noise)(second, (8, 4))]

    @jax.jit
    def train(params):
        def loss(params):
            return ((jax.nn.relu(x @ params[0]) @ params[1] - target) ** 2).mean()

        def step(_, params):
            return jax.tree.map(lambda w, g: w - 0.3 * g, params, jax.grad(loss)(params))

        return jax.lax.fori_loop(0, 3000, step, params)

    trained = train(params)[0]
    difference = float(jnp.abs(trained[:, :4] - trained[:, 4:]).max())
    assert difference > 0.1 if separate else difference == 0
