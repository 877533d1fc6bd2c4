"""MetaMix and MLTI: what they mix, on examples with distinguishable inputs, and trainings on mixed targets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from learners import Source
from torch import Tensor

from metareg import Episodes, MetaLearner, UsageError, hookimpl
from metareg_mixup import MetaMix
from metareg_mlti import MLTI
from reference import NETS, cross_entropy, difference, inner_loop, mean_squared_error, train
from samples import LOSSES, MODELS, episodes, tasks_of

WAYS, SHOTS, QUERY = 3, 2, 4


def coded(tasks: int, classes: bool, shots: int = SHOTS, query: int = QUERY) -> Episodes:
    """Return tasks whose examples are different unit vectors, so that a mixture shows its components."""
    generator = torch.Generator().manual_seed(3)
    sizes = shots * WAYS, query * WAYS
    codes = torch.eye(tasks * sum(sizes), dtype=torch.float64).view(tasks, sum(sizes), -1)
    order = [torch.stack([torch.randperm(size, generator=generator) for _ in range(tasks)]) for size in sizes]
    targets: list[Tensor] = [each % WAYS for each in order]
    if not classes:
        targets = [torch.randn(tasks, size, 1, dtype=torch.float64, generator=generator) for size in sizes]
    return Episodes(codes[:, : sizes[0]], targets[0], codes[:, sizes[0] :], targets[1])


def mixed_by(plugin: Any, batch: Episodes, seed: int = 0, **config: Any) -> Episodes:
    return plugin(plugin.Config(**config)).augment_episodes(batch, torch.Generator().manual_seed(seed))


def read(x: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of each example in its mixture, and the other example."""
    share = (x * own).sum(-1)
    return share, (x - share[..., None] * own).argmax(-1)


def variance_of_beta(parameter: float) -> float:
    return 1 / (4 * (2 * parameter + 1))


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("query", [1, 2, 5])
def test_metamix_mixes_queries_with_supports_of_the_task(classes: bool, query: int) -> None:
    batch = coded(5, classes, query=query)
    mixed = mixed_by(MetaMix, batch)
    assert mixed.support_x.equal(batch.support_x)
    assert mixed.support_y.equal(batch.support_y)
    share, other = read(mixed.query_x, batch.query_x)
    examples = SHOTS * WAYS + query * WAYS
    for task in range(5):
        assert share[task].std() < 1e-12
        number = other[task] - task * examples
        assert ((number >= 0) & (number < SHOTS * WAYS)).all()
        counts = number.bincount(minlength=SHOTS * WAYS)
        assert counts.max() - counts.min() <= 1
        own, partner = batch.query_y[task], batch.support_y[task][number]
        if classes:
            own, partner = (torch.eye(WAYS, dtype=torch.float64)[each] for each in (own, partner))
        weight = share[task][:, None]
        torch.testing.assert_close(mixed.query_y[task], weight * own + (1 - weight) * partner)


