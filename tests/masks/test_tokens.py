"""Token masks: two forms of one mask, exact gradients, and a cache that forgets nothing needed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit.masks import tokens

N, HEADS, KV, D = 12, 4, 2, 8


def random_types(seed, n=N, heads=()):
    return jax.random.randint(jax.random.key(seed), (*heads, n), 0, 3).at[..., -1].set(0)


def qkv(seed, n=N):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((n, HEADS, D), (n, KV, D), (n, KV, D))
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def by_definition(types, window):
    """Pair by pair."""
    n = len(types)
    out = np.zeros((n, n), bool)
    for j, kind in enumerate(types):
        later = [g for g in range(j, n) if types[g] == 0]
        last = {0: n, 1: later[0] if later else n, 2: j + window}[int(kind)]
        out[j : last + 1, j] = True
    return out


def test_both_forms_are_the_definition():
    types = jnp.stack([random_types(s) for s in range(50)])
    types = types.at[10:20, -1].set(1)  # and without a last global token
    for window in (0, 1, 3):
        index = jax.jit(tokens.visible)(types, window)
        product = jax.jit(tokens.soft_visible)(jnp.eye(3)[types], window)
        due = np.stack([by_definition(t, window) for t in np.asarray(types)])
        np.testing.assert_array_equal(index, due)
        np.testing.assert_array_equal(product, due)
        assert due[:, np.arange(N), np.arange(N)].all()


def test_global_tokens_are_causal_attention():
    q, k, v = qkv(0)
    due = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    got = tokens.attention(q, k, v, tokens.visible(jnp.zeros((KV, N), int)))
    np.testing.assert_allclose(got, due, rtol=1e-5, atol=1e-6)


def test_window_tokens_are_a_sliding_window_beside_the_sink():
    q, k, v = qkv(1)
    w = 3
    mask = tokens.visible(jnp.full((KV, N), 2).at[:, 0].set(0), w)
    got = tokens.attention(q, k, v, mask)
    due = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(w, 0))
    np.testing.assert_allclose(got[: w + 1], due[: w + 1], rtol=1e-5, atol=1e-6)
    assert jnp.abs(got[w + 1 :] - due[w + 1 :]).max() > 1e-2
    without = tokens.attention(q, k, v, tokens.visible(jnp.full((KV, N), 2), w))
    np.testing.assert_allclose(without, due, rtol=1e-5, atol=1e-6)


def test_masked_attention_is_that_of_jax():
    q, k, v = qkv(2)
    mask = tokens.visible(random_types(3, heads=(KV,)), 2)
    due = jax.nn.dot_product_attention(q, k, v, mask=jnp.repeat(mask, HEADS // KV, 0))
    np.testing.assert_allclose(tokens.attention(q, k, v, mask), due, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_types_is_that_of_finite_differences():
    q, k, v = qkv(4, n=7)
    target = jax.random.normal(jax.random.key(5), (7, HEADS, D))

    def loss(z):
        return (tokens.attention(q, k, v, tokens.soft_visible(z, 1)) * target).sum()

    with jax.enable_x64(True):
        wide = partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float64))
        q, k, v, target = wide([q, k, v, target])
        z = jax.nn.softmax(jax.random.normal(jax.random.key(6), (KV, 7, 3), jnp.float64))
        z = z.at[:, 3].set(jnp.array([1.0, 0, 0]))  # where a factor of the product is zero
        grads = jax.jit(jax.grad(loss))(z)
        basis = jnp.eye(z.size).reshape(-1, *z.shape)
        step = 1e-6
        run = jax.jit(jax.vmap(lambda e: (loss(z + step * e) - loss(z - step * e)) / (2 * step)))
        np.testing.assert_allclose(grads.ravel(), run(basis), rtol=1e-6, atol=1e-8)
        hard = jnp.eye(3)[random_types(7, 7, (KV,))]
        of_mask = jax.jit(jax.grad(lambda m: (tokens.attention(q, k, v, m) * target).sum()))
        hidden = of_mask(tokens.soft_visible(hard, 1))
        below = np.tril(np.ones((7, 7), bool)) & ~np.asarray(tokens.visible(hard.argmax(-1), 1))
        assert below.any()
        assert (hidden[below] != 0).all()  # keys that are hidden say what they would change


def test_hidden_keys_do_not_overflow():
    q, k, v = qkv(8)
    types = jnp.full((KV, N), 2)
    k = k.at[0].mul(200.0)  # hidden from all but itself
    scores = jnp.einsum("nhgd,hd->nhg", q.reshape(N, KV, -1, D), k[0]) * D**-0.5
    assert scores.max() > 200
    fn = lambda m: tokens.attention(q, k, v, m).sum()
    value, grads = jax.value_and_grad(fn)(tokens.soft_visible(jnp.eye(3)[types], 1))
    mask = tokens.visible(types, 1)
    due = jax.nn.dot_product_attention(q, k, v, mask=jnp.repeat(mask, HEADS // KV, 0))
    np.testing.assert_allclose(value, due.sum(), rtol=1e-5)
    assert jnp.isfinite(grads).all()


def test_draws_are_hard_with_a_soft_gradient():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2])) + jnp.zeros((3000, 3))
    z = jax.jit(tokens.draw)(jax.random.key(0), logits)
    assert set(np.unique(z)) == {0.0, 1.0}
    assert (z.sum(-1) == 1).all()
    assert z[0].tolist() == z[-1].tolist() == [1, 0, 0]
    np.testing.assert_allclose(z[1:-1].mean(0), [0.5, 0.3, 0.2], atol=0.03)
    cost = lambda logits: (tokens.draw(jax.random.key(0), logits)[:, 0]).sum()
    grads = jax.grad(cost)(logits[:20])
    assert (grads[jnp.array([0, -1])] == 0).all()
    assert (grads[1:-1, 0] > 0).all()
    np.testing.assert_allclose(grads.sum(-1), 0, atol=1e-6)


def test_life_and_its_gradient_by_hand():
    types = jnp.array([0, 1, 2, 1, 0, 1])
    z = jnp.eye(3)[types]
    due = (6 + 3 + 1 + 2 + 0) / 6  # n - j, then g(j) - j: 4 - 1, 4 - 3, 5 - 5
    np.testing.assert_allclose(tokens.life(z), due, rtol=1e-6)
    grads = jax.grad(tokens.life)(z)
    until = jnp.array([0, 4, 4, 4, 4, 5]) - jnp.arange(6)
    due = jnp.stack([6 - jnp.arange(6), until, jnp.zeros(6)], 1) / 6
    np.testing.assert_allclose(grads, due, rtol=1e-6)


@pytest.mark.parametrize("window", [0, 2])
def test_decoding_with_an_evicting_cache_is_the_masked_forward(window):
    n, slots = 40, 26
    q, k, v = qkv(9, n)
    logits = jnp.array([-1.5, 0.0, 0.5]) + jnp.zeros((KV, n, 3))
    types = jax.random.categorical(jax.random.key(10), logits).at[:, 0].set(0)
    mask = tokens.visible(types, window)
    due = tokens.attention(q, k, v, mask)

    @partial(jax.jit, static_argnums=0)
    def run(slots):
        def step(state, now):
            out, state = tokens.decode(state, *now, window)
            return state, (out, state.live.sum(-1))

        return jax.lax.scan(step, tokens.cache(slots, KV, D), (q, k, v, types.T))

    state, (out, sizes) = run(slots)
    np.testing.assert_allclose(out, due, rtol=1e-4, atol=1e-5)
    assert (state.lost == 0).all()
    # after step i exactly those keys are left that a later query may still see
    mask, sizes = np.asarray(mask), np.asarray(sizes)
    some_later = np.stack([mask[:, i + 1 :, : i + 1].any(1).sum(-1) for i in range(n - 1)])
    assert (sizes[:-1] <= mask[:, : n - 1].sum(-1).T).all()
    assert (sizes[:-1] >= some_later).all()
    assert sizes.max() < n
    state, (out, _) = run(3)
    assert (state.lost > 0).all()
    assert jnp.abs(out - due).max() > 1e-2


def test_a_query_that_sees_nothing_is_an_error():
    """Also where it would see nothing but what comes later; under jit it is NaN, and alone so."""
    q, k, v = qkv(0)
    mask = tokens.visible(jnp.zeros((KV, N), int)).at[1, 4, :5].set(False)
    for empty in (mask, np.asarray(mask), mask.at[1, 4, 5:].set(True), mask.astype(float)):
        with pytest.raises(ValueError, match=r"query 4 sees no key \(head 1\)"):
            tokens.attention(q, k, v, empty)
    out = jax.jit(tokens.attention)(q, k, v, mask)
    lost = np.isnan(out).any(-1)
    assert lost[4, -1] and not lost[4, 0] and not np.delete(lost, 4, 0).any()


def test_bad_input():
    q, k, v = qkv(0)
    with pytest.raises(ValueError, match="4 heads of queries cannot share 3"):
        tokens.attention(q, k[:, [0, 0, 0]], v[:, [0, 0, 0]], jnp.ones((3, N, N)))
    with pytest.raises(ValueError, match=r"the mask has shape \(4, 12, 12\), and \(2, 12, 12\)"):
        tokens.attention(q, k, v, jnp.ones((4, N, N)))
    for fn in (tokens.visible, tokens.soft_visible):
        with pytest.raises(ValueError, match="window=-1"):
            fn(jnp.zeros((N, 3), int), -1)
    with pytest.raises(ValueError, match="slots=0"):
        tokens.cache(0, 1, 1)
    with pytest.raises(TypeError, match="typed key"):
        tokens.draw(jax.random.PRNGKey(0), jnp.zeros((4, 3)))


@pytest.mark.parametrize("kind", [jnp.float32, bool])
def test_the_bounded_derivative_is_that_of_the_published_kernel(kind):
    """dL/dM_ij = exp(s_ij) / sum over all j of exp(s_ij) (dP_ij - sum_k P_ik dP_ik)."""
    q, k, v = qkv(11)
    q, k, v = q[:, :1], k[:, :1], v[:, :1]
    mask = tokens.visible(random_types(12, heads=(1,)), 1).astype(kind)
    target = jax.random.normal(jax.random.key(13), (N, 1, D))
    due = tokens.attention(q, k, v, mask)
    np.testing.assert_allclose(tokens.attention(q, k, v, mask, bounded=True), due, rtol=1e-5)
    if kind is bool:
        return
    fn = lambda m: (tokens.attention(q, k, v, m, bounded=True) * target).sum()
    scores = np.where(np.tri(N), np.asarray(q[:, 0] @ k[:, 0].T) * D**-0.5, -np.inf)
    power = np.exp(scores)
    p = np.asarray(mask[0]) * power
    p = p / p.sum(-1, keepdims=True)
    dp = np.asarray(target[:, 0] @ v[:, 0].T)
    due = power / power.sum(-1, keepdims=True) * (dp - (p * dp).sum(-1, keepdims=True))
    np.testing.assert_allclose(jax.grad(fn)(mask)[0], due, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_cache_shrinks_with_the_factor_and_what_is_copied_stays():
    """One layer copies the marked symbol among 14 to the end; types are read off the symbols.

    The marked token stays until the last query: as a global one (or, with factors near 1, as a
    local one, which is cheaper and serves as well if no global token comes between). With the exact
    derivative, which is huge at hidden keys, Adam stalls before the types are learned.
    """
    symbols, n = 8, 16

    def data(key):
        one, two = jax.random.split(key)
        x = jax.random.randint(one, (64, n), 0, symbols)
        place = jax.random.randint(two, (64,), 1, n - 1)
        marked = jnp.arange(n) == place[:, None]
        return x, marked, x[jnp.arange(64), place]

    def init(key):
        k = jax.random.split(key, 6)
        normal = lambda key, *s: jax.random.normal(key, s) / s[0] ** 0.5
        return {
            "embed": normal(k[0], symbols, 16), "mark": normal(k[1], 1, 16),
            "last": normal(k[2], 1, 16), "qkv": normal(k[3], 16, 3, 16),
            "head": normal(k[4], 16, symbols), "types": jnp.zeros((16, 3)),
        }  # fmt: skip

    def one(bounded, params, x, marked, key):
        h = params["embed"][x] + marked[:, None] * params["mark"]
        h = h.at[-1].add(params["last"][0])
        logits = jax.lax.stop_gradient(h) @ params["types"]
        z = tokens.draw(key, logits)
        q, k, v = jnp.moveaxis(jnp.einsum("nd,dce->nce", h, params["qkv"]), 1, 0)[:, :, None]
        mask = tokens.soft_visible(z, 2)
        out = tokens.attention(q, k, v, mask[None], bounded=bounded)
        return out[-1, 0] @ params["head"], tokens.life(z), mask.sum() / (n * (n + 1) / 2), z[:, 0]

    def loss_fn(params, key, factor, bounded):
        batch, draw = jax.random.split(key)
        x, marked, y = data(batch)
        keys = jax.random.split(draw, 64)
        out, life, share, kinds = jax.vmap(partial(one, bounded, params))(x, marked, keys)
        task = optax.softmax_cross_entropy_with_integer_labels(out, y).mean()
        kept = (kinds * marked).sum() / 64
        return task + factor * life.mean(), ((out.argmax(-1) == y).mean(), share.mean(), kept)

    tx = optax.adam(1e-2)

    @partial(jax.jit, static_argnums=1)
    @partial(jax.vmap, in_axes=(0, None))
    def train(factor, bounded):
        params = init(jax.random.key(0))

        def step(state, key):
            params, opt_state = state
            grads, measured = jax.grad(loss_fn, has_aux=True)(params, key, factor, bounded)
            updates, opt_state = tx.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), measured

        keys = jax.random.split(jax.random.key(1), 1500)
        _, measured = jax.lax.scan(step, (params, tx.init(params)), keys)
        return [m[-200:].mean() for m in measured]

    accuracy, share, kept = train(jnp.array([0.0, 0.003, 0.03]), True)
    _, exact, _ = train(jnp.array([0.03]), False)
    print("accuracy", accuracy, "cache", share, "exact", exact, "the copied token is global", kept)
    assert (accuracy > 0.98).all()
    assert (kept > 0.98).all()
    assert share[0] > share[1] > share[2]
    assert share[2] < share[0] - 0.1
    assert exact[0] > share[2] + 0.05
