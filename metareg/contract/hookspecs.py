"""The whole extension surface of metareg: every hook that a plugin can implement.

A plugin is a class whose methods carry `metareg.hookimpl`. An implementation names only the arguments that it wants, as
in pytest. Stage functions are pure: they take tensors and dicts of tensors and return new ones, change nothing in place
and draw no random numbers of their own (`draw_noise` is the place for that), so that one implementation runs task after
task, vectorized over tasks (`torch.func.vmap`) and compiled.

Names and shapes used throughout:

- a *dict by name* maps parameter names to tensors. The model's own parameters keep their names (``body.0.weight``,
  ``head.weight``); what a plugin adds in `init_meta` is prefixed with the plugin's name in the learner
  (``metasgd.step_size.head.weight``), and the plugin itself sees it without the prefix;
- inside the stages of one task there is no task dimension: support inputs are ``[examples, …]``, features
  ``[examples, …]``, a loss is a scalar;
- `task` is a `metareg.TaskView`: the data of one task, and its model, losses and gradients as pure functions. The query
  targets are there in the outer stages alone;
- `state` is what the algorithm keeps from one inner step to the next: a pytree of floating-point tensors whose structure
  and shapes do not change. It begins with `start_task` and ends with the task;
- `start` are the adapted parameters before the first inner step;
- `noise` is what this plugin's own `draw_noise` returned for this task or this batch; None where it drew nothing.
"""

# The signatures below are read by pluggy and by people; their bodies are their documentation.
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
"""Raised when a hook changes in a way that existing plugins notice. New hooks and new arguments do not raise it.

A plugin class states the one that it was written for, ``contract = 1``.
"""

OLDEST_CONTRACT = 1
"""The oldest contract whose plugins still work; older ones are refused when they are loaded."""

hookspec = pluggy.HookspecMarker("metareg")
hookimpl = pluggy.HookimplMarker("metareg")


class Reduction(Enum):
    """How the results of several plugins become one. The values are sentences of the documentation."""

    FIRST = "the first result that is not `None`; the plugin given last is asked first"
    CHAIN = "chained in the order given: each gets as the first argument what the one before returned"
    SUM = "summed"
    EACH = "each on its own"


@dataclass(frozen=True)
class Hook:
    """What the core knows of a hook beside its signature."""

    part: str
    """The part of a training in which it is called: a heading of the documentation."""
    reduction: Reduction
    full_meta: bool = False
    """Whether `meta` holds every meta-parameter by its full name, not the plugin's own alone."""


HOOKS: dict[str, Hook] = {}
"""Every hook by its name, in the order of the documentation."""

_Spec = TypeVar("_Spec", bound=Callable[..., Any])


def _hook(part: str, reduction: Reduction, *, full_meta: bool = False) -> Callable[[_Spec], _Spec]:
    """Declare the function to be the specification of a hook."""

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
    """Extra meta-parameters of this plugin, learned in the outer loop: step sizes, a co-learner.

    Args:
        model: the model whose `named_parameters()` have the names used everywhere; not to be changed.
        example: one support set's inputs ``[examples, …]``; only its shapes and types are meaningful.
        features: the body's features of such inputs ``[examples, …]``.
        outputs: the head's outputs ``[examples, …]``.
        adapted: the names of the parameters that the inner loop adapts.
        body: those of the feature extractor.
        head: those of the head.
        output_layer: the names of weight and bias of the head's last layer, as `TaskView.output_layer`.
        inner_steps: adaptation steps in training, for meta-parameters of which each step has its own.
        generator: draws the initial values; seeded by the run's seed and the plugin's name. Default initialisers of
            `torch.nn` are seeded in the same way while this hook runs.

    Returns:
        Tensors by name, without the plugin's prefix.
    """


@_hook("inner", Reduction.FIRST)
def adapted_parameters(
    names: tuple[str, ...], body: tuple[str, ...], head: tuple[str, ...], output_layer: tuple[str, str | None]
) -> Sequence[str] | None:
    """Which parameters the inner loop adapts; all of them where no plugin answers.

    Args:
        names: every trainable parameter of the model.
        body: those of the feature extractor.
        head: those of the classifier or regressor on top.
        output_layer: the names of weight and bias of its last layer, as `TaskView.output_layer`.

    Returns:
        A subset of `names`, which may be empty. The others enter the inner loop as constants of it and learn in the outer
        loop only.
    """


