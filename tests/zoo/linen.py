"""The zoo in flax linen. Params are all collections: {"params": ..., "batch_stats": ...}.

The models are those of the plain modules and so are their counts; what differs is said.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.zoo import convolution, dense, recurrent, transformer
from tests.zoo.model import Model, batch, ids, randomize, whole


def _built(module, *args):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return module.apply, randomize(shapes), args


def _like(model, build):
    return model._replace(name=f"linen_{model.name}", build=build)


class _MLP(nn.Module):
    h1: int
    h2: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.h1)(x))
        return nn.Dense(2)(jnp.tanh(nn.Dense(self.h2)(x)))


def _mlp(h1=5, h2=7):
    return _built(_MLP(h1, h2), batch(4, 3))


MLP = _like(dense.MLP, _mlp)


class _VGG(nn.Module):
    c0: int
    c1: int
    h: int

    @nn.compact
    def __call__(self, x):
        for channels in (self.c0, self.c1):
            x = nn.max_pool(nn.relu(nn.Conv(channels, (3, 3))(x)), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(4)(nn.relu(nn.Dense(self.h)(x)))


def _vgg(c0=5, c1=7, h=11):
    return _built(_VGG(c0, c1, h), batch(2, 8, 8, 2))


VGG = _like(convolution.VGG, _vgg)


class _Layer(nn.Module):
    """A convolution and its normalization."""

    channels: int
    size: int = 3
    stride: int = 1
    groups: int = 1  # of the convolution
    members: int = 0  # groups of GroupNorm; 0 for BatchNorm

    @nn.compact
    def __call__(self, x):
        size, stride = (self.size, self.size), (self.stride, self.stride)
        x = nn.Conv(self.channels, size, stride, use_bias=False, feature_group_count=self.groups)(x)
        if self.members:
            return nn.GroupNorm(self.members)(x)
        return nn.BatchNorm(use_running_average=True)(x)


class _Block(nn.Module):
    inner: int
    channels: int
    stride: int = 1
    inner_members: int = 0
    members: int = 0

    @nn.compact
    def __call__(self, x):
        y = nn.relu(_Layer(self.inner, stride=self.stride, members=self.inner_members)(x))
        y = _Layer(self.channels, members=self.members)(y)
        if x.shape != y.shape:
            x = _Layer(self.channels, 1, self.stride, members=self.members)(x)
        return nn.relu(x + y)


class _ResNet(nn.Module):
    stem: _Layer
    blocks: tuple[_Block, ...]
    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


def _resnet(c0=5, m0=7, c1=13, m1=11, m2=17):
    blocks = (_Block(m0, c0), _Block(m1, c1, 2), _Block(m2, c1))
    return _built(_ResNet(_Layer(c0), blocks, 4), batch(2, 6, 6, 2))


RESNET = _like(convolution.RESNET, _resnet)


def _resnet_group_norm(g0=3, k0=5, g1=2, k1=7, g2=4, k2=9, g3=6, k3=8):
    blocks = (
        _Block(g1 * k1, g0 * k0, inner_members=g1, members=g0),
        _Block(g2 * k2, g3 * k3, 2, inner_members=g2, members=g3),
    )
    return _built(_ResNet(_Layer(g0 * k0, members=g0), blocks, 11), batch(2, 4, 4, 2))


RESNET_GROUP_NORM = _like(convolution.RESNET_GROUP_NORM, _resnet_group_norm)


class _MobileNet(nn.Module):
    c0: int
    e: int
    c1: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(_Layer(self.c0)(x))
        x = nn.relu6(_Layer(self.c0, stride=2, groups=self.c0)(x))
        x = _Layer(self.c1, 1)(x)
        y = nn.relu6(_Layer(self.e, 1)(x))
        y = nn.relu6(_Layer(self.e, groups=self.e)(y))
        return nn.Dense(4)((x + _Layer(self.c1, 1)(y)).mean((1, 2)))


def _mobilenet(c0=5, e=11, c1=7):
    return _built(_MobileNet(c0, e, c1), batch(2, 6, 6, 2))


MOBILENET = _like(convolution.MOBILENET, _mobilenet)


class _UNet(nn.Module):
    c0: int
    c1: int
    u: int
    c2: int

    @nn.compact
    def __call__(self, x):
        skip = nn.relu(nn.Conv(self.c0, (3, 3))(x))
        x = nn.max_pool(skip, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(self.c1, (3, 3))(x))
        x = nn.relu(nn.ConvTranspose(self.u, (2, 2), (2, 2))(x))
        x = nn.relu(nn.Conv(self.c2, (3, 3))(jnp.concatenate([x, skip], axis=-1)))
        return nn.Conv(4, (1, 1))(x)


def _unet(c0=5, c1=7, u=11, c2=13):
    return _built(_UNet(c0, c1, u, c2), batch(2, 6, 6, 2))


UNET = _like(convolution.UNET, _unet)


class _TransformerBlock(nn.Module):
    h: int
    size: int
    m: int

    @nn.compact
    def __call__(self, x, mask):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(
            self.h, qkv_features=self.h * self.size, use_bias=False
        )(y, mask=mask)
        y = nn.gelu(nn.Dense(self.m)(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y), None


class _ViT(nn.Module):
    d: int
    h: int
    size: int
    m: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.d, (2, 2), (2, 2))(x)
        x = x.reshape(x.shape[0], -1, self.d)
        init = nn.initializers.normal()
        first = jnp.tile(self.param("class", init, (1, 1, self.d)), (x.shape[0], 1, 1))
        x = jnp.concatenate([first, x], axis=1)
        x = x + self.param("positions", init, (1, 10, self.d))
        x, _ = _TransformerBlock(self.h, self.size, self.m)(x, None)
        return nn.Dense(4)(nn.LayerNorm()(x)[:, 0])


def _vit(d=11, h=3, size=5, m=13):
    return _built(_ViT(d, h, size, m), batch(2, 6, 6, 2))


# As the plain ViT, but linen gives values the size of queries and keys: still two axes, of 5 both.
# linen scales queries by 1 / sqrt(5), which a rebuilt smaller module would change: the axis is
# removable in the graph, where that number is a constant.
_ATTENTION = {
    "d": whole(11),
    "h": whole(3),
    "k": whole(5),
    "v": whole(5),
    "m": whole(13),
}
_PARTS = {"k": ("query", "key"), "v": ("value", "out/")}
VIT = Model("linen_vit", _vit, (3, 5, 5, 11, 13), (3, 5, 5, 13), _ATTENTION, _PARTS)


class _GPT(nn.Module):
    d: int
    h: int
    size: int
    m: int

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(transformer.VOCAB, self.d)
        place = nn.Embed(transformer.CONTEXT, self.d)
        x = table(tokens) + place(jnp.arange(tokens.shape[1]))
        layers = nn.scan(
            nn.remat(_TransformerBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=4,
        )
        x, _ = layers(self.h, self.size, self.m)(x, nn.make_causal_mask(tokens))
        return table.attend(nn.LayerNorm()(x))


def _gpt(d=11, h=3, size=5, m=13):
    return _built(_GPT(d, h, size, m), ids(transformer.VOCAB, 2, 7))


# Four layers in nn.scan (their dimension is fixed), embeddings tied by Embed.attend.
GPT = Model("linen_gpt_scan", _gpt, (3, 5, 5, 11, 13), (3, 5, 5, 13), _ATTENTION, _PARTS)


class _LSTM(nn.Module):
    h0: int
    h1: int

    @nn.compact
    def __call__(self, x):
        for size in (self.h0, self.h1):
            x = nn.RNN(nn.OptimizedLSTMCell(size))(x)
        return nn.Dense(2)(x[:, -1])


def _lstm(h0=5, h1=7):
    return _built(_LSTM(h0, h1), batch(2, 6, 3))


# linen keeps the gates in leaves of their own and concatenates them as it runs.
LSTM = _like(recurrent.LSTM, _lstm)._replace(layout={"h0": whole(5), "h1": whole(7)})


class _GRU(nn.Module):
    h: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(nn.GRUCell(self.h))(x)[:, -1])


def _gru(h=5):
    return _built(_GRU(h), batch(2, 6, 3))


GRU = _like(recurrent.GRU, _gru)._replace(layout={"h": whole(5)})


class _Mamba(nn.Module):
    d: int
    i: int
    n: int
    r: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(recurrent.VOCAB, self.d)(tokens)
        y, z = jnp.split(nn.Dense(2 * self.i, use_bias=False)(nn.RMSNorm()(x)), 2, axis=-1)
        y = nn.silu(nn.Conv(self.i, 4, padding="CAUSAL", feature_group_count=self.i)(y))
        mix = nn.Dense(self.r + 2 * self.n, use_bias=False)(y)
        dt, b, c = jnp.split(mix, [self.r, self.r + self.n], axis=-1)
        dt = nn.softplus(nn.Dense(self.i)(dt))
        a = -jnp.exp(self.param("a_log", nn.initializers.normal(), (self.i, self.n)))

        def step(state, now):
            dt, y, b, c = now
            state = jnp.exp(dt[..., None] * a) * state + (dt * y)[..., None] * b[:, None, :]
            return state, jnp.einsum("bin,bn->bi", state, c)

        over_time = jax.tree.map(lambda v: v.swapaxes(0, 1), (dt, y, b, c))
        zeros = jnp.zeros((x.shape[0], self.i, self.n))
        states = jax.lax.scan(step, zeros, over_time)[1].swapaxes(0, 1)
        y = states + self.param("skip", nn.initializers.ones, (self.i,)) * y
        x = x + nn.Dense(self.d, use_bias=False)(y * nn.silu(z))
        return nn.Dense(recurrent.VOCAB, use_bias=False)(x)


def _mamba(d=11, i=17, n=5, r=3):
    return _built(_Mamba(d, i, n, r), ids(recurrent.VOCAB, 2, 6))


MAMBA = _like(recurrent.MAMBA, _mamba)

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
    MAMBA,
)
