"""The complete extension surface of metareg: every hook that a plugin can implement.

A plugin is a class whose methods are marked with `metareg.hookimpl`. As in pytest, an implementation lists only the
arguments that it needs. Stage functions are pure: they take tensors and dicts of tensors and return new ones. They
change nothing in place, and draw random numbers only in `draw_noise`. One implementation therefore runs task by task,
vectorized over tasks (`torch.func.vmap`) and compiled.

Names and shapes:

- a *dict by name* maps parameter names to tensors. The model's own parameters keep their names (``body.0.weight``,
  ``head.weight``). What a plugin adds in `init_meta` is prefixed with the plugin's name in the learner
  (``metasgd.step_size.head.weight``); the plugin itself sees it without the prefix;
- the stages of one task have no task dimension: support inputs and features are ``[examples, …]``, a loss is a scalar;
- `task` is a `metareg.TaskView`: the data of one task, and its model, losses and gradients as pure functions. Only the
  outer stages see the query targets;
- `state` is what the algorithm carries from one inner step to the next: a pytree of floating-point tensors with a fixed
  structure and fixed shapes. `start_task` creates it, and it is discarded after the task;
- `start` holds the adapted parameters before the first inner step;
- `noise` is what the plugin's own `draw_noise` returned for this task or batch, or None if it drew nothing.
"""

# The functions below only declare signatures; their docstrings are the reference.
# mypy: disable-error-code="empty-body"

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from metareg.contract.episodes import Episodes
    from metareg.contract.evaluation import Evaluation
    from metareg.contract.tasks import TaskSpec
    from metareg.contract.views import LearnerView, RunView, TaskView

__all__ = ["CONTRACT_VERSION", "HOOKS", "OLDEST_CONTRACT", "Hook", "Reduction", "hookimpl", "hookspec"]

CONTRACT_VERSION = 1
"""Increased when a hook changes in a way that existing plugins notice. New hooks and new arguments do not increase it.

A plugin class states the version that it was written for: ``contract = 1``.
"""

OLDEST_CONTRACT = 1
"""The oldest supported contract; plugins written for an older one are refused when they are loaded."""

hookspec = pluggy.HookspecMarker("metareg")
"""Marks a function as the specification of a hook; metareg's own are marked with it."""

hookimpl = pluggy.HookimplMarker("metareg")
"""Marks a plugin's method as the implementation of the hook of its name: ``@hookimpl``."""


class Reduction(Enum):
    """How the results of several plugins are combined. The values are sentences of the documentation."""

    FIRST = "the first result that is not `None`; the plugin given last is asked first"
    CHAIN = "chained in the given order: each gets the previous result as its first argument"
    SUM = "summed"
    EACH = "each called independently"


@dataclass(frozen=True)
class Hook:
    """What the core knows about a hook beyond its signature."""

    part: str
    """The part of training that calls it: a heading of the documentation."""
    reduction: Reduction
    full_meta: bool = False
    """Whether `meta` holds every meta-parameter by its full name instead of only the plugin's own."""


HOOKS: dict[str, Hook] = {}
"""All hooks by name, in the order of the documentation."""

_Spec = TypeVar("_Spec", bound=Callable[..., Any])


def _hook(part: str, reduction: Reduction, *, full_meta: bool = False) -> Callable[[_Spec], _Spec]:
    """Declare a function as the specification of a hook."""

    def declare(spec: _Spec) -> _Spec:
        HOOKS[spec.__name__] = Hook(part, reduction, full_meta)
        return hookspec(spec, firstresult=reduction is Reduction.FIRST)

    return declare


@_hook("parameters", Reduction.EACH)
def init_meta(
    model: nn.Module,
    example: Any,
    features: Tensor,
    outputs: Tensor,
    adapted: tuple[str, ...],
    body: tuple[str, ...],
    head: tuple[str, ...],
    output_layer: tuple[str, str | None],
    inner_steps: int,
    generator: torch.Generator,
) -> dict[str, Tensor] | None:
    """Return additional meta-parameters of this plugin, learned in the outer loop, such as step sizes or a co-learner.

    Args:
        model: the model. The keys of its `named_parameters()` are the names used everywhere. Do not change it.
        example: the inputs of one support set ``[examples, …]``; only their shapes and types are meaningful.
        features: the body's features for such inputs ``[examples, …]``.
        outputs: the head's outputs ``[examples, …]``.
        adapted: the names of the parameters that the inner loop adapts.
        body: the names of the feature extractor's parameters.
        head: the names of the head's parameters.
        output_layer: the names of weight and bias of the head's last layer, as in `TaskView.output_layer`.
        inner_steps: the number of inner steps in training, for meta-parameters that differ from step to step.
        generator: draws the initial values; seeded by the run's seed and the plugin's name. The default initialisers of
            `torch.nn` are seeded in the same way while this hook runs.

    Returns:
        Tensors by name, without the plugin's prefix.
    """


