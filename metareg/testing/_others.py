"""Checks of tasks, models and observers."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metareg.contract.episodes import Episodes
from metareg.contract.hookspecs import hookimpl
from metareg.contract.splits import SPLITS
from metareg.contract.tasks import Task, TaskSpec
from metareg.engine.split_model import SplitModel
from metareg.errors import MetaregError
from metareg.learner.learner import MetaLearner
from metareg.registry.dispatch import find_hook
from metareg.registry.plugins import resolve
from metareg.registry.sources import TaskSource
from metareg.runs.run import Run
from metareg.runs.training import train
from metareg.testing._bench import (
    Descent,
    built,
    channels_last,
    difference,
    equal,
    generator,
    global_randomness,
    snapshot,
)
from metareg.testing._check import Subject, fail
from metareg.util.seeding import task_uniform, use_seed
from metareg.util.torch_internals import tree_leaves

ROUNDING = 1e-8

# ----------------------------------------------------------------------------------------------------------------- tasks


def check_task_function(subject: Subject) -> None:
    """A task is a function of seed, split and number, whatever was asked for before and beside it."""
    first, second = TaskSource(subject.resolved()), TaskSource(subject.resolved())
    for split in SPLITS:
        with global_randomness() as moved:
            together, places = first.placed_episodes(split, [2, 0, 1], 0)
        if moved:
            fail(
                f"The {subject.label} moves the global random state of {' and '.join(moved)}.",
                "draw with metareg.task_uniform, or from a generator seeded by metareg.derive_seed(seed, split, index).",
            )
        alone = [second.episodes(split, [number], 0)[0] for number in (2, 0, 1)]
        beside = [stack[row : row + 1] for stack in together for row in range(len(stack))]
        for place, task in zip(places, beside, strict=True):
            number = (2, 0, 1)[place]
            if not _same(subject, task, alone[place]):
                fail(
                    f"The {subject.label} gives another task number {number} of '{split}' alone than beside others.",
                    "let nothing of a task depend on the other numbers that were asked for, nor on earlier calls, and say "
                    "of several stacks which of the tasks they hold, in the order asked for (Episodes.placed).",
                )
        for number, task in zip((2, 0, 1), alone, strict=True):
            if not equal(second.episodes(split, [number], 0)[0].parts, task.parts):
                fail(
                    f"The {subject.label} gives another task number {number} of '{split}' when it is asked again.",
                    "draw from a generator that is seeded anew for every task: metareg.derive_seed(seed, split, index).",
                )
    _differ(subject, first.episodes("train", [0], 0), first.episodes("test", [0], 0), "the splits 'train' and 'test'")
    _differ(subject, first.episodes("train", [0], 0), first.episodes("train", [0], 1), "the seeds 0 and 1")
    _differ(subject, first.episodes("train", [0], 0), first.episodes("train", [1], 0), "the numbers 0 and 1")


def _same(subject: Subject, a: Episodes, b: Episodes) -> bool:
    """Whether two stacks hold the same task: the same bits, or what a model learns from it where inputs may be padded."""
    if equal(a.parts, b.parts) or isinstance(a.support_x, Tensor):
        return equal(a.parts, b.parts)
    task = subject.resolved().instance
    learner = MetaLearner(
        built(task.default_model, task.spec).double(), Descent, loss=task.loss, metric=task.metric, strategy="serial"
    )
    (loss_a, grads_a), (loss_b, grads_b) = learner.meta_gradient(a), learner.meta_gradient(b)
    return difference({"loss": loss_a} | grads_a, {"loss": loss_b} | grads_b)[0] <= ROUNDING


def _differ(subject: Subject, a: list[Episodes], b: list[Episodes], what: str) -> None:
    if equal([each.parts for each in a], [each.parts for each in b]):
        fail(
            f"The {subject.label} gives the same task for {what}.",
            "use seed, split and index, all three, in what seeds the draw.",
        )


def check_task_shapes(subject: Subject) -> None:
    """Inputs and targets have the shapes and types that `spec` and the loss ask for, and are finite."""
    plugin = subject.resolved()
    task = plugin.instance
    spec: TaskSpec = task.spec
    for split in SPLITS:
        batches = TaskSource(plugin).episodes(split, range(3), 0)
        if getattr(task, "stackable", True) and len(batches) != 1:
            fail(f"The {subject.label} returns stacks of several sizes.", "say so: stackable = False.")
        for episodes in batches:
            for x, y, part in (
                (episodes.support_x, episodes.support_y, "support"),
                (episodes.query_x, episodes.query_y, "query"),
            ):
                if isinstance(x, Tensor) and tuple(x.shape[2:]) != tuple(spec.input_shape):
                    fail(
                        f"The {part} inputs of the {subject.label} have the shape {tuple(x.shape[2:])} each, and spec "
                        f"says {tuple(spec.input_shape)}.",
                        "return [tasks, examples, *input_shape], or correct spec.",
                    )
                if any(
                    leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()) for leaf in tree_leaves((x, y))
                ):
                    fail(f"The {split} split of the {subject.label} holds NaN or infinity.", "look at the data.")
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
    elif loss == "mse" and tuple(y.shape[2:]) != tuple(spec.output_shape):
        fail(
            f"The {part} targets of the {subject.label} have the shape {tuple(y.shape[2:])} each, and spec says "
            f"{tuple(spec.output_shape)}.",
            "return [tasks, examples, *output_shape], or correct spec.",
        )


def check_task_trains(subject: Subject) -> None:
    """Its own model can be trained and evaluated on it."""
    plugin = subject.resolved()
    task = plugin.instance
    if task.default_model is None:
        fail(f"The {subject.label} names no model.", "set default_model to the name of a model that suits it.")
    source = TaskSource(plugin)
    learner = MetaLearner(
        built(task.default_model, task.spec), Descent, loss=task.loss, metric=task.metric, strategy="serial"
    )
    loss, _ = learner.meta_gradient(source.episodes("train", range(2), 0))
    if not bool(torch.isfinite(loss)):
        fail(f"The loss on the {subject.label} is {loss.item()}.", "scale inputs and targets to about 1.")
    learner.evaluate(source, 2, inner_steps=(0, 1))


# ---------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Example:
    """What a model is built for and run on: a task that it declares, or random numbers of the shapes that it declares."""

    spec: TaskSpec
    episodes: Episodes
    loss: Any

    @classmethod
    def of(cls, subject: Subject) -> Example:
        named = subject.declared("example_task")
        if named is None:
            spec: TaskSpec = subject.declared("example_spec", TaskSpec((3,), (2,)))
            draw = generator("example")
            x, y = (torch.randn(2, 3, 5, *shape, generator=draw) for shape in (spec.input_shape, spec.output_shape))
            if len(spec.input_shape) == 3:
                x = channels_last(x)
            return cls(spec, Episodes(x[0], y[0], x[1], y[1]).to("cpu", torch.float64), "mse")
        fields = type(resolve("tasks", named).config).model_fields
        wishes = {key.rpartition(".")[2]: value for key, value in subject.declared("recommended", {}).items()}
        plugin = resolve("tasks", named, {key: value for key, value in wishes.items() if key in fields})
        (episodes,) = TaskSource(plugin).episodes("train", range(3), 0)
        return cls(plugin.instance.spec, episodes.to("cpu", torch.float64), plugin.instance.loss)

    @property
    def inputs(self) -> Any:
        """One support set's."""
        return self.episodes.unstack(0)[0]


