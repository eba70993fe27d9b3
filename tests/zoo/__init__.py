"""Models of many kinds, with their free axes counted by hand."""

from tests.zoo import convolution, dense, linen, recurrent, transformer
from tests.zoo.convolution import RESNET_GROUPS, VGG_GROUPS
from tests.zoo.model import Model

MODELS = (
    *dense.MODELS,
    *convolution.MODELS,
    *transformer.MODELS,
    *recurrent.MODELS,
    *linen.MODELS,
)

__all__ = ["MODELS", "RESNET_GROUPS", "VGG_GROUPS", "Model"]
