"""torchvision's classifiers as backbones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from metareg import PathText, TaskSpec, UnknownNameError
from metareg_image.backbones import Backbone, BackboneConfig
from metareg_image.vision import import_torchvision

__all__ = ["TorchvisionModel"]


class TorchvisionConfig(BackboneConfig):
    """Options of the torchvision model."""

    architecture: str = Field("resnet18", description="A classifier in torchvision.models, such as resnet18.")
    weights: PathText | None = Field(
        None,
        description="A file with weights for this architecture (.pth, .pt or .safetensors), or hub for the weights "
        "that torchvision recommends, from torch.hub's cache. Nothing is downloaded; by default, random "
        "weights.",
    )

    @classmethod
    def locate_in_hub(cls, architecture: str) -> Path:
        url = _find_models(architecture).get_model_weights(architecture).DEFAULT.url
        return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


class TorchvisionModel(Backbone):
    """A torchvision classifier (resnet18, densenet121, mobilenet_v3_small …) whose last linear layer is the head.

    The features are that layer's inputs, ``[examples, features]``; the head is a new linear layer for the classes of a
    task. Dropout and stochastic depth are set to 0, because the inner loop does not support them. BatchNorm layers use
    the statistics of tasks (``bn_statistics``), not those of the pretraining. With pretrained weights, images are
    normalised as for ImageNet, unless you set `normalisation`.

    Reference:
        torchvision.models; for ResNets He, Zhang, Ren and Sun, CVPR 2016, arXiv 1512.03385.
    """

    Config: ClassVar[type[TorchvisionConfig]] = TorchvisionConfig
    library = "torchvision"

    @property
    def recommended(self) -> Mapping[str, Any]:
        """The normalisation that pretrained weights expect."""
        return {} if self.config.weights is None else {"task.normalisation": "imagenet"}

    def create(self, spec: TaskSpec) -> nn.Module:  # noqa: ARG002
        architecture = self.config.architecture
        # Their auxiliary classifiers return additional outputs in training.
        extra = {"aux_logits": False, "init_weights": True} if architecture in ("googlenet", "inception_v3") else {}
        model: nn.Module = _find_models(architecture).get_model(architecture, weights=None, **extra)
        return model

    def find_head(self, backbone: nn.Module) -> str:
        return [name for name, _ in backbone.named_modules()][-1]

    def describe_download(self) -> str:
        return f"import torchvision; torchvision.models.get_model('{self.config.architecture}', weights='DEFAULT')"


def _find_models(architecture: str) -> ModuleType:
    """Return torchvision.models, which must have the architecture."""
    models: ModuleType = import_torchvision("torchvision").models
    known = models.list_models(module=models)
    if architecture not in known:
        raise UnknownNameError("classifier of torchvision.models", architecture, known)
    return models
