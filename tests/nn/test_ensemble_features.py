import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data import load
from experiments.perceptron import init, logits
from jaxkit import nn, trace, tree

RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
some = lambda tree, n: jax.tree.map(lambda x: x[:n], tree)


def fit(loss_fn, params, tx, batches):
    """Train over the first axis of batches."""

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]


def rows(key, steps, size, n):
    return jax.random.randint(key, (steps, size), 0, n)


def ridge(features, targets, strength):
    """Least squares with a penalty on the weights, and none on the shift."""
    centred = targets - targets.mean(0)
    gram = features.T @ features + strength * jnp.eye(features.shape[1])
    w = jnp.linalg.solve(gram, features.T @ centred)
    return lambda test: test @ w + targets.mean(0)


# --------------------------------------------------------------------- concatenation (CAT)

STACK = {"kernel": draw(3, 6, 8), "bias": draw(3, 8)}
X, X_TEST = draw(40, 6), draw(25, 6)


def features(params, x):
    return jax.nn.relu(x @ params["kernel"] + params["bias"])


def test_members_in_one_program_are_members_in_a_loop():
    got, stats = jax.jit(lambda s, x: nn.concatenated_features(features, s, x))(STACK, X)
    loop = np.concatenate([features(at(STACK, i), X) for i in range(3)], 1)
    np.testing.assert_allclose(stats.mean, loop.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats.std, loop.std(0), rtol=1e-5)
    np.testing.assert_allclose(got, (loop - loop.mean(0)) / loop.std(0), atol=1e-5)
    same = nn.FeatureStats(jnp.zeros(24), jnp.ones(24))
    plain, kept = nn.concatenated_features(features, STACK, X, stats=same)
    np.testing.assert_allclose(plain, loop, atol=1e-6)
    assert kept is same


def test_one_member_is_a_plain_probe():
    train, stats = nn.concatenated_features(features, some(STACK, 1), X)
    test, _ = nn.concatenated_features(features, some(STACK, 1), X_TEST, stats=stats)
    own, other = (np.asarray(features(at(STACK, 0), x)) for x in (X, X_TEST))
    standard = lambda z: jnp.asarray((z - own.mean(0)) / own.std(0))
    targets = draw(40, 2)
    want = ridge(standard(own), targets, 1.0)(standard(other))
    np.testing.assert_allclose(ridge(train, targets, 1.0)(test), want, atol=1e-4)


def test_copies_of_one_network_add_nothing():
    """The rank is the same, and so is the probe; another network adds its own."""
    three = jax.tree.map(lambda w: jnp.stack([w[0]] * 3), STACK)
    with pytest.warns(UserWarning, match=r"members \[0, 1, 2\] have the same features"):
        train, stats = nn.concatenated_features(features, three, X)
    with pytest.warns(UserWarning, match="trained from one seed"):
        test, _ = nn.concatenated_features(features, three, X_TEST, stats=stats)
    alone, own = nn.concatenated_features(features, some(STACK, 1), X)
    alone_test, _ = nn.concatenated_features(features, some(STACK, 1), X_TEST, stats=own)
    targets = draw(40, 2)
    # sum_i w_i = w with the least sum of squares: w_i = w / 3, so a third of the penalty
    copies = ridge(train, targets, 3.0)(test)
    np.testing.assert_allclose(copies, ridge(alone, targets, 1.0)(alone_test), atol=1e-4)
    rank = lambda z: np.linalg.matrix_rank(np.asarray(z), tol=1e-3)
    both, _ = nn.concatenated_features(features, some(STACK, 2), X)
    assert rank(train) == rank(alone) == 8 and rank(both) == 16


def test_scales_of_members_do_not_matter():
    scale = jnp.array([1.0, 100.0, 0.01])
    scaled = jax.tree.map(lambda w: jax.vmap(jnp.multiply)(scale, w), STACK)
    want, _ = nn.concatenated_features(features, STACK, X)
    np.testing.assert_allclose(nn.concatenated_features(features, scaled, X)[0], want, atol=1e-4)


@pytest.mark.parametrize(("bias", "squash"), [(-1000.0, jax.nn.relu), (8.0, jnp.tanh)])
def test_units_that_are_dead_or_saturated_stay_small(bias, squash):
    """Their deviation is 0, or rounding, and is not what to divide by."""
    stuck = STACK | {"bias": STACK["bias"].at[1, 2].set(bias)}
    stuck["kernel"] = STACK["kernel"].at[1, :, 2].multiply(0.01)
    apply_fn = lambda p, x: squash(x @ p["kernel"] + p["bias"])
    want, _ = nn.concatenated_features(apply_fn, STACK, X)
    got, stats = nn.concatenated_features(apply_fn, stuck, X)
    assert (stats.std[10] > 0) == (squash is jnp.tanh) and jnp.abs(got[:, 10]).max() < 1e-6
    other, _ = nn.concatenated_features(apply_fn, stuck, 5 * X_TEST, stats=stats)
    assert jnp.abs(other[:, 10]).max() < 1e-6
    others = np.arange(24) != 10
    np.testing.assert_allclose(got[:, others], want[:, others], atol=1e-6)


