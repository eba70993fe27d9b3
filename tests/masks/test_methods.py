"""What every method of sparse training keeps, whatever the optimizer and the devices.

A table of methods; for each the density is exact, masks nest where they must, and masked entries
are zero, to the bit, with momentum, with AdamW, and with a state of matrices (SOAP); and replicated
or sharded over eight devices it does the same.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkit import masks, optim
from tests.masks import digits

KEY = jax.random.key(0)
STEPS = 20
SPARSITY = 0.8
OPTIMIZERS = {
    "momentum": optax.sgd(0.05, momentum=0.9),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "soap": optim.soap(0.01, weight_decay=0.1, every=3),
}


def first(params):
    return masks.topk(masks.random(KEY, params), sparsity=masks.erk(params, SPARSITY))


def none(params):
    return jax.tree.map(lambda w: jnp.zeros_like(w, bool), params)


class Method(NamedTuple):
    """How to wrap an optimizer; whether masks stay or nest; whether each leaf keeps its count."""

    wrap: object
    static: bool = False
    nested: bool = False
    leafwise: bool = True


METHODS = {
    "hold": Method(lambda tx, p: optax.chain(tx, masks.hold(first)), static=True),
    "sparse": Method(lambda tx, p: masks.sparse(tx, first), static=True),
    "set": Method(lambda tx, p: masks.set(tx, first, key=KEY, every=3, drop_rate=0.3)),
    "rigl": Method(lambda tx, p: masks.rigl(tx, first, every=3, end=15, drop_rate=0.3)),
    "cl_dst": Method(
        lambda tx, p: masks.cl_dst(tx, first(p), none(p), key=KEY, every=3, growth="momentum")
    ),
    "gradual": Method(
        lambda tx, p: masks.gradual(tx, SPARSITY, end=12, every=3), nested=True, leafwise=False
    ),
    "granet": Method(
        lambda tx, p: masks.granet(tx, SPARSITY, end=12, steps=STEPS, every=3), leafwise=False
    ),
    "granet, sparse to sparse": Method(
        lambda tx, p: masks.granet(
            tx, SPARSITY, end=12, steps=STEPS, every=3, initial_sparsity=0.4,
            mask=lambda p: masks.topk(masks.random(KEY, p), sparsity=0.4),
        ),
        leafwise=False,
    ),
}  # fmt: skip


def problem():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 8, 64))
    return digits.init(KEY, (16, 16, 8)), x, y


def run(method, tx, params, x, y, axis=None):
    """Train; return the params and the mask after every step."""
    tx = METHODS[method].wrap(OPTIMIZERS[tx], params)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(digits.cross_entropy)(params, x, y)
        grads = grads if axis is None else jax.lax.pmean(grads, axis)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, masks.current(state))

    return jax.lax.scan(step, (params, tx.init(params)), None, STEPS)[1]


def weights(tree):
    return {name: np.asarray(leaf) for name, leaf in tree.items() if name[0] == "w"}


@pytest.mark.parametrize("tx", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_density_nesting_and_zeros(method, tx):
    start, x, y = problem()
    params, seen = jax.jit(lambda p: run(method, tx, p, x, y))(start)
    mask, n = weights(seen), sum(w.size for w in weights(start).values())
    assert all(np.isfinite(w).all() for w in params.values())
    for name, w in weights(params).items():
        assert not w[~mask[name]].any()  # at every step, to the bit
        assert (w[-1] != np.asarray(start[name]))[mask[name][-1]].mean() > 0.95
    assert sum(m[-1].sum() for m in mask.values()) == round(n * (1 - SPARSITY))
    assert all(seen[name].all() for name in seen if name[0] == "b")
    counts = np.array([m.sum((1, 2)) for m in mask.values()])
    if METHODS[method].leafwise:
        assert (counts == counts[:, :1]).all()
        want = weights(first(start))
        np.testing.assert_array_equal(counts[:, 0], [m.sum() for m in want.values()])
    else:
        cubic = optax.polynomial_schedule(0.4 if "to" in method else 0.0, SPARSITY, 3, 12)
        due = [round(n * (1 - float(cubic(t - t % 3)))) for t in range(STEPS)]
        np.testing.assert_array_equal(counts.sum(0), due)
    same = all((m[1:] == m[:-1]).all() for m in mask.values())
    nested = all((~m[1:] | m[:-1]).all() for m in mask.values())
    assert same == METHODS[method].static
    assert nested == (METHODS[method].static or METHODS[method].nested)


QUICK = ("gradual", "rigl")  # the others take a minute to compile


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in METHODS]
)
def test_eight_devices_do_the_same(method):
    """Params replicated and data split (pmap), and params sharded over a mesh (jit)."""
    start, x, y = problem()
    last = lambda out: jax.tree.map(lambda w: w[-1], out)
    params, mask = last(jax.jit(lambda p, x, y: run(method, "adamw", p, x, y))(start, x, y))

    split = lambda a: a.reshape(8, -1, *a.shape[1:])
    replicas = jax.pmap(
        lambda p, x, y: run(method, "adamw", p, x, y, "data"), "data", in_axes=(None, 0, 0)
    )
    by_device = jax.tree.map(lambda w: w[:, -1], replicas(start, split(x), split(y)))
    for name in start:
        for device in range(8):
            np.testing.assert_array_equal(by_device[1][name][device], mask[name])
            np.testing.assert_array_equal(by_device[0][name][device], by_device[0][name][0])
        np.testing.assert_allclose(by_device[0][name][0], params[name], rtol=1e-4, atol=1e-5)

    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    place = lambda w: jax.device_put(
        w, NamedSharding(mesh, PartitionSpec("a", "b") if w.ndim == 2 else PartitionSpec("b"))
    )
    sharded = jax.jit(lambda p, x, y: run(method, "adamw", p, x, y))
    got, where = last(sharded(jax.tree.map(place, start), x, y))
    for name in start:
        np.testing.assert_array_equal(where[name], mask[name])
        np.testing.assert_allclose(got[name], params[name], rtol=1e-4, atol=1e-5)
