"""Classifiers of other libraries as backbones, with pretrained or the user's own weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn

from metareg import PathText, PluginConfig, TaskSpec, UnknownNameError, UsageError, hookimpl
from metareg_image.models import BodyAndHead, check_image_shape

__all__ = ["Backbone", "BackboneConfig"]

_HUB = "hub"
_SMALLEST = 32
_OFF = {"inplace": False} | dict.fromkeys(("p", "dropout", "drop_prob", "drop_rate"), 0.0)
"""Attributes of layers in torchvision and timm, and the values at which they do nothing."""


class BackboneConfig(PluginConfig):
    """Options of every backbone; a subclass has `architecture` and `weights` with descriptions of its own."""

    architecture: str
    weights: PathText | None = None
    trainable: list[str] | None = Field(
        None,
        description="Submodules of the backbone to train in addition to the head, such as [layer4]; the others are "
        "frozen. By default, all; [] means none.",
    )

    @classmethod
    def locate_in_hub(cls, architecture: str) -> Path:
        """Return the path in the library's cache of the weights that it recommends, whether or not they are there."""
        raise NotImplementedError

    @model_validator(mode="before")
    @classmethod
    def _find_in_hub(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("weights") != _HUB:
            return values
        architecture = values.get("architecture", cls.model_fields["architecture"].default)
        return {**values, "weights": str(cls.locate_in_hub(architecture))}


class Backbone(ABC):
    """A classifier of another library, whose last linear layer a new one for the classes of a task replaces."""

    contract = 1
    example_spec = TaskSpec((3, 32, 32), (5,))
    Config: ClassVar[type[BackboneConfig]]
    library: ClassVar[str]
    """The library's name, which is also the plugin's."""

    def __init__(self, config: BackboneConfig) -> None:
        self.config = config

    @abstractmethod
    def create(self, spec: TaskSpec) -> nn.Module:
        """Create the classifier with random weights.

        Raises:
            UsageError: the library has no such architecture.
        """

    @abstractmethod
    def find_head(self, backbone: nn.Module) -> str:
        """Return the dotted name of the layer that returns the scores."""

    @abstractmethod
    def describe_download(self) -> str:
        """Return a line of Python that downloads the recommended weights."""

    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        channels, *_ = check_image_shape(spec, self.library, _SMALLEST)
        if channels != 3:
            raise UsageError(
                f"The model '{self.library}' takes colour images; this task's have {channels} channel; use --set "
                "channels=3."
            )
        backbone = self.create(spec)
        _remove_randomness(backbone)
        place = self.find_head(backbone)
        last = backbone.get_submodule(place)
        if not isinstance(last, nn.Linear):
            raise UsageError(
                f"The classifier '{self.config.architecture}' of {self.library} does not end in a linear layer that the "
                "head could replace; use another one, such as resnet18."
            )
        backbone.set_submodule(place, nn.Identity())
        if self.config.weights is not None:
            self._load(backbone, Path(self.config.weights), place)
        if self.config.trainable is not None:
            _freeze(backbone, self.config.trainable, self.config.architecture)
        return BodyAndHead(self.convert(backbone), nn.Linear(last.in_features, spec.output_shape[0]))

    def convert(self, backbone: nn.Module) -> nn.Module:
        """Replace layers of the library by torch's own, after the weights are loaded by their names in the library."""
        return backbone

    def _load(self, backbone: nn.Module, path: Path, head: str) -> None:
        """Load weights, except the head's.

        Raises:
            UsageError: there is no such file, or it contains no weights for this architecture.
        """
        weights = _read(path, f'For {self.library}\'s, run python -c "{self.describe_download()}"')
        weights = {name: value for name, value in weights.items() if not name.startswith(f"{head}.")}
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
            raise UsageError(f"{path} does not fit the architecture '{self.config.architecture}': {problems[0]}{more}.")
        backbone.load_state_dict(weights, strict=False)


def _remove_randomness(model: nn.Module) -> None:
    """Turn off in-place operations, and all that draws random numbers: dropout, stochastic depth, attention's dropout."""
    for layer in model.modules():
        for name, off in _OFF.items():
            if isinstance(getattr(layer, name, None), type(off)):
                setattr(layer, name, off)


def _read(path: Path, advice: str) -> Mapping[str, Tensor]:
    """Read the tensors of a file by name, without executing anything.

    Args:
        path: the file.
        advice: how to get the library's own weights, if there is no file.
    """
    if not path.is_file():
        raise UsageError(
            f"There are no weights at {path}, and metareg does not download them. {advice}, then --set weights=hub."
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
