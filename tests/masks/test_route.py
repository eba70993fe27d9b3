"""Masks per input: exact counts, hand cases, decoupled gradients, and lossless cores."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import trace
from jaxkit.masks import route
from tests.counting import counting

# ------------------------------------------------------------------------ activation sparsity

H = jax.nn.relu(jax.random.normal(jax.random.key(0), (7, 12)))
MLP = {
    "up": {"w": jax.random.normal(jax.random.key(1), (6, 12)), "b": jnp.zeros(12)},
    "down": {"w": jax.random.normal(jax.random.key(2), (12, 5))},
}
AXES = {"up": {"w": (None, "mlp"), "b": ("mlp",)}, "down": {"w": ("mlp", None)}}
X = jax.random.normal(jax.random.key(3), (7, 6))


def mlp(params, x, activation=jax.nn.relu, route_fn=lambda h: h):
    h = activation(x @ params["up"]["w"] + params["up"]["b"])
    return route_fn(h) @ params["down"]["w"]


def test_exactly_k_per_token_and_ties_keep_the_lower_index():
    coarse = jnp.round(H * 2) / 2  # ties
    for k in (0, 1, 5, 12):
        marked = np.asarray(route.largest(coarse, k))
        due = np.zeros((7, 12), bool)
        order = np.argsort(-np.asarray(coarse), axis=-1, kind="stable")[:, :k]
        np.put_along_axis(due, order, True, -1)
        np.testing.assert_array_equal(marked, due)
        assert (jnp.count_nonzero(route.top_activations(coarse, k), axis=-1) <= k).all()


def test_all_units_are_the_plain_layer_bit_for_bit():
    top = jax.jit(lambda x: mlp(MLP, x, route_fn=lambda h: route.top_activations(h, 12)))
    np.testing.assert_array_equal(top(X), jax.jit(lambda x: mlp(MLP, x))(X))


def test_dropped_units_have_no_tangent():
    h, t = H[0], jnp.ones(12)
    kept = route.largest(h, 3)
    _, tangent = jax.jvp(lambda h: route.top_activations(h, 3), (h,), (t,))
    np.testing.assert_array_equal(tangent, kept)


def test_activity_counts_tokens_that_count():
    h = jnp.array([[1.0, 0.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert float(route.activity(h)) == 0.75
    assert float(route.activity(h, where=jnp.array([True, False]))) == 0.5
    assert float(route.activity(h, threshold=1.0)) == 0.125
    found = route.measure(mlp, MLP, X, where="down/w")
    due = (jax.nn.relu(X @ MLP["up"]["w"]) > 0).mean()
    assert list(found) == ["down/w"]
    np.testing.assert_allclose(found["down/w"], due, rtol=1e-6)


def test_padding_does_not_count_in_any_layer_and_every_layer_counts_for_itself():
    """Three layers in a scan are those of the loop; a cell that is called twice has two numbers."""
    up = jax.random.normal(jax.random.key(4), (3, 6, 12))
    params = {"up": up, "down": jax.random.normal(jax.random.key(5), (3, 12, 6))}
    x = jax.random.normal(jax.random.key(6), (2, 5, 6))
    tokens = jnp.arange(5) < jnp.array([[5], [2]])

    def layer(x, w):
        h = jax.nn.relu(x @ w["up"] - 1)
        return x + h @ w["down"], h

    scan = lambda params, x: jax.lax.scan(lambda x, w: (layer(x, w)[0], None), x, params)[0]
    due, y = [], x
    for i in range(3):
        y, h = layer(y, jax.tree.map(lambda w, i=i: w[i], params))
        due.append(np.asarray(h > 0)[np.asarray(tokens)].mean())
    assert len({round(float(d), 3) for d in due}) == 3
    found = route.measure(scan, params, x, where="down", tokens=tokens)["down"]
    np.testing.assert_allclose(found, due, rtol=1e-6)
    tail = x.at[1, 2:].set(100.0)
    same = route.measure(scan, params, tail, where="down", tokens=tokens)["down"]
    np.testing.assert_array_equal(found, same)
    own = jax.tree.map(lambda w: w[0], params)
    twice = lambda w, x: layer(layer(x, w)[0], w)[0]
    first, second = route.measure(twice, own, x, where="down", tokens=tokens)["down"]
    np.testing.assert_allclose(first, due[0], rtol=1e-6)
    inside = layer(layer(x, own)[0], own)[1] > 0
    np.testing.assert_allclose(second, np.asarray(inside)[np.asarray(tokens)].mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="'down': Incompatible"):
        route.measure(twice, own, x, where="down", tokens=jnp.ones((3, 5), bool))
    with pytest.raises(ValueError, match="'down': no token counts"):
        route.measure(scan, params, x, where="down", tokens=jnp.zeros((2, 5), bool))
    in_time = lambda p, xs: jax.lax.scan(lambda c, x: (c, scan(p, x)), 0, xs)[1]
    with pytest.raises(ValueError, match="'down': its layers are stacked inside another scan"):
        route.measure(in_time, params, x, where="down")


def test_activations_without_zeros_are_refused():
    gelu = lambda p, x: mlp(p, x, jax.nn.gelu)
    with pytest.raises(ValueError, match=r"'down/w': .* not activations of ReLU: some are neg"):
        route.measure(gelu, MLP, X, where="down/w")
    assert 0 < route.measure(gelu, MLP, X, where="down/w", threshold=0.1)["down/w"] < 1
    with pytest.raises(ValueError, match="none is exactly zero"):
        route.activity(jnp.ones((2, 3)))
    assert float(route.activity(jnp.array([[-1.0, 0.0]]), threshold=0)) == 0.5
    with pytest.raises(ValueError, match="no token counts"):
        route.activity(H, where=jnp.zeros(7, bool))
    for fn in (route.largest, route.top_activations):
        with pytest.raises(ValueError, match="13 of 12 entries"):
            fn(H, 13)


def test_random_readouts_push_active_units_down_on_average():
    """E_V[dL/da_i] > 0 for a_i > 0 if V has mean 0, and < 0 if the label's row has a large mean."""
    a = jax.nn.relu(jax.random.normal(jax.random.key(0), (64,))) + 0.01

    def gradient(key, shift):
        v = jax.random.normal(key, (10, 64)).at[0].add(shift)
        return jax.grad(lambda a: -jax.nn.log_softmax(v @ a / 8)[0])(a)

    @jax.jit
    def moments(key, shift):
        def add(sums, key):
            g = jax.vmap(lambda k: gradient(k, shift))(jax.random.split(key, 1000))
            return (sums[0] + g.sum(0), sums[1] + (g**2).sum(0), sums[2] + g.sum(1).mean()), None

        zeros = jnp.zeros(64)
        sums, _ = jax.lax.scan(add, (zeros, zeros, 0.0), jax.random.split(key, 40))
        mean = sums[0] / 40_000
        return mean, jnp.sqrt((sums[1] / 40_000 - mean**2) / 40_000)

    mean, error = moments(jax.random.key(1), 0.0)
    large = a > 0.5
    assert (mean[large] > 3 * error[large]).all()
    assert large.sum() > 15
    assert mean.sum() > 0
    mean, _ = moments(jax.random.key(1), 1.0)
    assert (mean < 0).all()


