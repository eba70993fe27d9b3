"""trace.replay: the operation of a leaf replaced by another function of its input."""

import string

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

from jaxkit.trace.taps import replay, taps

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(a, b, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def same(op, x, w):
    return op.run(x, w)


def lora(op, x, w, theta):
    return op.run(x, w) + op.low_rank(x, *theta)


# ---------------------------------------------------------------------------------- the models


def mlp(params, x):
    h = jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"])
    return h @ params["out"]["kernel"] + params["out"]["bias"]


MLP = {
    "in": {"kernel": normal(1, 3, 4), "bias": normal(2, 4)},
    "out": {"kernel": normal(3, 4, 2), "bias": normal(4, 2)},
}


def stacked(params, x):
    """A scan over remat blocks of two kernels each."""

    @jax.checkpoint
    def block(h, layer):
        return h + jnp.tanh(h @ layer["up"] + layer["bias"]) @ layer["down"]

    return lax.scan(lambda h, layer: (block(h, layer), None), x, params)[0]


STACKED = {"up": normal(5, 3, 4, 6), "bias": normal(6, 3, 6), "down": normal(7, 3, 6, 4)}


def rnn(params, xs):
    def step(h, x):
        h = jnp.tanh(x @ params["into"] + h @ params["over"])
        return h, h

    return lax.scan(step, jnp.zeros((xs.shape[1], 4)), xs)[1] @ params["readout"]


RNN = {"into": normal(8, 3, 4), "over": normal(9, 4, 4), "readout": normal(10, 4, 2)}


def tied(params, tokens):
    h = jnp.tanh(params["embed"][tokens] @ params["w"])
    return h @ params["embed"].T


TIED = {"embed": normal(11, 7, 4), "w": normal(12, 4, 4)}
TOKENS = jnp.array([[1, 2, 3, 0, 6], [4, 4, 1, 5, 2]])


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=(2, 2))(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, kernel_dilation=2)(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
        x = nn.relu(nn.ConvTranspose(3, (2, 2), strides=(2, 2))(x))
        return nn.Dense(2)(x.mean((1, 2)))


class Attention(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(num_heads=2, dtype=self.dtype)(nn.LayerNorm()(x))
        return nn.Dense(3, dtype=self.dtype)(x)


IMAGES, SEQUENCE = normal(13, 2, 6, 6, 3), normal(14, 2, 5, 4)

ZOO = {
    "mlp": (mlp, MLP, normal(15, 5, 3)),
    "stacked": (stacked, STACKED, normal(16, 2, 4)),
    "rnn": (rnn, RNN, normal(17, 6, 2, 3)),
    "tied": (tied, TIED, TOKENS),
    "convnet": (ConvNet().apply, ConvNet().init(KEY, IMAGES), IMAGES),
    "attention": (Attention().apply, Attention().init(KEY, SEQUENCE), SEQUENCE),
}


@pytest.fixture(params=ZOO)
def model(request):
    return ZOO[request.param]


# ------------------------------------------------------------------------- identities and edits


def test_the_same_operation_gives_the_same_bits(model):
    """Under jit. Eagerly, what is jitted inside runs operation by operation: to rounding."""
    apply_fn, params, x = model
    again = replay(apply_fn, dict.fromkeys(taps(apply_fn, "**")(params, x)[1], same))
    close(again(params, x), apply_fn(params, x), 1e-5, 1e-6)
    equal(jax.jit(again)(params, x), jax.jit(apply_fn)(params, x))


def test_another_leaf_through_the_operation_equals_the_function_of_that_leaf(model):
    apply_fn, params, x = model
    leaves = taps(apply_fn)(params, x)[1]
    doubled = dict.fromkeys(leaves, lambda op, x, w: op.run(x, 2 * w))
    with_double = jax.tree_util.tree_map_with_path(
        lambda path, w: (
            2 * w if jax.tree_util.keystr(path, simple=True, separator="/") in leaves else w
        ),
        params,
    )
    close(jax.jit(replay(apply_fn, doubled))(params, x), jax.jit(apply_fn)(with_double, x))


def test_another_leaf_goes_all_the_way_to_the_operation():
    """Through a cast, a mask, a standardization, a jitted function, a Newton-Schulz iteration."""

    @jax.jit
    def way(w):
        w = w.astype(jnp.float16).astype(jnp.float32) * (jnp.arange(4) != 2)
        w = (w - w.mean(0)) / (w.std(0) + 1)
        for _ in range(3):
            w = 1.5 * w - 0.5 * w @ w.T @ w
        return w[1:].T

    apply_fn = lambda params, x: x @ way(params["w"])
    params, x = {"w": 0.3 * normal(1, 4, 4)}, normal(2, 2, 4)
    edited = replay(apply_fn, {"w": lambda op, x, w: op.run(x, w + 1)})
    close(jax.jit(edited)(params, x), apply_fn({"w": params["w"] + 1}, x))


def test_a_zeroed_output_equals_a_zeroed_leaf(model):
    apply_fn, params, x = model
    for path in taps(apply_fn)(params, x)[1]:
        zero = replay(apply_fn, {path: lambda op, x, w: jnp.zeros_like(op.run(x, w))})
        without = jax.tree_util.tree_map_with_path(
            lambda p, w, path=path: (
                0 * w if jax.tree_util.keystr(p, simple=True, separator="/") == path else w
            ),
            params,
        )
        close(jax.jit(zero)(params, x), jax.jit(apply_fn)(without, x))


def test_patching_a_layer_with_the_taps_of_another_input_gives_its_output():
    x, other = normal(20, 2, 4), normal(21, 2, 4)
    out, tapped = taps(stacked, "*")(STACKED, other)
    # The residual stream carries x on: patch what the last layer adds, and the input before it.
    patch = replay(stacked, {"down": (lambda op, x, w, y: y, tapped["down"].output)})
    close(patch(STACKED, x) - x, out - other)
    out, tapped = taps(mlp)(MLP, other[:, :3])
    patch = replay(mlp, {"in/kernel": (lambda op, x, w, y: y, tapped["in/kernel"].output)})
    equal(patch(MLP, x[:, :3]), out)


def test_patching_over_time_reads_its_own_step():
    xs, other = normal(22, 6, 2, 3), normal(23, 6, 2, 3)
    out, tapped = taps(rnn)(RNN, other)
    whole = (lambda op, x, w, ys: ys[op.step[-1]], tapped["into"].output)
    equal(replay(rnn, {"into": whole})(RNN, xs), out)


def test_taps_of_a_replay_see_the_edit():
    x = normal(24, 5, 3)
    edited = replay(mlp, {"in/kernel": lambda op, x, w: 3 * op.run(x, w)})
    tapped = taps(edited)(MLP, x)[1]
    close(tapped["out/kernel"].input, jax.nn.relu(3 * x @ MLP["in"]["kernel"] + MLP["in"]["bias"]))


def test_inside_cond_while_and_custom_derivatives():
    def apply_fn(params, x):
        h = lax.cond(x.sum() > -1e9, lambda h: h @ params["branch"], lambda h: h, x)
        _, h = lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ params["loop"])), (0, h)
        )
        return dense(h, params["custom"])

    @jax.custom_vjp
    def dense(x, w):
        return x @ w

    dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    params = {name: normal(i, 3, 3) for i, name in enumerate(("branch", "loop", "custom"))}
    x = normal(9, 2, 3)
    for path in params:
        run = replay(apply_fn, {path: same})
        equal(run(params, x), apply_fn(params, x))
        run = replay(apply_fn, {path: lambda op, x, w: op.run(x, 2 * w)})
        close(run(params, x), apply_fn(params | {path: 2 * params[path]}, x))


