"""SOAP, Fira, GaLore: the authors' algorithm step by step in numpy, limits, invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import masks, optim
from jaxkit.optim.soap import orthonormal

RNG = np.random.default_rng(0)


def run(tx, params, grads):
    """Return the params after all gradients (a stacked tree), one jitted scan."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), updates

    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), grads))()


def nbytes(tx, params):
    """Return the memory of all arrays of the state (the counters are scalars)."""
    state = jax.eval_shape(tx.init, params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)


def soap_by_hand(w, gradients, lr, b1, b2, d, eps, every, wd):
    """The authors' loop for one matrix, in float64: moments go back to the original frame."""
    m, n = w.shape
    left, right = np.zeros((m, m)), np.zeros((n, n))
    mu, nu = np.zeros((m, n)), np.zeros((m, n))
    sort = lambda f: np.linalg.eigh(f + 1e-30 * np.eye(len(f)))[1][:, ::-1]
    for t, g in enumerate(gradients):
        if t == 0:
            left, right = (1 - d) * g @ g.T, (1 - d) * g.T @ g
            ql, qr = sort(left), sort(right)
            continue
        x = ql.T @ g @ qr
        mu, nu = b1 * mu + (1 - b1) * x, b2 * nu + (1 - b2) * x * x
        step = ql @ (mu / (np.sqrt(nu) + eps)) @ qr.T
        w = w - lr * (np.sqrt(1 - b2**t) / (1 - b1**t) * step + wd * w)
        mu = ql @ mu @ qr.T
        left, right = d * left + (1 - d) * g @ g.T, d * right + (1 - d) * g.T @ g
        if t % every == 0:
            order = np.argsort(-np.diag(ql.T @ left @ ql))
            ql, nu = ql[:, order], nu[order]
            order = np.argsort(-np.diag(qr.T @ right @ qr))
            qr, nu = qr[:, order], nu[:, order]
            ql, qr = np.linalg.qr(left @ ql)[0], np.linalg.qr(right @ qr)[0]
        mu = ql.T @ mu @ qr
    return w


def test_soap_is_the_authors_loop():
    w, g = RNG.normal(size=(5, 4)), RNG.normal(size=(60, 5, 4))
    options = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "every": 7, "weight_decay": 0.1}
    with jax.enable_x64(True):
        tx = optim.soap(0.01, factor_decay=0.8, **options)
        (got, _), _ = run(tx, {"w": jnp.asarray(w)}, {"w": jnp.asarray(g)})
        want = soap_by_hand(w, g, 0.01, 0.9, 0.95, 0.8, 1e-8, 7, 0.1)
        np.testing.assert_allclose(got["w"], want, rtol=0, atol=1e-10)


def waves(steps, **shapes):
    """Params and gradients without a random generator, as others can make them."""
    wave = lambda *shape: np.sin(0.7 + 0.37 * np.arange(np.prod(shape)) ** 2).reshape(shape)
    drift = lambda shape: 0.3 * np.cos(np.arange(steps)).reshape(steps, *[1] * len(shape))
    params = {name: (i + 1) * wave(*shape) for i, (name, shape) in enumerate(shapes.items())}
    return params, {name: wave(steps, *shape) + drift(shape) for name, shape in shapes.items()}


def assert_fifths(params, want):
    for name, values in want.items():
        np.testing.assert_allclose(params[name].ravel()[::5], values, rtol=0, atol=2e-6)


def test_soap_is_that_of_pytorch_optimizer():
    """The numbers are those of SOAP in pytorch_optimizer 4.1.0 (torch 2.13.0), in float64."""
    params, grads = waves(45, w=(5, 5), k=(3, 2, 4), v=(5,))
    with jax.enable_x64(True):
        tx = optim.soap(0.01, b1=0.9, b2=0.95, factor_decay=0.8, every=7, weight_decay=0.0)
        (got, _), _ = run(tx, params, grads)
        want = {
            "w": [0.667629, -0.622397, -0.040301, 0.744767, -0.990041],
            "k": [1.209478, -0.956135, 0.030751, 1.543963, -1.817031],
            "v": [1.842162],
        }
        assert_fifths(got, want)


