"""Sparse iso-FLOP layers: equal cost, the dense layer at sparsity 0, linear identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxkit import masks

SHAPE = (3, 3, 64, 64)
KEY = jax.random.key(0)


def conv(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def draw(shapes):
    return {
        name: jax.random.normal(jax.random.fold_in(KEY, i), shape) / 5
        for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize(
    ("sparsity", "wide", "factorized", "doped", "inside", "rank"),
    [
        (0.5, 0.989, 1.007, 0.986, 116, 28),
        (0.75, 1.000, 1.003, 0.997, 231, 43),
        (0.9, 0.996, 1.000, 0.985, 576, 51),  # in floats 36864 / (0.1 * 640) exceeds 576
    ],
)
def test_the_cost_is_that_of_the_dense_layer(sparsity, wide, factorized, doped, inside, rank):
    n = masks.wide(64, sparsity)
    assert n == {0.5: 90, 0.75: 128, 0.9: 202}[sparsity]
    assert (1 - sparsity) * n**2 / 64**2 == pytest.approx(wide, abs=6e-4)
    layer = masks.factorized(SHAPE, sparsity)
    assert layer.shapes == {"u": (3, 3, 64, inside), "v": (1, 1, inside, 64)}
    assert layer.flops == pytest.approx(factorized, abs=6e-4)
    layer = masks.doped(SHAPE, sparsity)
    assert layer.shapes["v"] == (1, 1, rank, 64)
    assert layer.flops == pytest.approx(doped, abs=6e-4)
    layer = masks.parallel(SHAPE, sparsity)
    assert len(layer.shapes) == {0.5: 2, 0.75: 4, 0.9: 10}[sparsity]
    assert abs(layer.flops - 1) <= len(layer.shapes) / 2 / (9 * 64 * 64)  # half an entry a branch


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.7, 8 / 9, 0.999])
def test_a_wide_model_costs_the_same_at_any_sparsity(sparsity):
    n = masks.wide(64, sparsity)
    assert (1 - sparsity) * n**2 <= 64**2 * (1 + 1e-9) < (1 - sparsity) * (n + 1) ** 2
    assert sparsity != 8 / 9 or n == 192


def test_sparse_branches_together_have_the_variance_of_the_dense_kernel():
    """The recipe of the module: b kernels of density 1 / b, independent."""
    layer = masks.parallel((64, 64), 0.75)
    pairs = zip(layer.shapes.items(), jax.random.split(KEY, len(layer.shapes)), strict=True)
    kernels = {name: jax.random.normal(own, shape) for (name, shape), own in pairs}
    mask = masks.topk(masks.random(KEY, kernels), sparsity=layer.sparsity)
    kernel = layer.apply(masks.apply(kernels, mask), jnp.eye(64), jnp.matmul)
    # w = sum of B(4, 1/4) normal draws: Var w^2 is 3 E c^2 - 1 = 4.25, over 4096 entries
    assert float(jnp.mean(kernel**2)) == pytest.approx(1, abs=4 * (4.25 / 4096) ** 0.5)


def test_branches_keep_the_dtype():
    layer = masks.parallel((2, 3), 0.5)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), draw(layer.shapes))
    assert layer.apply(half, jnp.ones((1, 2), jnp.bfloat16), jnp.matmul).dtype == jnp.bfloat16


def test_the_promised_entries_are_those_of_the_mask():
    layer = masks.doped((3, 3, 4, 8), 0.75)
    kernels = draw(layer.shapes)
    mask = masks.topk(masks.random(KEY, kernels), sparsity=layer.sparsity)
    assert sum(int(m.sum()) for m in mask.values()) / (9 * 4 * 8) == layer.flops
    assert mask["u"].all()
    assert mask["v"].all()
    assert int(mask["w"].sum()) == 72


def test_many_branches_are_counted_without_rounding_down():
    """int(1 / (1 - 0.99)) is 99."""
    assert int(1 / (1 - 0.99)) == 99
    assert len(masks.parallel((4, 4), 0.99).shapes) == 100
    assert masks.wide(10, 0.99) == 100


def test_sparsity_zero_is_the_dense_layer():
    x, w = jax.random.normal(KEY, (2, 5, 5, 4)), jax.random.normal(KEY, (3, 3, 4, 8))
    dense = conv(x, w)
    assert masks.wide(64, 0) == 64
    one = masks.parallel(w.shape, 0)
    assert one.shapes == {"branch_0": w.shape}
    np.testing.assert_array_equal(one.apply({"branch_0": w}, x, conv), dense)
    plain = masks.doped(w.shape, 0)
    assert plain.shapes == {"w": w.shape}
    np.testing.assert_array_equal(plain.apply({"w": w}, x, conv), dense)


def test_linear_branches_are_one_convolution_with_the_summed_kernel():
    x = jax.random.normal(KEY, (2, 5, 5, 4))
    layer = masks.parallel((3, 3, 4, 8), 0.75)
    kernels = draw(layer.shapes)
    np.testing.assert_allclose(
        layer.apply(kernels, x, conv), conv(x, sum(kernels.values())), atol=1e-5
    )
    norms = {name: lambda y, i=i: (i + 1) * y for i, name in enumerate(kernels)}
    weighed = sum((i + 1) * w for i, w in enumerate(kernels.values()))
    np.testing.assert_allclose(
        layer.apply(kernels, x, conv, norms=norms), conv(x, weighed), atol=1e-4
    )


def test_doped_and_linear_factors_are_one_convolution_with_the_folded_kernel():
    x = jax.random.normal(KEY, (2, 5, 5, 4))
    layer = masks.doped((3, 3, 4, 8), 0.75)
    k = draw(layer.shapes)
    fold = lambda k: jnp.einsum("hwir,ro->hwio", k["u"], k["v"][0, 0])
    np.testing.assert_allclose(layer.apply(k, x, conv), conv(x, k["w"] + fold(k)), atol=1e-5)
    factors = masks.factorized((3, 3, 4, 8), 0.75)
    k = draw(factors.shapes)
    linear = factors.apply(k, x, conv, inner=lambda h: h)
    np.testing.assert_allclose(linear, conv(x, fold(k)), atol=1e-4)
    bent = factors.apply(k, x, conv)
    assert float(jnp.abs(bent - linear).max()) > 0.1
    np.testing.assert_allclose(bent, conv(jax.nn.relu(conv(x, k["u"])), k["v"]))
    dense = masks.factorized((12, 20), 0.5)
    k = draw(dense.shapes)
    x = jnp.ones((3, 12))
    y = dense.apply(k, x, jnp.matmul)
    np.testing.assert_allclose(y, jax.nn.relu(x @ k["u"]) @ k["v"])


def test_folded_decay_is_that_of_the_product():
    k = draw({"u": (3, 3, 4, 5), "v": (1, 1, 5, 8)})
    product = lambda k: jnp.sum(jnp.einsum("hwir,xyro->hwio", k["u"], k["v"]) ** 2) / 2
    decay = lambda k: masks.folded_decay(k["u"], k["v"])
    np.testing.assert_allclose(decay(k), product(k), rtol=1e-5)
    found, due = jax.grad(decay)(k), jax.grad(product)(k)
    for name in k:
        np.testing.assert_allclose(found[name], due[name], rtol=1e-4, atol=1e-5)
    u, v = k["u"].reshape(-1, 5), k["v"][0, 0]
    np.testing.assert_allclose(found["u"].reshape(-1, 5), u @ v @ v.T, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\) came"):
        masks.folded_decay(jnp.ones((2, 3)), jnp.ones((2, 4)))


def test_bad_input():
    for fn in (masks.parallel, masks.factorized, masks.doped):
        with pytest.raises(ValueError, match="sparsity is 1"):
            fn((4, 4), 1.0)
        with pytest.raises(ValueError, match=r"shape \(4,\)"):
            fn((4,), 0.5)
    for s, near in ((0.6, "0.666667"), (0.65, "0.666667"), (0.714, "0.75"), (0.55, "0.5")):
        with pytest.raises(ValueError, match=rf"branches; the nearest.* is {near}$"):
            masks.parallel((4, 4), s)
    with pytest.raises(ValueError, match=r"makes 2\.5 branches"):
        masks.parallel((4, 4), 0.6)
    assert len(masks.parallel((4, 4), 2 / 3).shapes) == 3