# --------------------------------------------------------------------------- low rank on einsums


EINSUMS = [
    "bd,df->bf",
    "bd,fd->fb",
    "bnd,dhk->bnhk",
    "bnhk,hkd->bnd",
    "ecd,edf->ecf",
    "cdne,fegd->fgcne",
    "xbk,bky->byx",
    "ab,bac->cab",
    "a,b->ab",
    "bd,du->bu",  # u has size one
]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("spec", EINSUMS)
def test_low_rank_and_axes_of_any_einsum(spec, swap):
    """low_rank equals the dense product; scaling w scales the axes of x and y it is said to."""
    (xs, ws), ys = spec.split("->")[0].split(","), spec.split("->")[1]
    size = {c: 2 + i % 3 for i, c in enumerate(string.ascii_lowercase)} | {"u": 1, "z": 2}
    shape = lambda letters: tuple(size[c] for c in letters)
    consumed = "".join(c for c in ws if c not in ys)
    batch = "".join(c for c in ws if c in xs and c in ys)
    produced = "".join(c for c in ws if c not in xs)
    a, b = normal(3, *shape(batch + consumed + "z")), normal(4, *shape(batch + "z" + produced))
    scales = [1 + normal(5, size[c]) ** 2 for c in ws]
    seen = []

    def apply_fn(params, x):
        if swap:
            return jnp.einsum(f"{ws},{xs}->{ys}", params["w"], x)
        return jnp.einsum(f"{xs},{ws}->{ys}", x, params["w"])

    def along(t, axes):
        for axis, s in zip(axes, scales, strict=True):
            t = t if axis is None else jnp.moveaxis(jnp.moveaxis(t, axis, -1) * s, -1, axis)
        return t

    def edit(op, x, w, theta):
        made = [y if x is None else None for x, y in zip(op.x_axes, op.y_axes, strict=True)]
        scaled = op.run(x, along(w, range(w.ndim)))
        seen.append((op, along(op.run(along(x, op.x_axes), w), made), scaled))
        return op.low_rank(x, *theta)

    def both(w, x, a, b):
        dense = jnp.einsum(f"{batch}{consumed}z,{batch}z{produced}->{ws}", a, b)
        got = replay(apply_fn, {"w": (edit, (a, b))})({"w": w}, x)
        return (got, apply_fn({"w": dense}, x)), seen[-1][1:]

    for got, want in jax.jit(both)(normal(1, *shape(ws)), normal(2, *shape(xs)), a, b):
        close(got, want, 1e-4, 1e-4)
    op = seen[-1][0]
    assert op.primitive == "dot_general"
    assert [axis is None for axis in op.x_axes] == [c in produced for c in ws]
    assert [axis is None for axis in op.y_axes] == [c in consumed for c in ws]


