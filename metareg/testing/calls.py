"""Calls of hooks with arguments as in training, created anew for each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metareg.learner.learner import MetaLearner
from metareg.registry.dispatch import Implementation, create_plugin_manager, find_implementations
from metareg.registry.plugins import Plugin
from metareg.testing.benches import STEPS, Bench, Pair, draw_noise, new_generator
from metareg.testing.check import Subject
from metareg.util.devices import move_tensors
from metareg.util.seeding import use_seed
from metareg.util.torch_internals import tree_map

__all__ = ["StageCall", "list_stage_calls"]


@dataclass(frozen=True)
class StageCall:
    """One implementation of a hook, with arguments as in training."""

    implementation: Implementation
    arguments: Callable[[], dict[str, Any]]

    @property
    def hook(self) -> str:
        return self.implementation.hook

    def __call__(self, arguments: dict[str, Any]) -> Any:
        # init_meta can use torch's default initialisers, which draw from the global generator, so it is seeded as in a
        # run.
        around = use_seed(0, "testing", "call") if self.hook == "init_meta" else nullcontext()
        with torch.no_grad(), around:
            return self.implementation(**arguments)


def list_stage_calls(subject: Subject, dtype: torch.dtype, device: str = "cpu") -> Iterator[StageCall]:
    """Yield every implementation of the plugin, with arguments as in training on a device.

    On the device ``"meta"``, whose tensors have shapes but no values, only vectors are used.
    """
    for bench in Pair.of(subject).benches[: 1 if device == "meta" else None]:
        pair = Pair.of(subject)
        learner = pair.learner(bench, dtype=dtype)
        plugin = pair.augmenters[0] if pair.augmenters else pair.algorithm
        assert isinstance(plugin, Plugin)
        manager, named = create_plugin_manager([plugin])
        for hook, variants in _list_arguments(learner, bench, next(iter(named)), device).items():
            for implementation in find_implementations(manager, named, hook):
                for variant in variants:
                    yield StageCall(implementation, variant)


def _list_arguments(
    learner: MetaLearner, bench: Bench, name: str, device: str
) -> dict[str, list[Callable[[], dict[str, Any]]]]:
    """Return the arguments of some calls for each hook, created on each access."""
    model, meta = learner.model, move_tensors(learner.meta_parameters, device)
    task = bench.episodes.to(device, next(iter(meta.values())).dtype).unstack(0)
    adapted = {each: meta[each] for each in learner.engine.training.adapted_names}
    shapes = {each: tuple(value.shape) for each, value in adapted.items()}
    every_shape = {each: tuple(value.shape) for each, value in meta.items()}
    own = {each[len(name) + 1 :]: value for each, value in meta.items() if each.startswith(f"{name}.")}
    with torch.no_grad():
        support_features, support_outputs = model.forward(meta, task[0])
        features, outputs = model.forward(meta, task[2])
    drawn = move_tensors(draw_noise(learner, "task", adapted, 0, 0), device)
    noise = drawn.get(name)
    functions = learner.engine.training
    with torch.no_grad():
        context = functions.prepare(meta, task, drawn)
        adaptation = functions.adapt(context, STEPS)
        of_task = {
            "noise": noise, "task": functions.view_outer(adaptation, context), "inner_steps": STEPS,
            "adapted": adaptation.params, "start": adaptation.start or adapted, "state": adaptation.state,
        }  # fmt: skip
        state = functions.start(context).state
    batch_noise = move_tensors(draw_noise(learner, "batch", meta, 0).get(name), device)

    def draw_like(values: dict[str, Tensor]) -> dict[str, Tensor]:
        draw = new_generator("arguments")
        return {
            each: torch.randn(value.shape, generator=draw, dtype=value.dtype).to(device)
            for each, value in values.items()
        }

    def prepare(**arguments: Any) -> Callable[[], dict[str, Any]]:
        def make() -> dict[str, Any]:
            copied = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments)
            return copied | ({"generator": new_generator("call")} if "generator" in arguments else {})

        return make

    inner = [
        prepare(
            params=adapted, grads=draw_like(adapted), meta=own, noise=noise, step=step, state=state, start=adapted,
            outputs=support_outputs, targets=task[1], loss=learner.loss, task=functions.view(context, step),
        )
        for step in range(STEPS)
    ]  # fmt: skip
    one, two = draw_like(meta), {each: 2 * value for each, value in meta.items()}
    stacked = {each: torch.stack([one[each], two[each]]) for each in meta}
    return {
        "adapted_parameters": [
            prepare(names=model.names, body=model.body_names, head=model.head_names, output_layer=model.output_layer)
        ],
        **dict.fromkeys(
            ("start_task", "inner_loss", "inner_gradient", "inner_update", "augment_inner_loss", "augment_inner_gradient"),
            inner,
        ),
        "draw_noise": [
            prepare(shapes=shapes, generator=None, inner_steps=STEPS, stage="task", training_step=3),
            prepare(shapes=shapes, generator=None, inner_steps=STEPS, stage="adapt", training_step=None),
            prepare(shapes=every_shape, generator=None, inner_steps=STEPS, stage="batch", training_step=3),
        ],
        "augment_episodes": [prepare(episodes=bench.episodes, generator=None, training_step=3)],
        "augment_outer_loss": [
            prepare(
                features=features, outputs=outputs, targets=task[3], meta=own, loss=learner.loss, metric=learner.metric,
                **of_task,
            )
        ],
        "augment_outer_gradient": [
            prepare(grads=draw_like(meta), meta=own, noise=batch_noise, every=meta, gradient_at=draw_like)
        ],
        "outer_loss_weights": [prepare(inner_steps=STEPS, training_step=step) for step in (0, 1000)],
        "outer_objective": [prepare(meta=own, **of_task)],
        "outer_gradient": [prepare(meta=meta, **of_task)],
        "combine_tasks": [
            prepare(grads=stacked, losses=stacked[next(iter(meta))].flatten(1).mean(1), meta=own, noise=batch_noise)
        ],
        "outer_update": [prepare(meta=meta, grads=draw_like(meta), state={})],
        "init_meta": [
            prepare(
                model=model.module, example=task[0], features=support_features, outputs=support_outputs,
                adapted=tuple(adapted), body=model.body_names, head=model.head_names,
                output_layer=model.output_layer, inner_steps=STEPS, generator=None,
            )
        ],
    }  # fmt: skip