@_hook("inner", Reduction.FIRST)
def adapted_parameters(
    names: tuple[str, ...], body: tuple[str, ...], head: tuple[str, ...], output_layer: tuple[str, str | None]
) -> Sequence[str] | None:
    """Select the parameters that the inner loop adapts; all of them if no plugin answers.

    Args:
        names: every trainable parameter of the model.
        body: the parameters of the feature extractor.
        head: the parameters of the classifier or regressor on top.
        output_layer: the names of weight and bias of its last layer, as in `TaskView.output_layer`.

    Returns:
        A subset of `names`, possibly empty. The other parameters are constant in the inner loop and learn only in the
        outer loop.
    """


@_hook("inner", Reduction.FIRST)
def start_task(
    params: dict[str, Tensor], meta: dict[str, Tensor], noise: Any, task: TaskView
) -> dict[str, Tensor] | tuple[dict[str, Tensor], Any] | None:
    """Return the parameters that adaptation to a task starts with; the meta-parameters if no plugin answers.

    Use it for parameters that every task resets (CAVIA's context), for parameters computed from the support set
    (prototypes), and for the state of an inner optimiser. Parameters on which the result does not depend get no
    gradient through the inner loop.

    Args:
        params: the meta-parameters that the inner loop adapts, by name.
        meta: this plugin's own meta-parameters.

    Returns:
        The parameters before the first inner step, with the names and shapes of `params`; or a pair of them and
        `state`.
    """


@_hook("inner", Reduction.FIRST)
def inner_loss(
    outputs: Tensor,
    targets: Tensor,
    params: dict[str, Tensor],
    meta: dict[str, Tensor],
    step: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    noise: Any,
    task: TaskView,
) -> Tensor | None:
    """Return the support loss that an inner step descends; the task's own loss if no plugin answers.

    Use it for learned losses. It is differentiated with respect to the adapted parameters and, in the outer loop, with
    respect to the meta-parameters. With ``first_order``, it is a constant for the outer loop.

    Args:
        outputs: the model's outputs for the support set ``[examples, …]``.
        targets: the support targets ``[examples]`` or ``[examples, outputs]``.
        params: the adapted parameters by name.
        meta: this plugin's own meta-parameters.
        step: 0 for the first inner step.
        loss: the task's loss, ``loss(outputs, targets) -> scalar``.

    Returns:
        A scalar.
    """


@_hook("inner", Reduction.FIRST)
def inner_gradient(
    params: dict[str, Tensor], meta: dict[str, Tensor], step: int, state: Any, noise: Any, task: TaskView
) -> dict[str, Tensor] | None:
    """Return the gradient of one inner step, before the augmenters; that of the inner loss if no plugin answers.

    Use it for gradients that are evaluated elsewhere than at `params`, that use more than the support set, or that are
    no gradients of a loss.

    Args:
        params: the adapted parameters by name.
        meta: this plugin's own meta-parameters.
        step: 0 for the first inner step.

    Returns:
        Gradients with the names and shapes of `params`.
    """


@_hook("inner", Reduction.FIRST)
def inner_update(
    params: dict[str, Tensor],
    grads: dict[str, Tensor],
    meta: dict[str, Tensor],
    step: int,
    state: Any,
    start: dict[str, Tensor],
    noise: Any,
    task: TaskView,
) -> dict[str, Tensor] | tuple[dict[str, Tensor], Any] | None:
    """Take one inner step.

    Args:
        params: the adapted parameters by name.
        grads: the gradient of the inner loss for each of them, after all augmenters.
        meta: this plugin's own meta-parameters.
        step: 0 for the first inner step; evaluation can take more steps than training.

    Returns:
        The new parameters, with the names and shapes of `params`; or a pair of them and the new `state`.
    """


@_hook("augmentation", Reduction.EACH)
def draw_noise(
    shapes: dict[str, tuple[int, ...]],
    generator: torch.Generator,
    inner_steps: int,
    stage: str,
    training_step: int | None,
) -> Any:
    """Draw random numbers or compute schedules outside the pure step; the plugin's other hooks receive them as `noise`.

    Called once per task if the plugin uses `noise` in a stage of a task: with ``stage="task"`` in training, and with
    ``stage="adapt"`` in evaluation and adaptation (algorithms, and augmenters that stay). Called once per meta-batch
    with ``stage="batch"`` if it uses `noise` in `combine_tasks` or `augment_outer_gradient`.

    Args:
        shapes: the shapes of the adapted parameters (``"task"``, ``"adapt"``) or of all meta-parameters (``"batch"``).
        generator: seeded by the run's seed, the plugin, the training step and the task; in evaluation, by the split and
            the task instead of the step. `MetaLearner.adapt` draws the same numbers each time.
        inner_steps: the number of inner steps of the task.
        stage: ``"task"``, ``"adapt"`` or ``"batch"``.
        training_step: the number of training steps done so far; None outside training. Return anything that follows a
            schedule as a tensor: a Python number would be frozen into a traced graph.

    Returns:
        A pytree of tensors, with the same structure and shapes for every task.
    """


