"""The stages of a run: the hooks of its algorithm and augmenters, each reduced to one result."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metareg.errors import PluginError
from metareg.registry.dispatch import Implementation, create_plugin_manager, find_implementations, list_hooks
from metareg.registry.plugins import Plugin
from metareg.util.layout import copy_contiguous
from metareg.util.seeding import create_generator, use_seed

__all__ = ["Stages"]

Tensors = dict[str, Tensor]


class Stages:
    """The stage hooks of an algorithm and its augmenters.

    Args:
        algorithm: the algorithm.
        augmenters: in the order in which they are chained.
    """

    def __init__(self, algorithm: Plugin, augmenters: Sequence[Plugin]) -> None:
        self.algorithm = algorithm
        self.augmenters = tuple(augmenters)
        manager, self.plugins = create_plugin_manager([algorithm, *augmenters])
        get = {
            hook: find_implementations(manager, self.plugins, hook)
            for hook in (
                "init_meta", "adapted_parameters", "start_task", "inner_update", "draw_noise", "augment_inner_gradient",
                "augment_outer_loss", "augment_outer_gradient", "outer_loss_weights", "outer_gradient", "outer_update",
            )
        }  # fmt: skip
        self._init_meta = get["init_meta"]
        self._adapted_parameters = get["adapted_parameters"][::-1]
        self._start_task = get["start_task"][::-1]
        self._inner_update = get["inner_update"][::-1]
        self._inner_gradient = get["augment_inner_gradient"]
        self._outer_loss = get["augment_outer_loss"]
        self._outer_batch_gradient = get["augment_outer_gradient"]
        self._outer_loss_weights = get["outer_loss_weights"][::-1]
        self._outer_gradient = get["outer_gradient"][::-1]
        self._outer_update = get["outer_update"][::-1]
        in_task = {each.name for each in (*self._inner_gradient, *self._outer_loss)}
        in_batch = {each.name for each in self._outer_batch_gradient}
        self._task_noise = [each for each in get["draw_noise"] if each.name in in_task]
        self._batch_noise = [each for each in get["draw_noise"] if each.name in in_batch]
        for augmenter in self.augmenters:
            if not list_hooks(type(augmenter.instance)):
                raise PluginError(
                    f"The {augmenter.label} implements no hook; its methods are marked with @metareg.hookimpl."
                )
        if not self._inner_update:
            raise PluginError(f"The {algorithm.label} implements no inner_update.")

    # ------------------------------------------------------------------------------------------------ what there is

    @property
    def has_outer_loss(self) -> bool:
        return bool(self._outer_loss)

    @property
    def has_outer_gradient(self) -> bool:
        return bool(self._outer_gradient)

    @property
    def has_outer_update(self) -> bool:
        return bool(self._outer_update)

    @property
    def has_outer_batch_gradient(self) -> bool:
        return bool(self._outer_batch_gradient)

    @property
    def draws_noise(self) -> bool:
        return bool(self._task_noise)

    def wanting(self, *arguments: str) -> Plugin | None:
        """The first plugin with a parameter or augmentation hook that names one of these arguments."""
        for each in (*self._init_meta, *self._adapted_parameters, *self._outer_loss):
            if set(arguments) & set(each.arguments):
                return each.plugin
        return None

    def init_wants(self, *arguments: str) -> bool:
        """Whether some `init_meta` names one of these arguments."""
        return any(set(arguments) & set(each.arguments) for each in self._init_meta)

    def without_augmenters(self) -> Stages:
        """The stages of the algorithm alone: what evaluation, adaptation and the exported learner use."""
        return Stages(self.algorithm, ())

    def owner(self, meta_name: str) -> str | None:
        """The name of the plugin whose meta-parameter it is; None for the model's own."""
        return next((name for name in self.plugins if meta_name.startswith(f"{name}.")), None)

    # ----------------------------------------------------------------------------------------------------- parameters

    def init_meta(self, seed: int, **arguments: Any) -> Tensors:
        """Every plugin's extra meta-parameters, by full name."""
        meta: Tensors = {}
        for each in self._init_meta:
            with use_seed(seed, "init_meta", each.name) as generator:
                created = each(generator=generator, **arguments)
            if created is None:
                continue
            if not isinstance(created, dict) or not all(_is_real(value) for value in created.values()):
                each.reject("it must return a dict of floating-point tensors by name")
            meta |= {f"{each.name}.{name}": value for name, value in copy_contiguous(created).items()}
        return meta

    def adapted_parameters(
        self, names: tuple[str, ...], body: tuple[str, ...], head: tuple[str, ...]
    ) -> tuple[str, ...]:
        """The names that the inner loop adapts, in the model's order."""
        for each in self._adapted_parameters:
            chosen = each(names=names, body=body, head=head)
            if chosen is not None:
                if isinstance(chosen, str) or not isinstance(chosen, Collection):
                    each.reject(f"it must return a sequence of names, not {_described(chosen)}")
                unknown = [name for name in chosen if name not in names]
                if unknown or not chosen:
                    each.reject(f"it named {unknown or 'no parameter'}; the model has {', '.join(names)}")
                return tuple(name for name in names if name in set(chosen))
        return names

    # ----------------------------------------------------------------------------------------------- inner, augmentation

    def draw_task_noise(
        self, shapes: dict[str, tuple[int, ...]], inner_steps: int, seed: int, *labels: str | int
    ) -> dict[str, Any]:
        """What each augmenter draws for one task, by the augmenter's name."""
        return self._draw(self._task_noise, "task", shapes, inner_steps, seed, *labels)

    def draw_batch_noise(
        self, shapes: dict[str, tuple[int, ...]], inner_steps: int, seed: int, *labels: str | int
    ) -> dict[str, Any]:
        """What each augmenter draws for one meta-batch, by the augmenter's name."""
        return self._draw(self._batch_noise, "batch", shapes, inner_steps, seed, *labels)

    @staticmethod
    def _draw(
        drawing: list[Implementation],
        stage: str,
        shapes: dict[str, tuple[int, ...]],
        inner_steps: int,
        seed: int,
        *labels: str | int,
    ) -> dict[str, Any]:
        noise = {}
        for each in drawing:
            generator = create_generator(seed, "noise", stage, each.name, *labels)
            drawn = each(shapes=shapes, generator=generator, inner_steps=inner_steps, stage=stage)
            if not all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(drawn) if leaf is not None):
                each.reject("it must return a pytree of tensors")
            noise[each.name] = drawn
        return noise

    def augment_inner_gradient(
        self, grads: Tensors, params: Tensors, meta: Tensors, noise: Mapping[str, Any], step: int
    ) -> Tensors:
        for each in self._inner_gradient:
            changed = each(grads=grads, params=params, meta=each.own(meta), noise=noise.get(each.name), step=step)
            grads = _like(grads, changed, each)
        return grads

    def start_task(self, params: Tensors, meta: Tensors) -> Tensors:
        """The adapted parameters before the first inner step."""
        for each in self._start_task:
            started = each(params=params, meta=each.own(meta))
            if started is not None:
                return _like(params, started, each)
        return params

    def inner_update(self, params: Tensors, grads: Tensors, meta: Tensors, step: int) -> Tensors:
        for each in self._inner_update:
            updated = each(params=params, grads=grads, meta=each.own(meta), step=step)
            if updated is not None:
                return _like(params, updated, each)
        raise PluginError(f"No plugin gave a result for inner_update at inner step {step}.")

    def augment_outer_loss(
        self, meta: Tensors, noise: Mapping[str, Any], **arguments: Any
    ) -> tuple[Tensor | float, Tensors]:
        """The sum of the terms, and what the augmenters want logged, as ``NAME.KEY``."""
        total: Tensor | float = 0.0
        logs: Tensors = {}
        for each in self._outer_loss:
            term = each(meta=each.own(meta), noise=noise.get(each.name), **arguments)
            term, extra = term if isinstance(term, tuple) and len(term) == 2 else (term, {})
            if not _is_scalar(term):
                each.reject(f"it must return a scalar tensor, not {_described(term)}")
            if not isinstance(extra, dict) or not all(_is_scalar(value) for value in extra.values()):
                each.reject("what it wants logged must be a dict of scalar tensors")
            total = total + term
            logs |= {f"{each.name}.{key}": value.detach() for key, value in extra.items()}
        return total, logs

    def augment_outer_gradient(self, grads: Tensors, meta: Tensors, noise: Mapping[str, Any]) -> Tensors:
        for each in self._outer_batch_gradient:
            grads = _like(grads, each(grads=grads, meta=each.own(meta), noise=noise.get(each.name)), each)
        return grads

    # ---------------------------------------------------------------------------------------------------------- outer

    def outer_loss_weights(self, inner_steps: int, training_step: int) -> list[float] | None:
        """The weight of the query loss after each inner step; None for that after the last step alone."""
        for each in self._outer_loss_weights:
            weights = each(inner_steps=inner_steps, training_step=training_step)
            if weights is not None:
                numbers = [float(weight) for weight in weights]
                if len(numbers) != inner_steps:
                    each.reject(f"it returned {len(numbers)} weights for {inner_steps} inner steps")
                return numbers
        return None

    def outer_gradient(self, meta: Tensors, adapted: Tensors, inner_steps: int) -> Tensors:
        """A task's meta-gradient from the plugin that gives one, zero where it leaves a parameter out."""
        for each in self._outer_gradient:
            grads = each(meta=meta, adapted=adapted, inner_steps=inner_steps)
            if grads is not None:
                if not isinstance(grads, dict):
                    each.reject(f"it must return a dict of tensors, not {_described(grads)}")
                zero = {name: torch.zeros_like(value) for name, value in meta.items()}
                return _like(meta, zero | grads, each)
        raise PluginError("No plugin gave a result for outer_gradient.")

    def outer_update(self, meta: Tensors, grads: Tensors, state: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
        for each in self._outer_update:
            result = each(meta=meta, grads=grads, state=state)
            if result is not None:
                if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
                    each.reject("it must return the new meta-parameters and a dict, the new state")
                return _like(meta, result[0], each), result[1]
        raise PluginError("No plugin gave a result for outer_update.")


def _like(expected: Tensors, given: Any, by: Implementation) -> Tensors:
    """`given` in the order of `expected`, if it has its names, shapes, types and devices."""
    if not isinstance(given, dict):
        by.reject(f"it must return a dict of tensors, not {_described(given)}")
    if given.keys() != expected.keys():
        missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
        parts = [
            f"misses {', '.join(sorted(missing))}" if missing else "",
            f"adds {', '.join(sorted(extra))}" if extra else "",
        ]
        by.reject(f"its result {' and '.join(filter(None, parts))}")
    for name, value in expected.items():
        if not isinstance(given[name], Tensor) or given[name].shape != value.shape:
            by.reject(f"'{name}' must be a tensor of shape {tuple(value.shape)}, not {_described(given[name])}")
        if given[name].dtype != value.dtype or given[name].device != value.device:
            by.reject(
                f"'{name}' must be a tensor of {value.dtype} on {value.device}, not of {given[name].dtype} on "
                f"{given[name].device}"
            )
    return {name: given[name] for name in expected}


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