@pytest.mark.slow
def test_training_on_random_labels_empties_deep_layers():
    """3 pre-norm ReLU blocks of 64 x 512 on centred digits: active fractions before and after."""
    from sklearn.datasets import load_digits

    x, _ = load_digits(return_X_y=True)
    x = jnp.asarray((x - x.mean(0)) / (x.std(0) + 1e-6), jnp.float32)
    y = jax.random.randint(jax.random.key(0), (len(x),), 0, 10)
    keys = jax.random.split(jax.random.key(1), 7)
    normal = lambda k, *s: jax.random.normal(k, s) * (2 / s[0]) ** 0.5
    params = {
        "blocks": [
            {"up": normal(keys[i], 64, 512), "bias": jnp.zeros(512),
             "down": normal(keys[3 + i], 512, 64)} for i in range(3)
        ],
        "head": normal(keys[6], 64, 10),
    }  # fmt: skip

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def apply_fn(params, x):
        for p in params["blocks"]:
            x = x + jax.nn.relu(norm(x) @ p["up"] + p["bias"]) @ p["down"]
        return norm(x) @ params["head"]

    def loss_fn(params, i):
        out = apply_fn(params, x[i])
        return optax.softmax_cross_entropy_with_integer_labels(out, y[i]).mean()

    tx = optax.adam(3e-3)

    @jax.jit
    def train(params):
        def step(state, key):
            params, opt_state = state
            grads = jax.grad(loss_fn)(params, jax.random.randint(key, (128,), 0, len(x)))
            updates, opt_state = tx.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        keys = jax.random.split(jax.random.key(2), 1000)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    rho = lambda params: [
        float(r) for r in route.measure(apply_fn, params, x, where="blocks/*/down").values()
    ]
    before, after = rho(params), rho(train(params))
    print("active", np.round(before, 3), np.round(after, 3))
    assert all(abs(r - 0.5) < 0.05 for r in before)
    assert max(after[1:]) <= 0.30


