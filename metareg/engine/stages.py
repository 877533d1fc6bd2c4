"""The stages of a run: the hooks of its algorithm and augmenters, each reduced to one result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metareg.contract.episodes import Episodes
from metareg.contract.hookspecs import HOOKS, Reduction
from metareg.contract.losses import Loss
from metareg.contract.views import TaskView
from metareg.engine.split_model import SplitModel
from metareg.errors import ExamplesError, PluginError
from metareg.printable import format_count
from metareg.registry.dispatch import Implementation, create_plugin_manager, find_implementations, list_hooks
from metareg.registry.plugins import Plugin
from metareg.util.layout import copy_contiguous
from metareg.util.seeding import create_generator, use_seed
from metareg.util.torch_internals import map_tree, tree_leaves, tree_map

__all__ = ["Stages"]

Tensors = dict[str, Tensor]
Check = Callable[[Any, Any, Implementation], Any]
"""Takes the hook's first argument, the plugin's result and the implementation; returns the checked result."""

_REQUIRED = object()
_INNER = (
    "start_task", "inner_loss", "augment_inner_loss", "inner_gradient", "augment_inner_gradient", "inner_update",
)  # fmt: skip
_NOISE = {
    "task": (*_INNER, "augment_outer_loss", "outer_objective", "outer_gradient"),
    "adapt": _INNER,
    "batch": ("combine_tasks", "augment_outer_gradient"),
}
"""The hooks with `noise` that is drawn for each task in training, each task in evaluation, and each meta-batch."""


_ADAPTING = ("adapted_parameters", "start_task", "inner_loss", "inner_gradient", "inner_update")
"""The hooks that define adaptation, as opposed to augmenting hooks, which change it."""


class Stages:
    """The stage hooks of an algorithm and its augmenters, chained in order."""

    def __init__(self, algorithm: Plugin, augmenters: Sequence[Plugin]) -> None:
        self.algorithm = algorithm
        self.augmenters = tuple(augmenters)
        manager, self.plugins = create_plugin_manager([algorithm, *augmenters])
        self._implementations = {hook: find_implementations(manager, self.plugins, hook) for hook in HOOKS}
        self._drawing = {stage: self._find_drawing(hooks) for stage, hooks in _NOISE.items()}
        for augmenter in self.augmenters:
            if not list_hooks(type(augmenter.instance)):
                raise PluginError(f"The {augmenter.label} implements no hook; mark its methods with @metareg.hookimpl.")
        for hook in _ADAPTING:
            for each in self._implementations[hook]:
                if _is_training_only(each.plugin):
                    raise PluginError(
                        f"The {each.plugin.label} implements {hook}: without it, evaluation would adapt differently "
                        "from training; declare training_only = False in its class to keep it."
                    )
        if not self._implementations["inner_update"]:
            raise PluginError(f"The {algorithm.label} implements no inner_update.")
        self.training_only = frozenset(name for name, plugin in self.plugins.items() if _is_training_only(plugin))
        """The names of the training-only augmenters."""
        self._refuse_split_namesakes()
        for each in self._implementations["draw_noise"]:
            if not any(each in drawing for drawing in self._drawing.values()):
                raise PluginError(
                    f"The {each.plugin.label} draws noise but does not use it: add the argument `noise` to a stage."
                )

    def _refuse_split_namesakes(self) -> None:
        """Refuse augmenters with one name of which only some stay in evaluation, which would change their numbering."""
        for augmenter in self.augmenters:
            namesakes = [each for each in self.augmenters if each.name == augmenter.name]
            if len({_is_training_only(each) for each in namesakes}) > 1:
                raise PluginError(
                    f"Several augmenters '{augmenter.name}' must either all stay in evaluation or none of them."
                )

    def _find_drawing(self, hooks: Sequence[str]) -> list[Implementation]:
        """Find the implementations of `draw_noise` of plugins that use noise in one of these hooks."""
        taking = {each.name for hook in hooks for each in self._implementations[hook] if "noise" in each.arguments}
        return [each for each in self._implementations["draw_noise"] if each.name in taking]

    def implements(self, hook: str) -> bool:
        """Return whether any plugin implements a hook."""
        return bool(self._implementations[hook])

    def draws_noise(self, stage: str) -> bool:
        """Return whether any plugin draws noise in a stage, named as in `draw_noise`."""
        return bool(self._drawing[stage])

    def list_owners(self, hook: str) -> list[str]:
        """List the labels of the plugins that implement a hook, in the order of the calls."""
        return [each.plugin.label for each in self._implementations[hook]]

    @property
    def changes_inner_loss(self) -> bool:
        """Whether the inner loss differs from the task's own."""
        return self.implements("inner_loss") or self.implements("augment_inner_loss")

    @property
    def transductive(self) -> bool:
        """Whether a plugin declares that adaptation reads the query inputs."""
        return any(getattr(plugin.instance, "transductive", False) for plugin in self.plugins.values())

    def check_targets(self, targets: Tensor) -> None:
        """Refuse targets that a plugin does not support.

        Raises:
            ExamplesError: the targets are numbers and the plugin supports only classes, or vice versa.
        """
        found = "numbers" if targets.is_floating_point() else "classes"
        for plugin in self.plugins.values():
            wanted = getattr(plugin.instance, "targets", found)
            if wanted != found:
                raise ExamplesError(
                    f"The {plugin.label} supports only targets that are {wanted}; those of this task are {found}."
                )

    def find_asking(self, *arguments: str, hook: str | None = None) -> Plugin | None:
        """Find the first plugin that takes one of these arguments, in `hook` or in any hook."""
        for implementations in self._implementations.values() if hook is None else [self._implementations[hook]]:
            for each in implementations:
                if set(arguments) & set(each.arguments):
                    return each.plugin
        return None

    def for_adaptation(self) -> Stages:
        """Return the stages for evaluation, adaptation and the exported learner, without training-only augmenters."""
        return Stages(self.algorithm, [each for each in self.augmenters if not _is_training_only(each)])

    def owner(self, meta_name: str) -> str | None:
        """Return the name of the plugin that owns a meta-parameter; None for the model's own."""
        return next((name for name in self.plugins if meta_name.startswith(f"{name}.")), None)

    def init_meta(self, seed: int, **arguments: Any) -> Tensors:
        """Create every plugin's additional meta-parameters, by full name."""
        meta: Tensors = {}
        for each in self._implementations["init_meta"]:
            with use_seed(seed, "init_meta", each.name) as generator:
                created = each(generator=generator, **arguments)
            if created is not None:
                created = copy_contiguous(_take_tensors(created, each))
                meta |= {f"{each.name}.{name}": value for name, value in created.items()}
        return meta

    def adapted_parameters(self, model: SplitModel) -> tuple[str, ...]:
        """Return the names of the parameters that the inner loop adapts, in the model's order."""
        arguments: dict[str, Any] = {"body": model.body_names, "head": model.head_names}
        if self.find_asking("output_layer", hook="adapted_parameters"):
            arguments["output_layer"] = model.output_layer
        return self._reduce("adapted_parameters", _select, otherwise=model.names, names=model.names, **arguments)

    def draw_noise(
        self,
        stage: str,
        params: Tensors,
        like: Tensor,
        inner_steps: int,
        seed: int,
        draws: Iterable[tuple[str | int, ...]],
        training_step: int | None = None,
    ) -> list[dict[str, Any]]:
        """Draw the noise of each plugin for some tasks or for a meta-batch, by the plugin's name; empty without noise.

        Args:
            stage: ``"task"``, ``"adapt"`` or ``"batch"``.
            params: the parameters whose shapes the plugins receive.
            like: a tensor with the type and device of the noise.
            inner_steps: the number of inner steps of a task.
            seed: the seed of the run or evaluation.
            draws: further labels of each draw, such as the training step and the task's number in its batch.
            training_step: the number of training steps done; None outside training.
        """
        drawing = self._drawing[stage]
        if not drawing:
            return []
        shapes = {name: tuple(value.shape) for name, value in params.items()}

        def draw(each: Implementation, labels: Sequence[str | int]) -> Any:
            drawn = each(
                shapes=shapes, generator=create_generator(seed, "noise", stage, each.name, *labels),
                inner_steps=inner_steps, stage=stage, training_step=training_step,
            )  # fmt: skip
            return None if drawn is None else _take_noise(drawn, each, like)

        return [{each.name: drawn for each in drawing if (drawn := draw(each, labels)) is not None} for labels in draws]

    def augment_episodes(self, batches: Sequence[Episodes], seed: int, training_step: int) -> list[Episodes]:
        """Return the stacks of a training batch, as changed by the plugins."""
        changed = []
        for number, stack in enumerate(batches):
            for each in self._implementations["augment_episodes"]:
                generator = create_generator(seed, "episodes", each.name, training_step, number)
                given = each(episodes=stack, generator=generator, training_step=training_step)
                stack = _take_episodes(stack, given, each)
            changed.append(stack)
        return changed

    def start_task(
        self, params: Tensors, meta: Tensors, noise: Mapping[str, Any], task: TaskView
    ) -> tuple[Tensors, Any]:
        """Return the adapted parameters and the algorithm's state before the first inner step."""
        start: tuple[Tensors, Any] = params, {}
        return self._reduce("start_task", _begin, otherwise=start, params=params, meta=meta, noise=noise, task=task)

    def inner_loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        params: Tensors,
        meta: Tensors,
        step: int,
        loss: Loss,
        noise: Mapping[str, Any],
        task: TaskView,
    ) -> Tensor:
        """Return the loss of an inner step: the algorithm's or the task's own, plus the augmenters' terms."""
        arguments = {
            "targets": targets,
            "params": params,
            "meta": meta,
            "step": step,
            "loss": loss,
            "noise": noise,
            "task": task,
        }
        own = self._reduce("inner_loss", _take_scalar, otherwise=None, outputs=outputs, **arguments)
        own = loss(outputs, targets) if own is None else own
        return own + self._reduce("augment_inner_loss", _take_scalar, outputs=outputs, **arguments)

    def inner_gradient(
        self, params: Tensors, meta: Tensors, step: int, state: Any, noise: Mapping[str, Any], task: TaskView
    ) -> Tensors | None:
        """Return the gradient of one inner step from the plugin that computes it."""
        return self._reduce(
            "inner_gradient", _match, otherwise=None,
            params=params, meta=meta, step=step, state=state, noise=noise, task=task,
        )  # fmt: skip

    def augment_inner_gradient(
        self, grads: Tensors, params: Tensors, meta: Tensors, noise: Mapping[str, Any], step: int, task: TaskView
    ) -> Tensors:
        return self._reduce(
            "augment_inner_gradient", _match, grads=grads, params=params, meta=meta, noise=noise, step=step, task=task
        )

    def inner_update(
        self,
        grads: Tensors,
        start: Tensors,
        params: Tensors,
        meta: Tensors,
        step: int,
        state: Any,
        noise: Mapping[str, Any],
        task: TaskView,
    ) -> tuple[Tensors, Any]:
        """Return the adapted parameters and the state after another inner step."""
        return self._reduce(
            "inner_update", partial(_go_on, state),
            params=params, grads=grads, meta=meta, step=step, state=state, start=start, noise=noise, task=task,
        )  # fmt: skip

    @property
    def predictor(self) -> str | None:
        """The name of the plugin that predicts instead of the head; None if none does."""
        return next((each.name for each in self._implementations["predict"]), None)

    def predict(self, features: Tensor, support_features: Tensor | None, meta: Tensors) -> Tensor:
        """Return the outputs of the plugin that predicts."""
        arguments = {"features": features, "support_features": support_features, "meta": meta}
        return self._reduce("predict", _take_outputs, **arguments)

    def augment_outer_loss(
        self, meta: Tensors, noise: Mapping[str, Any], *, dtype: torch.dtype, **arguments: Any
    ) -> tuple[Tensor | float, Tensors]:
        """Return the sum of the terms, and the augmenters' logs as ``NAME.KEY``.

        Args:
            meta: every meta-parameter.
            noise: the noise of each plugin.
            dtype: the type of the query loss; a term can also have the type of the features, the model's precision.
            arguments: the other arguments of the hook.
        """
        logs: Tensors = {}
        take = partial(_take_term, logs, (dtype, arguments["features"].dtype))
        return self._reduce("augment_outer_loss", take, **arguments, meta=meta, noise=noise), logs

    def outer_objective(
        self,
        meta: Tensors,
        adapted: Tensors,
        start: Tensors,
        state: Any,
        inner_steps: int,
        noise: Mapping[str, Any],
        task: TaskView,
    ) -> Tensor | None:
        """Return a task's outer objective from the plugin that computes it."""
        return self._reduce(
            "outer_objective", _take_scalar, otherwise=None,
            meta=meta, adapted=adapted, start=start, state=state, inner_steps=inner_steps, noise=noise, task=task,
        )  # fmt: skip

    def combine_tasks(self, grads: Tensors, losses: Tensor, meta: Tensors, noise: Mapping[str, Any]) -> Tensors:
        """Combine the tasks' meta-gradients ``[tasks, …]`` into the batch's; their mean if no plugin implements it."""

        def match(_: Tensors, given: Any, by: Implementation) -> Tensors:
            return _match(meta, given, by)

        arguments = {"grads": grads, "losses": losses, "meta": meta, "noise": noise}
        combined = self._reduce("combine_tasks", match, otherwise=None, **arguments)
        return {name: value.mean(0) for name, value in grads.items()} if combined is None else combined

    def augment_outer_gradient(
        self, grads: Tensors, meta: Tensors, noise: Mapping[str, Any], gradient_at: Callable[[Tensors], Tensors]
    ) -> Tensors:
        arguments = {"grads": grads, "meta": meta, "noise": noise, "every": meta, "gradient_at": gradient_at}
        return self._reduce("augment_outer_gradient", _match, **arguments)

    def outer_loss_weights(self, inner_steps: int, training_step: int) -> list[float] | None:
        """Return the weight of the query loss after each inner step; None if only the last step counts."""
        arguments = {"inner_steps": inner_steps, "training_step": training_step}
        return self._reduce("outer_loss_weights", _match_count, otherwise=None, **arguments)

    def outer_gradient(
        self,
        meta: Tensors,
        adapted: Tensors,
        start: Tensors,
        state: Any,
        inner_steps: int,
        noise: Mapping[str, Any],
        task: TaskView,
    ) -> Tensors:
        """Return a task's meta-gradient from the plugin that computes it, with zeros for omitted parameters."""
        return self._reduce(
            "outer_gradient", _complete,
            meta=meta, adapted=adapted, start=start, state=state, inner_steps=inner_steps, noise=noise, task=task,
        )  # fmt: skip

    def outer_update(self, meta: Tensors, grads: Tensors, state: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
        return self._reduce("outer_update", _match_with_state, meta=meta, grads=grads, state=state)

    def _reduce(self, hook: str, check: Check, *, otherwise: Any = _REQUIRED, **arguments: Any) -> Any:
        """Combine the results of a hook's implementations according to its `Reduction`.

        Args:
            hook: the hook's name; its first result counts, or its results are chained or summed.
            check: returns a valid result, and refuses any other.
            otherwise: the result if the first result counts and no plugin returns one; without it, that is an error.
            arguments: the hook's arguments in order; `meta` contains all meta-parameters, `noise` the noise of each
                plugin.
        """
        implementations, reduction = self._implementations[hook], HOOKS[hook].reduction
        first = next(iter(arguments))
        if reduction is Reduction.FIRST:
            for each in implementations:
                if (result := _call(each, arguments)) is not None:
                    return check(arguments[first], result, each)
            if otherwise is _REQUIRED:
                at = f" at inner step {arguments['step']}" if "step" in arguments else ""
                raise PluginError(f"No plugin returned a result for {hook}{at}.")
            return otherwise
        if reduction is Reduction.CHAIN:
            for each in implementations:
                arguments[first] = check(arguments[first], _call(each, arguments), each)
            return arguments[first]
        return sum((check(arguments[first], _call(each, arguments), each) for each in implementations), 0.0)


def _is_training_only(plugin: Plugin) -> bool:
    return plugin.kind == "augmenters" and bool(getattr(plugin.instance, "training_only", True))


def _call(implementation: Implementation, arguments: Mapping[str, Any]) -> Any:
    """Call an implementation with its plugin's own meta-parameters and noise."""
    own = dict(arguments)
    if "meta" in implementation.arguments and not HOOKS[implementation.hook].full_meta:
        own["meta"] = implementation.own(arguments["meta"])
    if "noise" in implementation.arguments:
        own["noise"] = arguments["noise"].get(implementation.name)
    if "gradient_at" in implementation.arguments:
        every, gradient_at = arguments["every"], arguments["gradient_at"]
        own["gradient_at"] = lambda given: gradient_at(_match_every(every, given, implementation))
    return implementation(**own)


# Checks of results: each function returns a result that fulfils its hook's contract, and refuses any other.


def _match(expected: Tensors, given: Any, by: Implementation) -> Tensors:
    """Return the tensors in the order of `expected` if they have its names, shapes, types and devices."""
    if not isinstance(given, dict):
        by.reject(f"it must return a dict of tensors, not {_describe(given)}")
    if given.keys() != expected.keys():
        missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
        parts = [
            f"{verb} {', '.join(sorted(names))}" for verb, names in (("misses", missing), ("adds", extra)) if names
        ]
        by.reject(f"its result {' and '.join(parts)}")
    for name, value in expected.items():
        if not isinstance(given[name], Tensor) or given[name].shape != value.shape:
            by.reject(f"'{name}' must be a tensor of shape {tuple(value.shape)}, not {_describe(given[name])}")
        if given[name].dtype != value.dtype or given[name].device != value.device:
            wanted, found = (f"{each.dtype} on {each.device}" for each in (value, given[name]))
            by.reject(f"'{name}' must be a tensor of {wanted}, not of {found}")
    return {name: given[name] for name in expected}


def _begin(expected: Tensors, given: Any, by: Implementation) -> tuple[Tensors, Any]:
    """Check the start of a task, with an optional state."""
    params, state = given if isinstance(given, tuple) and len(given) == 2 else (given, {})
    if not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(state)):
        by.reject("the state must be a pytree of floating-point tensors")
    return _match(expected, params, by), state


