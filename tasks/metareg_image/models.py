"""Convolutional networks of the few-shot literature, whose features are maps; the head does the final pooling."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from metareg import PluginConfig, TaskSpec, UsageError, hookimpl

__all__ = ["BodyAndHead", "Conv4", "ResNet12", "check_image_shape"]

_GROUPS = 8

Norm = Literal["batch", "group", "none"]
Pool = Literal["max", "average"]


class Conv4:
    """Four blocks of 3×3 convolution, normalisation and ReLU, each followed by 2×2 pooling; then a linear layer.

    The features are the output of the fourth block before pooling, ``[examples, width, height / 8, breadth / 8]``,
    the input of CML's co-learner; the head pools, flattens and applies a linear layer. 64 channels on 84×84 give the
    linear layer 1,600 inputs.

    Reference:
        Vinyals et al., Matching Networks for One Shot Learning, NeurIPS 2016, arXiv 1606.04080, §4.1; the split into
        features and head is that of Shin, Han and Kim, UAI 2024, arXiv 2406.04639.
    """

    contract = 1
    example_spec = TaskSpec((1, 16, 16), (5,))

    class Config(PluginConfig):
        former_names = {"norm": "norm_layer"}  # noqa: RUF012

        width: int = Field(64, ge=1, description="Channels of every block.")
        norm_layer: Norm = Field("batch", description="Normalisation: batch, group (of at most 8 groups) or none.")
        pool: Pool = Field("max", description="2×2 pooling: max or average.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        channels, height, breadth = check_image_shape(spec, "conv4", 16)
        config, layers = self.config, []
        for block in range(4):
            layers.append(_convolution(channels if block == 0 else config.width, config.width, config.norm_layer))
            layers.append(_relu_and_pool(config.pool) if block < 3 else nn.ReLU())
        inputs = config.width * (height // 16) * (breadth // 16)
        head = nn.Sequential(_pool(config.pool), nn.Flatten(), nn.Linear(inputs, spec.output_shape[0]))
        return BodyAndHead(nn.Sequential(*layers), head)


class ResNet12:
    """Four residual blocks of three 3×3 convolutions, each followed by 2×2 max-pooling; global average; a linear layer.

    Leaky ReLU has slope 0.1, and each shortcut is a 1×1 convolution with normalisation. The features are the map after
    the fourth block, ``[examples, widths[3], height / 16, width / 16]``.

    Reference:
        Oreshkin, Rodriguez and Lacoste, TADAM, NeurIPS 2018, arXiv 1805.10123, with the widths 64, 128, 256, 512;
        Lee et al., CVPR 2019, arXiv 1904.03758, uses 64, 160, 320, 640, and dropout, which the inner loop does not
        support.
    """

    contract = 1
    example_spec = TaskSpec((1, 16, 16), (5,))

    class Config(PluginConfig):
        former_names = {"norm": "norm_layer"}  # noqa: RUF012

        widths: list[int] = Field(
            [64, 128, 256, 512], min_length=4, max_length=4, description="Channels of the blocks."
        )
        norm_layer: Norm = Field("batch", description="Normalisation: batch, group (of at most 8 groups) or none.")

    def __init__(self, config: Config) -> None:
        if any(width < 1 for width in config.widths):
            raise ValueError(f"widths must be positive, got {config.widths}")
        self.config = config

    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        channels, *_ = check_image_shape(spec, "resnet12", 16)
        widths = self.config.widths
        blocks = [
            _Residual(before, after, self.config.norm_layer)
            for before, after in zip([channels, *widths[:3]], widths, strict=True)
        ]
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], spec.output_shape[0]))
        return BodyAndHead(nn.Sequential(*blocks), head)


class BodyAndHead(nn.Module):
    """The head applied to the body's features."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(x))
        return outputs


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, norm: Norm) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (before, after, after):
            layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), _norm(norm, after), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, bias=False), _norm(norm, after))
        self.out = nn.Sequential(nn.MaxPool2d(2), nn.LeakyReLU(0.1))  # in this order for the reason in `_relu_and_pool`

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.layers(x) + self.shortcut(x))
        return result


def _convolution(before: int, after: int, norm: Norm) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), _norm(norm, after))


def _relu_and_pool(kind: Pool) -> nn.Module:
    """Return ReLU and 2×2 pooling. Max-pooling comes first: outputs and gradients are the same, and ReLU has a quarter
    of the work."""
    return nn.Sequential(_pool(kind), nn.ReLU()) if kind == "max" else nn.Sequential(nn.ReLU(), _pool(kind))


def _norm(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels, track_running_stats=False)
    if norm == "group":
        return nn.GroupNorm(max(n for n in range(1, _GROUPS + 1) if channels % n == 0), channels)
    return nn.Identity()


def _pool(kind: Pool) -> nn.Module:
    return nn.MaxPool2d(2) if kind == "max" else nn.AvgPool2d(2)


def check_image_shape(spec: TaskSpec, model: str, smallest: int) -> tuple[int, int, int]:
    """Return the channels, height and width of a task's images.

    Raises:
        UsageError: the task has no images or no classes, or its images have fewer than `smallest` pixels per side.
    """
    if len(spec.input_shape) != 3 or len(spec.output_shape) != 1:
        raise UsageError(
            f"The model '{model}' takes images [channels, height, width] and returns one score per class; this task's "
            f"inputs are {spec.input_shape} and its outputs {spec.output_shape}."
        )
    channels, height, breadth = spec.input_shape
    if min(height, breadth) < smallest:
        raise UsageError(
            f"The model '{model}' needs images of at least {smallest}×{smallest} pixels; this task's are "
            f"{height}×{breadth}."
        )
    return channels, height, breadth