# ------------------------------------------------------------------------- fire together ...


def test_mass_by_hand():
    a = jnp.array([4.0, 3.0, 2.0, 1.0])
    assert route.mass(a, 0.75).tolist() == [True, True, False, False]
    assert route.mass(a, 0.9).tolist() == [True, True, True, False]
    assert route.mass(a, None).all()
    assert route.mass(jnp.array([4.0, 0.0, 2.0]), 1).tolist() == [True, False, True]
    assert route.mass(a, 0.3).tolist() == [True, False, False, False]  # the largest alone exceeds r
    assert route.mass(jnp.zeros(3), 0.5).tolist() == [True, False, False]
    tied = route.mass(jnp.ones(4), 0.5)
    assert tied.tolist() == [True, True, False, False]


def test_mass_is_scale_free_grows_with_r_and_has_no_gradient():
    a = jax.random.uniform(jax.random.key(0), (50, 9))
    few = jax.jit(lambda a, r: route.mass(a, r))
    np.testing.assert_array_equal(few(a, 0.6), few(a * 8, 0.6))
    counts = [few(a, r).sum(-1) for r in (0.2, 0.5, 0.8, 0.95)]
    assert all((b >= c).all() for b, c in zip(counts[1:], counts[:-1], strict=True))
    kept = jnp.where(few(a, 0.8), a, 0).sum(-1) / a.sum(-1)
    assert (kept <= 0.8 + 2e-5).all()
    assert (jax.grad(lambda a: jnp.where(route.mass(a, 0.8), 2.0, 1.0).sum())(a) == 0).all()
    for r in (0, -1.0, 1.5):
        with pytest.raises(ValueError, match=r"a number in \(0, 1\]"):
            route.mass(a, r)


IMAGES = jax.random.normal(jax.random.key(5), (2, 5, 5, 3))
CONVS = {
    "first": jax.random.normal(jax.random.key(6), (3, 3, 3, 4)),
    "second": jax.random.normal(jax.random.key(7), (3, 3, 4, 6)),
}


def conv(x, w):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)