def _go_on(before: Any, expected: Tensors, given: Any, by: Implementation) -> tuple[Tensors, Any]:
    """Check the result of an inner step; the state keeps its structure, and its value if none is returned."""
    params, state = given if isinstance(given, tuple) and len(given) == 2 else (given, before)
    if state is not before and _list_shapes(state) != _list_shapes(before):
        by.reject("the state must keep the structure, shapes and types that start_task returned")
    return _match(expected, params, by), state


def _list_shapes(state: Any) -> Any:
    """Return the shapes and types of a state, in its structure."""
    return tree_map(lambda leaf: (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf, state)


def _complete(expected: Tensors, given: Any, by: Implementation) -> Tensors:
    """Check like `_match`, with zeros for omitted tensors."""
    zeros = {name: torch.zeros_like(value) for name, value in expected.items()}
    return _match(expected, zeros | given if isinstance(given, dict) else given, by)


def _match_every(every: Tensors, given: Any, by: Implementation) -> Tensors:
    """Check like `_match` the meta-parameters at which a plugin asks for a batch's gradient."""
    if not isinstance(given, dict) or given.keys() != every.keys():
        by.reject("gradient_at takes a value for each meta-parameter, with the names in `every`")
    return _match(every, given, by)


def _match_with_state(expected: Tensors, given: Any, by: Implementation) -> tuple[Tensors, dict[str, Any]]:
    """Check like `_match` the first of two parts; the second is a state."""
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], dict)):
        by.reject("it must return the new meta-parameters and the new state, a dict")
    return _match(expected, given[0], by), given[1]


