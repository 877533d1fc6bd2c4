"""A learner's file: parameters and constants in safetensors format, with a header that describes the learner.

Nothing in the file can execute code. The file contains neither training-only augmenters nor the outer optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from metareg._version import __version__
from metareg.contract.config import PluginConfig, PluginSpec, validate
from metareg.contract.losses import Loss, Metric
from metareg.engine.split_model import SplitModel
from metareg.engine.stages import Stages
from metareg.errors import UsageError
from metareg.learner.config import LearnerConfig
from metareg.learner.meta_parameters import check_shapes
from metareg.learner.model_plugin import ModelRecipe
from metareg.learner.module_json import build_module, describe_module
from metareg.registry.plugins import Plugin, get_name
from metareg.util.files import refuse_malformed
from metareg.util.tensorfile import TensorFile, limit_cost, write_tensors

__all__ = ["Header", "LearnerFile", "write_learner"]

FILE_FORMAT = 1
_CONSTANT = "constant:"
_BYTES_FOR_MODEL, _BYTES_FOR_EXAMPLES = 16 << 20, 1 << 30


class AugmenterSpec(PluginSpec):
    """An augmenter that stays in evaluation."""

    installed: bool = Field(description="Whether a package installs it.")


class Header(LearnerConfig):
    """The metadata of a learner's file: its options, and facts that are not options."""

    format: int
    metareg: str
    algo: PluginSpec
    installed: bool = Field(description="Whether a package installs the algorithm.")
    augment: list[AugmenterSpec] = Field([], description="The augmenters that stay in evaluation.")
    model: ModelRecipe | None = Field(description="How a model plugin built the model.")
    architecture: dict[str, Any] | None = Field(
        description="The layers of any other model that consists only of torch.nn layers."
    )
    module: str = Field(description="The name of the model's class.")
    head: str | None
    loss: str | None = Field(description="None for a callable.")
    metric: str
    steps_done: int = Field(ge=0)
    task: PluginSpec | None = Field(None, description="The task that it was trained on, without paths of data.")
    example: Any = Field(None, description="The shapes and types of the inputs with which plugins created parameters.")


def write_learner(
    path: Path,
    config: LearnerConfig,
    stages: Stages,
    model: SplitModel,
    recipe: ModelRecipe | None,
    meta: Mapping[str, Tensor],
    **facts: Any,
) -> None:
    """Write a learner's file.

    Args:
        stages: the stages of its evaluation.
        meta: the meta-parameters that evaluation uses.
        facts: the other entries of `Header`.

    Raises:
        MetaregError: the file cannot be written.
    """
    header = {
        "format": FILE_FORMAT,
        "metareg": __version__,
        "algo": _describe_plugin(stages.algorithm),
        "installed": _is_installed(stages.algorithm),
        "model": recipe and recipe.model_dump(mode="json"),
        "architecture": None if recipe else describe_module(model.module),
        "module": type(model.module).__name__,
        **facts,
        **config.model_dump(exclude={"device"}),
    }
    if stages.augmenters:  # older versions can read a file without this entry
        header["augment"] = [{**_describe_plugin(each), "installed": _is_installed(each)} for each in stages.augmenters]
    constants = {f"{_CONSTANT}{name}": value for name, value in model.constants().items()}
    write_tensors(path, {**meta, **constants}, header)


def _describe_plugin(plugin: Plugin) -> dict[str, Any]:
    options = plugin.config.model_dump(mode="json") if isinstance(plugin.config, PluginConfig) else {}
    return {"name": plugin.name, "config": options}


def _is_installed(plugin: Plugin) -> bool:
    return plugin.distribution is not None


