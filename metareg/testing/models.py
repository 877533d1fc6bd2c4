"""Checks of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metareg.contract.episodes import Episodes
from metareg.contract.tasks import TaskSpec
from metareg.engine.split_model import SplitModel
from metareg.errors import MetaregError, describe_error
from metareg.learner.learner import MetaLearner
from metareg.registry.plugins import resolve
from metareg.registry.task_source import TaskSource
from metareg.testing.benches import Descent, RepeatedTasks, build_model, new_generator, to_channels_last
from metareg.testing.check import Subject, are_equal, fail, refuse_global_randomness, snapshot
from metareg.testing.steps import PRECISIONS, STRATEGIES, compare_steps
from metareg.util.torch_internals import tree_map

__all__ = ["check_model_seed", "check_model_split", "check_model_steps", "check_model_trains"]


@dataclass(frozen=True)
class Example:
    """The spec and inputs for a model: from the task that it declares, or random numbers with the declared shapes."""

    spec: TaskSpec
    episodes: Episodes
    loss: Any

    @classmethod
    def of(cls, subject: Subject) -> Example:
        named = subject.attribute("example_task")
        if named is None:
            spec: TaskSpec = subject.attribute("example_spec", TaskSpec((3,), (2,)))
            draw = new_generator("example")
            x, y = (torch.randn(2, 3, 5, *shape, generator=draw) for shape in (spec.input_shape, spec.output_shape))
            if len(spec.input_shape) == 3:
                x = to_channels_last(x)
            return cls(spec, Episodes(x[0], y[0], x[1], y[1]).to("cpu", torch.float64), "mse")
        fields = type(resolve("tasks", named).config).model_fields
        wishes = {key.rpartition(".")[2]: value for key, value in subject.attribute("recommended", {}).items()}
        plugin = resolve("tasks", named, {key: value for key, value in wishes.items() if key in fields})
        (episodes,) = TaskSource(plugin).episodes("train", range(3), 0)
        return cls(plugin.instance.spec, episodes.to("cpu", torch.float64), plugin.instance.loss)

    @property
    def inputs(self) -> Any:
        """Return the inputs of one support set."""
        return tree_map(lambda leaf: leaf[0], self.episodes.support_x)


def _build(subject: Subject, seed: int = 0) -> nn.Module:
    return build_model(subject.resolve(), Example.of(subject).spec, seed)


def _run(subject: Subject, model: nn.Module, x: Any) -> Tensor:
    """Run a model on the kit's inputs."""
    try:
        outputs: Tensor = model(x)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        what = (
            f"a tensor of the shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__} of tensors"
        )
        fail(
            f"The {subject.label} cannot be run on {what}: {describe_error(error)}",
            "declare the shapes that it supports, example_spec = TaskSpec(…); or, if its inputs are not plain tensors, "
            "a task plugin with such inputs, example_task.",
        )
    return outputs


def check_model_seed(subject: Subject) -> None:
    """The initial weights depend only on the seed."""
    remedy = "draw from the generator that build receives, or use torch's default initialisers."
    with refuse_global_randomness(subject, remedy):
        first = _build(subject)
    if not are_equal(snapshot(first), snapshot(_build(subject))):
        fail(f"The {subject.label} starts with different weights each time.", remedy)
    if are_equal(snapshot(first), snapshot(_build(subject, seed=1))):
        fail(f"The {subject.label} starts with the same weights for every seed.", remedy)


def check_model_split(subject: Subject) -> None:
    """`outputs = head(body(x))` has the shape that the spec requires; a forward pass does not change the model."""
    model = _build(subject).double()
    split = SplitModel(model)
    if not split.has_head:
        fail(f"The {subject.label} builds a model without body and head.", "name its parts self.body and self.head.")
    example = Example.of(subject)
    x = example.inputs
    outputs = _run(subject, model, x)
    split.examine(split.initial_parameters(), x)
    expected = (example.episodes.support_y.shape[1], *example.spec.output_shape)
    if tuple(outputs.shape) != expected:
        fail(
            f"The {subject.label} returns outputs of shape {tuple(outputs.shape)}, but the spec requires {expected}.",
            "derive the size of the head from spec.output_shape, and of the body from spec.input_shape.",
        )
    if not isinstance(x, Tensor):
        return
    wrong = torch.cat([x, x], 1)  # more channels, or longer vectors
    try:
        model(wrong)
    except (MetaregError, RuntimeError, ValueError, IndexError):
        pass
    else:
        fail(
            f"The {subject.label} takes inputs of the shape {tuple(wrong.shape[1:])} where it was built for "
            f"{tuple(x.shape[1:])}.",
            "let layers have fixed sizes, computed from spec, so that inputs of another shape raise.",
        )


def check_model_trains(subject: Subject) -> None:
    """It is twice differentiable, every parameter has a gradient, and a forward pass does not change it."""
    example = Example.of(subject)
    model = _build(subject).double()
    state = snapshot(model)
    _run(subject, model, example.inputs)
    if not are_equal(state, snapshot(model)):
        fail(
            f"A forward of the {subject.label} changes its buffers or parameters.",
            "let forward compute outputs and change nothing.",
        )
    learner = MetaLearner(model, Descent, loss=example.loss, inner_steps=2, strategy="serial")
    _, grads = learner.meta_gradient(example.episodes)
    still = [name for name, value in grads.items() if not bool(value.any())]
    if still:
        fail(
            f"No gradient reaches '{still[0]}' of the {subject.label}.",
            "use every parameter in forward, or set its requires_grad to False.",
        )


def check_model_steps(subject: Subject) -> None:
    """A few steps of fit with it agree in every strategy, in float32 and float64."""
    example = Example.of(subject)
    for precision in PRECISIONS:

        def new_learner(dtype: torch.dtype = precision.dtype, **options: Any) -> MetaLearner:
            return MetaLearner(_build(subject).to(dtype), Descent, loss=example.loss, **options)

        compare_steps(
            new_learner,
            TaskSource.of(RepeatedTasks(example.episodes)),
            precision,
            STRATEGIES,
            f"the {subject.label}",
            "let forward compute outputs from its inputs and parameters alone, change nothing, and use operations that "
            "torch.func.vmap knows.",
            steps=2,
        )