def _built(subject: Subject, seed: int = 0) -> nn.Module:
    plugin = subject.resolved()
    build = find_hook(plugin, "build")
    if build is None:
        fail(f"The {plugin.label} implements no hook 'build'.", "implement build(spec, generator) -> nn.Module.")
    with use_seed(seed, "testing", "model") as draw:
        model = build(spec=Example.of(subject).spec, generator=draw)
    if not isinstance(model, nn.Module):
        fail(f"The {plugin.label} builds a {type(model).__name__}.", "return an nn.Module from build.")
    return model


def check_model_seed(subject: Subject) -> None:
    """The seed decides the initial weights, and nothing else does."""
    with global_randomness() as moved:
        first = _built(subject)
    if moved:
        fail(
            f"The {subject.label} moves the global random state of {' and '.join(moved)}.",
            "draw from the generator that build is given, or through torch's default initialisers.",
        )
    if not equal(snapshot(first), snapshot(_built(subject))):
        fail(
            f"The {subject.label} starts from other weights each time.", "draw from the generator that build is given."
        )
    if equal(snapshot(first), snapshot(_built(subject, seed=1))):
        fail(f"The {subject.label} starts from the same weights for every seed.", "draw from the generator of build.")


def check_model_split(subject: Subject) -> None:
    """`outputs = head(body(x))` has the shape that the spec asks for; a forward changes nothing in the model."""
    model = _built(subject).double()
    split = SplitModel(model)
    if not split.has_head:
        fail(
            f"The {subject.label} builds a model without body and head.", "name its two parts self.body and self.head."
        )
    example = Example.of(subject)
    x = example.inputs
    split.check_split(split.initial_parameters(), x)
    outputs = model(x)
    expected = (example.episodes.support_y.shape[1], *example.spec.output_shape)
    if tuple(outputs.shape) != expected:
        fail(
            f"The {subject.label} gives outputs of the shape {tuple(outputs.shape)} where the spec asks for {expected}.",
            "size the head by spec.output_shape, and the body by spec.input_shape.",
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
    """It can be differentiated twice, every parameter has a gradient, and a forward changes nothing of it."""
    example = Example.of(subject)
    model = _built(subject).double()
    state = snapshot(model)
    learner = MetaLearner(model, Descent, loss=example.loss, inner_steps=2, strategy="serial")
    before = snapshot(learner.model.module)
    _, grads = learner.meta_gradient(example.episodes)
    if not equal(before, snapshot(learner.model.module)) or not equal(state, snapshot(model)):
        fail(
            f"A forward of the {subject.label} changes its buffers or parameters.",
            "let forward compute outputs and change nothing.",
        )
    still = [name for name, value in grads.items() if not bool(value.any())]
    if still:
        fail(
            f"No gradient reaches '{still[0]}' of the {subject.label}.",
            "use every parameter in forward, or set its requires_grad to False.",
        )


# ------------------------------------------------------------------------------------------------------------- observers


class _Lines(Task):
    """Lines through the origin, for runs in which only the observer matters."""

    contract = 1
    name = "lines"
    loss = "mse"
    recommended: ClassVar[dict[str, Any]] = {}

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec((1,), (1,))

    @hookimpl
    def episodes(self, split: str, indices: Sequence[int], seed: int) -> Episodes:
        drawn = torch.from_numpy(task_uniform(seed, split, indices, 9)).float().unsqueeze(-1)
        x, y = drawn[:, 1:], drawn[:, :1] * drawn[:, 1:]
        return Episodes(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])