def test_statistics_of_examples_on_eight_devices():
    x = draw(64, 6)
    want, _ = nn.concatenated_features(features, STACK, x)
    run = lambda x: nn.concatenated_features(features, STACK, x, axis_name="data")
    got, stats = jax.pmap(run, "data")(x.reshape(8, 8, 6))
    np.testing.assert_allclose(got.reshape(64, -1), want, atol=1e-5)
    assert (stats.mean == stats.mean[0]).all()


def test_bfloat16_networks_have_float32_features():
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), STACK)
    out, stats = nn.concatenated_features(features, half, X.astype(jnp.bfloat16))
    assert out.dtype == stats.mean.dtype == jnp.float32


def test_bad_features_are_named():
    with pytest.raises(ValueError, match=r"\(n, features\) were due of a member, and \(40, 1, 8\)"):
        nn.concatenated_features(lambda p, x: features(p, x)[:, None], STACK, X)
    _, stats = nn.concatenated_features(features, some(STACK, 2), X)
    with pytest.raises(ValueError, match="statistics are of 16 features, and 24 came"):
        nn.concatenated_features(features, STACK, X, stats=stats)


@pytest.mark.slow
def test_five_seeds_are_richer_than_the_best_of_them():
    """Trained on digits 0 to 4; a probe of 5 to 9 on 60 images; four times five seeds.

    A network of the size of one that learns to tell all of their features is richer as well.
    """
    data = load(train=1300, test=497)
    old, new, test = data.y < 5, data.y >= 5, data.y_test >= 5
    flat = lambda x: jnp.asarray(x.reshape(len(x), -1))
    x, y = flat(data.x[old]), jnp.asarray(data.y[old])
    x_few, y_few = flat(data.x[new][:60]), jnp.asarray(data.y[new][:60] - 5)
    x_test, y_test = flat(data.x_test[test]), jnp.asarray(data.y_test[test] - 5)

    def inner(params, x):
        for layer in (params["layer_0"], params["layer_1"]):
            x = features(layer, x)
        return x

    def loss(params, i):
        out = inner(params, x[i]) @ params["layer_2"]["kernel"] + params["layer_2"]["bias"]
        return cross_entropy(out, y[i]).mean()

    def train(key, objective, steps, **others):
        start, order = jax.random.split(key)
        params = {"net": init(start, (64, 32, 16, 5)), **others}
        return fit(objective, params, optax.adam(1e-2), rows(order, steps, 64, len(x)))["net"]

    def student(key, nets, strength):
        everything, _ = nn.concatenated_features(inner, nets, x)

        def matched(params, i):
            told = inner(params["net"], x[i]) @ params["map"]
            return loss(params["net"], i) + strength * jnp.square(told - everything[i]).mean()

        return train(key, matched, 600, map=jax.random.normal(key, (16, 80)) / 4)

    def probe(stack):
        few, stats = nn.concatenated_features(inner, stack, x_few)
        many, _ = nn.concatenated_features(inner, stack, x_test, stats=stats)

        def penalized(w, _):
            nll = cross_entropy(few @ w["kernel"] + w["bias"], y_few).mean()
            return nll + 0.005 * jnp.square(w["kernel"]).sum()

        zero = {"kernel": jnp.zeros((few.shape[1], 5)), "bias": jnp.zeros(5)}
        w = fit(penalized, zero, optax.adam(0.05), jnp.arange(300))
        return ((many @ w["kernel"] + w["bias"]).argmax(1) == y_test).mean()

    alone = lambda net: probe(jax.tree.map(lambda w: w[None], net))

    def run(keys):
        nets = jax.vmap(lambda key: train(key, lambda p, i: loss(p["net"], i), 300))(keys)
        taught = jax.vmap(lambda strength: alone(student(keys[0], nets, strength)))
        return jax.vmap(alone)(nets), probe(nets), taught(jnp.array([0.0, 1.0]))

    keys = jax.random.split(jax.random.key(0), (4, 5))
    singles, together, taught = jax.jit(jax.vmap(run))(keys)
    assert together.mean() >= singles.max(1).mean() + 0.05
    assert (together > singles.max(1)).all()
    assert taught[:, 1].mean() > taught[:, 0].mean() + 0.02


# ------------------------------------------------------------------------------ layers (LEVI)

