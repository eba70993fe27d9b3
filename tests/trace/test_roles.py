"""What each leaf does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxkit import trace
from tests import zoo

X = jnp.linspace(-1, 1, 12).reshape(4, 3)
IDS = jnp.array([0, 2, 1])
IN, OUT = "consumed", "produced"


def _roles(fn, *shapes, x=X):
    params = [jnp.ones(s) for s in shapes]
    return [tuple(r) for r in trace.roles(fn, params, x)]


CASES = {
    "dense": (
        lambda p, x: x @ p[0] + p[1],
        [(3, 5), (5,)],
        [("kernel", (IN, OUT)), ("bias", (OUT,))],
    ),
    "transposed": (lambda p, x: x @ p[0].T, [(5, 3)], [("kernel", (OUT, IN))]),
    "cast": (
        lambda p, x: x.astype(jnp.bfloat16) @ p[0].astype(jnp.bfloat16),
        [(3, 5)],
        [("kernel", (IN, OUT))],
    ),
    "masked": (
        lambda p, x: x @ (p[0] * np.tri(3, 5, dtype=np.float32)),
        [(3, 5)],
        [("kernel", (IN, OUT))],
    ),
    "heads": (
        lambda p, x: jnp.einsum("bi,ihk->bhk", x, p[0]).reshape(4, -1) @ p[1].reshape(10, 3),
        [(3, 2, 5), (2, 5, 3)],
        [("kernel", (IN, OUT, OUT)), ("kernel", (IN, IN, OUT))],
    ),
    "experts": (
        lambda p, x: jnp.einsum("ebi,eij->ebj", jnp.broadcast_to(x, (2, 4, 3)), p[0]),
        [(2, 3, 5)],
        [("kernel", (None, IN, OUT))],
    ),
    "convolution": (
        lambda p, x: lax.conv(x.reshape(1, 3, 4, 1), p[0], (1, 1), "SAME") * p[1][:, None, None],
        [(5, 3, 3, 3), (5,)],
        [("kernel", (OUT, IN, None, None)), ("gain", (OUT,))],
    ),
    "batch norm": (
        lambda p, x: (x - p[0]) * (p[1] / jnp.sqrt(p[2] + 1e-3)) + p[3],
        [(3,)] * 4,
        [("bias", (OUT,)), ("gain", (OUT,)), ("gain", (OUT,)), ("bias", (OUT,))],
    ),
    "low rank": (
        lambda p, x: x @ (p[0] @ p[1]),
        [(3, 2), (2, 5)],
        [("kernel", (IN, OUT)), ("kernel", (IN, OUT))],
    ),
    "low rank on activations": (
        lambda p, x: x @ p[0] @ p[1],
        [(3, 2), (2, 5)],
        [("kernel", (IN, OUT)), ("kernel", (IN, OUT))],
    ),
    "weight norm": (
        lambda p, x: x @ (p[1] * p[0] / jnp.linalg.norm(p[0], axis=0)),
        [(3, 5), (5,)],
        [("kernel", (IN, OUT)), ("gain", (OUT,))],
    ),
    "class token": (
        lambda p, x: jnp.concatenate([p[0][None], x]),
        [(3,)],
        [("other", (OUT,))],
    ),
    "scalar": (lambda p, x: p[0] * x + p[1], [(), ()], [("gain", ()), ("bias", ())]),
    "unread": (lambda p, x: x, [(3, 5)], [("other", (None, None))]),
    "recurrent": (
        lambda p, x: lax.scan(lambda h, r: (h @ p[0] + r @ p[1] + p[2], None), jnp.zeros(5), x)[0],
        [(5, 5), (3, 5), (5,)],
        [("kernel", (IN, OUT)), ("kernel", (IN, OUT)), ("bias", (OUT,))],
    ),
    "layers of a scan": (
        lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p[0])[0],
        [(2, 3, 3)],
        [("kernel", (None, IN, OUT))],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_role(name):
    fn, shapes, expected = CASES[name]
    assert _roles(fn, *shapes) == expected


def test_embeddings_also_tied_and_of_positions():
    fn = lambda p, ids: (p[0][ids] + p[1][jnp.arange(3)]) @ p[0].T
    assert _roles(fn, (6, 5), (4, 5), x=IDS) == [("embedding", (IN, OUT))] * 2


@pytest.mark.parametrize("model", zoo.MODELS, ids=lambda m: m.name)
def test_every_leaf_of_the_zoo_has_a_part(model):
    apply_fn, params, args = model.build()
    roles = trace.roles(apply_fn, params, *args)
    is_role = lambda x: isinstance(x, trace.Role)

    def sensible(role, leaf):
        assert len(role.dims) == np.ndim(leaf)
        if role.kind == "kernel":
            assert IN in role.dims
        if role.kind in ("bias", "gain"):
            assert IN not in role.dims and (OUT in role.dims or np.ndim(leaf) == 0)

    jax.tree.map(sensible, roles, params, is_leaf=is_role)
