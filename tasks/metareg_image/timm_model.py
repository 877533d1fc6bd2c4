"""timm's classifiers as backbones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from metareg import PathText, TaskSpec, UnknownNameError, UsageError
from metareg_image.backbones import Backbone, BackboneConfig
from metareg_image.base import NORMALISATIONS
from metareg_image.vision import import_timm

__all__ = ["TimmModel"]

_FILES = ("model.safetensors", "pytorch_model.bin")


class TimmConfig(BackboneConfig):
    """Options of the timm model."""

    architecture: str = Field(
        "resnet18",
        description="A classifier of timm.list_models(), such as resnet18, or with the name of its weights, such as "
        "resnet18.a1_in1k.",
    )
    weights: PathText | None = Field(
        None,
        description="A file with weights for this architecture (.pth, .pt, .bin or .safetensors), or hub for the weights "
        "that timm names or recommends, from Hugging Face's cache. Nothing is downloaded; by default, random weights.",
    )

    @classmethod
    def locate_in_hub(cls, architecture: str) -> Path:
        repository = _describe(architecture).hf_hub_id
        if not repository:
            raise UsageError(
                f"timm names no weights for '{architecture}' on the Hugging Face hub; set weights to a file."
            )
        import_timm("timm")
        from huggingface_hub import constants, try_to_load_from_cache

        found = (try_to_load_from_cache(repository, name) for name in _FILES)
        missing = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
        return next((Path(path) for path in found if isinstance(path, str)), missing)


class TimmModel(Backbone):
    """A timm classifier (resnet18, efficientnet_b0, vit_tiny_patch16_224 …) whose last linear layer is the head.

    The features are that layer's inputs, ``[examples, features]``; the head is a new linear layer for the classes of a
    task. Dropout and stochastic depth are set to 0, because the inner loop does not support them. BatchNorm layers use
    the statistics of tasks (``bn_statistics``), not those of the pretraining. With pretrained weights, images are
    normalised as in the pretraining, unless you set `normalisation`. Architectures for a fixed size of images, such as
    vision transformers, are created for the task's size.

    Reference:
        Wightman, PyTorch Image Models, https://github.com/huggingface/pytorch-image-models.
    """

    Config: ClassVar[type[TimmConfig]] = TimmConfig
    library = "timm"

    @property
    def recommended(self) -> Mapping[str, Any]:
        """The normalisation that pretrained weights expect, and the size of images where they are for one size."""
        if self.config.weights is None:
            return {}
        facts = _describe(self.config.architecture)
        named = {(values.mean, values.std): name for name, values in NORMALISATIONS.items()}
        normalisation = named.get((tuple(facts.mean), tuple(facts.std)))
        recommended = {} if normalisation is None else {"task.normalisation": normalisation}
        return recommended | ({"task.size": facts.input_size[-1]} if facts.fixed_input_size else {})

    def create(self, spec: TaskSpec) -> nn.Module:
        architecture, size = self.config.architecture, spec.input_shape[1:]
        sized = {"img_size": size} if _describe(architecture).fixed_input_size else {}
        try:
            # The variants for export compute activations and attention from operations with every derivative.
            model: nn.Module = import_timm("timm").create_model(
                architecture, exportable=True, num_classes=spec.output_shape[0], **sized
            )
        except Exception as error:  # architectures check sizes in their own ways
            raise UsageError(
                f"timm cannot create '{architecture}' for images of {size[0]}×{size[1]} pixels ({error}); use --set "
                f"size={_describe(architecture).input_size[-1]}."
            ) from error
        return model

    def find_head(self, backbone: nn.Module) -> str:
        facts: Any = backbone.pretrained_cfg
        names = facts["classifier"]
        return names if isinstance(names, str) else ""  # of several heads, whose scores are averaged, none is the last

    def convert(self, backbone: nn.Module) -> nn.Module:
        """Separate BatchNorm from the activation after it, because metareg replaces torch's BatchNorm."""
        return _separate(backbone)

    def describe_download(self) -> str:
        return f"import timm; timm.create_model('{self.config.architecture}', pretrained=True)"


def _describe(architecture: str) -> Any:
    """Return timm's description of an architecture and its weights (PretrainedCfg)."""
    timm: ModuleType = import_timm("timm")
    if architecture not in (known := {*timm.list_models(), *timm.list_pretrained()}):
        raise UnknownNameError("classifier of timm", architecture, known)
    return timm.get_pretrained_cfg(architecture)


def _separate(module: nn.Module) -> nn.Module:
    """Replace each BatchNormAct2d in a module by BatchNorm2d and its activation."""
    if isinstance(module, import_timm("timm").layers.BatchNormAct2d):
        norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine)
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            setattr(norm, name, value)
        return nn.Sequential(norm, module.act)
    for name, child in module.named_children():
        setattr(module, name, _separate(child))
    return module