class LearnerFile:
    """A file of `write_learner`. Opening it reads and checks only the header.

    Raises:
        UsageError: the file is missing, damaged, or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = TensorFile(path, "learner")
        found = self._file.header.get("format")
        if found != FILE_FORMAT:
            raise UsageError(
                f"{path} has file format {found}, but this metareg reads format {FILE_FORMAT}; use the metareg version "
                "that wrote it."
            )
        self.header = validate(Header, self._file.header, str(path))

    @contextmanager
    def limit_cost(self, *, examples: bool = False) -> Iterator[None]:
        """Refuse, in a block that builds the learner, what costs many times the file's size, or cannot be built.

        Args:
            examples: whether plugins can run the model on examples in the block.
        """
        least = _BYTES_FOR_EXAMPLES if examples else _BYTES_FOR_MODEL
        with refuse_malformed(self.path, "a learner"), limit_cost(self._file, bytes_at_least=least):
            yield

    def create_arguments(
        self,
        model: nn.Module | None,
        algo: type | object | None,
        augment: Sequence[type | object],
        loss: Loss | None,
        metric: Metric | None,
    ) -> dict[str, Any]:
        """Create the arguments of `MetaLearner`, except the device; arguments as in `MetaLearner.load`.

        Raises:
            UsageError: something is missing that the file cannot contain.
        """
        header = self.header
        if algo is None and not header.installed:
            raise UsageError(f"{self.path} was trained by '{header.algo.name}', which no package installs; pass algo=…")
        if loss is None and header.loss is None:
            raise UsageError(f"{self.path} was trained with a custom loss; pass it as loss=…")
        ready_made = algo is not None and not isinstance(algo, type | str)
        return {
            **header.model_dump(include=LearnerConfig.model_fields.keys() - {"device"}),
            **self._create_model_arguments(model),
            "algo": header.algo.name if algo is None else algo,
            "algo_config": None if ready_made else header.algo.config,
            "augment": self._create_augmenters(augment),
            "loss": header.loss if loss is None else loss,
            "metric": header.metric if metric is None and header.loss is not None else metric,
            "head": header.head,
        }

    def _create_augmenters(self, given: Sequence[type | object]) -> list[Any]:
        """Return the augmenters that stay, as arguments of `MetaLearner`: the given ones, and the others by name."""
        own = {get_name(each): each for each in given}
        for name in own.keys() - {each.name for each in self.header.augment}:
            known = ", ".join(each.name for each in self.header.augment) or "none"
            raise UsageError(f"{self.path} was saved without an augmenter '{name}'; it contains: {known}.")
        augmenters: list[Any] = []
        for each in self.header.augment:
            if each.name not in own and not each.installed:
                raise UsageError(
                    f"{self.path} adapts with the augmenter '{each.name}', which no package installs; pass augment=…"
                )
            plugin = own.get(each.name, each.name)
            augmenters.append((plugin, each.config) if isinstance(plugin, type | str) else plugin)
        return augmenters

    def _create_model_arguments(self, model: nn.Module | None) -> dict[str, Any]:
        header = self.header
        if model is not None:
            return {"model": model}
        if header.model is not None:
            return {"model": header.model.name, "model_options": header.model.config, "spec": header.model.spec}
        if header.architecture is not None:
            values = {name.removeprefix(_CONSTANT): value for name, value in self._file.read().items()}
            return {"model": build_module(header.architecture, values)}
        raise UsageError(f"{self.path} contains the weights of a {header.module}; pass such a module as model=…")

    def read(
        self, meta: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Read the meta-parameters and constants, with the types and devices of a learner's.

        Raises:
            UsageError: the file is damaged, or its names or shapes differ from the learner's.
        """
        shapes = self._file.shapes
        own = {name: shape for name, shape in shapes.items() if not name.startswith(_CONSTANT)}
        fixed = {name.removeprefix(_CONSTANT): shape for name, shape in shapes.items() if name.startswith(_CONSTANT)}
        check_shapes(meta, own, str(self.path))
        check_shapes(constants, fixed, str(self.path))
        tensors = self._file.read()
        return (
            {name: tensors[name].to(value) for name, value in meta.items()},
            {name: tensors[f"{_CONSTANT}{name}"].to(value) for name, value in constants.items()},
        )