class _Line:
    """The model that goes with them."""

    contract = 1
    name = "line"

    @hookimpl
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))


def check_observer(subject: Subject) -> None:
    """It sees a whole run to its end, changes nothing of it, and writes into its folder only."""
    results = []
    for observers in ([], [subject.resolved()]):
        with _empty_folder() as folder, global_randomness() as moved:
            run = _short_run(folder / "run", observers)
            results.append({name: value.clone() for name, value in run.learner.meta_parameters.items()})
            stray = [path.name for path in folder.iterdir() if path.name != "run"]
            if stray:
                fail(
                    f"The {subject.label} wrote '{stray[0]}' outside of the run's folder.",
                    "write under run.path, which on_run_start gives.",
                )
        if moved and observers:
            fail(
                f"The {subject.label} moves the global random state of {' and '.join(moved)}.",
                "draw nothing at random.",
            )
    if not equal(*results):
        fail(
            f"A run ends in other weights when the {subject.label} watches it.",
            "read what the hooks are given, and change nothing of it.",
        )


def check_observer_logs(subject: Subject) -> None:
    """It takes logs and evaluations as they are, and leaves them so."""
    logs = {
        "loss": 1.0,
        "query_loss": 1.0,
        "mse": 1.0,
        "grad_norm": 0.5,
        "steps_per_second": 10.0,
        "cml.colearner_metric": 2.0,
    }
    plugin = subject.resolved()
    on_step = find_hook(plugin, "on_step")
    if on_step is None:
        return
    with _empty_folder() as folder:
        start = find_hook(plugin, "on_run_start")
        if start is not None:
            start(run=_short_run(folder / "run", []))
        given = copy.deepcopy(logs)
        on_step(step=10, logs=given)
        end = find_hook(plugin, "on_run_end")
        if end is not None:
            end(run=_short_run(folder / "other", []))
    if given != logs:
        fail(f"The {subject.label} changes the logs that on_step gives it.", "copy them: dict(logs).")


def _short_run(path: Path, observers: Sequence[Any]) -> Run:
    return train(
        Descent, task=_Lines, model=_Line, out=path, observers=observers, steps=4, meta_batch=2, log_every=2, eval_every=2,
        eval_tasks=2, test_tasks=2, test_inner_steps=[0, 1], device="cpu",
    )  # fmt: skip


@contextmanager
def _empty_folder() -> Iterator[Path]:
    """A new folder, which is the working directory for the block."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)
