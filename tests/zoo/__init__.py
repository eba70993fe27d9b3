"""Models of many kinds, with their free axes counted by hand."""

from tests.zoo import (
    convolution,
    dense,
    equinox,
    haiku,
    linen,
    nnx,
    recurrent,
    special,
    transformer,
)
from tests.zoo.convolution import RESNET_GROUPS, VGG_GROUPS
from tests.zoo.model import Model

PLAIN = (
    *dense.MODELS,
    *convolution.MODELS,
    *transformer.MODELS,
    *recurrent.MODELS,
    *special.MODELS,
)
LIBRARIES = (*linen.MODELS, *nnx.MODELS, *equinox.MODELS, *haiku.MODELS)
MODELS = (*PLAIN, *LIBRARIES)

__all__ = ["LIBRARIES", "MODELS", "PLAIN", "RESNET_GROUPS", "VGG_GROUPS", "Model"]
