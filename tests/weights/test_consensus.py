import hashlib
import struct
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.fft import dctn

from jaxkit import weights

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def stack(dtype=jnp.float32, n=4):
    draw = lambda *shape: jnp.asarray(RNG.normal(size=(n, *shape)), dtype)
    return {"w": draw(3, 2), "b": draw(2), "steps": jnp.arange(n)}


RING = jnp.array([[2, 1, 0, 1], [1, 2, 1, 0], [0, 1, 2, 1], [1, 0, 1, 2]]) / 4
gossip = jax.jit(weights.gossip)
permutation = lambda order: np.eye(len(order))[np.asarray(order)]
SKEWED = 0.5 * np.eye(4) + 0.3 * permutation([1, 2, 3, 0]) + 0.2 * permutation([1, 0, 2, 3])


def distance(models):
    """How far the models are from their mean, in all leaves together."""
    off = [x - x.mean(0) for name, x in models.items() if name != "steps"]
    return float(jnp.sqrt(sum(jnp.square(x).sum() for x in off)))


# --------------------------------------------------------------------------------------- gossip


@pytest.mark.parametrize("mixing", [RING, jnp.asarray(SKEWED, jnp.float32), jnp.full((4, 4), 0.25)])
def test_gossip_keeps_the_mean_and_shrinks_the_distance_from_it(mixing):
    models = stack()
    mixed = gossip(models, mixing)
    singular = np.linalg.svd(np.asarray(mixing, float))[1]
    assert distance(mixed) <= singular[1] * distance(models) * (1 + 1e-5) + 1e-6
    for name in ("w", "b"):
        np.testing.assert_allclose(mixed[name].mean(0), models[name].mean(0), atol=1e-6)
        want = np.einsum("ij,j...->i...", np.asarray(mixing, float), models[name])
        np.testing.assert_allclose(mixed[name], want, atol=1e-6)
    np.testing.assert_array_equal(mixed["steps"], models["steps"])


def test_the_second_eigenvector_shrinks_by_its_eigenvalue_at_each_step():
    values, vectors = np.linalg.eigh(np.asarray(RING, float))
    assert values[-2] == pytest.approx(0.5) and abs(values[0]) < 0.5
    models = {"w": 2.0 + jnp.asarray(np.outer(vectors[:, -2], [1.0, 3.0]), jnp.float32)}
    for _ in range(3):
        mixed = gossip(models, RING)
        assert distance(mixed) == pytest.approx(0.5 * distance(models), rel=1e-5)
        models = mixed


def test_a_matrix_that_is_not_symmetric_may_shrink_less_than_its_eigenvalues_say():
    values = np.sort(np.abs(np.linalg.eigvals(SKEWED)))
    _, singular, right = np.linalg.svd(SKEWED)
    assert singular[1] > values[-2] + 1e-3
    models = {"w": jnp.asarray(right[1], jnp.float32)}
    shrunk = distance(gossip(models, jnp.asarray(SKEWED, jnp.float32))) / distance(models)
    assert shrunk == pytest.approx(singular[1], rel=1e-5)


def test_full_synchronization_is_the_mean_over_devices():
    models = stack(n=8)
    floats = {name: models[name] for name in ("w", "b")}
    meaned = jax.pmap(lambda params: jax.lax.pmean(params, "models"), "models")(floats)
    mixed = gossip(floats, jnp.full((8, 8), 1 / 8))
    for name, want in meaned.items():
        np.testing.assert_allclose(mixed[name], want, atol=1e-6)
        np.testing.assert_allclose(mixed[name][0], floats[name].mean(0), atol=1e-6)


def test_gossip_computes_in_float32():
    models = stack(jnp.bfloat16)
    mixed = gossip(models, RING)
    assert mixed["w"].dtype == jnp.bfloat16
    wide = gossip({"w": models["w"].astype(jnp.float32)}, RING)["w"]
    np.testing.assert_array_equal(mixed["w"], wide.astype(jnp.bfloat16))


def test_a_matrix_that_is_not_doubly_stochastic_is_refused_with_its_sums():
    rows = np.array([[0.5, 0.5], [1.0, 0.0]])
    with pytest.raises(ValueError, match=r"rows sum to \[1.0, 1.0\], the columns to \[1.5, 0.5\]"):
        weights.gossip({"w": jnp.ones(2)}, rows)
    with pytest.raises(ValueError, match=r"rows sum to \[1.5, 0.5\], the columns to \[1.0, 1.0\]"):
        weights.gossip({"w": jnp.ones(2)}, rows.T)
    with pytest.raises(ValueError, match=r"the least entry is -0.5"):
        weights.gossip({"w": jnp.ones(2)}, jnp.array([[1.5, -0.5], [-0.5, 1.5]]))
    with pytest.raises(ValueError, match=r"a square matrix is due, and \(2, 3\)"):
        weights.gossip({"w": jnp.ones(2)}, jnp.ones((2, 3)) / 2)
    with pytest.raises(ValueError, match=r"'w' is \(3,\), and a stack of 2 models"):
        weights.gossip({"w": jnp.ones(3)}, jnp.eye(2))