@pytest.mark.parametrize(("n", "zeros"), [(12, 0), (14, 3), (9, 9)])
def test_orthonormal_is_the_q_of_qr(n, zeros):
    x = RNG.normal(size=(n, n))
    x[:, n - zeros :] = 0
    with jax.enable_x64(True):
        q = jax.jit(lambda x: orthonormal(x, block=4))(x)
        np.testing.assert_allclose(q.T @ q, np.eye(n), atol=1e-13)
        want = np.linalg.qr(x)[0]
        np.testing.assert_allclose(q[:, : n - zeros], want[:, : n - zeros], atol=1e-13)


def test_orthonormal_has_the_derivative_of_qr():
    x, v = RNG.normal(size=(2, 9, 9))
    with jax.enable_x64(True):
        slope = jax.jit(lambda x, v: jax.jvp(lambda x: orthonormal(x, block=4), (x,), (v,)))(x, v)
        around = [np.linalg.qr(x + sign * 1e-6 * v)[0] for sign in (1, -1)]
        np.testing.assert_allclose(slope[1], (around[0] - around[1]) / 2e-6, atol=1e-6)


def adam_with_eps_before(w, gradients, lr, b1, b2, eps):
    mu = nu = np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
        w = w - lr * np.sqrt(1 - b2**t) / (1 - b1**t) * mu / (np.sqrt(nu) + eps)
    return w


def test_without_factors_soap_is_adam_one_update_late():
    w, g = RNG.normal(size=(6, 5)), RNG.normal(size=(40, 6, 5))
    v, h = RNG.normal(size=5), RNG.normal(size=(40, 5))
    with jax.enable_x64(True):
        params, grads = ({"w": jnp.asarray(a), "v": jnp.asarray(b)} for a, b in ((w, v), (g, h)))
        none = optim.soap(0.01, weight_decay=0.0, eps=0.0, max_size=4)
        (got, _), steps = run(none, params, grads)
        assert not any(np.any(u[0]) for u in steps.values())
        late = jax.tree.map(lambda g: g[1:], grads)
        (adam, _), _ = run(optax.adam(0.01, b1=0.95, b2=0.95, eps=0), params, late)
        for name in params:
            np.testing.assert_allclose(got[name], adam[name], rtol=0, atol=1e-12)
        one_sided = optim.soap(0.01, weight_decay=0.0, eps=0.0, max_size=5)
        (other, _), _ = run(one_sided, params, grads)
        assert np.abs(other["w"] - adam["w"]).max() > 1e-2
        np.testing.assert_allclose(other["v"], adam["v"], rtol=0, atol=1e-12)


def test_soap_turns_with_its_gradients_and_adam_does_not():
    w, g = RNG.normal(size=(5, 4)), RNG.normal(size=(50, 5, 4))
    a, b = np.linalg.qr(RNG.normal(size=(5, 5)))[0], np.linalg.qr(RNG.normal(size=(4, 4)))[0]
    turn = lambda x: a @ x @ b.T
    with jax.enable_x64(True):

        def gap(tx):
            (plain, _), _ = run(tx, {"w": jnp.asarray(w)}, {"w": jnp.asarray(g)})
            (turned, _), _ = run(tx, {"w": jnp.asarray(turn(w))}, {"w": jnp.asarray(turn(g))})
            return np.abs(turned["w"] - turn(plain["w"])).max()

        assert gap(optim.soap(0.01, every=3)) < 1e-10
        assert gap(optax.adam(0.01)) > 1e-3


def test_on_diagonal_gradients_soap_is_adam_through_every_turn():
    diagonals = RNG.normal(size=(60, 5)) * np.array([1.0, 3.0, 0.5, 2.0, 1.5])
    g = np.stack([np.diag(d) for d in diagonals])
    w = RNG.normal(size=(5, 5))
    with jax.enable_x64(True):
        tx = optim.soap(0.01, every=7, weight_decay=0.0)
        (got, state), _ = run(tx, {"w": jnp.asarray(w)}, {"w": jnp.asarray(g)})
        want = adam_with_eps_before(w, g[1:], 0.01, 0.95, 0.95, 1e-8)
        # (rounding off the diagonal, over eps)
        np.testing.assert_allclose(got["w"], want, rtol=0, atol=1e-7)
        q = state[0].bases["w"].vectors[0]
        np.testing.assert_allclose(np.sort(np.abs(q), 1)[:, :-1], 0, atol=1e-12)
        mixed = g + 0.3 * RNG.normal(size=g.shape)
        (other, _), _ = run(tx, {"w": jnp.asarray(w)}, {"w": jnp.asarray(mixed)})
        adam = adam_with_eps_before(w, mixed[1:], 0.01, 0.95, 0.95, 1e-8)
        assert np.abs(other["w"] - adam).max() > 1e-2


