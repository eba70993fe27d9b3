"""Convolutional models in plain functions. Images are (batch, height, width, channel)."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.layers import (
    batch_norm,
    batch_norm_shapes,
    conv,
    dense,
    dense_shapes,
    group_norm,
    max_pool,
    norm_shapes,
)
from tests.zoo.model import Groups, Model, batch, blocks, draw, merged, whole

relu = jax.nn.relu


def _vgg(c0=5, c1=7, h=11):
    def apply_fn(params, x):
        for name in ("conv0", "conv1"):
            x = max_pool(relu(conv(params[name]["kernel"], x) + params[name]["bias"]))
        x = x.reshape(x.shape[0], -1)  # height x width x channel
        return dense(params["dense1"], relu(dense(params["dense0"], x)))

    shapes = {
        "conv0": {"kernel": (3, 3, 2, c0), "bias": (c0,)},
        "conv1": {"kernel": (3, 3, c0, c1), "bias": (c1,)},
        "dense0": dense_shapes(2 * 2 * c1, h),
        "dense1": dense_shapes(h, 4),
    }
    return apply_fn, draw(shapes), (batch(2, 8, 8, 2),)


# Axes: the channels of each convolution and the hidden dense layer. The flattened dimension is
# (2, 2, 7): the positions are fixed, the channel factor is the axis. The maximum runs over
# positions, not along channels: all removable.
VGG = Model(
    "vgg",
    _vgg,
    (5, 7, 11),
    (5, 7, 11),
    {"c0": whole(5), "c1": whole(7) | merged((2, 2, 7), 2), "h": whole(11)},
)
VGG_GROUPS: Groups = {
    "c0": [("conv0/bias", 0), ("conv0/kernel", 3), ("conv1/kernel", 2)],
    "c1": [("conv1/bias", 0), ("conv1/kernel", 3), ("dense0/kernel", 0)],  # last factor of dense0
    "h": [("dense0/bias", 0), ("dense0/kernel", 1), ("dense1/kernel", 0)],
}


def _resnet(c0=5, m0=7, c1=13, m1=11, m2=17):
    def norm_conv(p, x, stride=1):
        return batch_norm(p["norm"], conv(p["kernel"], x, stride))

    def block(p, x, stride):
        y = relu(norm_conv(p["conv0"], x, stride))
        y = norm_conv(p["conv1"], y)
        shortcut = norm_conv(p["shortcut"], x, stride) if "shortcut" in p else x
        return relu(y + shortcut)

    def apply_fn(params, x):
        x = relu(norm_conv(params["stem"], x))
        for name, stride in (("block0", 1), ("block1", 2), ("block2", 1)):
            x = block(params[name], x, stride)
        return dense(params["head"], x.mean((1, 2)))

    def shapes(n_in, n_out, size=3):
        return {"kernel": (size, size, n_in, n_out), "norm": batch_norm_shapes(n_out)}

    params = {
        "stem": shapes(2, c0),
        "block0": {"conv0": shapes(c0, m0), "conv1": shapes(m0, c0)},
        "block1": {
            "conv0": shapes(c0, m1),
            "conv1": shapes(m1, c1),
            "shortcut": shapes(c0, c1, 1),
        },
        "block2": {"conv0": shapes(c1, m2), "conv1": shapes(m2, c1)},
        "head": dense_shapes(c1, 4),
    }
    return apply_fn, draw(params), (batch(2, 6, 6, 2),)


# Axes: the inner channels m0, m1, m2 of the three blocks, and the residual streams: c0 from the
# stem through block0, c1 from block1, where the projection shortcut ends c0. With running
# statistics BatchNorm is element-wise, the mean runs over positions: all removable.
RESNET = Model(
    "resnet_batch_norm",
    _resnet,
    (5, 7, 11, 13, 17),
    (5, 7, 11, 13, 17),
    {"c0": whole(5), "m0": whole(7), "c1": whole(13), "m1": whole(11), "m2": whole(17)},
)


def _normed(path: str) -> list[tuple[str, int]]:
    """The channels that a convolution with its BatchNorm produces."""
    norm = [(f"{path}/norm/{leaf}", 0) for leaf in ("bias", "mean", "scale", "var")]
    return [(f"{path}/kernel", 3), *norm]


RESNET_GROUPS: Groups = {
    "c0": [
        *_normed("stem"),
        *_normed("block0/conv1"),
        ("block0/conv0/kernel", 2),
        ("block1/conv0/kernel", 2),
        ("block1/shortcut/kernel", 2),
    ],
    "m0": [*_normed("block0/conv0"), ("block0/conv1/kernel", 2)],
    "c1": [
        *_normed("block1/conv1"),
        *_normed("block1/shortcut"),
        *_normed("block2/conv1"),
        ("block2/conv0/kernel", 2),
        ("head/kernel", 0),
    ],
    "m1": [*_normed("block1/conv0"), ("block1/conv1/kernel", 2)],
    "m2": [*_normed("block2/conv0"), ("block2/conv1/kernel", 2)],
}


def _resnet_group_norm(g0=3, k0=5, g1=2, k1=7, g2=4, k2=9, g3=6, k3=8):
    # channels of: the first stream, the inner layer of block0 and of block1, the second stream
    c0, m0, m1, c1 = g0 * k0, g1 * k1, g2 * k2, g3 * k3

    def norm_conv(p, x, groups, stride=1):
        return group_norm(p["norm"], conv(p["kernel"], x, stride), groups)

    def apply_fn(params, x):
        x = relu(norm_conv(params["stem"], x, g0))
        p = params["block0"]
        y = relu(norm_conv(p["conv0"], x, g1))
        x = relu(x + norm_conv(p["conv1"], y, g0))
        p = params["block1"]
        y = relu(norm_conv(p["conv0"], x, g2, stride=2))
        x = relu(norm_conv(p["shortcut"], x, g3, stride=2) + norm_conv(p["conv1"], y, g3))
        return dense(params["head"], x.mean((1, 2)))

    def shapes(n_in, n_out, size=3):
        return {"kernel": (size, size, n_in, n_out), "norm": norm_shapes(n_out)}

    params = {
        "stem": shapes(2, c0),
        "block0": {"conv0": shapes(c0, m0), "conv1": shapes(m0, c0)},
        "block1": {
            "conv0": shapes(c0, m1),
            "conv1": shapes(m1, c1),
            "shortcut": shapes(c0, c1, 1),
        },
        "head": dense_shapes(c1, 11),
    }
    return apply_fn, draw(params), (batch(2, 4, 4, 2),)


# GroupNorm ties each channel to its group: channels are groups x members, and each of the four
# channel dimensions is two axes. Both are permutable. A whole group can go (the others keep their
# statistics): g is removable; a member cannot, the mean of its group runs over it.
RESNET_GROUP_NORM = Model(
    "resnet_group_norm",
    _resnet_group_norm,
    (2, 3, 4, 5, 6, 7, 8, 9),
    (2, 3, 4, 6),
    {
        "g0": merged((3, 5), 0),
        "k0": merged((3, 5), 1),
        "g1": merged((2, 7), 0),
        "k1": merged((2, 7), 1),
        "g2": merged((4, 9), 0),
        "k2": merged((4, 9), 1),
        "g3": merged((6, 8), 0),
        "k3": merged((6, 8), 1),
    },
)


def _mobilenet(c0=5, e=11, c1=7):
    def layer(p, x, stride=1, groups=1):
        return batch_norm(p["norm"], conv(p["kernel"], x, stride, groups=groups))

    def apply_fn(params, x):
        x = jax.nn.relu6(layer(params["stem"], x))
        x = jax.nn.relu6(layer(params["depthwise"], x, stride=2, groups=c0))
        x = layer(params["pointwise"], x)
        p = params["inverted"]
        y = jax.nn.relu6(layer(p["expand"], x))
        y = jax.nn.relu6(layer(p["depthwise"], y, groups=e))
        x = x + layer(p["project"], y)
        return dense(params["head"], x.mean((1, 2)))

    def shapes(*kernel):
        return {"kernel": kernel, "norm": batch_norm_shapes(kernel[-1])}

    params = {
        "stem": shapes(3, 3, 2, c0),
        "depthwise": shapes(3, 3, 1, c0),
        "pointwise": shapes(1, 1, c0, c1),
        "inverted": {
            "expand": shapes(1, 1, c1, e),
            "depthwise": shapes(3, 3, 1, e),
            "project": shapes(1, 1, e, c1),
        },
        "head": dense_shapes(c1, 4),
    }
    return apply_fn, draw(params), (batch(2, 6, 6, 2),)


# A depthwise convolution keeps its channels: stem and first depthwise are one axis c0, the
# expansion and its depthwise are e, and c1 is the residual stream. All element-wise along
# channels: all removable.
MOBILENET = Model(
    "mobilenet",
    _mobilenet,
    (5, 7, 11),
    (5, 7, 11),
    {"c0": whole(5), "e": whole(11), "c1": whole(7)},
)


def _multiplier(c=5, m=3):
    def apply_fn(params, x):
        x = relu(conv(params["stem"], x))
        x = relu(conv(params["depthwise"], x, groups=c) + params["bias"])
        return dense(params["head"], x.mean((1, 2)))

    shapes = {
        "stem": (2, 2, 4, c),
        "depthwise": (2, 2, 1, c * m),
        "bias": (c * m,),
        "head": dense_shapes(c * m, 7),
    }
    return apply_fn, draw(shapes), (batch(2, 4, 4, 4),)


# Depthwise with multiplier m: channel i makes the outputs i*m ... i*m + m-1, so that the output
# channels are c x m and both factors are axes, both removable.
MULTIPLIER = Model(
    "depthwise_multiplier",
    _multiplier,
    (3, 5),
    (3, 5),
    {"c": whole(5) | merged((5, 3), 0), "m": merged((5, 3), 1)},
)


def _grouped(g=2, a=5, b=7):
    def apply_fn(params, x):
        x = relu(conv(params["stem"], x))
        x = relu(conv(params["grouped"], x, groups=g) + params["bias"])
        return dense(params["head"], x.mean((1, 2)))

    shapes = {
        "stem": (3, 3, 3, g * a),
        "grouped": (3, 3, a, g * b),
        "bias": (g * b,),
        "head": dense_shapes(g * b, 4),
    }
    return apply_fn, draw(shapes), (batch(2, 4, 4, 3),)


# A convolution with g groups takes g x a channels to g x b. Axes: the groups, in the channels
# before and after; the members a before (the kernel's input dimension) and b after. All sums:
# all removable (of g: a whole group, with feature_group_count one less).
GROUPED = Model(
    "grouped_convolution",
    _grouped,
    (2, 5, 7),
    (2, 5, 7),
    {
        "g": merged((2, 5), 0) | merged((2, 7), 0),
        "a": whole(5) | merged((2, 5), 1),
        "b": merged((2, 7), 1),
    },
)


def _unet(c0=5, c1=7, u=11, c2=13):
    def apply_fn(params, x):
        skip = relu(conv(params["down0"], x))
        x = relu(conv(params["down1"], max_pool(skip)))
        x = lax.conv_transpose(
            x, params["up"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.concatenate([relu(x + params["up_bias"]), skip], axis=-1)
        x = relu(conv(params["merge"], x))
        return conv(params["out"], x)

    shapes = {
        "down0": (3, 3, 2, c0),
        "down1": (3, 3, c0, c1),
        "up": (2, 2, c1, u),
        "up_bias": (u,),
        "merge": (3, 3, u + c0, c2),
        "out": (1, 1, c2, 4),
    }
    return apply_fn, draw(shapes), (batch(2, 6, 6, 2),)


# Axes: the skipped channels c0, the bottom c1, the upsampled u and the merged c2. The kernel that
# reads the concatenation has the blocks u | c0. Only sums, relu and spatial maxima: all removable.
UNET = Model(
    "unet",
    _unet,
    (5, 7, 11, 13),
    (5, 7, 11, 13),
    {
        "c0": whole(5) | blocks(16, (11, (5,), 0)),
        "c1": whole(7),
        "u": whole(11) | blocks(16, (0, (11,), 0)),
        "c2": whole(13),
    },
)


def _densenet(c0=5, c1=7, c2=11):
    def layer(p, x):
        return conv(p["kernel"], relu(batch_norm(p["norm"], x)))

    def apply_fn(params, x):
        x = conv(params["stem"], x)
        x = jnp.concatenate([x, layer(params["layer0"], x)], axis=-1)
        x = jnp.concatenate([x, layer(params["layer1"], x)], axis=-1)
        x = relu(batch_norm(params["norm"], x))
        return dense(params["head"], x.mean((1, 2)))

    shapes = {
        "stem": (3, 3, 2, c0),
        "layer0": {"norm": batch_norm_shapes(c0), "kernel": (3, 3, c0, c1)},
        "layer1": {"norm": batch_norm_shapes(c0 + c1), "kernel": (3, 3, c0 + c1, c2)},
        "norm": batch_norm_shapes(c0 + c1 + c2),
        "head": dense_shapes(c0 + c1 + c2, 4),
    }
    return apply_fn, draw(shapes), (batch(2, 4, 4, 2),)


# Each layer appends its channels: the dimensions of 12 are c0 | c1 and those of 23 c0 | c1 | c2;
# three axes, and BatchNorm is element-wise: all removable.
DENSENET = Model(
    "densenet",
    _densenet,
    (5, 7, 11),
    (5, 7, 11),
    {
        "c0": whole(5) | blocks(12, (0, (5,), 0)) | blocks(23, (0, (5,), 0)),
        "c1": whole(7) | blocks(12, (5, (7,), 0)) | blocks(23, (5, (7,), 0)),
        "c2": whole(11) | blocks(23, (12, (11,), 0)),
    },
)


def _squeeze_excite(c0=7, r=5, c1=11):
    def apply_fn(params, x):
        x = relu(conv(params["conv0"], x))
        gate = relu(dense(params["squeeze"], x.mean((1, 2))))
        gate = jax.nn.sigmoid(dense(params["excite"], gate))
        x = relu(conv(params["conv1"], x * gate[:, None, None, :]))
        return dense(params["head"], x.mean((1, 2)))

    shapes = {
        "conv0": (3, 3, 2, c0),
        "squeeze": dense_shapes(c0, r),
        "excite": dense_shapes(r, c0),
        "conv1": (3, 3, c0, c1),
        "head": dense_shapes(c1, 4),
    }
    return apply_fn, draw(shapes), (batch(2, 4, 4, 2),)


# The gate multiplies the channels it was computed from: one axis c0; the squeezed r; and c1.
# A removed channel of gate sigmoid(0) multiplies zero: all removable.
SQUEEZE_EXCITE = Model(
    "squeeze_excite",
    _squeeze_excite,
    (5, 7, 11),
    (5, 7, 11),
    {"c0": whole(7), "r": whole(5), "c1": whole(11)},
)

MODELS = (
    VGG,
    RESNET,
    RESNET_GROUP_NORM,
    MOBILENET,
    MULTIPLIER,
    GROUPED,
    UNET,
    DENSENET,
    SQUEEZE_EXCITE,
)
