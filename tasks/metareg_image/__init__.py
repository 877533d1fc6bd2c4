"""Few-shot image classification: drawn letters, Omniglot, the benchmarks of the literature, and your own folders."""

from metareg_image.folders import CUB, Cars, ImageFolder, MiniImageNet, TieredImageNet
from metareg_image.fonts import FontFolder
from metareg_image.glyphs import Glyphs
from metareg_image.models import Conv4, ResNet12
from metareg_image.omniglot import Omniglot, OmniglotSmall
from metareg_image.standard import CIFARFS, FC100, SVHN, Aircraft, TrafficSign, VGGFlower
from metareg_image.timm_model import TimmModel
from metareg_image.torchvision_model import TorchvisionModel

__all__ = [
    "CIFARFS",
    "CUB",
    "FC100",
    "SVHN",
    "Aircraft",
    "Cars",
    "Conv4",
    "FontFolder",
    "Glyphs",
    "ImageFolder",
    "MiniImageNet",
    "Omniglot",
    "OmniglotSmall",
    "ResNet12",
    "TieredImageNet",
    "TimmModel",
    "TorchvisionModel",
    "TrafficSign",
    "VGGFlower",
]