# ----------------------------------------------------------------------------- LoRA on activations


def factors(path, w, rank=2, lead=0, groups=None):
    """A and B for a kernel whose first `groups` dimensions, after `lead` stacked ones, go in."""
    front, rest = w.shape[:lead], w.shape[lead:]
    split = len(rest) - 1 if groups is None else groups
    seed = sum(map(ord, path))
    return normal(seed, *front, *rest[:split], rank), normal(seed + 1, *front, rank, *rest[split:])


def product(a, b, lead=0):
    for _ in range(lead):
        return jax.vmap(product)(a, b)
    return jnp.tensordot(a, b, 1)


def leaf(params, path):
    for part in path.split("/"):
        params = params[part]
    return params


def merged(params, theta, lead):
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    new = [
        w + product(*theta[n], lead) if n in theta else w
        for n, (_, w) in zip(names, flat, strict=True)
    ]
    return jax.tree.unflatten(structure, new)


LORA = {
    "mlp": (0, {"in/kernel": None, "out/kernel": None}),
    "stacked": (1, {"up": None, "down": None}),
    "rnn": (0, {"into": None, "over": None, "readout": None}),
    "convnet": (
        0,
        {f"params/Conv_{i}/kernel": None for i in range(3)}
        | {"params/ConvTranspose_0/kernel": None},
    ),
    "attention": (
        0,
        {f"params/MultiHeadDotProductAttention_0/{n}/kernel": 1 for n in ("query", "key", "value")}
        | {"params/MultiHeadDotProductAttention_0/out/kernel": 2, "params/Dense_0/kernel": None},
    ),
}


@pytest.mark.parametrize("name", LORA)
def test_lora_on_activations_equals_the_merged_model_and_its_gradients(name):
    apply_fn, params, x = ZOO[name]
    lead, paths = LORA[name]
    theta = {p: factors(p, leaf(params, p), 2, lead, k) for p, k in paths.items()}
    bound = lambda theta: replay(apply_fn, {p: (lora, t) for p, t in theta.items()})(params, x)
    dense = lambda theta: apply_fn(merged(params, theta, lead), x)
    close(jax.jit(bound)(theta), jax.jit(dense)(theta), 2e-4, 2e-4)
    grads = [
        jax.jit(jax.grad(lambda t, f=f: jnp.sum(jnp.sin(f(t)))))(theta) for f in (bound, dense)
    ]
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[1]))
    jax.tree.map(lambda a, b: close(a / scale, b / scale, 1e-3, 1e-5), *grads)


def test_lora_on_a_tied_embedding_replaces_both_operations():
    """Rows looked up in a, and logits against the same a and b: b and a change their roles."""
    a, b = normal(1, 7, 2), normal(2, 2, 4)
    dense = tied({**TIED, "embed": TIED["embed"] + a @ b}, TOKENS)

    def edit(op, x, w, theta):
        a, b = theta
        pair = (a, b) if op.primitive == "gather" else (b.T, a.T)
        return op.run(x, w) + op.low_rank(x, *pair)

    close(replay(tied, {"embed": (edit, (a, b))})(TIED, TOKENS), dense)


