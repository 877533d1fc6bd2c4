"""Checks of tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metareg.contract.episodes import Episodes
from metareg.contract.splits import SPLITS
from metareg.contract.tasks import TaskSpec
from metareg.learner.config import LearnerConfig
from metareg.learner.learner import MetaLearner
from metareg.registry.task_source import TaskSource
from metareg.runs.options import assemble
from metareg.testing.benches import Descent, build_model
from metareg.testing.check import Subject, are_equal, difference, fail, refuse_global_randomness
from metareg.testing.steps import PRECISIONS, STRATEGIES, compare_steps
from metareg.util.torch_internals import tree_leaves

__all__ = ["check_task_function", "check_task_shapes", "check_task_steps", "check_task_trains"]

ROUNDING = 1e-8


def check_task_function(subject: Subject) -> None:
    """A task depends only on seed, split and number, whatever else was requested."""
    first, second = TaskSource(subject.resolve()), TaskSource(subject.resolve())
    remedy = "draw with metareg.task_uniform, or from a generator seeded by metareg.derive_seed(seed, split, index)."
    for split in SPLITS:
        with refuse_global_randomness(subject, remedy):
            together, places = first.placed_episodes(split, [2, 0, 1], 0)
        alone = [second.episodes(split, [number], 0)[0] for number in (2, 0, 1)]
        beside = [stack[row : row + 1] for stack in together for row in range(len(stack))]
        for place, task in zip(places, beside, strict=True):
            number = (2, 0, 1)[place]
            if not _is_same(subject, task, alone[place]):
                fail(
                    f"The {subject.label} returns a different task {number} of '{split}' alone than together with "
                    "others.",
                    "make each task independent of the other requested numbers and of earlier calls, and mark several "
                    "stacks with the positions of their tasks in the request (Episodes.placed).",
                )
        for number, task in zip((2, 0, 1), alone, strict=True):
            if not are_equal(second.episodes(split, [number], 0)[0].parts, task.parts):
                fail(
                    f"The {subject.label} returns a different task {number} of '{split}' on each call.",
                    "draw from a generator that you seed for each task: metareg.derive_seed(seed, split, index).",
                )
    one = [stack.parts for stack in first.episodes("train", [0], 0)]
    for split, number, seed, what in (
        ("test", 0, 0, "the splits 'train' and 'test'"),
        ("train", 0, 1, "the seeds 0 and 1"),
        ("train", 1, 0, "the numbers 0 and 1"),
    ):
        if are_equal(one, [stack.parts for stack in first.episodes(split, [number], seed)]):
            fail(
                f"The {subject.label} returns the same task for {what}.",
                "seed the draw with all three: seed, split and index.",
            )


def _is_same(subject: Subject, a: Episodes, b: Episodes) -> bool:
    """Return whether two stacks contain the same task: the same bits, or equal for a model if inputs are padded."""
    if are_equal(a.parts, b.parts) or isinstance(a.support_x, Tensor):
        return are_equal(a.parts, b.parts)
    learner = _create_learner(subject.resolve().instance, torch.float64)
    (loss_a, grads_a), (loss_b, grads_b) = learner.meta_gradient(a), learner.meta_gradient(b)
    return difference({"loss": loss_a} | grads_a, {"loss": loss_b} | grads_b)[0] <= ROUNDING


def _create_learner(task: Any, dtype: torch.dtype) -> MetaLearner:
    """Create a learner with the task's own model."""
    model = build_model(task.default_model, task.spec).to(dtype)
    return MetaLearner(model, Descent, loss=task.loss, metric=task.metric, strategy="serial")