@_hook("inner", Reduction.FIRST)
def start_task(
    params: dict[str, Tensor], meta: dict[str, Tensor], noise: Any, task: TaskView
) -> dict[str, Tensor] | tuple[dict[str, Tensor], Any] | None:
    """Where adaptation to a task starts; at the meta-parameters themselves where no plugin answers.

    For parameters that every task resets (CAVIA's context), that are computed from the support set (prototypes), and for
    the state of an inner optimiser. What the result does not depend on gets no gradient through the inner loop.

    Args:
        params: the meta-parameters that the inner loop adapts, by name.
        meta: this plugin's own meta-parameters.

    Returns:
        The parameters before the first inner step, with the names and shapes of `params`; or a pair of them and `state`.
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
    """The loss on the support set that an inner step descends; the task's own loss where no plugin answers.

    For learned losses. It is differentiated with respect to the adapted parameters, and in the outer loop with respect to
    the meta-parameters; with ``first_order`` it is a constant of the outer loop.

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
    """The gradient of one inner step, before the augmenters; that of the inner loss where no plugin answers.

    For gradients taken elsewhere than at `params`, of more than the support set, or of none at all.

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
    """One adaptation step.

    Args:
        params: the adapted parameters by name.
        grads: the gradient of the inner loss for each of them, after every augmenter.
        meta: this plugin's own meta-parameters.
        step: 0 for the first inner step; evaluation may take more steps than training did.

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
    """Random draws and schedules, made outside the pure step and handed to this plugin's other hooks as `noise`.

    Called once per task where the plugin names `noise` in a stage of a task, with ``stage="task"`` in training and
    ``stage="adapt"`` in evaluation and adaptation (algorithms, and augmenters that stay); and once per meta-batch with
    ``stage="batch"`` where it names `noise` in `combine_tasks` or `augment_outer_gradient`.

    Args:
        shapes: the shapes of the adapted parameters (``"task"``, ``"adapt"``) or of all meta-parameters (``"batch"``).
        generator: seeded by the run's seed, the plugin, and the training step and the task, or in evaluation the split and
            the task; `MetaLearner.adapt` draws the same each time.
        inner_steps: how many inner steps the task takes.
        stage: ``"task"``, ``"adapt"`` or ``"batch"``.
        training_step: how many training steps have been done; None outside training. Whatever follows a schedule is
            returned as a tensor, or it would be frozen into a traced graph.

    Returns:
        A pytree of tensors, of the same structure and shapes for every task.
    """


@_hook("augmentation", Reduction.CHAIN)
def augment_episodes(episodes: Episodes, generator: torch.Generator, training_step: int) -> Episodes:
    """Change the tasks of a training batch before the step: mixtures of examples or of tasks, mini-batches.

    Called in training only, once for each stack of tasks of equal sizes, outside the pure step.

    Args:
        episodes: the tasks ``[tasks, examples, …]``, on the device and in the types of their source.
        generator: seeded by the run's seed, the training step, the stack and the plugin.
        training_step: how many training steps have been done.

    Returns:
        As many tasks, in the same order.
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
    """A term that is added to the loss of each inner step; arguments as those of `inner_loss`.

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
    """Change the gradient of one inner step; arguments as those of `inner_update`.

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
    """A term that is added to the query loss of one task in training.

    Args:
        features: the adapted body's features of the query set ``[query, …]``.
        outputs: the adapted head's outputs ``[query, …]``.
        targets: the query targets ``[query]`` or ``[query, outputs]``.
        adapted: the adapted parameters after the last inner step.
        meta: this plugin's own meta-parameters.
        loss: the task's loss, ``loss(outputs, targets) -> scalar``.
        metric: the task's metric, ``metric(outputs, targets) -> scalar``.

    Returns:
        A scalar; or a scalar and a dict of scalars to be logged beside the training loss.
    """


@_hook("augmentation", Reduction.CHAIN)
def augment_outer_gradient(
    grads: dict[str, Tensor],
    meta: dict[str, Tensor],
    noise: Any,
    every: dict[str, Tensor],
    gradient_at: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Change the meta-gradient, once per meta-batch after the tasks are combined.

    Args:
        grads: the meta-gradient of every meta-parameter, by its full name.
        meta: this plugin's own meta-parameters.
        every: every meta-parameter by its full name.
        gradient_at: the meta-gradient of this batch, with the same draws, at other values of `every`.

    Returns:
        Gradients with the names and shapes of `grads`.
    """