# -------------------------------------------------------------------------------------- majority


def test_three_verifiers():
    q = jnp.linspace(0, 1, 21)
    np.testing.assert_allclose(weights.majority(q, 3), 3 * q**2 - 2 * q**3, atol=1e-6)
    assert weights.majority(0.98073, 3) == pytest.approx(0.9989, abs=5e-6)


@pytest.mark.parametrize("m", [1, 5, 31])
def test_a_majority_is_the_upper_half_of_a_binomial(m):
    q = np.linspace(0, 1, 11)
    want = sum(comb(m, j) * q**j * (1 - q) ** (m - j) for j in range(m // 2 + 1, m + 1))
    np.testing.assert_allclose(weights.majority(jnp.asarray(q), m), want, atol=2e-6)


def test_a_majority_as_counted():
    q, n = 0.7, 200_000
    votes = RNG.random((n, 5)) < q
    rate = ((votes.sum(1)) > 2).mean()
    want = float(weights.majority(q, 5))
    assert abs(rate - want) < 4 * np.sqrt(want * (1 - want) / n)


def test_an_even_number_of_verifiers_is_refused():
    for m in (0, 2, 4):
        with pytest.raises(ValueError, match=f"m={m}, and an odd number"):
            weights.majority(0.9, m)
    with pytest.raises(ValueError, match="no probability"):
        weights.majority(1.2, 3)


# ---------------------------------------------------------------------------------------- hashes

phash = jax.jit(weights.phash, static_argnames="size")


def picture(height, width):
    """Some waves, as bytes: an image that needs no file and no generator."""
    y, x = np.mgrid[:height, :width] / 32
    wave = np.sin(3 * x + 5 * y * y) + np.cos(7 * x * y) + np.sin(11 * x - 4 * y) / 2
    return np.round(50 * (wave + 2.5)).clip(0, 255).astype(np.uint8)


def bits(hexadecimal):
    return np.array([c == "1" for c in f"{int(hexadecimal, 16):0{4 * len(hexadecimal)}b}"])


# imagehash 4.3.2 (pillow 13.0): str(imagehash.phash(Image.fromarray(picture(h, w))))
@pytest.mark.parametrize(
    ("height", "width", "want"),
    [(32, 32, "e5d0ba6a916a916b"), (64, 64, "eee0c2c78c99b2a5"), (45, 80, "ffe0e34e99a294a0")],
)
def test_equals_imagehash_up_to_the_rounding_of_its_resized_images(height, width, want):
    differ = int((np.asarray(phash(picture(height, width))) != bits(want)).sum())
    assert differ == 0 if height == 32 else differ <= 2


def test_colours_and_other_sizes_equal_imagehash():
    red, green, blue = picture(32, 32), picture(32, 32).T, 255 - picture(32, 32)[::-1]
    rgb = np.stack([red, green, blue], -1)
    assert (np.asarray(phash(rgb)) != bits("ead5b56a3548954a")).sum() <= 2
    long = "ffc0e02ae2c0cf00ccd7992fb2d5e5aa8955baaa616a9e95616a9a95356aca95"
    np.testing.assert_array_equal(phash(picture(64, 64), size=16), bits(long))


def test_the_bits_are_those_of_the_cosine_transform():
    images = RNG.random((20, 32, 32))
    low = dctn(images, type=2, axes=(1, 2))[:, :8, :8].reshape(20, 64)
    with jax.enable_x64(True):
        found = jax.vmap(weights.phash)(images)
    np.testing.assert_array_equal(found, low > np.median(low, axis=1, keepdims=True))
    assert (found.sum(1) == 32).all()


def test_neither_contrast_nor_brightness_changes_a_hash():
    images = RNG.random((20, 40, 50)) + 0.1
    single = images.astype(np.float32)
    hashes = jax.jit(jax.vmap(weights.phash))
    np.testing.assert_array_equal(hashes(8 * single), hashes(single))
    with jax.enable_x64(True):  # what rounding makes of a tie with the median is not the point
        want, contrast, bright, negative = (
            np.asarray(hashes(x)) for x in (images, 7.5 * images, images + 0.5, images - 5)
        )
    np.testing.assert_array_equal(contrast, want)
    np.testing.assert_array_equal(bright, want)
    # a darker image, whose first coefficient falls below the median
    assert not negative[:, 0].any() and want[:, 0].all()
    assert ((negative != want).sum(1) == 2).all()  # it, and the one that takes its place


def test_like_images_agree_and_others_do_not():
    images = RNG.random((20, 32, 32)).astype(np.float32)
    hashes = jax.jit(jax.vmap(weights.phash))
    noisy = hashes(images + 0.01 * RNG.normal(size=images.shape).astype(np.float32))
    hashed = hashes(images)
    agreed = weights.agree(hashed[:, None], noisy[None], tolerance=10)
    np.testing.assert_array_equal(agreed, np.eye(20, dtype=bool))


def test_agreement_is_the_hamming_distance():
    a, b = RNG.integers(0, 2, (2, 50, 64))
    distances = (a != b).sum(1)
    for tolerance in (20, 32, 64):
        found = weights.agree(jnp.asarray(a), jnp.asarray(b), tolerance=tolerance)
        np.testing.assert_array_equal(found, distances <= tolerance)
    tokens = jnp.array([[5, 9, 2], [5, 8, 2]])
    assert weights.agree(tokens, tokens[0]).tolist() == [True, False]


def test_bad_images_and_lengths_are_named():
    with pytest.raises(ValueError, match=r"not \(32, 32, 4\)"):
        weights.phash(jnp.zeros((32, 32, 4)))
    with pytest.raises(ValueError, match=r"not \(32,\)"):
        weights.phash(jnp.zeros(32))
    with pytest.raises(ValueError, match="size=1"):
        weights.phash(jnp.zeros((32, 32)), size=1)
    with pytest.raises(ValueError, match=r"one length are due, and \(64,\), \(1,\) came"):
        weights.agree(jnp.zeros(64), jnp.zeros(1))


# ---------------------------------------------------------------------------------------- digest


def test_runs_from_the_same_key_have_the_same_digest():
    def train(key):
        w = jax.random.normal(key, (5, 3))
        step = lambda w, _: (w - 0.1 * jnp.sin(w @ w.T @ w), None)
        return {"w": jax.lax.scan(step, w, None, 20)[0], "key": key}

    run = jax.jit(train)
    first, same, other = run(KEY), run(jax.random.key(0)), run(jax.random.key(1))
    assert weights.tree_digest(first) == weights.tree_digest(same)
    assert weights.tree_digest(first) != weights.tree_digest(other)
    ulp = first | {"w": first["w"].at[4, 2].set(jnp.nextafter(first["w"][4, 2], jnp.inf))}
    assert jnp.abs(ulp["w"] - first["w"]).max() < 1e-6
    assert weights.tree_digest(ulp) != weights.tree_digest(first)


def test_the_digest_is_a_file_format():
    text = lambda s: struct.pack("<Q", len(s)) + s.encode()
    b = text("a") + text("bfloat16") + text("(2,)") + bytes([0x80, 0x3F] * 2)
    w = text("b/w") + text("float32") + text("(1, 3)") + struct.pack("<3f", 0, 1, 2)
    params = {"b": {"w": jnp.arange(3.0)[None]}, "a": jnp.ones(2, jnp.bfloat16)}
    assert weights.tree_digest(params) == hashlib.sha256(b + w).hexdigest()
    assert weights.tree_digest({}) == hashlib.sha256().hexdigest()


def test_whatever_differs_changes_the_digest():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    trees = [
        {"w": x},
        {"v": x},
        {"w": x.T},
        {"w": x.reshape(3, 2)},
        {"w": x.view(np.int32)},
        {"w": -0.0 * x},
        {"w": 0.0 * x},
        {"w": x, "": np.zeros(0)},
        {"w": x[:1], "x": x[1:]},
        {"w": jax.random.key(0)},
        {"w": jax.random.key_data(jax.random.key(0))},
        {"w": 1},
        {"w": True},
    ]
    assert len({weights.tree_digest(t) for t in trees}) == len(trees)


def test_layout_and_containers_do_not_change_the_digest():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    same = [
        {"w": [x]},
        {"w": (jnp.asarray(x),)},
        {"w": [np.asfortranarray(x)]},
        {"w": [x.astype(">f4")]},
        {"w": [jax.device_put(x, jax.devices()[3])]},
    ]
    assert len({weights.tree_digest(t) for t in same}) == 1
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)
    sharded = jax.device_put(rows, place)
    assert weights.tree_digest([sharded]) == weights.tree_digest([rows])


def test_what_has_no_bytes_is_refused():
    with pytest.raises(TypeError, match="'layer/act' is a function"):
        weights.tree_digest({"layer": {"act": lambda x: x}})
    with pytest.raises(TypeError, match="'name' is a str"):
        weights.tree_digest({"name": "adam"})