@_hook("augmentation", Reduction.CHAIN)
def augment_episodes(episodes: Episodes, generator: torch.Generator, training_step: int) -> Episodes:
    """Change the tasks of a training batch before the step: mix examples or tasks, or draw mini-batches.

    Called only in training, once for each stack of tasks of equal sizes, outside the pure step.

    Args:
        episodes: the tasks ``[tasks, examples, …]``, with the device and types of their source.
        generator: seeded by the run's seed, the training step, the stack and the plugin.
        training_step: the number of training steps done so far.

    Returns:
        The same number of tasks, in the same order.
    """


@_hook("augmentation", Reduction.SUM)
def augment_inner_loss(
    outputs: Tensor,
    targets: Tensor,
    params: dict[str, Tensor],
    meta: dict[str, Tensor],
    step: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    noise: Any,
    task: TaskView,
) -> Tensor:
    """Return a term that is added to the loss of each inner step; arguments as in `inner_loss`.

    Returns:
        A scalar.
    """


@_hook("augmentation", Reduction.CHAIN)
def augment_inner_gradient(
    grads: dict[str, Tensor],
    params: dict[str, Tensor],
    meta: dict[str, Tensor],
    noise: Any,
    step: int,
    task: TaskView,
) -> dict[str, Tensor]:
    """Change the gradient of one inner step; arguments as in `inner_update`.

    Returns:
        Gradients with the names and shapes of `grads`.
    """