def test_the_predictor_learns_beside_the_network():
    theta = {"kernel": jax.random.normal(jax.random.key(8), (4, 6)), "bias": jnp.zeros(6)}

    def loss(params, joint):
        x = jax.nn.relu(conv(IMAGES, params["net"]["first"]))
        out = jax.nn.relu(conv(x, params["net"]["second"]))
        target = route.mass(jnp.abs(out).max((1, 2)), 0.7)
        return route.predictor_loss(route.predict(params["theta"], x, joint=joint), target)

    params = {"net": CONVS, "theta": theta}
    apart, joint = (jax.grad(loss)(params, joint) for joint in (False, True))
    assert all((g == 0).all() for g in jax.tree.leaves(apart["net"]))
    assert (joint["net"]["first"] != 0).any()
    assert all((g != 0).any() for g in jax.tree.leaves(apart["theta"]))
    jax.tree.map(np.testing.assert_array_equal, apart["theta"], joint["theta"])


def test_predictor_and_its_loss_by_hand():
    theta = {"kernel": jax.random.normal(jax.random.key(8), (3, 6)), "bias": jnp.arange(6.0)}
    pooled = np.asarray(IMAGES, np.float64).mean((1, 2))
    weights = np.exp(pooled) / np.exp(pooled).sum(-1, keepdims=True)
    z = weights @ np.asarray(theta["kernel"], np.float64) + np.arange(6)
    np.testing.assert_allclose(route.predict(theta, IMAGES), z, rtol=1e-4, atol=1e-5)
    plain = pooled @ np.asarray(theta["kernel"], np.float64) + np.arange(6)
    got = route.predict(theta, IMAGES, softmax=False)
    np.testing.assert_allclose(got, plain, rtol=1e-4, atol=1e-5)
    target = np.arange(12).reshape(2, 6) % 3 == 0
    p = 1 / (1 + np.exp(-z))
    due = -np.where(target, np.log(p), np.log(1 - p)).mean(0).sum()
    np.testing.assert_allclose(route.predictor_loss(jnp.asarray(z), target), due, rtol=1e-4)


def test_masked_channels_are_gathered_channels():
    out = jax.nn.relu(conv(IMAGES[:1], CONVS["first"]))
    mask = route.mass(out.max((1, 2)), 0.7)[0]
    assert 0 < mask.sum() < 4
    dense = conv(out * mask, CONVS["second"])
    kept = np.flatnonzero(mask)
    small = jax.nn.relu(conv(IMAGES[:1], CONVS["first"][..., kept]))
    np.testing.assert_allclose(
        conv(small, CONVS["second"][:, :, kept]), dense, rtol=1e-5, atol=1e-5
    )


def test_counted_multiplications():
    ones = lambda n: jnp.ones((2, n), bool)
    assert float(route.macs(ones(6), ones(4), pixels=25, taps=9)) == 25 * 9 * 6 * 4
    assert float(route.macs(ones(6), ones(4), pixels=25, taps=9, groups=2)) == 25 * 9 * 6 * 2
    a, b = jax.random.uniform(jax.random.key(0), (2, 50, 8))
    counts = [
        float(route.macs(route.mass(a, r), route.mass(b, r), pixels=4, taps=9))
        for r in (0.3, 0.6, 0.9)
    ]
    assert counts == sorted(counts)
    active, previous = jnp.array([[1, 0], [1, 1]], bool), jnp.array([[1, 1], [1, 0]], bool)
    assert float(route.macs(active, previous, pixels=1, taps=1)) == 2  # (1 * 2 + 2 * 1) / 2


# --------------------------------------------------------------------------- core neurons