def test_lookup_of_one_row():
    params, a, b = {"table": normal(1, 7, 2, 3)}, normal(2, 7, 2), normal(3, 2, 2, 3)
    apply_fn = lambda p, i: p["table"][i]
    for index in (jnp.array(4), jnp.array([3, 3, -1])):
        got = replay(apply_fn, {"table": (lora, (a, b))})(params, index)
        close(got, (params["table"] + jnp.tensordot(a, b, 1))[index])


def test_low_rank_sees_through_merges_and_splits_of_dimensions():
    """Heads merged in the leaf and apart in the operation, and the other way round."""
    split = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(4, 2, 3))
    merge = lambda p, x: x @ p["w"].reshape(4, 6)
    into = lambda p, x: jnp.einsum("bhk,hkd->bd", x.reshape(-1, 2, 2), p["w"].reshape(2, 2, -1))
    x, a = normal(1, 5, 4), normal(2, 4, 2)
    for apply_fn, shape in ((split, (6,)), (merge, (2, 3)), (into, (6,))):
        b = normal(3, 2, *shape)
        got = replay(apply_fn, {"w": (lora, (a, b))})({"w": jnp.ones((4, *shape))}, x)
        close(got, apply_fn({"w": jnp.ones((4, *shape)) + jnp.tensordot(a, b, 1)}, x))


def test_low_rank_computes_in_the_dtype_of_the_operation():
    net = Attention(jnp.bfloat16)
    params = net.init(KEY, SEQUENCE)
    path = "params/MultiHeadDotProductAttention_0/query/kernel"
    theta = factors(path, leaf(params, path), 2, 0, 1)
    seen = []

    def edit(op, x, w, theta):
        y = op.low_rank(x, *theta)
        seen.append((x.dtype, w.dtype, y.dtype))
        return op.run(x, w) + y

    out = replay(net.apply, {path: (edit, theta)})(params, SEQUENCE)
    assert seen == [(jnp.bfloat16, jnp.float32, jnp.bfloat16)]
    close(out.astype(float), net.apply(merged(params, {path: theta}, 0), SEQUENCE), 0.1, 0.1)


def intermediates(jaxpr):
    """The equations of a jaxpr and of every function inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for param in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda p: isinstance(p, core.Jaxpr | core.ClosedJaxpr),
        ):
            if isinstance(param, core.Jaxpr | core.ClosedJaxpr):
                yield from intermediates(getattr(param, "jaxpr", param))


def dense_values(fn, theta, sizes):
    """The products and sums in the gradient whose result is as large as a weight."""
    jaxpr = jax.make_jaxpr(jax.grad(lambda t: fn(t).sum()))(theta)
    return [
        eqn.primitive.name
        for eqn in intermediates(jaxpr.jaxpr)
        for v in eqn.outvars
        if getattr(v.aval, "size", 0) in sizes and eqn.primitive.name not in ("slice", "squeeze")
    ]


BIG = {
    "dense": (mlp, {"in": {"kernel": jnp.ones((31, 37)), "bias": jnp.ones(37)},
                    "out": {"kernel": jnp.ones((37, 41)), "bias": jnp.ones(41)}},
              jnp.ones((2, 31)), 0, ["in/kernel", "out/kernel"]),
    "stacked": (stacked, {"up": jnp.ones((3, 31, 37)), "bias": jnp.ones((3, 37)),
                          "down": jnp.ones((3, 37, 31))}, jnp.ones((2, 31)), 1, ["up", "down"]),
    "conv": (lambda p, x: lax.conv(x, p["w"].transpose(3, 2, 0, 1), (1, 1), "SAME"),
             {"w": jnp.ones((3, 3, 29, 31))}, jnp.ones((1, 29, 5, 5)), 0, ["w"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BIG)
def test_no_gradient_of_the_size_of_a_weight_is_formed(name):
    """The gradient's jaxpr holds no value as large as a weight; that of the merged model does."""
    apply_fn, params, x, lead, paths = BIG[name]
    theta = {p: factors(p, leaf(params, p), 2, lead) for p in paths}
    bound = lambda t: replay(apply_fn, {p: (lora, t[p]) for p in paths})(params, x)
    dense = lambda t: apply_fn(merged(params, t, lead), x)
    kernels = [leaf(params, p) for p in paths]
    sizes = {w.size for w in kernels} | {w[0].size for w in kernels if lead}
    # a convolution's kernel is moved to the primitive's layout once; it is no gradient
    assert {*dense_values(bound, theta, sizes)} <= (
        {"transpose", "copy"} if name == "conv" else set()
    )
    assert {"dot_general", "add"} <= {*dense_values(dense, theta, sizes)}
    # what is saved for the backward pass: the weights themselves, and small things
    saved = lambda fn: jax.tree.leaves(jax.vjp(fn, theta)[1])
    total = sum(w.size for w in kernels)
    assert (
        sum(r.size for r in saved(bound))
        <= total + sum(t.size for t in jax.tree.leaves(theta)) + 40 * x.size
    )
    cost = lambda fn: jax.jit(jax.grad(lambda t: fn(t).sum())).lower(theta).cost_analysis()["flops"]
    assert cost(bound) < 0.8 * cost(dense)