PRETRAINED = {"first": draw(6, 8), "middle": draw(8, 7), "last": draw(7, 3)}
SMALL = {"kernel": draw(6, 4)}
LABELS = jnp.asarray(RNG.integers(0, 3, 40))


def pretrained(params, x):
    h = jnp.tanh(x @ params["first"])
    return jnp.tanh(h @ params["middle"]) @ params["last"]


def small(params, x):
    return jnp.tanh(x @ params["kernel"])


def tapped(params, x, names=("middle", "last")):
    found = trace.taps(pretrained, list(names))(params, x)[1]
    return {path: tap.input for path, tap in found.items()}


THETA = nn.levi_init(
    jax.random.key(0), tapped(PRETRAINED, X), small(SMALL, X), 3, width=16
)  # fmt: skip


def loss_of_all(params, frozen=True):
    z, s = tapped(params["pretrained"], X), small(params["small"], X)
    return nn.levi_loss(nn.levi_apply(params["theta"], z, s, frozen=frozen), LABELS).mean()


ALL = {"pretrained": PRETRAINED, "small": SMALL, "theta": THETA}


def test_the_pretrained_model_stays_as_it_is():
    """No gradient, and not a bit of a change; a weight decay over all leaves would move it."""
    frozen, tuned = (
        jax.jit(jax.grad(lambda p, f=f: loss_of_all(p, f)))(ALL) for f in (True, False)
    )
    moves = lambda grads: {path: bool(g.any()) for path, g in tree.flatten(grads).items()}
    assert all(move != path.startswith("pretrained") for path, move in moves(frozen).items())
    inner = {path for path, move in moves(tuned).items() if not move}
    assert inner == {"pretrained/last"}  # what it would have predicted is not used
    kinds = {"pretrained": "freeze", "small": "train", "theta": "train"}
    adamw = optax.adamw(1e-2, weight_decay=0.1)
    tx = optax.partition({"train": adamw, "freeze": optax.set_to_zero()}, kinds)
    run = jax.jit(lambda p: fit(lambda p, _: loss_of_all(p), p, tx, jnp.arange(20)))
    end = run(ALL)
    for name, w in PRETRAINED.items():
        np.testing.assert_array_equal(end["pretrained"][name], w)
    assert loss_of_all(end) < loss_of_all(ALL) - 0.1
    decayed = fit(lambda p, _: loss_of_all(p), ALL, adamw, jnp.arange(2))
    assert (decayed["pretrained"]["first"] != PRETRAINED["first"]).any()


def normal(x):
    x = np.asarray(x, float)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def test_the_adapting_layers_are_the_formula():
    z, s = tapped(PRETRAINED, X), small(SMALL, X)
    got = nn.levi_apply(THETA, z, s)
    for i, name in enumerate(("last", "middle")):
        hidden, out = (
            {k: np.asarray(w, float) for k, w in THETA[name][layer].items()}
            for layer in ("hidden", "out")
        )
        joined = np.concatenate([normal(z[name]), normal(s)], 1)
        h = np.maximum(joined @ hidden["kernel"] + hidden["bias"], 0)
        np.testing.assert_allclose(got[i], h @ out["kernel"] + out["bias"], atol=1e-5)


def test_one_layer_without_a_task_model_is_a_probe():
    z = {"last": tapped(PRETRAINED, X)["last"]}
    theta = {"last": THETA["last"]}
    got = nn.levi_apply(theta, z, jnp.zeros((40, 4)))
    hidden, out = theta["last"]["hidden"], theta["last"]["out"]
    h = jax.nn.relu(normal(z["last"]) @ hidden["kernel"][:7] + hidden["bias"])
    np.testing.assert_allclose(got[0], h @ out["kernel"] + out["bias"], atol=1e-5)
    np.testing.assert_allclose(
        nn.levi_loss(got, LABELS), 2 * cross_entropy(got[0], LABELS), rtol=1e-5
    )
    gradient = jax.grad(lambda s: nn.levi_apply(theta, z, s).sum())(jnp.zeros((40, 4)))
    assert jnp.isfinite(gradient).all()


def test_layers_are_exchangeable():
    """By other names, in another order: the prediction is the same, and so is the loss."""
    z, s = tapped(PRETRAINED, X), small(SMALL, X)
    z["x"] = draw(40, 5)
    theta = THETA | nn.levi_init(jax.random.key(1), {"x": z["x"]}, s, 3, width=16)
    other = {"x": "a", "last": "b", "middle": "c"}
    renamed = lambda tree: {other[name]: part for name, part in tree.items()}
    one, two = nn.levi_apply(theta, z, s), nn.levi_apply(renamed(theta), renamed(z), s)
    np.testing.assert_array_equal(two, one[jnp.array([2, 0, 1])])
    np.testing.assert_allclose(two.mean(0), one.mean(0), atol=1e-6)
    np.testing.assert_allclose(nn.levi_loss(two, LABELS), nn.levi_loss(one, LABELS), rtol=1e-5)
    again = nn.levi_init(jax.random.key(0), {"last": z["last"]}, s, 3, width=16)
    np.testing.assert_array_equal(
        again["last"]["hidden"]["kernel"], THETA["last"]["hidden"]["kernel"]
    )


