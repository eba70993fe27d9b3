"""Random programs over a few small params: what `trace.axes` says of them must be true.

A program is a list of steps (operation, a, b, c); the integers choose operands and dimensions
among what is there. Every step appends an array to a pool that starts with the leaves and the
inputs. The output sums functions of the last arrays, so that their dimensions need not be fixed.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIZES = (2, 3, 4, 6)


def _pick(pool, a, test=lambda x: True):
    """The a-th array, counted from the end, that passes the test."""
    found = [x for x in reversed(pool) if test(x)]
    return found[a % len(found)] if found else None


def _has_dims(x):
    return x.ndim > 0


def _unary(pool, a, b, c):
    functions = (
        jnp.tanh,
        jax.nn.relu,
        jax.nn.sigmoid,
        lambda x: jnp.exp(-jnp.abs(x)),
        jnp.sin,
        lambda x: jnp.sqrt(x * x + 0.1),
        lambda x: 2 * x + 1,
        lambda x: jnp.where(x > 0.1, x, -x),
        lambda x: jnp.clip(x, -0.5, 0.7),
        lambda x: 1 / (1 + x**2),
        lambda x: x.astype(jnp.float32).astype(x.dtype) + x,
    )
    return functions[b % len(functions)](_pick(pool, a))


def _binary(pool, a, b, c):
    x = _pick(pool, a)
    y = _pick(pool, b, lambda y: y.shape == x.shape)
    functions = (jnp.add, jnp.multiply, jnp.maximum, lambda x, y: x / (1 + y * y), jnp.subtract)
    return functions[c % len(functions)](x, y)


def _broadcast_binary(pool, a, b, c):
    """A matrix and a vector along one of its dimensions."""
    x = _pick(pool, a, lambda x: x.ndim > 1)
    if x is None:
        return None
    d = b % x.ndim
    y = _pick(pool, c, lambda y: y.shape == (x.shape[d],))
    if y is None:
        return None
    y = y.reshape([-1 if i == d else 1 for i in range(x.ndim)])
    return x * y if c % 2 else x + y


def _transpose(pool, a, b, c):
    x = _pick(pool, a, _has_dims)
    return jnp.transpose(x, np.random.default_rng(b).permutation(x.ndim))


def _contract(pool, a, b, c):
    x = _pick(pool, a, _has_dims)
    y = _pick(pool, b, lambda y: set(y.shape) & set(x.shape))
    common = [(i, j) for i in range(x.ndim) for j in range(y.ndim) if x.shape[i] == y.shape[j]]
    i, j = common[c % len(common)]
    batch = [(k, m) for k, m in common if k != i and m != j][: c // 7 % 2]
    left, right = zip(*batch, strict=True) if batch else ((), ())
    if x.ndim + y.ndim - 2 > 4:
        return None
    return lax.dot_general(x, y, (((i,), (j,)), (left, right))) / 2


def _merge(pool, a, b, c):
    x = _pick(pool, a, lambda x: x.ndim > 1)
    if x is None:
        return None
    d = b % (x.ndim - 1)
    return x.reshape(*x.shape[:d], -1, *x.shape[d + 2 :])


def _split(pool, a, b, c):
    x = _pick(pool, a, lambda x: any(n in (4, 6, 8, 9, 12) for n in x.shape))
    if x is None or x.ndim > 3:
        return None
    dims = [d for d, n in enumerate(x.shape) if n in (4, 6, 8, 9, 12)]
    d = dims[b % len(dims)]
    factors = [f for f in (2, 3) if x.shape[d] % f == 0]
    f = factors[c % len(factors)]
    if c // 3 % 2:
        f = x.shape[d] // f
    return x.reshape(*x.shape[:d], f, -1, *x.shape[d + 1 :])


def _slice(pool, a, b, c):
    x = _pick(pool, a, _has_dims)
    d = b % x.ndim
    start, stride = c % x.shape[d], 1 + c // 5 % 2
    stop = min(x.shape[d], start + 1 + c // 3 % x.shape[d])
    return lax.slice_in_dim(x, start, stop, stride, d)


def _index(pool, a, b, c):
    x = _pick(pool, a, _has_dims)
    return jnp.moveaxis(x, b % x.ndim, 0)[c % x.shape[b % x.ndim]]


def _concatenate(pool, a, b, c):
    x = _pick(pool, a, _has_dims)
    d = c % x.ndim
    rest = x.shape[:d] + x.shape[d + 1 :]
    y = _pick(pool, b, lambda y: y.ndim == x.ndim and y.shape[:d] + y.shape[d + 1 :] == rest)
    if x.shape[d] + y.shape[d] > 12:
        return None
    return jnp.concatenate([x, y], axis=d)


def _reduce(pool, a, b, c):
    x = _pick(pool, a, _has_dims)
    functions = (jnp.sum, jnp.mean, jnp.max, jnp.min, jnp.prod, jnp.var, jax.nn.logsumexp)
    return functions[b % len(functions)](x, axis=c % x.ndim)


def _normalize(pool, a, b, c):
    x = _pick(pool, a, _has_dims)
    d = c % x.ndim
    functions = (
        lambda x: jax.nn.softmax(x, axis=d),
        lambda x: (x - x.mean(d, keepdims=True)) / jnp.sqrt(x.var(d, keepdims=True) + 0.1),
        lambda x: x / jnp.sqrt((x * x).sum(d, keepdims=True) + 0.1),
    )
    return functions[b % len(functions)](x)


def _constant(pool, a, b, c):
    """A constant that is uniform along some dimensions, or along none, or diagonal."""
    x = _pick(pool, a, _has_dims)
    d = b % x.ndim
    ramp = jnp.arange(x.shape[d], dtype=x.dtype).reshape(
        [-1 if i == d else 1 for i in range(x.ndim)]
    )
    square = [(i, j) for i in range(x.ndim) for j in range(i) if x.shape[i] == x.shape[j]]
    kind = c % 6
    if kind == 0:
        return x + jnp.sin(ramp)
    if kind == 1:
        return x * jnp.full(x.shape, 0.7)
    if kind == 2 and square:
        i, j = square[b % len(square)]
        eye = jnp.eye(x.shape[i]).reshape([n if k in (i, j) else 1 for k, n in enumerate(x.shape)])
        return x + eye
    if kind == 3:
        return jnp.where(ramp < x.shape[d] // 2, x, 0.0)
    if kind == 4:
        return x + np.random.default_rng(c).standard_normal(x.shape)
    return jnp.tril(x) if x.ndim > 1 else x


def _gather(pool, a, b, c):
    x = _pick(pool, a, _has_dims)
    d = b % x.ndim
    n = x.shape[d]
    kind = c % 5
    if kind == 0:
        return jnp.take(x, jnp.array([0, n - 1]), axis=d)
    if kind == 1:
        return jnp.take_along_axis(x, jnp.argsort(x, axis=d), axis=d)
    if kind == 2:
        return jnp.take(x, jnp.argmax(x, axis=d), axis=d) if x.ndim < 3 else None
    if kind == 3:
        return lax.dynamic_slice_in_dim(x, c // 5 % n, max(1, n - 1), d)
    at = (jnp.abs(x).sum() * 10).astype(int) % n
    return lax.dynamic_slice_in_dim(x, at, max(1, n - 1), d)


def _ordered(pool, a, b, c):
    x = _pick(pool, a, _has_dims)
    d = b % x.ndim
    functions = (
        lambda x: jnp.cumsum(x, d),
        lambda x: jnp.flip(x, d),
        lambda x: jnp.roll(x, 1, d),
        lambda x: jnp.sort(x, d),
        lambda x: lax.top_k(jnp.moveaxis(x, d, -1), 2 if x.shape[d] > 1 else 1)[0],
        lambda x: jax.nn.one_hot(jnp.argmax(x, d), x.shape[d], axis=d, dtype=x.dtype) * x,
        lambda x: lax.cummax(x, d),
        lambda x: jnp.diff(x, axis=d) if x.shape[d] > 1 else x,
        lambda x: jnp.argsort(x, d).astype(x.dtype) * x,
    )
    y = functions[c % len(functions)](x)
    return y * jnp.sin(x) if y.shape == x.shape else y  # the order shows beside the old one


def _pad(pool, a, b, c):
    x = _pick(pool, a, _has_dims)
    widths = [(0, 0)] * x.ndim
    widths[b % x.ndim] = (c % 2, 1 + c // 2 % 2)
    if c % 5 == 4:
        return jnp.pad(x, widths, mode="edge")
    return jnp.pad(x, widths, constant_values=c % 3 / 2)


def _copies(pool, a, b, c):
    x = _pick(pool, a, lambda x: 0 < x.ndim < 4 and x.size <= 64)
    if x is None:
        return None
    d = b % x.ndim
    y = _pick(pool, b, lambda y: y.shape == x.shape)
    functions = (
        lambda: jnp.repeat(x, 2, axis=d),
        lambda: jnp.tile(x, [2 if i == d else 1 for i in range(x.ndim)]),
        lambda: jnp.stack([x, y], axis=d),
        lambda: jnp.broadcast_to(x[..., None], (*x.shape, 3)),
        lambda: sum(jnp.unstack(x, axis=d)),
    )
    return functions[c % len(functions)]()


def _square(pool, a, b, c):
    x = _pick(pool, a, lambda x: x.ndim == 2 and x.shape[0] == x.shape[1])
    if x is None:
        return None
    functions = (
        lambda: x + x.T,
        lambda: x @ x / 2,
        lambda: jnp.diag(x),
        lambda: jnp.trace(x)[None] * x[0],
        lambda: x @ x.T,
        lambda: jnp.linalg.inv(x @ x.T + 3 * jnp.eye(len(x))),
        lambda: jnp.triu(x),
    )
    return functions[c % len(functions)]()


def _loop(pool, a, b, c):
    x = _pick(pool, a, _has_dims)
    d = b % x.ndim
    moved = jnp.moveaxis(x, d, 0)
    w = _pick(pool, c, lambda w: w.ndim == 2 and x.ndim == 2 and w.shape == (moved.shape[1],) * 2)
    kind = c % 5
    if kind == 0 and w is not None:
        step = lambda h, row: (jnp.tanh(h @ w + row), h)
        return lax.scan(step, jnp.zeros(moved.shape[1]), moved)[c // 5 % 2]
    if kind == 1:
        return lax.map(lambda row: jnp.tanh(row) * 2, moved)
    if kind == 2:
        return lax.fori_loop(0, 3, lambda i, h: jnp.sin(h + i * moved), moved)
    if kind == 3:
        return lax.scan(lambda h, row: (h + row, h * row), moved[0], moved)[1]
    done = lambda s: s[0] < 3
    return lax.while_loop(done, lambda s: (s[0] + 1, jnp.cos(s[1]) + x), (0, x))[1]


def _branch(pool, a, b, c):
    x = _pick(pool, a, _has_dims)
    y = _pick(pool, b, lambda y: y.shape == x.shape)
    positive = pool[0].sum() > 0 if c % 2 else jnp.abs(x).sum() > 1
    first = (lambda x, y: x * 2, lambda x, y: jnp.flip(x, -1))[c // 2 % 2]
    second = (lambda x, y: y, lambda x, y: x + y)[c // 4 % 2]
    return lax.cond(positive, first, second, x, y) * jnp.sin(x)


def _wrapped(pool, a, b, c):
    step = STEPS[b % len(STEPS)]
    if step is _wrapped:
        return None
    inner = lambda pool: step(pool, a, c, b)
    if c % 4 == 0:
        return jax.jit(inner)(pool)
    if c % 4 == 1:
        return jax.checkpoint(inner)(pool)
    if c % 4 == 2:
        x = _pick(pool, a, _has_dims)
        return jax.grad(lambda x: jnp.sum(jnp.square(jnp.tanh(x) @ jnp.ones(x.shape[-1]))))(x)
    out = jax.eval_shape(inner, pool)
    if out is None or not jnp.issubdtype(out.dtype, jnp.floating):
        return None

    def loss(x):
        y = inner([x if x is p else p for p in pool[:-1]] + [x])
        return jnp.sum(jnp.sin(y))

    return jax.grad(loss)(pool[-1])


def _update(pool, a, b, c):
    x = _pick(pool, a, _has_dims)
    d = b % x.ndim
    row = jnp.moveaxis(x, d, 0)
    y = _pick(pool, b, lambda y: y.shape == row.shape[1:])
    if y is None:
        y = jnp.asarray(0.5)
    at = c % x.shape[d]
    functions = (
        lambda: row.at[at].set(y),
        lambda: row.at[at].add(y),
        lambda: row.at[jnp.array([0, at])].multiply(2.0),
        lambda: lax.dynamic_update_index_in_dim(row, jnp.broadcast_to(y, row.shape[1:]), at, 0),
        lambda: row.at[:at].set(0.0),
    )
    return functions[c // 3 % len(functions)]()


def _convolve(pool, a, b, c):
    x = _pick(pool, a, lambda x: x.ndim == 3)
    if x is None:
        return None
    w = _pick(pool, b, lambda w: w.ndim == 3 and w.shape[1] == x.shape[2])
    if w is None:
        return None
    groups = 1
    if x.shape[2] % 2 == 0 and w.shape[2] % 2 == 0 and c % 2:
        groups, w = 2, w[:, : x.shape[2] // 2]
    return lax.conv_general_dilated(
        x,
        w,
        (1 + c % 2,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


def _opaque(pool, a, b, c):
    """What cannot be followed."""
    x = _pick(pool, a, lambda x: x.ndim == 2 or x.ndim == 1)
    if x is None:
        return None
    kind = c % 3
    if kind == 0:
        flip = lambda x: np.ascontiguousarray(np.flip(x, -1))
        return jax.pure_callback(flip, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    if kind == 1:
        return x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
    return jnp.linalg.qr(x)[1] if x.ndim == 2 else jnp.abs(jnp.fft.fft(x))


STEPS = (
    _unary,
    _binary,
    _broadcast_binary,
    _transpose,
    _contract,
    _merge,
    _split,
    _slice,
    _index,
    _concatenate,
    _reduce,
    _normalize,
    _constant,
    _gather,
    _ordered,
    _pad,
    _copies,
    _square,
    _loop,
    _branch,
    _wrapped,
    _update,
    _convolve,
    _opaque,
)


NAMES = [step.__name__.strip("_") for step in STEPS]


def build(shapes, steps, keep):
    """Return apply_fn, params and args of a program."""
    rng = np.random.default_rng(len(shapes) + len(steps))
    params = {f"leaf{i}": rng.standard_normal(shape) for i, shape in enumerate(shapes)}
    x = rng.standard_normal((2, shapes[0][0]))

    def apply_fn(params, x):
        pool = [x @ params["leaf0"].reshape(x.shape[1], -1), *params.values()]
        for step, a, b, c in steps:
            made = STEPS[step % len(STEPS)](pool, a, b, c)
            if made is not None and made.size <= 512 and made.ndim <= 5:
                pool.append(made.astype(x.dtype))
        last = pool[-1:] if keep < 2 else pool[-3:]
        if keep == 0:
            return [jnp.sum(jnp.sin(y)) for y in last]
        if keep == 1:
            return [jnp.sum(jnp.sin(y), axis=tuple(range(1, y.ndim))) for y in last]
        return [jnp.max(jnp.cos(y + 0.1)) + jnp.sum(y**2) for y in last]

    return apply_fn, params, (x,)
