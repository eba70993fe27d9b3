import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data import load
from experiments.perceptron import init, logits
from jaxkit import losses, weights

RNG = np.random.default_rng(0)
V = 5
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
STUDENT, OLD, NEW = (draw(3, 4, V) for _ in range(3))
NEW = NEW.at[2, 0].set(2 * OLD[2, 0])
# in turn what the old model says (in the last row the new one too), the new one, the student
LABELS = jnp.stack(
    [*(x.argmax(-1)[:, i] for i, x in enumerate((OLD, NEW, STUDENT))), OLD.argmin(-1)[:, 3]], 1
)
loss = losses.compatibility_loss
grads = jax.jit(
    jax.grad(lambda *logits, m, mask: loss(*logits, LABELS, mask, select=m).sum(), (0, 1, 2))
)
ALL = jnp.ones((3, 4), bool)


def kl(p, q):
    p, q = (np.asarray(jax.nn.softmax(x), float) for x in (p, q))
    return (p * np.log(p / q)).sum(-1)


def test_each_token_has_its_teacher():
    right = {name: x.argmax(-1) == LABELS for name, x in (("s", STUDENT), ("o", OLD), ("n", NEW))}
    masks = {
        "old_right": right["o"],
        "old_right_new_wrong": right["o"] & ~right["n"],
        "student_wrong": ~right["s"],
    }
    assert len({m.tobytes() for m in map(np.asarray, masks.values())}) == 3
    for select, m in masks.items():
        want = np.where(m, kl(OLD, STUDENT), kl(NEW, STUDENT))
        got = loss(STUDENT, OLD, NEW, LABELS, select=select)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        np.testing.assert_array_equal(got, loss(STUDENT, OLD, NEW, LABELS, select=m))


@pytest.mark.parametrize(("m", "teacher"), [(True, OLD), (False, NEW)])
def test_the_minimiser_is_the_selected_teacher(m, teacher):
    """The loss is 0 there alone, with gradient 0; descent from the student finds it."""
    m = jnp.full((3, 4), m)
    assert abs(loss(teacher, OLD, NEW, LABELS, select=m)).max() < 1e-6
    for shift in (0.0, 3.0):  # logits count up to a constant
        assert abs(grads(teacher + shift, OLD, NEW, m=m, mask=ALL)[0]).max() < 1e-6
    other = NEW if teacher is OLD else OLD
    assert loss(other, OLD, NEW, LABELS, select=m).min() > 1e-2
    step = lambda x, _: (x - 2 * grads(x, OLD, NEW, m=m, mask=ALL)[0], None)
    end, _ = jax.jit(lambda x: jax.lax.scan(step, x, None, 500))(STUDENT)
    np.testing.assert_allclose(jax.nn.softmax(end), jax.nn.softmax(teacher), atol=1e-4)


def test_the_gradient_is_the_difference_of_probabilities_and_teachers_have_none():
    m = OLD.argmax(-1) == LABELS
    student, old, new = grads(STUDENT, OLD, NEW, m=m, mask=ALL)
    assert not old.any() and not new.any()
    want = jax.nn.softmax(STUDENT) - jax.nn.softmax(jnp.where(m[..., None], OLD, NEW))
    np.testing.assert_allclose(student, want, atol=1e-6)


def test_padding_does_not_count():
    """Neither in the loss nor in the gradient, whatever the logits and labels of pads are."""
    m = OLD.argmax(-1) == LABELS
    pad = lambda x, fill: jnp.concatenate([x, jnp.full_like(x[:, :2], fill)], 1)
    labels, mask = pad(LABELS, -100), pad(ALL, False)
    for fill in (0.0, 7.0, np.nan, -np.inf):
        padded = [pad(x, fill) for x in (STUDENT, OLD, NEW)]
        total = lambda student, padded=padded: loss(student, *padded[1:], labels, mask).sum()
        value, grad = jax.value_and_grad(total)(padded[0])
        assert float(value) == pytest.approx(float(loss(STUDENT, OLD, NEW, LABELS).sum()), rel=1e-6)
        np.testing.assert_allclose(
            grad[:, :4], grads(STUDENT, OLD, NEW, m=m, mask=ALL)[0], atol=1e-6
        )
        assert not grad[:, 4:].any()


def test_a_token_that_all_rule_out_adds_nothing():
    out = lambda x: x.at[..., 2].set(-jnp.inf)
    labels = jnp.where(LABELS == 2, 0, LABELS)
    without = [jnp.delete(x, 2, -1) for x in (STUDENT, OLD, NEW)]
    less = jnp.where(labels > 2, labels - 1, labels)
    value, grad = jax.value_and_grad(lambda s: loss(s, out(OLD), out(NEW), labels).sum())(
        out(STUDENT)
    )
    assert float(value) == pytest.approx(float(loss(*without, less).sum()), rel=1e-6)
    assert jnp.isfinite(grad).all() and not grad[..., 2].any()


def test_bfloat16_logits_are_compared_in_float32():
    half = [x.astype(jnp.bfloat16) for x in (STUDENT, OLD, NEW)]
    got = loss(*half, LABELS)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, loss(*(x.astype(jnp.float32) for x in half), LABELS))