def test_bases_are_made_without_rounded_products():
    """Where products round to TF32 or bfloat16, those of a basis do not (here the CPU's do not)."""

    turn = jax.jit(lambda x: orthonormal(x, block=4))
    program = turn.lower(jnp.eye(12)).as_text()
    products = program.count("dot_general ")
    assert 5 < products == program.count("precision = [HIGHEST, HIGHEST]")


def test_bases_stay_orthogonal_and_state_has_the_promised_size():
    tx = optim.soap(0.01)
    params = {"k": jnp.ones((3, 1, 6, 8)), "b": jnp.ones(8), "s": jnp.ones(())}
    state = tx.init(params)
    count = lambda t: sum(x.size for x in jax.tree.leaves(t))
    assert count(state[0].bases) == 2 * (9 + 36 + 64)
    assert count((state[0].mu, state[0].nu)) == 2 * (3 * 6 * 8 + 8 + 1)
    matrix = {"w": jnp.zeros((48, 32), jnp.bfloat16)}
    assert nbytes(tx, matrix) == 4 * 2 * (48 * 32 + 48**2 + 32**2)
    assert nbytes(optim.soap(0.01, max_size=40), matrix) == 4 * 2 * (48 * 32 + 32**2)
    g = jax.tree.map(lambda w: jax.random.normal(jax.random.key(0), (1001, *w.shape)), params)
    (_, state), _ = run(tx, params, g)
    for q in state[0].bases["k"].vectors:
        if q is not None:
            np.testing.assert_allclose(q.T @ q, np.eye(len(q)), rtol=0, atol=1e-6)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    updates, state = tx.update(half, tx.init(half), half)
    assert {u.dtype for u in updates.values()} == {jnp.dtype(jnp.bfloat16)}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state[0].mu))


@pytest.mark.parametrize("make", [optim.soap, optim.fira, optim.galore])
def test_decay_needs_the_params_and_options_their_range(make):
    params = {"w": jnp.ones((3, 2))}
    few = {} if make is optim.soap else {"rank": 1}
    tx = make(0.1, weight_decay=jnp.float32(0.1), **few)
    with pytest.raises(ValueError, match="weight decay needs the params"):
        tx.update(params, tx.init(params))
    free = make(0.1, weight_decay=np.float32(0), **few)
    free.update(params, free.init(params))
    for name, value in (("every", 0), ("every", np.int64(-3)), ("b1", 1.5), ("b2", 1.0)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            make(0.1, **few, **{name: value})
    with pytest.raises(ValueError, match="residual='Official'"):
        optim.fira(residual="Official")
    with pytest.raises(ValueError, match="factor_decay=1"):
        optim.soap(factor_decay=1.0)


def test_sparse_soap_keeps_zeros():
    params = {"w": jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)}
    mask = {"w": jnp.asarray(RNG.random((6, 5)) < 0.4)}
    g = {"w": jnp.asarray(RNG.normal(size=(20, 6, 5)), jnp.float32)}
    (got, _), _ = run(masks.sparse(optim.soap(0.01, every=3), mask), params, g)
    assert not np.any(got["w"][~mask["w"]]) and np.all(
        got["w"][mask["w"]] != params["w"][mask["w"]]
    )
    grown = masks.rigl(optim.soap(0.01, every=3), mask, every=4, drop_rate=0.5)
    (got, state), _ = run(grown, params, g)
    assert not np.any(got["w"][~masks.current(state)["w"]])


def test_soap_on_eight_devices_is_soap_on_one():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    params = {"w": jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32)}
    g = {"w": jnp.asarray(RNG.normal(size=(6, 8, 8)), jnp.float32)}
    tx = optim.soap(0.01, every=2, eps=1e-3)
    (want, _), _ = run(tx, params, g)
    spread = jax.device_put(params, place)
    (got, state), _ = run(tx, spread, g)
    np.testing.assert_allclose(got["w"], want["w"], atol=1e-4)
    copies = jax.tree.map(lambda x: jnp.stack([x] * 8), params)
    each, _ = jax.pmap(lambda p: run(tx, p, g)[0])(copies)
    np.testing.assert_allclose(each["w"][3], want["w"], atol=1e-4)
    specs = optax.tree_utils.tree_map_params(
        tx, lambda s, spec: spec, state, {"w": "spec"}, transform_non_params=lambda s: None
    )
    assert specs[0].mu == {"w": "spec"} and specs[0].bases is None