def test_cores_by_hand():
    a = jnp.array([[5.0, 4.0, 3.0, 2.0, 1.0, -1.0], [0.0, 0.0, 2.0, 2.0, -1.0, -2.0]])
    assert route.token_core(a, 0.4).tolist() == [
        [True, True, False, False, False, False],  # 2 of 5, and not 3 by rounding
        [False, False, True, False, False, False],  # 1 of 2, the first of equal ones
    ]
    assert not route.token_core(-jnp.ones((1, 4)), 0.4).any()
    np.testing.assert_array_equal(route.token_core(a, 1.0), a > 0)
    counts = [3, 2, 2, 1, 0]
    cores = jnp.arange(3)[:, None] < jnp.array(counts)
    assert route.sentence_core(cores, 0.4).tolist() == [0, 1]
    padded = jnp.concatenate([cores, jnp.ones((4, 5), bool).at[:, :2].set(False)])
    where = jnp.arange(7) < 3
    assert route.sentence_core(padded, 0.4, where=where).tolist() == [0, 1]
    assert route.sentence_core(padded, 0.4).tolist() == [2, 3]
    assert route.sentence_core(jnp.ones((1, 30), bool), 0.1).shape == (3,)  # .1 * 30 > 3 in floats


def test_a_batch_of_sentences_has_no_core_of_its_own():
    cores = jax.random.bernoulli(jax.random.key(0), 0.5, (2, 7, 50))
    with pytest.raises(ValueError, match=r"\(tokens, n\) is due, and shape \(2, 7, 50\) came"):
        route.sentence_core(cores, 0.2)
    each = jax.vmap(lambda c: route.sentence_core(c, 0.2))(cores)
    np.testing.assert_array_equal(each[1], route.sentence_core(cores[1], 0.2))
    for where in ([False] * 7, np.zeros(7, bool), jnp.zeros(7, bool)):
        with pytest.raises(ValueError, match="none of its 7 tokens counts"):
            route.sentence_core(cores[0], 0.2, where=where)