def _match_count(count: int, given: Any, by: Implementation) -> list[float]:
    """Check the weights, one for each inner step."""
    weights = [float(weight) for weight in given]
    if len(weights) != count:
        by.reject(f"it returned {format_count(len(weights), 'weight')} for {format_count(count, 'inner step')}")
    return weights


def _select(names: tuple[str, ...], given: Any, by: Implementation) -> tuple[str, ...]:
    """Return the given names in the order of `names`."""
    if isinstance(given, str) or not isinstance(given, Collection):
        by.reject(f"it must return a sequence of names, not {_describe(given)}")
    unknown = [name for name in given if name not in names]
    if unknown:
        by.reject(f"it named {unknown}; the model has {', '.join(names)}")
    return tuple(name for name in names if name in set(given))


def _take_outputs(features: Tensor, given: Any, by: Implementation) -> Tensor:
    """Check that there are outputs for each example."""
    if not isinstance(given, Tensor) or given.shape[:1] != features.shape[:1]:
        by.reject(f"it must return outputs for {format_count(features.shape[0], 'example')}, not {_describe(given)}")
    return given


def _take_term(logs: Tensors, dtypes: Collection[torch.dtype], _: Any, given: Any, by: Implementation) -> Tensor:
    """Check a term of the outer loss and its type; add its logs to `logs`."""
    term, extra = given if isinstance(given, tuple) and len(given) == 2 else (given, {})
    if not _is_scalar(term):
        by.reject(f"it must return a scalar tensor, not {_describe(term)}")
    if term.dtype not in dtypes:
        by.reject(f"its term must have the type of the query loss, {next(iter(dtypes))}, not {term.dtype}")
    if not isinstance(extra, dict) or not all(_is_scalar(value) for value in extra.values()):
        by.reject("the values to log must be a dict of scalar tensors")
    logs |= {f"{by.name}.{key}": value.detach() for key, value in extra.items()}
    return term


