"""The gradients of a batch's tasks: combined by a plugin, and evaluated at other meta-parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metareg import Episodes, MetaLearner, PluginError, hookimpl
from ranks import Ascent, Tilt
from reference import NETS, meta_gradient
from samples import MLP, episodes, tasks_of

Tensors = dict[str, Tensor]
BATCHES = {
    "one stack": lambda: episodes("mlp", 5),
    "unequal tasks": lambda: Episodes.group(
        [tasks_of(episodes("mlp", 1, shots=n, seed=n))[0] for n in (2, 3, 2, 4, 3)]
    ),
}


def in_order(batch: Any) -> list[Any]:
    """Undo the order of the stacks."""
    if isinstance(batch, Episodes):
        return tasks_of(batch)
    placed = {place: task for stack in batch for place, task in zip(stack.positions, tasks_of(stack), strict=True)}
    return [placed[place] for place in sorted(placed)]


def gradients_of_tasks(meta: Tensors, tasks: list[Any]) -> tuple[Tensors, Tensor]:
    """Compute each task's meta-gradient and loss with a reference loop ``[tasks, …]``."""
    found = [meta_gradient(NETS["mlp"], meta, [task], algo="maml", inner_lr=0.1, inner_steps=2) for task in tasks]
    return {name: torch.stack([grads[name] for _, grads in found]) for name in meta}, torch.stack(
        [one for one, _ in found]
    )


def tilted(meta: Tensors, tasks: list[Any]) -> tuple[Tensors, Tensor]:
    grads, losses = gradients_of_tasks(meta, tasks)
    weights = losses.softmax(0) * torch.arange(1.0, 1 + len(losses))
    return {name: torch.einsum("t,t...->...", weights, value) for name, value in grads.items()}, losses.mean()


def new_learner(*augment: Any, **options: Any) -> MetaLearner:
    return MetaLearner(MLP(), "maml", augment, loss="mse", inner_lr=0.1, inner_steps=2, **options)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "serial"},
        {"strategy": "vectorized"},
        {"strategy": "vectorized", "chunk": 2, "memory": "recompute"},
        {"strategy": "traced"},
        pytest.param({"strategy": "compiled"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_a_plugin_combines_the_tasks_in_their_order(batch: str, options: dict[str, Any]) -> None:
    learner, tasks = new_learner(Tilt, Ascent, **options), BATCHES[batch]()
    meta = learner.meta_parameters
    for _ in range(2):  # the second call replays the graph of the first
        loss, grads = learner.meta_gradient(tasks)
    here, expected_loss = tilted(meta, in_order(tasks))
    norm = torch.stack([value.norm() for value in here.values()]).norm()
    there = {name: value + 0.3 * here[name] / norm for name, value in meta.items()}
    expected, _ = tilted(there, in_order(tasks))
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(grads, expected, rtol=1e-7, atol=1e-9)
    assert learner.logs["grad_norm"] == pytest.approx(
        torch.stack([each.norm() for each in grads.values()]).norm().item()
    )
    assert [each.stride() for each in grads.values()] == [each.stride() for each in meta.values()]


def test_the_mean_stands_where_no_plugin_gives_a_combination() -> None:
    class Silent:
        @hookimpl
        def combine_tasks(self, grads: Tensors) -> None:
            assert {len(value) for value in grads.values()} == {3}

    one, other = (new_learner(*more).meta_gradient(episodes("mlp")) for more in ([Silent], []))
    torch.testing.assert_close(one, other)


def test_the_gradient_elsewhere_is_that_of_the_same_tasks_and_draws() -> None:
    class Again:
        @hookimpl
        def augment_outer_gradient(self, grads: Tensors, every: Tensors, gradient_at: Any) -> Tensors:
            assert list(every) == list(grads)
            again = gradient_at(dict(reversed([(name, value.clone()) for name, value in every.items()])))
            assert all(again[name].equal(value) for name, value in grads.items())
            return {name: value * 2 for name, value in again.items()}

    one, other = (new_learner("dropgrad", "cml", *more).meta_gradient(episodes("mlp"))[1] for more in ([Again], []))
    assert all(one[name].equal(2 * value) for name, value in other.items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda every: {}, "a value for each meta-parameter"),
        (lambda every: [*every.values()], "a value for each meta-parameter"),
        (lambda every: every | {"head.bias": torch.zeros(7)}, r"'head\.bias' must be a tensor of shape \(1,\)"),
        (lambda every: every | {"head.bias": torch.zeros(1)}, r"'head\.bias' must be a tensor of torch\.float64"),
    ],
    ids=["empty", "list", "shape", "dtype"],
)
def test_impossible_places_are_refused(change: Any, sentence: str) -> None:
    class Lost:
        @hookimpl
        def augment_outer_gradient(self, every: Tensors, gradient_at: Any) -> Any:
            return gradient_at(change(every))

    with pytest.raises(PluginError, match=f"'lost' broke the contract of augment_outer_gradient: .*{sentence}"):
        new_learner(Lost).meta_gradient(episodes("mlp"))


def test_a_combination_is_checked() -> None:
    class Kept:
        @hookimpl
        def combine_tasks(self, grads: Tensors) -> Tensors:
            return grads

    with pytest.raises(PluginError, match=r"'kept' broke the contract of combine_tasks: .* must be a tensor of shape"):
        new_learner(Kept).meta_gradient(episodes("mlp"))
