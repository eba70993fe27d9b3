"""The zoo in flax NNX. Params are the state of all parameters and running statistics.

The models are those of the plain modules and so are their counts; what differs is said.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo import convolution, dense, recurrent, transformer
from tests.zoo.model import Model, batch, ids, merged, randomize, whole

relu = nnx.relu


def _concrete(x):
    """The key and the count that nnx.RNN keeps for its first state (which is zero)."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key(0) if is_key else jnp.zeros(x.shape, x.dtype)


def _built(make, *args):
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)
    rest = jax.tree.map(_concrete, rest)

    def apply_fn(params, *args):
        return nnx.merge(graph, params, rest, copy=True)(*args)

    return apply_fn, randomize(params), args


def _like(model, build):
    return model._replace(name=f"nnx_{model.name}", build=build)


class _MLP(nnx.Module):
    def __init__(self, h1, h2, rngs):
        self.first = nnx.Linear(3, h1, rngs=rngs)
        self.second = nnx.Linear(h1, h2, rngs=rngs)
        self.last = nnx.Linear(h2, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.second(relu(self.first(x)))))


def _mlp(h1=5, h2=7):
    return _built(lambda rngs: _MLP(h1, h2, rngs), batch(4, 3))


MLP = _like(dense.MLP, _mlp)


class _VGG(nnx.Module):
    def __init__(self, c0, c1, h, rngs):
        self.conv0 = nnx.Conv(2, c0, (3, 3), rngs=rngs)
        self.conv1 = nnx.Conv(c0, c1, (3, 3), rngs=rngs)
        self.dense0 = nnx.Linear(2 * 2 * c1, h, rngs=rngs)
        self.dense1 = nnx.Linear(h, 4, rngs=rngs)

    def __call__(self, x):
        for conv in (self.conv0, self.conv1):
            x = nnx.max_pool(relu(conv(x)), (2, 2), (2, 2))
        return self.dense1(relu(self.dense0(x.reshape(x.shape[0], -1))))


def _vgg(c0=5, c1=7, h=11):
    return _built(lambda rngs: _VGG(c0, c1, h, rngs), batch(2, 8, 8, 2))


VGG = _like(convolution.VGG, _vgg)