def test_flips_of_two_versions():
    """The cells sum to 1, flips differ by the gain, and models that agree have none."""
    y, old, new = (jnp.asarray(RNG.integers(0, 4, 200)) for _ in range(3))
    cells = weights.flips(y, old, new)
    assert float(cells.sum()) == pytest.approx(1)
    accuracy = lambda p: float((p == y).mean())
    assert float(cells[0, 1] - cells[1, 0]) == pytest.approx(accuracy(new) - accuracy(old))
    same = weights.flips(y, old, old)
    assert same[0, 1] == same[1, 0] == 0
    moved = (old != new).mean() - cells[0, 1] - cells[1, 0]
    both_wrong = (old != y) & (new != y) & (old != new)
    assert float(moved) == pytest.approx(float(both_wrong.mean()), abs=1e-6) and moved > 0.1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"logits of `old` are \(3, 4, 6\), and \(3, 4, 5\)"):
        loss(STUDENT, draw(3, 4, 6), NEW, LABELS)  # another tokenizer
    with pytest.raises(ValueError, match=r"`new` are \(3, 3, 5\)"):
        loss(STUDENT, OLD, NEW[:, 1:], LABELS)
    with pytest.raises(ValueError, match=r"labels is \(3,\), and one a token, \(3, 4\)"):
        loss(STUDENT, OLD, NEW, LABELS[:, 0])
    with pytest.raises(ValueError, match=r"mask is \(4,\)"):
        loss(STUDENT, OLD, NEW, LABELS, ALL[0])
    with pytest.raises(TypeError, match="mask is float32, and bool"):
        loss(STUDENT, OLD, NEW, LABELS, jnp.ones((3, 4)))
    with pytest.raises(TypeError, match="select is int32"):
        loss(STUDENT, OLD, NEW, LABELS, select=LABELS)
    with pytest.raises(ValueError, match="select='new_right'; 'old_right'"):
        loss(STUDENT, OLD, NEW, LABELS, select="new_right")
    with pytest.raises(ValueError, match="prediction 1"):  # not aligned by example
        weights.flips(jnp.zeros(3, int), jnp.zeros(3, int), jnp.zeros(2, int))


@pytest.mark.slow
def test_an_update_of_a_digits_model_flips_less():
    """Old: a logistic regression on 150 images; new: a small network; then 400 steps of this."""
    data = load(train=1150, test=497)
    x, y, few = jnp.asarray(data.x[150:]), jnp.asarray(data.y[150:]), slice(0, 150)
    x_test, y_test = jnp.asarray(data.x_test), jnp.asarray(data.y_test)
    hard = lambda out, y: optax.softmax_cross_entropy_with_integer_labels(out, y).mean()

    def fit(params, x, objective, steps, lr, key, batch=None):
        tx = optax.adam(lr)

        def step(carry, key):
            params, state = carry
            rows = (
                jnp.arange(len(x)) if batch is None else jax.random.randint(key, batch, 0, len(x))
            )
            grads = jax.grad(lambda p: objective(logits(p, x[rows]), rows))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[0][0]

    old = fit(
        {"layer_0": {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}},
        jnp.asarray(data.x[few]),
        lambda out, rows: hard(out, jnp.asarray(data.y[few])[rows]),
        200, 0.01, jax.random.key(0),
    )  # fmt: skip
    old_logits, old_test = logits(old, x), logits(old, x_test).argmax(-1)

    def run(key):
        keys = jax.random.split(key, 3)
        supervised = lambda out, rows: hard(out, y[rows])
        new = fit(init(keys[0], (64, 32, 10)), x, supervised, 60, 0.01, keys[1], (64,))
        new_logits = logits(new, x)

        right = [out.argmax(-1) == y for out in (old_logits, new_logits)]

        def update(m):
            teach = lambda out, rows: loss(
                out, old_logits[rows], new_logits[rows], y[rows], select=m[rows]
            ).mean()
            return fit(new, x, teach, 400, 0.003, keys[2], (64,))

        both = jax.vmap(update)(jnp.stack([right[0], right[0] & ~right[1]]))
        models = [new, *(jax.tree.map(lambda w, i=i: w[i], both) for i in (0, 1))]
        tests = [logits(m, x_test).argmax(-1) for m in models]
        cells = jnp.stack([weights.flips(y_test, old_test, t) for t in tests])
        return cells[:, 1, 0], jnp.stack([(t == y_test).mean() for t in tests])

    flips, accuracy = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 5))
    flips, accuracy = flips.mean(0), accuracy.mean(0)
    assert flips[1] <= 0.8 * flips[0], (flips, accuracy)
    assert accuracy[1] >= accuracy[0] - 0.01
    assert flips[1] < flips[2] < flips[0]


def test_kd_loss():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 7, 5))
    labels, t = rng.integers(0, 5, 7), 2.5
    softmax = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    soft = -(softmax(teacher / t) * np.log(softmax(student / t))).sum(-1)
    due = t**2 * soft - np.log(softmax(student))[np.arange(7), labels]
    got = losses.kd_loss(*map(jnp.asarray, (student, teacher, labels)), temperature=t)
    np.testing.assert_allclose(got, due, rtol=1e-5)
    loss = lambda a, b: losses.kd_loss(a, b, jnp.asarray(labels), temperature=t).sum()
    to_student, to_teacher = jax.grad(loss, (0, 1))(jnp.asarray(student), jnp.asarray(teacher))
    assert (to_teacher == 0).all()
    hard = softmax(student) - np.eye(5)[labels]
    due = t * (softmax(student / t) - softmax(teacher / t)) + hard
    np.testing.assert_allclose(to_student, due, rtol=1e-4, atol=1e-5)