def test_the_loss_is_that_of_the_mean_and_of_each():
    z = draw(4, 40, 3)
    mean = cross_entropy(z.mean(0), LABELS)
    want = mean + sum(cross_entropy(each, LABELS) for each in z) / 4
    np.testing.assert_allclose(nn.levi_loss(z, LABELS), want, rtol=1e-5)


def test_sequences_of_any_length_are_averaged():
    z = {"a": draw(5, 9, 8), "b": draw(5, 3, 4, 6), "c": draw(5, 7)}
    s = draw(5, 2)
    theta = nn.levi_init(jax.random.key(0), z, s, 3, width=4)
    means = {"a": z["a"].mean(1), "b": z["b"].mean((1, 2)), "c": z["c"]}
    np.testing.assert_allclose(
        nn.levi_apply(theta, z, s), nn.levi_apply(theta, means, s), atol=1e-5
    )


def test_draws_have_the_scales_of_their_initializers():
    z = {"a": draw(1, 300)}
    theta = nn.levi_init(jax.random.key(0), z, draw(1, 100), 50, width=200)["a"]
    assert float(theta["hidden"]["kernel"].std()) == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert float(theta["out"]["kernel"].std()) == pytest.approx((1 / 200) ** 0.5, rel=0.05)
    assert not theta["hidden"]["bias"].any() and not theta["out"]["bias"].any()


def test_bad_layers_are_named():
    z, s = tapped(PRETRAINED, X), small(SMALL, X)
    with pytest.raises(
        ValueError, match=r"theta is of the layers \['last', 'middle'\], and \['x'\]"
    ):
        nn.levi_apply(THETA, {"x": z["last"]}, s)
    with pytest.raises(ValueError, match="features of one layer at least"):
        nn.levi_init(jax.random.key(0), {}, s, 3)
    with pytest.raises(TypeError, match="key"):
        nn.levi_init(jax.random.PRNGKey(0), z, s, 3)


@pytest.mark.slow
def test_layers_against_a_probe_where_the_pretraining_was_misled():
    """Pretrained with a pixel that tells the class; the task has none, the test a random one."""
    data = load(train=1300, test=497)
    rng = np.random.default_rng(0)

    def marked(x, classes):
        x = x.copy()
        x[np.arange(len(x)), classes // 8, classes % 8] = 1.0
        return jnp.asarray(x)

    x_pre, y_pre = marked(data.x[:1000], data.y[:1000]), jnp.asarray(data.y[:1000])
    x, y = jnp.asarray(data.x[1000:]), jnp.asarray(data.y[1000:])
    x_ood = marked(data.x_test, rng.integers(0, 10, len(data.x_test)))
    y_test = jnp.asarray(data.y_test)
    layers = ["layer_1/kernel", "layer_2/kernel"]

    def run(key):
        keys = jax.random.split(key, 6)
        loss = lambda p, i: cross_entropy(logits(p, x_pre[i]), y_pre[i]).mean()
        batches = rows(keys[1], 200, 64, len(x_pre))
        backbone = fit(loss, init(keys[0], (64, 128, 128, 10)), optax.adam(1e-3), batches)
        see = lambda x, which: {
            path: tap.input for path, tap in trace.taps(logits, which)(backbone, x)[1].items()
        }

        def train(which, use_small):
            z, z_ood = see(x, which), see(x_ood, which)
            little = lambda p, x: logits(p, x) * use_small
            params = {"small": init(keys[2], (64, 24, 10))}
            params["theta"] = nn.levi_init(keys[3], z, jnp.zeros((1, 10)), 10, width=32)

            def loss(params, i):
                own = {path: f[i] for path, f in z.items()}
                each = nn.levi_apply(params["theta"], own, little(params["small"], x[i]))
                return nn.levi_loss(each, y[i]).mean()

            end = fit(loss, params, optax.adam(3e-3), rows(keys[4], 200, 64, len(x)))
            each = nn.levi_apply(end["theta"], z_ood, little(end["small"], x_ood))
            return (each.mean(0).argmax(1) == y_test).mean()

        return jnp.stack([train(layers, 1.0), train(layers[1:], 0.0)])

    levi, probe = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 5)).mean(0)
    assert levi >= probe - 0.01