def check_task_shapes(subject: Subject) -> None:
    """Inputs and targets are finite, with the shapes and types that `spec` and the loss require."""
    plugin = subject.resolve()
    task = plugin.instance
    spec: TaskSpec = task.spec
    for split in SPLITS:
        batches = TaskSource(plugin).episodes(split, range(3), 0)
        if getattr(task, "stackable", True) and len(batches) != 1:
            fail(f"The {subject.label} returns stacks of several sizes.", "declare stackable = False.")
        for episodes in batches:
            for x, y, part in (
                (episodes.support_x, episodes.support_y, "support"),
                (episodes.query_x, episodes.query_y, "query"),
            ):
                if isinstance(x, Tensor) and tuple(x.shape[2:]) != tuple(spec.input_shape):
                    fail(
                        f"The {part} inputs of the {subject.label} have the shape {tuple(x.shape[2:])}, but spec says "
                        f"{tuple(spec.input_shape)}.",
                        "return [tasks, examples, *input_shape], or correct spec.",
                    )
                if not all(bool(torch.isfinite(leaf).all()) for leaf in tree_leaves((x, y))):
                    fail(f"The {split} split of the {subject.label} contains NaN or infinity.", "check the data.")
                _check_targets(subject, y, spec, task.loss, part)


def _check_targets(subject: Subject, y: Tensor, spec: TaskSpec, loss: Any, part: str) -> None:
    if loss == "cross_entropy":
        ways = spec.output_shape[0]
        if y.dtype != torch.int64 or y.dim() != 2 or int(y.min()) < 0 or int(y.max()) >= ways:
            fail(
                f"The {part} targets of the {subject.label} are {y.dtype} of shape {tuple(y.shape)}, "
                f"{y.min().item()} to {y.max().item()}; spec says {ways} classes.",
                "return class numbers from 0 to ways − 1 as int64 of the shape [tasks, examples].",
            )
    elif isinstance(loss, str) and tuple(y.shape[2:]) != tuple(spec.output_shape):
        fail(
            f"The {part} targets of the {subject.label} have the shape {tuple(y.shape[2:])}, but spec says "
            f"{tuple(spec.output_shape)}.",
            "return [tasks, examples, *output_shape], or correct spec.",
        )


def check_task_trains(subject: Subject) -> None:
    """Its default model can be trained and evaluated on it."""
    plugin = subject.resolve()
    task = plugin.instance
    if getattr(task, "default_model", None) is None:
        fail(f"The {subject.label} has no default model.", "set default_model to the name of a suitable model.")
    source, learner = TaskSource(plugin), _create_learner(task, torch.float32)
    loss, _ = learner.meta_gradient(source.episodes("train", range(2), 0))
    if not bool(torch.isfinite(loss)):
        fail(f"The loss on the {subject.label} is {loss.item()}.", "scale inputs and targets to about 1.")
    learner.evaluate(source, 2, inner_steps=(0, 1))


def check_task_steps(subject: Subject) -> None:
    """A few steps of fit on its episodes, with its model and recommended options, agree in every strategy."""
    selection = assemble({"algo": Descent, "task": (subject.plugin, subject.config)}, {})
    task, source = selection.task.instance, TaskSource(selection.task)
    of_outer_step = {name for name in LearnerConfig.model_fields if name.startswith("outer_")}
    of_step = selection.config.model_dump(
        include={"inner_steps", "first_order", "reset_optimizer_every", *of_outer_step}
    )
    for precision in PRECISIONS:

        def new_learner(dtype: torch.dtype = precision.dtype, **options: Any) -> MetaLearner:
            model = build_model(selection.model, task.spec).to(dtype)
            metric = getattr(task, "metric", None)
            return MetaLearner(model, selection.algorithm, loss=task.loss, metric=metric, **of_step, **options)

        compare_steps(
            new_learner,
            source,
            precision,
            STRATEGIES if source.stackable else STRATEGIES[:1],
            f"the {selection.model.label} on the {subject.label}",
            "return the same episodes for a number in every call, alone or with other numbers, with the task dimension "
            f"first; if they are, check the model with `metareg check-plugin models {selection.model.name}`.",
        )