@_hook("outer", Reduction.FIRST)
def outer_loss_weights(inner_steps: int, training_step: int) -> Sequence[float] | None:
    """Weights of the query losses after each inner step (MAML++'s multi-step loss).

    The loss after the last step alone where no plugin answers. Called once per training step, outside the pure step:
    the weights may change from one to the next. Terms of `augment_outer_loss` are taken after the last step, unweighted;
    where `outer_gradient` is implemented, the weights have no effect.

    Args:
        inner_steps: adaptation steps in training.
        training_step: how many training steps have been done.

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
    """What the outer loop differentiates, exactly, in the place of the query loss of one task.

    Terms of `augment_outer_loss` are added to it. Beside a plugin that implements it, `outer_loss_weights` has no effect.

    Args:
        meta: this plugin's own meta-parameters.
        adapted: the parameters that the inner loop adapted, after its last step.
        inner_steps: how many steps it took.

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
    """The meta-gradient of one task, for algorithms that are no derivative of an objective (Reptile, iMAML).

    Args:
        meta: every meta-parameter by its full name.
        adapted: the parameters that the inner loop adapted, after its last step.
        inner_steps: how many steps it took.

    Returns:
        Gradients by full name; a parameter left out gets zero. Terms of `augment_outer_loss` are differentiated as
        always and added to it.
    """


@_hook("outer", Reduction.FIRST)
def combine_tasks(
    grads: dict[str, Tensor], losses: Tensor, meta: dict[str, Tensor], noise: Any
) -> dict[str, Tensor] | None:
    """The meta-gradient of a batch from those of its tasks; their mean where no plugin answers.

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
    """One step of the outer optimiser; of `torch.optim.Adam` where no plugin answers.

    Args:
        meta: every meta-parameter by its full name.
        grads: the meta-gradient of each.
        state: what the last call returned as state; empty at first. Tensors, numbers, and dicts of them.

    Returns:
        The new meta-parameters, with the names and shapes of `meta`, and the new state.
    """


@_hook("evaluation", Reduction.FIRST)
def predict(features: Tensor, support_features: Tensor | None, meta: dict[str, Tensor]) -> Tensor:
    """What is predicted in evaluation and by adapted modules, in the place of the head's outputs (CML's co-learner).

    Results name the plugin that answers. The head is no part of what it predicts: in evaluation and adaptation the inner
    loop leaves the head's parameters as `start_task` gave them, and adapts the body alone.

    Args:
        features: the adapted body's features ``[query, …]``.
        support_features: those of the support set ``[examples, …]`` where it alone may decide statistics
            (``bn_statistics="support"``); None otherwise.
        meta: this plugin's own meta-parameters.

    Returns:
        Outputs ``[query, outputs]``.
    """


@_hook("tasks and models", Reduction.FIRST)
def episodes(split: str, indices: Sequence[int], seed: int) -> Episodes | list[Episodes] | None:
    """The tasks number `indices` of a split: a pure function of its arguments, whatever was asked for before.

    A task plugin also has the attributes of `metareg.Task`: its `spec`, loss, metric, default model and recommended
    options.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        indices: non-negative task numbers.
        seed: the run's seed.

    Returns:
        The tasks stacked in that order; or, where they are of unequal sizes, a list of stacks that say which of them they
        hold: `Episodes.group` makes such stacks, `Episodes.placed` says it of others. The tasks of any other list are drawn
        one by one where their order matters, as it does for the scores of an evaluation.
    """


@_hook("tasks and models", Reduction.FIRST)
def figures(learner: LearnerView, seed: int) -> Mapping[str, Figure] | None:
    """Pictures of some test tasks after training, by file name without its ending; the run saves them as PNG."""


@_hook("tasks and models", Reduction.FIRST)
def build(spec: TaskSpec, generator: torch.Generator) -> nn.Module | None:
    """A model for a task: an `nn.Module` with `body` and `head`, freshly initialised.

    Args:
        spec: the task's input and output shapes.
        generator: draws the initial values; default initialisers of `torch.nn` are seeded in the same way.
    """


@_hook("observers", Reduction.EACH)
def on_run_start(run: RunView) -> None:
    """Training is about to begin, or to go on after the step ``run.learner.steps_done`` of a run that was stopped.

    The run's folder and configuration exist. A run that goes on repeats the steps after its newest checkpoint.
    """


@_hook("observers", Reduction.EACH)
def on_step(step: int, logs: dict[str, float]) -> None:
    """Every `log_every` training steps: the number of steps done and the means of the logged values since the last call.

    Keys: ``loss`` (the objective), ``query_loss``, the metric under its own name, ``grad_norm``, ``steps_per_second``,
    and ``PLUGIN.KEY`` for what an augmenter logs.
    """


@_hook("observers", Reduction.EACH)
def on_evaluation(step: int, split: str, evaluation: Evaluation) -> None:
    """An evaluation on a split has ended: ``"validation"`` while training, ``"test"`` at the end."""


@_hook("observers", Reduction.EACH)
def on_run_end(run: RunView) -> None:
    """The run has ended and its results are written."""
