"""The classifiers of torchvision as backbones, with its pretrained weights or any of that shape."""

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

    architecture: str = Field("resnet18", description="A classifier of torchvision.models, as resnet18.")
    weights: PathText | None = Field(
        None,
        description="A file with weights of that architecture (.pth, .pt or .safetensors), or hub: the weights that "
        "torchvision recommends, out of torch.hub's cache. Nothing is downloaded. Unset, random weights.",
    )
    trainable: list[str] | None = Field(
        None,
        description="Which submodules of the backbone are trained beside the head, as [layer4]; unset, all; [] none: the "
        "others are frozen.",
    )

    @model_validator(mode="before")
    @classmethod
    def _find_in_hub(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("weights") != _HUB:
            return values
        architecture = values.get("architecture", cls.model_fields["architecture"].default)
        return {**values, "weights": str(_locate_in_hub(architecture))}


class TorchvisionModel:
    """A classifier of torchvision (resnet18, densenet121, mobilenet_v3_small …) whose last linear layer is the head.

    The features are what that layer takes, ``[examples, features]``; the head is a new linear layer for the classes of a
    task. Dropout and stochastic depth are set to 0, which the inner loop cannot have. BatchNorm layers use the statistics
    of tasks (``bn_statistics``), not those of the pretraining. With pretrained weights, images are normalised as ImageNet's
    were, unless `normalisation` says otherwise.

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
                f"The model 'torchvision' takes colour images; this task's have {channels} channel: --set channels=3."
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
    """The classifier with random weights, without what draws random numbers or overwrites its inputs."""
    models = import_torchvision("torchvision").models
    known = models.list_models(module=models)
    if architecture not in known:
        raise UnknownNameError("classifier of torchvision.models", architecture, known)
    # Their auxiliary classifiers give outputs of their own in training.
    extra = {"aux_logits": False, "init_weights": True} if architecture in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(architecture, weights=None, **extra)
    # Dropout, torchvision's StochasticDepth, and its attention.
    for layer in model.modules():
        for name, off in (("inplace", False), ("p", 0.0), ("dropout", 0.0)):
            if isinstance(getattr(layer, name, None), type(off)):
                setattr(layer, name, off)
    return model


def _find_last_linear(model: nn.Module, architecture: str) -> tuple[str, nn.Linear]:
    place, last = [*model.named_modules()][-1]
    if not isinstance(last, nn.Linear):
        raise UsageError(
            f"The classifier '{architecture}' of torchvision does not end in a linear layer, which the head would take the "
            "place of; take another one, as resnet18."
        )
    return place, last


def _locate_in_hub(architecture: str) -> Path:
    """Where torch.hub's cache has the weights that torchvision recommends, if it has them."""
    models = import_torchvision("torchvision").models
    known = models.list_models(module=models)
    if architecture not in known:
        raise UnknownNameError("classifier of torchvision.models", architecture, known)
    url = models.get_model_weights(architecture).DEFAULT.url
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def _load(backbone: nn.Module, path: Path, head: str, architecture: str) -> None:
    """Load weights, those of the head aside.

    Raises:
        UsageError: there is no such file, it holds no weights, or those of another architecture.
    """
    if not path.is_file():
        raise UsageError(
            f"There are no weights at {path}, and metareg downloads none. Those of torchvision: "
            f"python -c \"import torchvision; torchvision.models.get_model('{architecture}', weights='DEFAULT')\", then "
            "--set weights=hub."
        )
    weights = {name: value for name, value in _read(path).items() if not name.startswith(f"{head}.")}
    own = backbone.state_dict()
    problems = [
        f"'{name}' is missing" for name in own if name not in weights and not name.endswith("num_batches_tracked")
    ]
    problems += [f"'{name}' is none of it" for name in weights if name not in own]
    problems += [
        f"'{name}' has the shape {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UsageError(f"{path} does not fit the architecture '{architecture}': {problems[0]}{more}.")
    backbone.load_state_dict(weights, strict=False)


def _read(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file by name; nothing in it is executed."""
    if not path.is_file():
        raise UsageError(f"There is no file of weights at {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    # The readers raise errors of many kinds for a damaged file.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UsageError(f"{path} cannot be read as weights: {reason}.") from error
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UsageError(f"{path} holds no weights by name (a state_dict of an nn.Module).")
    return weights


def _freeze(backbone: nn.Module, trainable: list[str], architecture: str) -> None:
    known = {name for name, module in backbone.named_modules() if name and any(True for _ in module.parameters())}
    for name in trainable:
        if name not in known:
            raise UnknownNameError(f"submodule of '{architecture}' with parameters", name, known)
    backbone.requires_grad_(False)
    for name in trainable:
        backbone.get_submodule(name).requires_grad_()
