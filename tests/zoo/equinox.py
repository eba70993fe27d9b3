"""The zoo in Equinox: modules of one example, vmapped. Params are the inexact arrays.

The models are those of the plain modules and so are their counts; what differs is said. Kernels
are (out, in, ...) and images (channel, height, width).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import nn

from tests.zoo import convolution, dense, recurrent, transformer
from tests.zoo.model import batch, ids, merged, randomize, whole

relu = jax.nn.relu


def _is_inexact(x):
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def _built(make, *args):
    model = eqx.filter_eval_shape(make, jax.random.key(0))
    shapes, static = eqx.partition(model, _is_inexact)

    def apply_fn(params, *args):
        return jax.vmap(eqx.combine(params, static))(*args)

    return apply_fn, randomize(shapes), args


def _like(model, build):
    return model._replace(name=f"equinox_{model.name}", build=build)


def _keys(key):
    """As many keys as one asks for."""
    while True:
        key, one = jax.random.split(key)
        yield one


class _MLP(eqx.Module):
    layers: list

    def __init__(self, h1, h2, key):
        sizes = ((3, h1), (h1, h2), (h2, 2))
        self.layers = [nn.Linear(*s, key=k) for s, k in zip(sizes, _keys(key), strict=False)]

    def __call__(self, x):
        first, second, last = self.layers
        return last(jnp.tanh(second(relu(first(x)))))


def _mlp(h1=5, h2=7):
    return _built(lambda key: _MLP(h1, h2, key), batch(4, 3))


MLP = _like(dense.MLP, _mlp)


class _VGG(eqx.Module):
    convs: list
    denses: list

    def __init__(self, c0, c1, h, key):
        keys = _keys(key)
        self.convs = [
            nn.Conv2d(2, c0, 3, padding=1, key=next(keys)),
            nn.Conv2d(c0, c1, 3, padding=1, key=next(keys)),
        ]
        self.denses = [
            nn.Linear(c1 * 2 * 2, h, key=next(keys)),
            nn.Linear(h, 4, key=next(keys)),
        ]

    def __call__(self, x):
        for conv in self.convs:
            x = nn.MaxPool2d(2, 2)(relu(conv(x)))
        return self.denses[1](relu(self.denses[0](x.ravel())))


def _vgg(c0=5, c1=7, h=11):
    return _built(lambda key: _VGG(c0, c1, h, key), batch(2, 2, 8, 8))


# The flattened dimension is channel x height x width.
VGG = _like(convolution.VGG, _vgg)._replace(
    layout=convolution.VGG.layout | {"c1": whole(7) | merged((7, 2, 2), 0)}
)


class _Layer(eqx.Module):
    """A convolution and its normalization: GroupNorm of `members` groups, or BatchNorm."""

    conv: nn.Conv2d
    norm: nn.GroupNorm | nn.BatchNorm

    def __init__(self, n_in, n_out, key, size=3, stride=1, groups=1, members=0):
        self.conv = nn.Conv2d(
            n_in, n_out, size, stride, "SAME", groups=groups, use_bias=False, key=key
        )
        if members:
            self.norm = nn.GroupNorm(members, n_out)
        else:
            self.norm = nn.BatchNorm(n_out, "batch", mode="ema", inference=True)

    def __call__(self, x, state):
        x = self.conv(x)
        return self.norm(x, state)[0] if isinstance(self.norm, nn.BatchNorm) else self.norm(x)


class _Block(eqx.Module):
    conv0: _Layer
    conv1: _Layer
    shortcut: _Layer | None

    def __init__(self, n_in, inner, n_out, keys, stride=1, inner_members=0, members=0):
        self.conv0 = _Layer(n_in, inner, next(keys), stride=stride, members=inner_members)
        self.conv1 = _Layer(inner, n_out, next(keys), members=members)
        self.shortcut = None
        if n_in != n_out:
            self.shortcut = _Layer(n_in, n_out, next(keys), 1, stride, members=members)

    def __call__(self, x, state):
        y = self.conv1(relu(self.conv0(x, state)), state)
        return relu(y + (x if self.shortcut is None else self.shortcut(x, state)))


class _ResNet(eqx.Module):
    stem: _Layer
    blocks: list
    head: nn.Linear

    def __init__(self, c0, m0, c1, m1, m2, key):
        keys = _keys(key)
        self.stem = _Layer(2, c0, next(keys))
        self.blocks = [
            _Block(c0, m0, c0, keys),
            _Block(c0, m1, c1, keys, stride=2),
            _Block(c1, m2, c1, keys),
        ]
        self.head = nn.Linear(c1, 4, key=next(keys))

    def __call__(self, x, state):
        x = relu(self.stem(x, state))
        for block in self.blocks:
            x = block(x, state)
        return self.head(x.mean((1, 2)))


class _ResNetGroupNorm(_ResNet):
    def __init__(self, g0, k0, g1, k1, g2, k2, g3, k3, key):
        keys = _keys(key)
        self.stem = _Layer(2, g0 * k0, next(keys), members=g0)
        self.blocks = [
            _Block(g0 * k0, g1 * k1, g0 * k0, keys, 1, g1, g0),
            _Block(g0 * k0, g2 * k2, g3 * k3, keys, 2, g2, g3),
        ]
        self.head = nn.Linear(g3 * k3, 11, key=next(keys))


class _MobileNet(eqx.Module):
    layers: list
    head: nn.Linear

    def __init__(self, c0, e, c1, key):
        keys = _keys(key)
        self.layers = [
            _Layer(2, c0, next(keys)),
            _Layer(c0, c0, next(keys), stride=2, groups=c0),
            _Layer(c0, c1, next(keys), 1),
            _Layer(c1, e, next(keys), 1),
            _Layer(e, e, next(keys), groups=e),
            _Layer(e, c1, next(keys), 1),
        ]
        self.head = nn.Linear(c1, 4, key=next(keys))

    def __call__(self, x, state):
        stem, depthwise, pointwise, expand, inner, project = self.layers
        x = jax.nn.relu6(depthwise(jax.nn.relu6(stem(x, state)), state))
        x = pointwise(x, state)
        y = jax.nn.relu6(inner(jax.nn.relu6(expand(x, state)), state))
        return self.head((x + project(y, state)).mean((1, 2)))


def _stateful(make, *args):
    """A model with running statistics: params are {"model": ..., "state": ...}."""
    both = dict(
        zip(
            ("model", "state"),
            eqx.filter_eval_shape(eqx.nn.make_with_state(make), jax.random.key(0)),
            strict=True,
        )
    )
    shapes, static = eqx.partition(both, _is_inexact)
    flags = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), static["state"])

    def apply_fn(params, *args):
        model = eqx.combine(params["model"], static["model"])
        state = eqx.combine(params["state"], flags)
        return jax.vmap(lambda *row: model(*row, state), axis_name="batch")(*args)

    def positive(key_path, x):  # a state holds pairs (mean, var) without names
        return jnp.exp(x) if key_path[-1].idx == 1 else x

    params = randomize(shapes)
    params["state"] = jax.tree.map_with_path(positive, params["state"])
    return apply_fn, params, args


def _resnet(c0=5, m0=7, c1=13, m1=11, m2=17):
    return _stateful(lambda key: _ResNet(c0, m0, c1, m1, m2, key), batch(2, 2, 6, 6))


def _resnet_group_norm(g0=3, k0=5, g1=2, k1=7, g2=4, k2=9, g3=6, k3=8):
    sizes = (g0, k0, g1, k1, g2, k2, g3, k3)
    return _stateful(lambda key: _ResNetGroupNorm(*sizes, key), batch(2, 2, 4, 4))


def _mobilenet(c0=5, e=11, c1=7):
    return _stateful(lambda key: _MobileNet(c0, e, c1, key), batch(2, 2, 6, 6))


RESNET = _like(convolution.RESNET, _resnet)
RESNET_GROUP_NORM = _like(convolution.RESNET_GROUP_NORM, _resnet_group_norm)
MOBILENET = _like(convolution.MOBILENET, _mobilenet)


class _UNet(eqx.Module):
    down: list
    up: nn.ConvTranspose2d
    join: nn.Conv2d
    out: nn.Conv2d

    def __init__(self, c0, c1, u, c2, key):
        keys = _keys(key)
        self.down = [
            nn.Conv2d(2, c0, 3, padding=1, key=next(keys)),
            nn.Conv2d(c0, c1, 3, padding=1, key=next(keys)),
        ]
        self.up = nn.ConvTranspose2d(c1, u, 2, 2, key=next(keys))
        self.join = nn.Conv2d(u + c0, c2, 3, padding=1, key=next(keys))
        self.out = nn.Conv2d(c2, 4, 1, key=next(keys))

    def __call__(self, x):
        skip = relu(self.down[0](x))
        x = relu(self.down[1](nn.MaxPool2d(2, 2)(skip)))
        return self.out(relu(self.join(jnp.concatenate([relu(self.up(x)), skip]))))


def _unet(c0=5, c1=7, u=11, c2=13):
    return _built(lambda key: _UNet(c0, c1, u, c2, key), batch(2, 2, 6, 6))


UNET = _like(convolution.UNET, _unet)


class _TransformerBlock(eqx.Module):
    norms: list
    attention: nn.MultiheadAttention
    up: nn.Linear
    down: nn.Linear

    def __init__(self, d, h, k, v, m, key):
        keys = _keys(key)
        self.norms = [nn.LayerNorm(d), nn.LayerNorm(d)]
        self.attention = nn.MultiheadAttention(h, d, qk_size=k, vo_size=v, key=next(keys))
        self.up = nn.Linear(d, m, key=next(keys))
        self.down = nn.Linear(m, d, key=next(keys))

    def __call__(self, x, mask=None):
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, mask)
        y = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norms[1])(x)))
        return x + jax.vmap(self.down)(y)


class _ViT(eqx.Module):
    patch: nn.Conv2d
    first: jax.Array
    positions: jax.Array
    block: _TransformerBlock
    norm: nn.LayerNorm
    head: nn.Linear

    def __init__(self, d, h, k, v, m, key):
        keys = _keys(key)
        self.patch = nn.Conv2d(2, d, 2, 2, key=next(keys))
        self.first = jnp.zeros((1, d))
        self.positions = jnp.zeros((10, d))
        self.block = _TransformerBlock(d, h, k, v, m, next(keys))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, 4, key=next(keys))

    def __call__(self, x):
        x = self.patch(x)
        x = x.reshape(x.shape[0], -1).T
        x = self.block(jnp.concatenate([self.first, x]) + self.positions)
        return self.head(self.norm(x[0]))


def _vit(d=11, h=3, v=7, m=13):
    return _built(lambda key: _ViT(d, h, 5, v, m, key), batch(2, 2, 6, 6))


# Kernels are (heads x k, d) and so on, as in the plain ViT. Equinox scales queries by 1 / sqrt(k),
# which a rebuilt smaller module would change (so k is no argument of build): the axis is removable
# in the graph, where that number is a constant.
VIT = _like(transformer.VIT, _vit)


class _GPT(eqx.Module):
    tokens: nn.Embedding
    positions: nn.Embedding
    blocks: _TransformerBlock
    norm: nn.LayerNorm

    def __init__(self, d, h, k, v, m, key):
        keys = _keys(key)
        self.tokens = nn.Embedding(transformer.VOCAB, d, key=next(keys))
        self.positions = nn.Embedding(transformer.CONTEXT, d, key=next(keys))
        self.blocks = eqx.filter_vmap(lambda key: _TransformerBlock(d, h, k, v, m, key))(
            jax.random.split(next(keys), 4)
        )
        self.norm = nn.LayerNorm(d)

    def __call__(self, tokens):
        mask = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def step(x, layer):
            return eqx.combine(layer, static)(x, mask), None

        x = jax.vmap(self.tokens)(tokens)
        x = x + jax.vmap(self.positions)(jnp.arange(len(tokens)))
        x, _ = jax.lax.scan(step, x, arrays)
        return jax.vmap(self.norm)(x) @ self.tokens.weight.T


def _gpt(d=11, h=3, v=7, m=13):
    return _built(lambda key: _GPT(d, h, 5, v, m, key), ids(transformer.VOCAB, 2, 7))


# Four layers made by filter_vmap and run by lax.scan; the token table is tied.
GPT = _like(transformer.GPT_SCAN, _gpt)


class _LSTM(eqx.Module):
    cells: list
    head: nn.Linear

    def __init__(self, h0, h1, key):
        keys = _keys(key)
        self.cells = [
            nn.LSTMCell(3, h0, key=next(keys)),
            nn.LSTMCell(h0, h1, key=next(keys)),
        ]
        self.head = nn.Linear(h1, 2, key=next(keys))

    def __call__(self, x):
        for cell in self.cells:

            def step(state, now, cell=cell):
                state = cell(now, state)
                return state, state[0]

            zeros = jnp.zeros(cell.hidden_size)
            _, x = jax.lax.scan(step, (zeros, zeros), x)
        return self.head(x[-1])


def _lstm(h0=5, h1=7):
    return _built(lambda key: _LSTM(h0, h1, key), batch(2, 6, 3))


# Kernels of input and state apart, the gates fused in their rows.
LSTM = _like(recurrent.LSTM, _lstm)._replace(
    layout={"h0": whole(5) | merged((4, 5), 1), "h1": whole(7) | merged((4, 7), 1)}
)


class _GRU(eqx.Module):
    cell: nn.GRUCell
    head: nn.Linear

    def __init__(self, h, key):
        keys = _keys(key)
        self.cell = nn.GRUCell(3, h, key=next(keys))
        self.head = nn.Linear(h, 2, key=next(keys))

    def __call__(self, x):
        zeros = jnp.zeros(self.cell.hidden_size)
        state, _ = jax.lax.scan(lambda state, now: (self.cell(now, state), None), zeros, x)
        return self.head(state)


def _gru(h=5):
    return _built(lambda key: _GRU(h, key), batch(2, 6, 3))


GRU = _like(recurrent.GRU, _gru)

MODELS = (
    MLP,
    VGG,
    RESNET,
    RESNET_GROUP_NORM,
    MOBILENET,
    UNET,
    VIT,
    GPT,
    LSTM,
    GRU,
)