# -------------------------------------------------------------------------------- Fira, GaLore


def fira_by_hand(w, gradients, lr, rank, every, scale, official, limit=1.01, eps=1e-6):
    """The authors' loop for one matrix in float64, transposed so that it is tall."""
    wide = w.shape[0] < w.shape[1]
    w = w.T if wide else w
    mu = nu = 0.0
    before = None
    for t, g in enumerate(gradients, 1):
        g = g.T if wide else g
        if (t - 1) % every == 0:
            # (the signs of the vectors matter, since the moments are not turned along)
            u, _, v = np.linalg.svd(g.T if wide else g, full_matrices=False)
            rows = u[:, :rank].T if wide else v[:rank]
        x = g @ rows.T
        mu, nu = 0.9 * mu + 0.1 * x, 0.999 * nu + 0.001 * x * x
        n = mu / (np.sqrt(nu) + eps)
        phi = np.linalg.norm(n, axis=1) / (np.linalg.norm(x, axis=1) + 1e-8)
        rest = (g - (scale if official else 1.0) * x @ rows) * phi[:, None]
        size = np.linalg.norm(rest)
        if before is not None:
            over = max(size / (before + 1e-8), limit) / limit
            rest, size = rest / over, size / over
        before = size
        w = w - lr * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * (scale * n @ rows + rest)
    return w.T if wide else w


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
@pytest.mark.parametrize("official", [True, False])
def test_fira_is_the_authors_loop(shape, official):
    w, g = RNG.normal(size=shape), RNG.normal(size=(30, *shape))
    g[12] *= 100
    with jax.enable_x64(True):
        kind = "official" if official else "paper"
        tx = optim.fira(0.01, rank=2, every=5, scale=0.25, residual=kind)
        (got, _), _ = run(tx, {"w": jnp.asarray(w)}, {"w": jnp.asarray(g)})
        want = fira_by_hand(w, g, 0.01, 2, 5, 0.25, official)
        np.testing.assert_allclose(got["w"], want, rtol=0, atol=1e-8)


def test_fira_is_that_of_the_authors():
    """The numbers are those of FiraAdamW in fira 1.0.2 (torch 2.13.0), in float64.

    (With one projection: the moments are not turned along, so the signs that another LAPACK gives
    to the later ones would matter.)
    """
    params, grads = waves(30, tall=(7, 4), wide=(4, 7), v=(5,))
    with jax.enable_x64(True):
        tx = optim.fira(0.01, rank=2, every=100, scale=0.25, residual="official")
        (got, _), _ = run(tx, params, grads)
        want = {
            "tall": [0.634885, -0.543236, -0.004397, 0.793508, -0.864131, -0.500876],
            "wide": [1.27134, -1.039672, 0.019716, 1.560936, -1.737734, -1.032292],
            "v": [1.831663],
        }
        assert_fifths(got, want)
        tx = optim.fira(0.01, rank=2, every=100)
        (got, _), _ = run(tx, params, grads)
        want = {
            "tall": [0.618033, -0.54372, -0.013608, 0.804223, -0.866188, -0.50741],
            "wide": [1.25303, -1.069154, 0.012115, 1.591563, -1.741986, -1.045105],
        }
        assert_fifths(got, want)


def test_low_rank_states_have_the_promised_size():
    for shape in ((48, 32), (32, 48)):
        params = {"w": jnp.zeros(shape, jnp.bfloat16)}
        for tx in (optim.fira(0.01, rank=8), optim.galore(0.01, rank=8)):
            assert nbytes(tx, params) == 4 * (2 * 8 * 48 + 8 * 32)
    vector = {"v": jnp.zeros(9, jnp.bfloat16)}
    assert nbytes(optim.fira(0.01, rank=8), vector) == 4 * 2 * 9


