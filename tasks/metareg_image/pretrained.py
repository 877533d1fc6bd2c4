"""torchvision's classifiers as backbones, with pretrained or the user's own weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn

from metareg import PathText, PluginConfig, TaskSpec, UnknownNameError, UsageError, hookimpl
from metareg_image.models import BodyAndHead, check_image_shape
from metareg_image.vision import import_torchvision

__all__ = ["TorchvisionModel"]

_HUB = "hub"


class TorchvisionConfig(PluginConfig):
    """Options of the torchvision model."""

    architecture: str = Field("resnet18", description="A classifier in torchvision.models, such as resnet18.")
    weights: PathText | None = Field(
        None,
        description="A file with weights for this architecture (.pth, .pt or .safetensors), or hub for the weights "
        "that torchvision recommends, from torch.hub's cache. Nothing is downloaded; by default, random "
        "weights.",
    )
    trainable: list[str] | None = Field(
        None,
        description="Submodules of the backbone to train in addition to the head, such as [layer4]; the others are "
        "frozen. By default, all; [] means none.",
    )

    @model_validator(mode="before")
    @classmethod
    def _find_in_hub(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("weights") != _HUB:
            return values
        architecture = values.get("architecture", cls.model_fields["architecture"].default)
        return {**values, "weights": str(_locate_in_hub(architecture))}


class TorchvisionModel:
    """A torchvision classifier (resnet18, densenet121, mobilenet_v3_small …) whose last linear layer is the head.

    The features are that layer's inputs, ``[examples, features]``; the head is a new linear layer for the classes of a
    task. Dropout and stochastic depth are set to 0, because the inner loop does not support them. BatchNorm layers use
    the statistics of tasks (``bn_statistics``), not those of the pretraining. With pretrained weights, images are
    normalised as for ImageNet, unless you set `normalisation`.

    Reference:
        torchvision.models; for ResNets He, Zhang, Ren and Sun, CVPR 2016, arXiv 1512.03385.
    """

    contract = 1
    example_spec = TaskSpec((3, 32, 32), (5,))
    Config = TorchvisionConfig

    def __init__(self, config: TorchvisionConfig) -> None:
        self.config = config

    @property
    def recommended(self) -> Mapping[str, Any]:
        """The normalisation that pretrained weights expect."""
        return {} if self.config.weights is None else {"task.normalisation": "imagenet"}

    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        channels, *_ = check_image_shape(spec, "torchvision", 32)
        if channels != 3:
            raise UsageError(
                f"The model 'torchvision' takes colour images; this task's have {channels} channel; use --set "
                "channels=3."
            )
        config = self.config
        backbone = _create(config.architecture)
        place, last = _find_last_linear(backbone, config.architecture)
        backbone.set_submodule(place, nn.Identity())
        if config.weights is not None:
            _load(backbone, Path(config.weights), place, config.architecture)
        if config.trainable is not None:
            _freeze(backbone, config.trainable, config.architecture)
        return BodyAndHead(backbone, nn.Linear(last.in_features, spec.output_shape[0]))


def _create(architecture: str) -> nn.Module:
    """Create the classifier with random weights, without random or in-place operations."""
    models = import_torchvision("torchvision").models
    known = models.list_models(module=models)
    if architecture not in known:
        raise UnknownNameError("classifier of torchvision.models", architecture, known)
    # Their auxiliary classifiers return additional outputs in training.
    extra = {"aux_logits": False, "init_weights": True} if architecture in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(architecture, weights=None, **extra)
    # Dropout, and torchvision's StochasticDepth and attention.
    for layer in model.modules():
        for name, off in (("inplace", False), ("p", 0.0), ("dropout", 0.0)):
            if isinstance(getattr(layer, name, None), type(off)):
                setattr(layer, name, off)
    return model


def _find_last_linear(model: nn.Module, architecture: str) -> tuple[str, nn.Linear]:
    place, last = [*model.named_modules()][-1]
    if not isinstance(last, nn.Linear):
        raise UsageError(
            f"The classifier '{architecture}' of torchvision does not end in a linear layer that the head could "
            "replace; use another one, such as resnet18."
        )
    return place, last


def _locate_in_hub(architecture: str) -> Path:
    """Return the path in torch.hub's cache of the weights that torchvision recommends."""
    models = import_torchvision("torchvision").models
    known = models.list_models(module=models)
    if architecture not in known:
        raise UnknownNameError("classifier of torchvision.models", architecture, known)
    url = models.get_model_weights(architecture).DEFAULT.url
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def _load(backbone: nn.Module, path: Path, head: str, architecture: str) -> None:
    """Load weights, except the head's.

    Raises:
        UsageError: there is no such file, or it contains no weights for this architecture.
    """
    weights = {name: value for name, value in _read(path, architecture).items() if not name.startswith(f"{head}.")}
    own = backbone.state_dict()
    problems = [
        f"'{name}' is missing" for name in own if name not in weights and not name.endswith("num_batches_tracked")
    ]
    problems += [f"'{name}' is not in it" for name in weights if name not in own]
    problems += [
        f"'{name}' has the shape {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UsageError(f"{path} does not fit the architecture '{architecture}': {problems[0]}{more}.")
    backbone.load_state_dict(weights, strict=False)


def _read(path: Path, architecture: str) -> Mapping[str, Tensor]:
    """Read the tensors of a file by name, without executing anything."""
    if not path.is_file():
        raise UsageError(
            f"There are no weights at {path}, and metareg does not download them. For torchvision's, run python -c "
            f"\"import torchvision; torchvision.models.get_model('{architecture}', weights='DEFAULT')\", then "
            "--set weights=hub."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    # The readers raise many kinds of errors for damaged files.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UsageError(f"{path} cannot be read as weights: {reason}.") from error
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UsageError(f"{path} contains no weights by name (a state_dict of an nn.Module).")
    return weights


def _freeze(backbone: nn.Module, trainable: list[str], architecture: str) -> None:
    known = {name for name, module in backbone.named_modules() if name and any(True for _ in module.parameters())}
    for name in trainable:
        if name not in known:
            raise UnknownNameError(f"submodule of '{architecture}' with parameters", name, known)
    backbone.requires_grad_(False)
    for name in trainable:
        backbone.get_submodule(name).requires_grad_()