def test_recomputation_stays():
    """A remat block is one after the edit too, with the low rank inside of it."""
    theta = {p: factors(p, leaf(STACKED, p), 2, 1) for p in ("up", "down")}
    bound = lambda t: replay(stacked, {p: (lora, t[p]) for p in t})(STACKED, normal(1, 2, 4))
    (scan,) = (e for e in jax.make_jaxpr(bound)(theta).eqns if e.primitive.name == "scan")
    body = scan.params["jaxpr"].jaxpr
    products = lambda j: sum(e.primitive.name == "dot_general" for e in intermediates(j))
    (block,) = (e for e in body.eqns if e.primitive.name in ("remat2", "checkpoint", "remat"))
    assert products(body) == products(block.params["jaxpr"]) == 6


def test_theta_under_vmap_is_an_ensemble_of_adapters():
    x = normal(1, 5, 3)
    many = normal(2, 4, 3, 2), normal(3, 4, 2, 4)
    bound = lambda theta: replay(mlp, {"in/kernel": (lora, theta)})(MLP, x)
    out = jax.jit(jax.vmap(bound))(many)
    for i in range(4):
        close(out[i], bound(jax.tree.map(lambda t, i=i: t[i], many)))


# -------------------------------------------------------------------------------- what it says


def test_bad_edits():
    x = jnp.ones((5, 3))
    run = lambda edits, fn=mlp, params=MLP, x=x: replay(fn, edits)(params, x)
    with pytest.raises(
        ValueError, match="no leaf has the path 'in/kernle'; the nearest: 'in/kernel'"
    ):
        run({"in/kernle": same})
    with pytest.raises(
        ValueError, match=r"ops\['in/kernel'\] returned shape \(5, 3\), and \(5, 4\)"
    ):
        run({"in/kernel": lambda op, x, w: x})
    with pytest.raises(TypeError, match=r"returned dtype bfloat16, and float32 was due; cast"):
        run({"in/kernel": lambda op, x, w: op.run(x, w).astype(jnp.bfloat16)})
    with pytest.raises(ValueError, match="'never' is never read"):
        run({"never": same}, params=MLP | {"never": jnp.ones(3)})
    product = lambda p, x: x @ (p["a"] @ p["b"])
    both = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"\['a', 'b'\] share one operation, `dot_general` at "):
        run(dict.fromkeys("ab", same), product, both)
    token = lambda p, x: jnp.concatenate([x @ p["w"], x + p["w"]])
    lost = lambda p, x: jnp.concatenate([x @ p["w"], p["w"]])
    square = {"w": jnp.ones((3, 3))}
    run({"w": same}, token, square, jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="'w' goes into `concatenate` at "):
        run({"w": same}, lost, square, jnp.ones((3, 3)))


def test_bad_extras_and_factors():
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"'up' is stacked over the 3 iterations of the scan at "):
        replay(stacked, {"up": (lora, (jnp.ones((4, 2)), jnp.ones((2, 6))))})(STACKED, x)
    wrong = (jnp.ones((4, 2)), jnp.ones((2, 3)))
    due = r"'in/kernel' has no low-rank form: factors .* came, \(3, 2\) and \(2, 4\) due"
    with pytest.raises(ValueError, match=due):
        replay(mlp, {"in/kernel": (lora, wrong)})(MLP, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="'in/bias' has no low-rank form: `add` is not bilinear"):
        replay(mlp, {"in/bias": (lora, wrong)})(MLP, jnp.ones((5, 3)))
    masked = lambda p, x: x @ jnp.where(jnp.eye(3) > 0, p["w"], 0)
    with pytest.raises(ValueError, match="it is more than cast, transposed and reshaped"):
        replay(masked, {"w": (lora, wrong)})({"w": jnp.ones((3, 3))}, jnp.ones((5, 3)))
