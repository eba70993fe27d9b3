"""Several objectives: optimality conditions, and quadratic programs by another solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from jaxkit import optim

RNG = np.random.default_rng(0)


def gradients(m, d=12, seed=0):
    g = np.random.default_rng(seed).normal(size=(m, d)).astype(np.float32)
    return {"a": jnp.asarray(g[:, :8].reshape(m, 2, 4)), "b": jnp.asarray(g[:, 8:])}, g


def test_gram_matrices():
    tree, g = gradients(3)
    np.testing.assert_allclose(optim.gram(tree), g @ g.T, rtol=1e-5)
    np.testing.assert_allclose(optim.gram(tree, where="b"), g[:, 8:] @ g[:, 8:].T, rtol=1e-5)
    one = jax.tree.map(lambda x: x[1], tree)
    np.testing.assert_allclose(optim.gram(tree, one), g @ g[1], rtol=1e-5)
    square = {"w": jnp.asarray(RNG.normal(size=(2, 2)), jnp.float32)}
    np.testing.assert_allclose(
        optim.gram(square, {"w": square["w"][0]}), square["w"] @ square["w"][0], rtol=1e-5
    )
    mixed = optim.weigh(tree, jnp.array([0.5, 0.25, 0.25]))
    np.testing.assert_allclose(mixed["b"], np.array([0.5, 0.25, 0.25]) @ g[:, 8:], rtol=1e-5)


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_shortest_direction_is_that_of_a_quadratic_program(m):
    solve = jax.jit(optim.min_norm)
    for seed in range(8):
        g = np.random.default_rng(seed).normal(size=(m, m + 1))
        g = g + 1.5 * (seed % 2)  # some with all in one half space
        c = (g @ g.T).astype(np.float64)
        a = np.asarray(solve(jnp.asarray(c, jnp.float32)))
        np.testing.assert_allclose(a.sum(), 1, rtol=1e-5)
        assert np.all(a >= 0)
        result = minimize(
            lambda x, c=c: x @ c @ x,
            np.full(m, 1 / m),
            bounds=[(0, 1)] * m,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
            tol=1e-14,
        )
        np.testing.assert_allclose(a @ c @ a, result.fun, rtol=2e-3, atol=1e-5 * c.max())
        assert np.all(c @ a >= a @ c @ a - 1e-3 * c.max())  # no objective rises
    with pytest.raises(ValueError, match="9 objectives"):
        optim.min_norm(jnp.eye(9))


def test_pareto_direction_is_that_of_a_linear_program():
    solve = jax.jit(optim.pareto_direction)
    for m in (2, 3, 4):
        for seed in range(6):
            tree, g = gradients(m, seed=seed)
            v = np.random.default_rng(100 + seed).normal(size=12).astype(np.float32)
            guidance = {"a": jnp.asarray(v[:8].reshape(2, 4)), "b": jnp.asarray(v[8:])}
            found = solve(tree, guidance)
            a, c = np.asarray(found.weights, np.float64), g @ g.T
            want = linprog(-(g @ v), -c, np.zeros(m), np.ones((1, m)), [1.0])
            np.testing.assert_allclose(a.sum(), 1, rtol=1e-4)
            length = np.sqrt(np.diag(c))
            assert np.all(c @ a >= -1e-5 * length * np.sqrt(a @ c @ a)) and np.all(a >= 0)
            np.testing.assert_allclose(a @ g @ v, -want.fun, rtol=1e-2, atol=1e-2)
            flat = np.concatenate([np.ravel(found.grads["a"]), found.grads["b"]])
            np.testing.assert_allclose(flat, a @ g, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_no_objective_rises_however_unequal_their_scales(normalize):
    """Relative to |g_i| |d|, for pairs with lengths up to 1e4 apart; by one variable exactly."""
    rng = np.random.default_rng(1)
    g = rng.normal(size=(200, 2, 5)) * 10 ** rng.uniform(-2, 2, (200, 2, 1))
    g, v = g.astype(np.float32), rng.normal(size=(200, 5)).astype(np.float32)

    def solve(both):
        g, v = both
        found = optim.pareto_direction({"w": g}, {"w": v}, normalize=normalize)
        none = optim.pareto_direction({"w": g}, {"w": 0 * v}, normalize=normalize)
        return found.weights, none.weights, optim.min_norm(g @ g.T)

    found, none, shortest = (
        np.asarray(a, np.float64) for a in jax.jit(lambda *x: jax.lax.map(solve, x))(g, v)
    )
    g, v = g.astype(np.float64), v.astype(np.float64)
    length = np.linalg.norm(g, axis=2)
    for a in (found, none, shortest):
        d = np.einsum("nm,nmd->nd", a, g)
        falls = np.einsum("nmd,nd->nm", g, d) / (length * np.linalg.norm(d, axis=1)[:, None])
        assert falls.min() > -1e-5
    # a_0 = x: both constraints and the objective are linear in it
    c = np.einsum("nid,njd->nij", g, g)
    low, high = np.zeros(200), np.ones(200)
    zero = c[:, :, 1] / (c[:, :, 1] - c[:, :, 0])  # where <g_i, d> = 0
    low = np.where(c[:, 0, 1] < 0, zero[:, 0], low)
    high = np.where(c[:, 0, 1] < 0, zero[:, 1], high)
    pull = np.einsum("nmd,nd->nm", g / length[..., None] if normalize else g, v)
    x = found[:, 0]
    if normalize:
        first, other = x * length[:, 0], (1 - x) * length[:, 1]
        x = first / (first + other)
        ends = [e * length[:, 0] / (e * length[:, 0] + (1 - e) * length[:, 1]) for e in (low, high)]
        low, high = ends
    want = np.where(pull[:, 0] > pull[:, 1], high, low)
    np.testing.assert_allclose([x, 1 - x], [want, 1 - want], rtol=1e-3, atol=1e-6)


def test_a_weak_objective_beside_a_strong_one_does_not_rise():
    g = {"w": jnp.array([[1e4, 0.0], [-0.09, 1.0]])}
    d = optim.pareto_direction(g, {"w": jnp.array([1.0, 0.0])}).grads["w"]
    assert np.all(g["w"] @ d >= -1e-6 * jnp.linalg.norm(g["w"], axis=1) * jnp.linalg.norm(d))
    assert d[0] > 0


def test_pareto_direction_in_cases_that_are_known():
    orthogonal = {"w": jnp.diag(jnp.array([1.0, 2.0, 3.0]))}
    a = optim.pareto_direction(orthogonal, {"w": jnp.array([0.1, 0.2, 0.3])}).weights
    np.testing.assert_allclose(a, [0, 0, 1], atol=1e-6)
    none = optim.pareto_direction(orthogonal, {"w": jnp.zeros(3)}).weights
    np.testing.assert_allclose(none, optim.min_norm(optim.gram(orthogonal)), atol=1e-6)
    single = optim.pareto_direction({"w": jnp.ones((1, 3))}, {"w": -jnp.ones(3)})
    assert single.weights.tolist() == [1.0]
    tree, g = gradients(3)
    own = optim.pareto_direction(jax.tree.map(jnp.abs, tree), jax.tree.map(lambda x: x[1], tree))
    assert np.isfinite(own.weights).all()
    scaled = {"w": jnp.asarray(np.stack([1e4 * g[0], g[1]]))}
    v = {"w": jnp.asarray(g[1])}
    even = {"w": jnp.asarray(np.stack([g[0], g[1]]))}
    np.testing.assert_allclose(
        optim.pareto_direction(scaled, v, normalize=True).grads["w"]
        / jnp.linalg.norm(optim.pareto_direction(scaled, v, normalize=True).grads["w"]),
        optim.pareto_direction(even, v, normalize=True).grads["w"]
        / jnp.linalg.norm(optim.pareto_direction(even, v, normalize=True).grads["w"]),
        atol=1e-3,
    )


def test_descent_on_two_parabolas_ends_on_the_pareto_front_nearer_to_the_guide():
    ends = jnp.array([[0.0, 0.0], [4.0, 0.0]])
    losses = lambda w: 0.5 * jnp.sum((w - ends) ** 2, axis=1)
    guide = lambda w: 0.5 * jnp.sum((w - jnp.array([3.0, 0.0])) ** 2)

    def step(w, _):
        found = optim.pareto_direction({"w": jax.jacrev(losses)(w)}, {"w": jax.grad(guide)(w)})
        new = w - 0.05 * found.grads["w"]
        rise = 0.5 * jnp.sum((new - w) ** 2)  # of second order
        return new, losses(new) - losses(w) - rise

    w, change = jax.lax.scan(step, jnp.array([1.0, 3.0]), None, length=400)
    assert np.all(change <= 1e-4)
    assert abs(w[1]) < 0.05 and 0 <= w[0] <= 4


def test_preferences_lead_to_their_ray():
    """Two and three parabolas, preference r: at the end r_i l_i are equal, on the front."""
    ends = jnp.array([[0.0, 0.0], [4.0, 0.0]])
    losses = lambda w: 0.5 * jnp.sum((w - ends) ** 2, axis=1) + 0.01
    for r in ([1.0, 1.0], [3.0, 1.0], [1.0, 5.0]):
        r = jnp.array(r)

        def step(w, _, r=r):
            g = jax.jacrev(losses)(w)
            return w - 0.02 * optim.epo_weights(g @ g.T, losses(w), r) @ g, None

        w, _ = jax.lax.scan(step, jnp.array([1.0, 2.0]), None, length=1500)
        balance = np.asarray(r * losses(w))
        assert abs(w[1]) < 0.1 and balance.max() / balance.min() < 1.2, (r, w, balance)


# --------------------------------------------------------------------------------------- TrAct


def test_tract_is_the_ridge_regression_of_a_step_of_activations():
    with jax.enable_x64(True):
        x, d = jnp.asarray(RNG.normal(size=(9, 5))), jnp.asarray(RNG.normal(size=(9, 3)))
        lam, eta, b = 0.1, 0.2, 9
        step = -eta * optim.tract(x.T @ d, x, damping=lam)
        goal = lambda w: jnp.sum((x @ w + eta * b * d) ** 2) / b + lam * jnp.sum(w**2)
        np.testing.assert_allclose(jax.grad(goal)(step), 0, atol=1e-12)
        # the other side of the same matrix, for fewer rows than inputs
        few = x[:3]
        k = few @ few.T / 3
        dual = (d[:3].T - d[:3].T @ (k / lam) @ jnp.linalg.inv(k / lam + jnp.eye(3))) @ few / lam
        np.testing.assert_allclose(optim.tract(few.T @ d[:3], few, damping=lam), dual.T, rtol=1e-9)
        far = optim.tract(x.T @ d, x, damping=1e9)
        np.testing.assert_allclose(1e9 * far, x.T @ d, rtol=1e-7)
        tokens = optim.tract(x.T @ d, x.reshape(3, 3, 5), damping=lam)
        np.testing.assert_allclose(-eta * tokens, step, rtol=1e-12)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_tract_of_a_convolution_is_that_of_its_patches(padding):
    with jax.enable_x64(True):
        x = jnp.asarray(RNG.normal(size=(2, 6, 5, 3)))
        w = jnp.asarray(RNG.normal(size=(3, 2, 3, 4)))
        conv = lambda w: jax.lax.conv_general_dilated(
            x, w, (2, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        g = jax.grad(lambda w: jnp.sum(jnp.sin(conv(w))))(w)
        got = optim.tract(g, x, strides=(2, 1), padding=padding)
        # the output is linear in the kernel: its Jacobian, summed over outputs of one channel
        jac = jax.jacobian(conv)(w)[..., 0, :, :, :, 0].reshape(-1, 18)
        second = jac.T @ jac / len(jac) + 0.1 * jnp.eye(18)
        want = jnp.linalg.solve(second, g.reshape(18, 4)).reshape(g.shape)
        np.testing.assert_allclose(got, want, rtol=1e-9)
        one = jnp.asarray(RNG.normal(size=(1, 1, 3, 4)))
        np.testing.assert_allclose(
            optim.tract(one, x)[0, 0], optim.tract(one[0, 0], x.reshape(-1, 3)), rtol=1e-9
        )
    with pytest.warns(UserWarning, match="normalize them"):
        optim.tract(jnp.ones((3, 2)), 255 * jnp.ones((5, 3)))
    for bad in ({"damping": 0.0}, {"damping": jnp.float32(-1.0)}, {"inputs": jnp.ones((2, 4))}):
        options = {"grad": jnp.ones((3, 2)), "inputs": jnp.ones((5, 3)), **bad}
        with pytest.raises(ValueError, match=r"damping=|do not fit"):
            optim.tract(**options)