def test_a_gated_layer_reads_the_core_of_both_projections():
    """Gathered columns of gate and up and rows of down, and the dense layer masked to the core."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        name: {"w": jax.random.normal(key, shape)}
        for name, key, shape in zip(
            ("gate", "up", "down"), keys, ((6, 20), (6, 20), (20, 5)), strict=False
        )
    }
    axes = {"gate": {"w": (None, "mlp")}, "up": {"w": (None, "mlp")}, "down": {"w": ("mlp", None)}}
    acts = lambda p, x: jax.nn.silu(x @ p["gate"]["w"])
    layer = lambda p, x, m=1.0: (acts(p, x) * (x @ p["up"]["w"]) * m) @ p["down"]["w"]
    prompt, x = jax.random.normal(keys[3], (2, 9, 6))
    core = route.sentence_core(route.token_core(acts(params, prompt)), 0.2)
    small = trace.take(params, axes, {"mlp": core})
    for name in ("gate", "up"):
        np.testing.assert_array_equal(small[name]["w"], params[name]["w"][:, core])
    np.testing.assert_array_equal(small["down"]["w"], params["down"]["w"][core])
    masked = layer(params, x, jnp.zeros(20).at[core].set(1))
    np.testing.assert_allclose(layer(small, x), masked, rtol=1e-5, atol=1e-5)
    # a gate of other columns is another model
    other = small | {"gate": {"w": params["gate"]["w"][:, :4]}}
    assert jnp.abs(layer(other, x) - masked).max() > 0.1
    assert jnp.abs(layer(params, x) - masked).max() > 0.1


def gathered(index):
    return trace.take(MLP, AXES, {"mlp": index})


def test_the_whole_core_is_the_dense_model():
    a = jax.nn.relu(X @ MLP["up"]["w"])
    core = route.sentence_core(route.token_core(a, 1.0), 1.0)
    np.testing.assert_allclose(mlp(gathered(core), X), mlp(MLP, X), rtol=1e-5, atol=1e-5)


def test_decoding_with_a_core_is_the_masked_model_in_one_compilation():
    def decoded(prompt, x):
        a = jax.nn.relu(prompt @ MLP["up"]["w"] + MLP["up"]["b"])
        core = route.sentence_core(route.token_core(a), 0.25)
        return mlp(gathered(core), x), core

    decode, traces = counting(decoded)
    for seed in range(3):
        prompt = jax.random.normal(jax.random.key(seed), (5, 6)) + jnp.arange(6.0) * (seed - 1)
        got, core = decode(prompt, X)
        assert core.shape == (3,)
        due = mlp(MLP, X, route_fn=lambda h, core=core: h * jnp.zeros(12).at[core].set(1))
        np.testing.assert_allclose(got, due, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


def test_a_core_that_holds_all_that_fires_loses_nothing():
    """20 units, of which 4 fire on this prompt, and none else on what follows."""
    w = jax.random.normal(jax.random.key(0), (6, 20))
    params = {
        "up": {"w": w, "b": jnp.where(jnp.arange(20) % 5 == 2, 20.0, -20.0)},
        "down": {"w": jax.random.normal(jax.random.key(1), (20, 5))},
    }
    a = jax.nn.relu(X[:3] @ w + params["up"]["b"])
    core = route.sentence_core(route.token_core(a, 1.0), 0.2)
    assert sorted(core.tolist()) == [2, 7, 12, 17]
    small = trace.take(params, AXES, {"mlp": core})
    np.testing.assert_allclose(mlp(small, X), mlp(params, X), rtol=1e-5, atol=1e-5)
    half = trace.take(params, AXES, {"mlp": core[:2]})
    assert jnp.abs(mlp(half, X) - mlp(params, X)).max() > 0.1


def _overlap(a, b):
    return len({*a.tolist()} & {*b.tolist()}) / len({*a.tolist()} | {*b.tolist()})


def test_cores_are_stable_within_a_topic_and_clusters_recover_them():
    """Sentences are tokens around a topic; the second layer's neurons answer to the topic."""
    topics = jax.random.normal(jax.random.key(0), (3, 16))
    hidden = jax.random.normal(jax.random.key(1), (16, 32)) / 4
    up = jax.random.normal(jax.random.key(2), (32, 100)) / 5

    @jax.jit
    def sentence(key, topic):
        tokens = topics[topic] + 0.8 * jax.random.normal(key, (12, 16))
        a = jax.nn.relu(jax.nn.relu(tokens @ hidden) @ up)
        cores = route.token_core(a)
        prompt, whole = route.sentence_core(cores[:6]), route.sentence_core(cores)
        return tokens.mean(0), prompt, whole

    which = jnp.arange(30) % 3
    found = jax.vmap(sentence)(jax.random.split(jax.random.key(3), 30), which)
    embedding, prompt, whole = map(np.asarray, found)
    own = np.mean([_overlap(prompt[i], whole[i]) for i in range(30)])
    other = np.mean([_overlap(prompt[i], prompt[j]) for i in range(10) for j in range(i)
                     if (i - j) % 3])  # fmt: skip
    assert own > other + 0.2
    as_masks = np.zeros((30, 100), bool)
    np.put_along_axis(as_masks, whole, True, 1)
    cores = route.cluster_cores(as_masks[:24], which[:24], 3)
    assert cores.shape == (3, 20)
    for c in range(3):
        counts = as_masks[:24][np.asarray(which[:24]) == c].sum(0)
        assert cores[c].tolist() == np.argsort(-counts, kind="stable")[:20].tolist()
    centroids = jnp.stack([embedding[:24][which[:24] == c].mean(0) for c in range(3)])
    for i in range(24, 30):
        chosen = route.nearest_core(5 * embedding[i], centroids, cores)
        np.testing.assert_array_equal(chosen, cores[which[i]])
        assert _overlap(chosen, whole[i]) > other


def test_bad_parts():
    cores = jnp.ones((2, 5), bool)
    for part in (0, 1.1):
        with pytest.raises(ValueError, match=f"alpha={part}"):
            route.token_core(H, part)
        with pytest.raises(ValueError, match=f"beta={part}"):
            route.sentence_core(cores, part)
        with pytest.raises(ValueError, match=f"gamma={part}"):
            route.cluster_cores(cores, jnp.zeros(2, int), 1, part)
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        route.sentence_core(cores[:0])