@_hook("augmentation", Reduction.SUM)
def augment_outer_loss(
    features: Tensor,
    outputs: Tensor,
    targets: Tensor,
    adapted: dict[str, Tensor],
    meta: dict[str, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    metric: Callable[[Tensor, Tensor], Tensor],
    noise: Any,
    task: TaskView,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Return a term that is added to the query loss of one task in training.

    Args:
        features: the adapted body's features of the query set ``[query, …]``.
        outputs: the adapted head's outputs ``[query, …]``.
        targets: the query targets ``[query]`` or ``[query, outputs]``.
        adapted: the adapted parameters after the last inner step.
        meta: this plugin's own meta-parameters.
        loss: the task's loss, ``loss(outputs, targets) -> scalar``.
        metric: the task's metric, ``metric(outputs, targets) -> scalar``.

    Returns:
        A scalar; or a pair of a scalar and a dict of scalars to log beside the training loss.
    """


@_hook("augmentation", Reduction.CHAIN)
def augment_outer_gradient(
    grads: dict[str, Tensor],
    meta: dict[str, Tensor],
    noise: Any,
    every: dict[str, Tensor],
    gradient_at: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Change the meta-gradient, once per meta-batch, after the tasks are combined.

    Args:
        grads: the meta-gradient of every meta-parameter, by its full name.
        meta: this plugin's own meta-parameters.
        every: every meta-parameter by its full name.
        gradient_at: computes the meta-gradient of this batch, with the same draws, at other values of `every`.

    Returns:
        Gradients with the names and shapes of `grads`.
    """


@_hook("outer", Reduction.FIRST)
def outer_loss_weights(inner_steps: int, training_step: int) -> Sequence[float] | None:
    """Return weights for the query losses after each inner step (MAML++'s multi-step loss).

    If no plugin answers, only the loss after the last step counts. Called once per training step, outside the pure
    step, so the weights can change over training. Terms of `augment_outer_loss` are evaluated after the last step,
    unweighted. If `outer_gradient` is implemented, the weights have no effect.

    Args:
        inner_steps: the number of inner steps in training.
        training_step: the number of training steps done so far.

    Returns:
        `inner_steps` weights, the first for the loss after one step.
    """


@_hook("outer", Reduction.FIRST)
def outer_objective(
    meta: dict[str, Tensor],
    adapted: dict[str, Tensor],
    start: dict[str, Tensor],
    state: Any,
    inner_steps: int,
    noise: Any,
    task: TaskView,
) -> Tensor | None:
    """Return the objective of one task that replaces its query loss; the outer loop differentiates it exactly.

    Terms of `augment_outer_loss` are added to it. If a plugin implements it, `outer_loss_weights` has no effect.

    Args:
        meta: this plugin's own meta-parameters.
        adapted: the adapted parameters after the last inner step.
        inner_steps: the number of inner steps taken.

    Returns:
        A scalar.
    """


@_hook("outer", Reduction.FIRST, full_meta=True)
def outer_gradient(
    meta: dict[str, Tensor],
    adapted: dict[str, Tensor],
    start: dict[str, Tensor],
    state: Any,
    inner_steps: int,
    noise: Any,
    task: TaskView,
) -> dict[str, Tensor] | None:
    """Return the meta-gradient of one task, for algorithms that do not differentiate an objective (Reptile, iMAML).

    Args:
        meta: every meta-parameter by its full name.
        adapted: the adapted parameters after the last inner step.
        inner_steps: the number of inner steps taken.

    Returns:
        Gradients by full name; parameters left out get zero. Terms of `augment_outer_loss` are differentiated as usual
        and added.
    """


@_hook("outer", Reduction.FIRST)
def combine_tasks(
    grads: dict[str, Tensor], losses: Tensor, meta: dict[str, Tensor], noise: Any
) -> dict[str, Tensor] | None:
    """Combine the meta-gradients of a batch's tasks into one; their mean if no plugin answers.

    Args:
        grads: the meta-gradients by full name ``[tasks, …]``, in the order of the tasks.
        losses: the objective of each task ``[tasks]``.
        meta: this plugin's own meta-parameters.

    Returns:
        Gradients with the names of `grads`, without the task dimension.
    """


@_hook("outer", Reduction.FIRST, full_meta=True)
def outer_update(
    meta: dict[str, Tensor], grads: dict[str, Tensor], state: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Take one step of the outer optimiser; a step of the run's `outer_optimizer` if no plugin answers.

    Args:
        meta: every meta-parameter by its full name.
        grads: the meta-gradient of each.
        state: the state that the previous call returned; empty at first. Tensors, numbers, and dicts of them.

    Returns:
        The new meta-parameters, with the names and shapes of `meta`, and the new state.
    """


@_hook("evaluation", Reduction.FIRST)
def predict(features: Tensor, support_features: Tensor | None, meta: dict[str, Tensor]) -> Tensor:
    """Return the predictions that replace the head's outputs in evaluation and in adapted modules (CML's co-learner).

    Results name the plugin that answers. Its predictions do not use the head: in evaluation and adaptation, the inner
    loop adapts only the body, and the head's parameters stay as `start_task` returned them.

    Args:
        features: the adapted body's features ``[query, …]``.
        support_features: the features of the support set ``[examples, …]`` if statistics may come only from it
            (``bn_statistics="support"``); None otherwise.
        meta: this plugin's own meta-parameters.

    Returns:
        Outputs ``[query, outputs]``.
    """


@_hook("tasks and models", Reduction.FIRST)
def episodes(split: str, indices: Sequence[int], seed: int) -> Episodes | list[Episodes] | None:
    """Return the tasks `indices` of a split: a pure function of the arguments, independent of earlier calls.

    A task plugin also has the attributes of `metareg.Task`: its `spec`, loss, metric, default model and recommended
    options.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        indices: non-negative task numbers.
        seed: the run's seed.

    Returns:
        The tasks, stacked in that order. If their sizes differ, a list of stacks that say which tasks they hold:
        `Episodes.group` creates such stacks, and `Episodes.placed` marks existing ones. Tasks in any other list are
        drawn one by one where their order matters, as for the scores of an evaluation.
    """


@_hook("tasks and models", Reduction.FIRST)
def figures(learner: LearnerView, seed: int) -> Mapping[str, Figure] | None:
    """Plot some test tasks after training; figures by file name without extension. The run saves them as PNG."""


@_hook("tasks and models", Reduction.FIRST)
def build(spec: TaskSpec, generator: torch.Generator) -> nn.Module | None:
    """Build a model for a task: a freshly initialised `nn.Module` with `body` and `head`.

    Args:
        spec: the task's input and output shapes.
        generator: draws the initial values; the default initialisers of `torch.nn` are seeded in the same way.
    """


@_hook("observers", Reduction.EACH)
def on_run_start(run: RunView) -> None:
    """Training is about to start, or to continue a stopped run after step ``run.learner.steps_done``.

    The run's folder and configuration exist. A resumed run repeats the steps after its newest checkpoint.
    """


@_hook("observers", Reduction.EACH)
def on_step(step: int, logs: dict[str, float]) -> None:
    """Called every `log_every` training steps with the step number and the mean logs since the last call.

    Keys: ``loss`` (the objective), ``query_loss``, the metric under its own name, ``grad_norm``, ``steps_per_second``,
        and ``PLUGIN.KEY`` for what an augmenter logs.
    """


@_hook("observers", Reduction.EACH)
def on_evaluation(step: int, split: str, evaluation: Evaluation) -> None:
    """An evaluation on a split has ended: ``"validation"`` during training, ``"test"`` at the end."""


@_hook("observers", Reduction.EACH)
def on_run_end(run: RunView) -> None:
    """The run has ended and its results are written."""
