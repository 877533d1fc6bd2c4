"""The meta-parameters of a learner: the model's own, and those that plugins add."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metareg.contract.episodes import Episodes
from metareg.engine.split_model import SplitModel
from metareg.engine.stages import Stages
from metareg.errors import UsageError
from metareg.learner.config import LearnerConfig
from metareg.util.devices import move_tensors
from metareg.util.files import MALFORMED
from metareg.util.layout import copy_contiguous
from metareg.util.torch_internals import tree_map

__all__ = ["MetaParameters", "check_shapes"]

Tensors = dict[str, Tensor]
_DTYPES = {
    str(each).removeprefix("torch."): each
    for each in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8,
                 torch.int16, torch.int32, torch.int64)
}  # fmt: skip
"""The supported types of inputs, by name."""
_MOST_NUMBERS = 1 << 28
"""Maximum number of entries in the inputs of a task, if a file gives their shapes."""


class MetaParameters:
    """Every meta-parameter by name; plugins' parameters are created once there is an example, if they need one."""

    def __init__(self, model: SplitModel, stages: Stages, config: LearnerConfig, device: torch.device) -> None:
        self._model = model
        self._stages = stages
        self._config = config
        self.tensors: Tensors = move_tensors(model.initial_parameters(), device)
        """The model's parameters; after `initialize`, the plugins' too."""
        self.initialized = False
        self.example: Any = None
        """The shapes and types of the inputs with which plugins created parameters, for a file; None if not needed."""
        self.outputs: tuple[int, ...] | None = None
        """The shape ``(examples, …)`` of the model's outputs for its first inputs; None before."""

    @property
    def like(self) -> Tensor:
        """One of the parameters, which all have the same type and device."""
        return next(iter(self.tensors.values()))

    def initialize(self, example: Any) -> None:
        """Examine the model and create the plugins' parameters; do each only once.

        Args:
            example: one support set's inputs ``[examples, …]``; None if there are none yet.

        Raises:
            UsageError: as for `SplitModel.examine`; or a parameter of the model has a plugin's name as its prefix, or a
                plugin needs an example.
        """
        if self.outputs is None and example is not None:
            self.outputs = tuple(self._model.examine(self.tensors, example).shape)
        if not self.initialized:
            self._create_plugins(example)

    def initialize_like(self, described: Any) -> None:
        """Create the plugins' parameters with inputs like `described`.

        Raises:
            UsageError: `described` is invalid, or a plugin needs inputs and there are none.
        """
        if not self.initialized:
            inputs = None if described is None else move_tensors(create_inputs(described), self.like.device)
            self._create_plugins(inputs)  # inputs of zeros are no test of the model's forward pass

    def _create_plugins(self, example: Any) -> None:
        """Create the plugins' parameters, with example inputs if there are any."""
        self.tensors = self.tensors | self._create(example)
        self.example = None if example is None else describe_inputs(example)
        self.initialized = True

    def _create(self, example: Any) -> Tensors:
        features = outputs = None
        if self._stages.find_asking("example", "features", "outputs", hook="init_meta"):
            with torch.no_grad():
                features = self._guess_features() if example is None else self._model.body(self.tensors, example)
                outputs = self._model.head(self.tensors, features)
        model = self._model
        asks = self._stages.find_asking("output_layer", hook="init_meta")
        extra = {"output_layer": model.output_layer} if asks else {}
        created = self._stages.init_meta(
            self._config.seed, model=model.module, inner_steps=self._config.inner_steps, example=example,
            features=features, outputs=outputs, body=model.body_names, head=model.head_names,
            adapted=self._stages.adapted_parameters(model), **extra,
        )  # fmt: skip
        taken = [name for name in self.tensors if self._stages.owner(name)]
        if taken:
            raise UsageError(
                f"The model's parameter '{taken[0]}' starts with the name of a plugin; rename the submodule."
            )
        return {name: value.to(self.like) for name, value in created.items()}

    def _guess_features(self) -> Tensor:
        """Return features with the shape that a linear head takes."""
        head = self._model.module.get_submodule((self._model.head_prefix or "").rstrip("."))
        if not isinstance(head, nn.Linear):
            raise UsageError(
                "The meta-parameters of this learner depend on the shape of its features; first call "
                "learner.initialize(example_inputs), or run a batch of tasks."
            )
        return self.like.new_zeros(2, head.in_features)

    def prepare(self, episodes: Episodes) -> None:
        """Prepare for running tasks: call `initialize` the first time.

        Raises:
            UsageError: as for `initialize`; or `torch.autocast` is active.
        """
        if torch.is_autocast_enabled(self.like.device.type):
            raise UsageError(
                "torch.autocast would change the types of gradients and scores, permanently so in a traced graph; "
                "leave its context and use MetaLearner(precision='bf16')."
            )
        if not self.initialized or self.outputs is None:
            self._stages.check_targets(episodes.support_y)
            example = self.match(episodes[:1]).support_x
            self.initialize(tree_map(lambda leaf: leaf[0], example))

    def match(self, episodes: Episodes) -> Episodes:
        """Move the tasks to the parameters' device and type."""
        return episodes.to(self.like.device, self.like.dtype)

    def select_plain(self) -> Tensors:
        """Select the parameters for evaluation and adaptation, without those of training-only augmenters."""
        self.initialize(None)
        left = self._stages.training_only
        return {name: value for name, value in self.tensors.items() if self._stages.owner(name) not in left}

    def load(self, tensors: Mapping[str, Tensor], example: Any, where: str) -> None:
        """Load copies of values for parameters that were created with inputs like `example`.

        Raises:
            UsageError: the names or shapes differ.
        """
        self.initialize_like(example)
        check_shapes(self.tensors, {name: tuple(value.shape) for name, value in tensors.items()}, where)
        self.tensors = copy_contiguous({name: tensors[name].to(value) for name, value in self.tensors.items()})

    def take_snapshot(self) -> dict[str, Any]:
        """Return everything that a learner with the same arguments needs to restore these parameters."""
        return {
            "tensors": self.tensors, "initialized": self.initialized, "example": self.example,
            "constants": self._model.constants(),
        }  # fmt: skip

    def restore_snapshot(self, snapshot: Mapping[str, Any]) -> None:
        """Restore what `take_snapshot` returned."""
        self.tensors = move_tensors(snapshot["tensors"], self.like.device)
        self.initialized, self.example = snapshot["initialized"], snapshot["example"]
        self._model.module.load_state_dict(snapshot["constants"], strict=False)