def _take_scalar(_: Any, given: Any, by: Implementation) -> Tensor:
    """Check a scalar loss."""
    if not _is_scalar(given):
        by.reject(f"it must return a scalar tensor, not {_describe(given)}")
    return given


def _take_tensors(given: Any, by: Implementation) -> Tensors:
    """Check new tensors by name."""
    if not isinstance(given, dict) or not all(isinstance(v, Tensor) and v.is_floating_point() for v in given.values()):
        by.reject("it must return a dict of floating-point tensors by name")
    return given


def _take_episodes(stack: Episodes, given: Any, by: Implementation) -> Episodes:
    """Check that the number of tasks is the same; they take the positions of the stack's tasks."""
    if not isinstance(given, Episodes):
        by.reject(f"it must return Episodes, not {_describe(given)}")
    if len(given) != len(stack):
        by.reject(f"it must return the same number of tasks, {len(stack)}, not {len(given)}")
    return given if stack.positions is None else given.placed(stack.positions)


def _take_noise(given: Any, by: Implementation, like: Tensor) -> Any:
    """Check a pytree of tensors, and move it to the device and type of `like`."""

    def take(leaf: Any) -> Tensor:
        if not isinstance(leaf, Tensor):
            by.reject(f"it must return a pytree of tensors, without {_describe(leaf)}")
        return leaf.to(like.device, like.dtype if leaf.is_floating_point() else None)

    return map_tree(take, given)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