@pytest.mark.parametrize("plugin", [MetaMix, MLTI])
@pytest.mark.parametrize("parameter", [2.0, 0.5])
def test_shares_are_of_a_beta_distribution(plugin: Any, parameter: float) -> None:
    x, y = torch.zeros(4000, 2, 1, dtype=torch.float64), torch.zeros(4000, 2, 1, dtype=torch.float64)
    # MetaMix mixes with the support set, MLTI with the next task: mixing ones with zeros shows the share.
    tasks = torch.arange(4000).view(-1, 1, 1) % 2 if plugin is MLTI else torch.ones(4000, 1, 1)
    mixed = mixed_by(plugin, Episodes(x, y, tasks.to(x).expand_as(x).clone(), y), beta=parameter).query_x[:, 0, 0]
    share = mixed
    if plugin is MLTI:  # half of the tasks are mixed with themselves
        share = torch.where(tasks.flatten() == 1, mixed, 1 - mixed)
        assert (share == 1).double().mean().item() == pytest.approx(0.5, abs=0.03)
        share = share[share != 1]
    assert share.mean().item() == pytest.approx(0.5, abs=0.02)
    assert share.var().item() == pytest.approx(variance_of_beta(parameter), rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_mlti_makes_new_classes_of_pairs(seed: int) -> None:
    batch = coded(6, classes=True)
    mixed = mixed_by(MLTI, batch, seed)
    assert mixed.support_y.equal(batch.support_y)
    assert mixed.query_y.equal(batch.query_y)
    examples = (SHOTS + QUERY) * WAYS
    partners = []
    for task in range(6):
        pairs, shares = set(), []
        for x, own, offset in (
            (mixed.support_x, batch.support_x, 0), (mixed.query_x, batch.query_x, SHOTS * WAYS),
        ):  # fmt: skip
            share, other = read(x[task], own[task])
            kept = share < 1 - 1e-9  # an example mixed with itself
            shares += share[kept].tolist()
            partners.append(set((other[kept] // examples).tolist()))
            which = "query" if offset else "support"
            targets = getattr(batch, f"{which}_y")
            number = other[kept] % examples - offset
            assert ((number >= 0) & (number < targets.shape[1])).all()
            assert len(number.unique()) == len(number)
            pairs |= {
                (mine.item(), targets[code // examples, at].item())
                for mine, code, at in zip(targets[task][kept], other[kept], number, strict=True)
            }
        if not pairs:  # the task itself, and each class with itself
            continue
        assert max(shares) - min(shares) < 1e-12
        assert len({own for own, _ in pairs}) == len(pairs) == len({theirs for _, theirs in pairs})
        (partner,) = partners[-1] | partners[-2]
        assert partner in (task, (task + 1) % 6)


def test_mlti_mixes_numbers_as_it_mixes_inputs() -> None:
    batch = coded(6, classes=False)
    mixed = mixed_by(MLTI, batch)
    everything = torch.cat([batch.support_y, batch.query_y], 1).flatten()
    for x, own, y, found in (
        (mixed.support_x, batch.support_x, batch.support_y, mixed.support_y),
        (mixed.query_x, batch.query_x, batch.query_y, mixed.query_y),
    ):
        share, other = read(x, own)
        share = share.flatten()
        expected = share * y.flatten() + (1 - share) * everything[other.flatten()]
        torch.testing.assert_close(found.flatten()[share < 1 - 1e-9], expected[share < 1 - 1e-9])


@pytest.mark.parametrize(("plugin", "name"), [(MetaMix, "mixup"), (MLTI, "mlti")])
def test_inputs_that_cannot_be_mixed_are_refused(plugin: Any, name: str) -> None:
    y = torch.zeros(2, 3, dtype=torch.long)
    for x in (torch.zeros(2, 3, dtype=torch.long), {"nodes": torch.zeros(2, 3)}):
        with pytest.raises(UsageError, match=f"'{name}' can mix only inputs"):
            mixed_by(plugin, Episodes(x, y, x, y))


def test_mlti_takes_examples_again_where_there_are_fewer_and_refuses_classes_without_any() -> None:
    x, y = torch.eye(6).view(2, 3, 6), torch.tensor([[0, 0, 1], [0, 1, 1]])
    for seed in range(5):
        mixed = mixed_by(MLTI, Episodes(x, y, x, y), seed)
        assert mixed.support_y.equal(y)
        torch.testing.assert_close(mixed.support_x.sum(-1), torch.ones(2, 3))
    without = x.repeat(9, 1, 1), y.repeat(9, 1)
    with pytest.raises(UsageError, match="examples of every class"):  # in one of 18 tasks, with an empty class
        mixed_by(MLTI, Episodes(*without, without[0], torch.zeros_like(without[1])))


@pytest.mark.parametrize("plugin", [MetaMix, MLTI])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_trainings_equal_a_loop_on_the_tasks_that_they_make(net: str, plugin: Any) -> None:
    """In two steps, the tasks are mixed anew each time; evaluation does not mix."""
    made: list[Episodes] = []

    class Recording(plugin):  # type: ignore[misc]
        @hookimpl
        def augment_episodes(self, episodes: Episodes, generator: torch.Generator) -> Episodes:
            made.append(super().augment_episodes(episodes, generator))
            return made[-1]

    learner = MetaLearner(
        MODELS[net](), "maml", ["cml", Recording], loss=LOSSES[net], inner_lr=0.1, outer_lr=0.01, strategy="vectorized"
    )
    batch = episodes(net)
    learner.initialize(batch.support_x[0])
    before = {name: value.clone() for name, value in learner.meta_parameters.items()}
    for _ in range(2):
        learner.step(batch)
    assert len(made) == 2
    assert not made[0].query_x.equal(made[1].query_x)
    soft = replace(NETS[net], loss=soft_cross_entropy if net == "conv" else mean_squared_error)
    expected = train(
        soft, before, [tasks_of(each) for each in made], outer_lr=0.01, algo="maml", inner_lr=0.1, inner_steps=1,
        gamma=1.0 if net == "conv" else 0.2,
    )  # fmt: skip
    found = learner.meta_parameters
    kept = found.keys() - {f"{name.removesuffix('weight')}bias" for name, value in found.items() if value.dim() == 4}
    assert difference({name: found[name] for name in kept}, {name: expected[name] for name in kept}) < 1e-6
    learner.evaluate(Source(net), 4)
    assert len(made) == 2


def soft_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of all classes, weighted by their probabilities."""
    if not targets.is_floating_point():
        return cross_entropy(outputs, targets)
    of_classes = torch.logsumexp(outputs, 1, keepdim=True) - outputs
    return (targets * of_classes).sum(1).mean()


def test_gradients_of_mixed_targets_are_mixtures_of_gradients() -> None:
    """Compute λ ℓ(·, y_Q) + (1 − λ) ℓ(·, y_S) of the paper for each task, plus CML's term."""
    batch = episodes("conv")
    mixed = mixed_by(MetaMix, batch)
    learner = MetaLearner(MODELS["conv"](), "maml", ["cml"], inner_lr=0.1, strategy="vectorized")
    loss, grads = learner.meta_gradient(mixed)
    meta = {name: value.detach().requires_grad_() for name, value in learner.meta_parameters.items()}
    total = torch.zeros((), dtype=torch.float64)
    for task in tasks_of(mixed):
        adapted = inner_loop(NETS["conv"], meta, task, algo="maml", inner_lr=0.1, inner_steps=1)
        features = NETS["conv"].body(adapted, task[2])
        for outputs in (NETS["conv"].head(adapted, features), NETS["conv"].colearner(meta, features)):
            for number in range(5):
                of_class = outputs.new_full((len(outputs),), number, dtype=torch.long)
                losses = [cross_entropy(row[None], y[None]) for row, y in zip(outputs, of_class, strict=True)]
                total = total + (task[3][:, number] * torch.stack(losses)).mean() / len(mixed)
    expected = dict(zip(meta, torch.autograd.grad(total, list(meta.values())), strict=True))
    assert loss.item() == pytest.approx(total.item())
    assert difference(grads, expected) < 1e-6
    assert 0 <= learner.logs["accuracy"] <= 1