def describe_inputs(x: Any) -> Any:
    """Describe the structure, shapes and types of inputs for JSON; a tensor becomes ``[type, size, …]``."""
    if isinstance(x, Tensor):
        return [str(x.dtype).removeprefix("torch."), *x.shape]
    if isinstance(x, Mapping):
        return {str(name): describe_inputs(value) for name, value in x.items()}
    return {f"{type(x).__name__} {number}": describe_inputs(value) for number, value in enumerate(x)}


def create_inputs(described: Any) -> Any:
    """Create zeros with the shapes and types from `describe_inputs`.

    Raises:
        UsageError: `described` is invalid.
    """
    try:
        if isinstance(described, list):
            dtype, *shape = described
            if math.prod(map(int, shape)) > _MOST_NUMBERS:
                raise ValueError("no task is that large")
            return torch.zeros([int(size) for size in shape], dtype=_DTYPES[dtype])
        inputs = {name: create_inputs(value) for name, value in described.items()}
    except MALFORMED as error:
        raise UsageError(f"{described!r} does not describe a model's inputs.") from error
    for kind in (tuple, list):
        if inputs and all(name.startswith(f"{kind.__name__} ") for name in inputs):
            return kind(inputs.values())
    return inputs


def check_shapes(expected: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare names and shapes with those of a learner's tensors.

    Raises:
        UsageError: they differ; the message names the first three that do.
    """
    problems = []
    for name, value in expected.items():
        if name not in shapes:
            problems.append(f"'{name}' is missing")
        elif shapes[name] != value.shape:
            problems.append(f"'{name}' has the shape {shapes[name]} instead of {tuple(value.shape)}")
    problems += [f"'{name}' is not in the model" for name in shapes if name not in expected]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UsageError(f"{where} does not fit the model: {'; '.join(problems[:3])}{more}.")