def test_at_full_rank_fira_is_galore_is_adam_in_a_turned_frame():
    w, g = RNG.normal(size=(6, 4)), RNG.normal(size=(30, 6, 4))
    with jax.enable_x64(True):
        tree = lambda x: {"w": jnp.asarray(x)}
        (full, _), _ = run(optim.fira(0.01, rank=4, every=100), tree(w), tree(g))
        (low, _), _ = run(optim.galore(0.01, rank=4, every=100, scale=1.0), tree(w), tree(g))
        rows = np.linalg.svd(g[0], full_matrices=False)[2]
        adam = adam_with_eps_before(w @ rows.T, g @ rows.T, 0.01, 0.9, 0.999, 1e-6) @ rows
        np.testing.assert_allclose(full["w"], adam, rtol=0, atol=1e-10)
        np.testing.assert_allclose(low["w"], adam, rtol=0, atol=1e-10)


def test_the_residual_grows_by_a_hundredth_at_most():
    g = RNG.normal(size=(30, 7, 4))
    g[10] *= 100
    params = {"w": jnp.zeros((7, 4))}
    fira, galore = optim.fira(1.0, rank=2, every=5), optim.galore(1.0, rank=2, every=5, scale=1.0)
    grads = {"w": jnp.asarray(g, jnp.float32)}

    def step(states, g):
        (u, state), (v, other) = (
            tx.update(g, s, params) for tx, s in zip((fira, galore), states, strict=True)
        )
        return (state, other), (optax.tree.norm(optax.tree.sub(u, v)), state[0].bases["w"].residual)

    start = fira.init(params), galore.init(params)
    added, kept = jax.jit(lambda: jax.lax.scan(step, start, grads)[1])()
    t = np.arange(1, 31)
    norms = added / (np.sqrt(1 - 0.999**t) / (1 - 0.9**t))
    np.testing.assert_allclose(kept, norms, rtol=1e-3)
    assert np.all(norms[1:] <= 1.01 * norms[:-1] * (1 + 2e-3))
    assert np.any(norms[1:] >= 1.009 * norms[:-1])  # the limit is met


def test_a_residual_that_overflows_is_left_out():
    """The second gradient is huge, but only in a direction that the projection does not see."""
    q = np.linalg.qr(RNG.normal(size=(6, 4)))[0]
    g = np.stack([q * [4.0, 3.0, 1.0, 0.5]] * 3).astype(np.float32)
    g[1, 5, 3] = 1e25
    params = {"w": jnp.zeros((6, 4))}
    fira, galore = (make(1.0, rank=2, scale=1.0) for make in (optim.fira, optim.galore))
    state, other = fira.init(params), galore.init(params)
    before = np.zeros(())
    for t in range(3):
        grads = {"w": jnp.asarray(g[t])}
        u, state = jax.jit(fira.update)(grads, state, params)
        v, other = jax.jit(galore.update)(grads, other, params)
        size = np.asarray(state[0].bases["w"].residual)
        assert np.all(np.isfinite(u["w"])) and np.isfinite(size)
        assert np.allclose(u["w"], v["w"], rtol=1e-6) == (t == 1) == bool(size == before)
        before = size


def test_a_first_residual_of_zero_does_not_hold_back_the_others():
    params = {"w": jnp.zeros((6, 4))}
    g = np.concatenate([np.zeros((1, 6, 4)), RNG.normal(size=(3, 6, 4))]).astype(np.float32)
    tx = optim.fira(1.0, rank=2, every=1)
    (_, state), steps = run(tx, params, {"w": jnp.asarray(g)})
    assert np.all(np.isfinite(steps["w"])) and float(state[0].bases["w"].residual) > 0.1


def test_fira_on_other_leaves_is_adam_and_says_what_it_cannot_project():
    params = {"k": jnp.ones((3, 3, 2, 4)), "b": jnp.ones(4)}
    g = jax.tree.map(lambda w: jax.random.normal(jax.random.key(1), (10, *w.shape)), params)
    (got, _), _ = run(optim.fira(0.01, eps=1e-12), params, g)
    (adam, _), _ = run(optax.adam(0.01, eps=1e-12), params, g)
    for name in params:
        np.testing.assert_allclose(got[name], adam[name], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"'k' has shape \(3, 3, 2, 4\), and a matrix was due"):
        optim.fira(0.01, where="k").init(params)
    with pytest.raises(ValueError, match="rank=0"):
        optim.fira(0.01, rank=0)
    with pytest.warns(UserWarning, match="'kernel' .* its rank is 2, not 9"):
        optim.galore(0.01, rank=9).init({"kernel": jnp.ones((5, 2))})