class _Layer(nnx.Module):
    """A convolution and its normalization: GroupNorm of `members` groups, or BatchNorm."""

    def __init__(self, n_in, n_out, rngs, size=3, stride=1, groups=1, members=0):
        self.conv = nnx.Conv(
            n_in,
            n_out,
            (size, size),
            stride,
            use_bias=False,
            feature_group_count=groups,
            rngs=rngs,
        )
        if members:
            self.norm = nnx.GroupNorm(n_out, members, rngs=rngs)
        else:
            self.norm = nnx.BatchNorm(n_out, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class _Block(nnx.Module):
    def __init__(self, n_in, inner, n_out, rngs, stride=1, inner_members=0, members=0):
        self.conv0 = _Layer(n_in, inner, rngs, stride=stride, members=inner_members)
        self.conv1 = _Layer(inner, n_out, rngs, members=members)
        if n_in != n_out:
            self.shortcut = _Layer(n_in, n_out, rngs, 1, stride, members=members)

    def __call__(self, x):
        y = self.conv1(relu(self.conv0(x)))
        return relu(y + (self.shortcut(x) if hasattr(self, "shortcut") else x))


class _ResNet(nnx.Module):
    def __init__(self, c0, m0, c1, m1, m2, rngs):
        self.stem = _Layer(2, c0, rngs)
        self.block0 = _Block(c0, m0, c0, rngs)
        self.block1 = _Block(c0, m1, c1, rngs, stride=2)
        self.block2 = _Block(c1, m2, c1, rngs)
        self.head = nnx.Linear(c1, 4, rngs=rngs)

    def __call__(self, x):
        x = relu(self.stem(x))
        x = self.block2(self.block1(self.block0(x)))
        return self.head(x.mean((1, 2)))


def _resnet(c0=5, m0=7, c1=13, m1=11, m2=17):
    return _built(lambda rngs: _ResNet(c0, m0, c1, m1, m2, rngs), batch(2, 6, 6, 2))


RESNET = _like(convolution.RESNET, _resnet)


class _ResNetGroupNorm(nnx.Module):
    def __init__(self, g0, k0, g1, k1, g2, k2, g3, k3, rngs):
        self.stem = _Layer(2, g0 * k0, rngs, members=g0)
        self.block0 = _Block(g0 * k0, g1 * k1, g0 * k0, rngs, 1, g1, g0)
        self.block1 = _Block(g0 * k0, g2 * k2, g3 * k3, rngs, 2, g2, g3)
        self.head = nnx.Linear(g3 * k3, 11, rngs=rngs)

    def __call__(self, x):
        x = self.block1(self.block0(relu(self.stem(x))))
        return self.head(x.mean((1, 2)))


def _resnet_group_norm(g0=3, k0=5, g1=2, k1=7, g2=4, k2=9, g3=6, k3=8):
    sizes = (g0, k0, g1, k1, g2, k2, g3, k3)
    return _built(lambda rngs: _ResNetGroupNorm(*sizes, rngs), batch(2, 4, 4, 2))


RESNET_GROUP_NORM = _like(convolution.RESNET_GROUP_NORM, _resnet_group_norm)


class _MobileNet(nnx.Module):
    def __init__(self, c0, e, c1, rngs):
        self.stem = _Layer(2, c0, rngs)
        self.depthwise = _Layer(c0, c0, rngs, stride=2, groups=c0)
        self.pointwise = _Layer(c0, c1, rngs, 1)
        self.expand = _Layer(c1, e, rngs, 1)
        self.filter = _Layer(e, e, rngs, groups=e)
        self.project = _Layer(e, c1, rngs, 1)
        self.head = nnx.Linear(c1, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu6(self.depthwise(nnx.relu6(self.stem(x))))
        x = self.pointwise(x)
        x = x + self.project(nnx.relu6(self.filter(nnx.relu6(self.expand(x)))))
        return self.head(x.mean((1, 2)))


def _mobilenet(c0=5, e=11, c1=7):
    return _built(lambda rngs: _MobileNet(c0, e, c1, rngs), batch(2, 6, 6, 2))


MOBILENET = _like(convolution.MOBILENET, _mobilenet)


class _UNet(nnx.Module):
    def __init__(self, c0, c1, u, c2, rngs):
        self.down0 = nnx.Conv(2, c0, (3, 3), rngs=rngs)
        self.down1 = nnx.Conv(c0, c1, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(c1, u, (2, 2), (2, 2), rngs=rngs)
        self.join = nnx.Conv(u + c0, c2, (3, 3), rngs=rngs)
        self.out = nnx.Conv(c2, 4, (1, 1), rngs=rngs)

    def __call__(self, x):
        skip = relu(self.down0(x))
        x = relu(self.down1(nnx.max_pool(skip, (2, 2), (2, 2))))
        x = jnp.concatenate([relu(self.up(x)), skip], axis=-1)
        return self.out(relu(self.join(x)))


def _unet(c0=5, c1=7, u=11, c2=13):
    return _built(lambda rngs: _UNet(c0, c1, u, c2, rngs), batch(2, 6, 6, 2))


UNET = _like(convolution.UNET, _unet)


class _TransformerBlock(nnx.Module):
    def __init__(self, d, h, size, m, rngs):
        self.norm0 = nnx.LayerNorm(d, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            h, d, h * size, use_bias=False, decode=False, rngs=rngs
        )
        self.norm1 = nnx.LayerNorm(d, rngs=rngs)
        self.up = nnx.Linear(d, m, rngs=rngs)
        self.down = nnx.Linear(m, d, rngs=rngs)

    def __call__(self, x, mask=None):
        x = x + self.attention(self.norm0(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm1(x))))


class _ViT(nnx.Module):
    def __init__(self, d, h, size, m, rngs):
        init = nnx.initializers.normal()
        self.patch = nnx.Conv(2, d, (2, 2), (2, 2), rngs=rngs)
        self.first = nnx.Param(init(rngs.params(), (1, 1, d)))
        self.positions = nnx.Param(init(rngs.params(), (1, 10, d)))
        self.block = _TransformerBlock(d, h, size, m, rngs)
        self.norm = nnx.LayerNorm(d, rngs=rngs)
        self.head = nnx.Linear(d, 4, rngs=rngs)

    def __call__(self, x):
        x = self.patch(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = jnp.tile(self.first[...], (x.shape[0], 1, 1))
        x = jnp.concatenate([first, x], axis=1) + self.positions
        return self.head(self.norm(self.block(x))[:, 0])


def _vit(d=11, h=3, size=5, m=13):
    return _built(lambda rngs: _ViT(d, h, size, m, rngs), batch(2, 6, 6, 2))


# As the plain ViT, but NNX gives values the size of queries and keys: still two axes, of 5 both;
# NNX scales queries by 1 / sqrt(5): a constant of the graph, as in linen.
_ATTENTION = {
    "d": whole(11),
    "h": whole(3),
    "k": whole(5),
    "v": whole(5),
    "m": whole(13),
}
_PARTS = {"k": ("query", "key"), "v": ("value", "out/")}
VIT = Model("nnx_vit", _vit, (3, 5, 5, 11, 13), (3, 5, 5, 13), _ATTENTION, _PARTS)


class _GPT(nnx.Module):
    def __init__(self, d, h, size, m, rngs):
        @nnx.split_rngs(splits=4)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs):
            return _TransformerBlock(d, h, size, m, rngs)

        self.tokens = nnx.Embed(transformer.VOCAB, d, rngs=rngs)
        self.positions = nnx.Embed(transformer.CONTEXT, d, rngs=rngs)
        self.blocks = stacked(rngs)
        self.norm = nnx.LayerNorm(d, rngs=rngs)

    def __call__(self, tokens):
        mask = nnx.make_causal_mask(tokens)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, block):
            return block(x, mask)

        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        return self.tokens.attend(self.norm(forward(x, self.blocks)))


def _gpt(d=11, h=3, size=5, m=13):
    return _built(lambda rngs: _GPT(d, h, size, m, rngs), ids(transformer.VOCAB, 2, 7))


# Four layers stacked by nnx.vmap and run by nnx.scan, embeddings tied by Embed.attend.
GPT = Model("nnx_gpt_scan", _gpt, (3, 5, 5, 11, 13), (3, 5, 5, 13), _ATTENTION, _PARTS)


class _LSTM(nnx.Module):
    def __init__(self, h0, h1, rngs):
        self.cell0 = nnx.RNN(nnx.OptimizedLSTMCell(3, h0, rngs=rngs))
        self.cell1 = nnx.RNN(nnx.OptimizedLSTMCell(h0, h1, rngs=rngs))
        self.head = nnx.Linear(h1, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.cell1(self.cell0(x))[:, -1])


def _lstm(h0=5, h1=7):
    return _built(lambda rngs: _LSTM(h0, h1, rngs), batch(2, 6, 3))


# NNX fuses the gates and keeps the kernels of input and state apart.
LSTM = _like(recurrent.LSTM, _lstm)._replace(
    layout={"h0": whole(5) | merged((4, 5), 1), "h1": whole(7) | merged((4, 7), 1)}
)


class _GRU(nnx.Module):
    def __init__(self, h, rngs):
        self.cell = nnx.RNN(nnx.GRUCell(3, h, rngs=rngs))
        self.head = nnx.Linear(h, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.cell(x)[:, -1])


def _gru(h=5):
    return _built(lambda rngs: _GRU(h, rngs), batch(2, 6, 3))


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
