"""LEO against a reference loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import WrittenOut, check_training
from prototypes import BIAS, CLASSES, WEIGHT, embed, mean_of_classes
from torch import Tensor

from metareg import Episodes, MetaLearner, hookimpl
from metareg_leo import LEO
from reference import NETS, Net, Task, Tensors
from samples import ConvNet, episodes, tasks_of

LATENTS, FEATURES = 3, 16
CONFIG = {
    "latents": LATENTS, "code_steps": 2, "code_lr": 0.5, "weight_lr": 0.1, "kl_weight": 0.1, "encoder_penalty": 0.2,
    "l2_penalty": 0.03, "orthogonality": 0.4,
}  # fmt: skip
NOISE = {
    name: torch.randn(CLASSES, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    for name, width in {"code": LATENTS, "weight": FEATURES}.items()
}


@hookimpl
def _draw(_: LEO, stage: str) -> Any:
    return NOISE if stage == "task" else None


def _moments(outputs: Tensor, width: int, std_at_zero: float) -> tuple[Tensor, Tensor]:
    return outputs[:, :width], torch.clamp(torch.exp(outputs[:, width:]) - 1 + std_at_zero, min=1e-10)


def _encode(net: Net, meta: Tensors, task: Task) -> tuple[Tensor, Tensor]:
    """Compute the mean and standard deviation of the codes, pair by pair."""
    codes = [meta["leo.encoder"] @ z for z in embed(net, meta, task[0])]
    rows = []
    for left in codes:
        related = []
        for right in codes:
            hidden = torch.cat([left, right])
            for layer in range(3):
                hidden = meta[f"leo.relation.{layer}"] @ (hidden if layer == 0 else torch.relu(hidden))
            related.append(hidden)
        rows.append(sum(related) / len(codes))
    return _moments(mean_of_classes(torch.stack(rows), task[1]), LATENTS, 0.0)


def _decode(meta: Tensors, code: Tensor, draws: Tensors | None) -> Tensor:
    mean, std = _moments(code @ meta["leo.decoder"].T, FEATURES, (2 / (FEATURES + CLASSES)) ** 0.5)
    return mean if draws is None else mean + std * draws["weight"]


def _run(net: Net, meta: Tensors, task: Task, steps: int, draws: Tensors | None) -> dict[str, Any]:
    mean, std = _encode(net, meta, task)
    start = code = mean if draws is None else mean + std * draws["code"]
    weight = _decode(meta, code, draws)
    embeddings = embed(net, meta, task[0])
    for step in range(steps):
        loss = net.loss(embeddings @ weight.T + meta[BIAS], task[1])
        if step < CONFIG["code_steps"]:
            (grad,) = torch.autograd.grad(loss, code, create_graph=True)
            code = code - meta["leo.code_lr"] * grad
            weight = _decode(meta, code, draws)
        else:
            (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
            weight = weight - meta.get("leo.weight_lr", CONFIG["weight_lr"]) * grad
    return {"mean": mean, "std": std, "start": start, "code": code, "weight": weight}


def _adapt(net: Net, meta: Tensors, task: Task, steps: int, draws: Tensors | None = None) -> Tensors:
    return {**meta, WEIGHT: _run(net, meta, task, steps, draws)["weight"]}


def _objective(net: Net, meta: Tensors, task: Task, steps: int) -> Tensor:
    found = _run(net, meta, task, steps, NOISE)
    loss = net.loss(embed(net, meta, task[2]) @ found["weight"].T + meta[BIAS], task[3])
    codes = torch.distributions.Normal(found["mean"], found["std"])
    prior = torch.distributions.Normal(torch.zeros_like(found["mean"]), 1.0)
    divergence = torch.distributions.kl_divergence(codes, prior).mean()
    distance = ((found["code"].detach() - found["start"]) ** 2).mean()
    networks = [value for name, value in meta.items() if name.startswith("leo.") and not name.endswith("_lr")]
    penalty = sum(((value**2).sum() for value in networks), torch.zeros(()))
    columns = list(meta["leo.decoder"].T)
    cosines = [torch.cosine_similarity(one, other, dim=0) for one in columns for other in columns]
    off = torch.stack(cosines).view(LATENTS, LATENTS) - torch.eye(LATENTS, dtype=loss.dtype)
    return loss + 0.1 * divergence + 0.2 * distance + 0.03 / 2 * penalty + 0.4 * (off**2).mean()


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "serial", "inner_steps": 2},
        {"cml": True},
        {"cml": True, "strategy": "traced", "memory": "recompute"},
        pytest.param({"cml": True, "strategy": "compiled"}, marks=pytest.mark.slow),
    ],
)
def test_training_and_evaluation_are_those_of_the_loop(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps adapt the code; if training takes no more, the weights' step size is not a meta-parameter."""
    monkeypatch.setattr(LEO, "draw_noise", _draw)
    check_training("conv", "leo", WrittenOut(_adapt, _objective), CONFIG, **{"inner_steps": 3, **options})


def test_draws_are_for_training_and_differ_from_task_to_task() -> None:
    learner = MetaLearner(ConvNet(), "leo", latents=LATENTS)
    batch = episodes("conv", tasks=1)
    twice = Episodes(*(torch.cat([part, part]) for part in batch.parts))
    _, of_one = learner.meta_gradient(batch)
    _, of_two = learner.meta_gradient(twice)
    assert all(not of_one[name].allclose(of_two[name]) for name in ("leo.encoder", "leo.decoder", "body.4.weight"))
    (task,) = tasks_of(batch)
    first, second = (learner.adapt(*task[:2], steps=2)(task[2]) for _ in range(2))
    assert first.equal(second)


def test_a_class_without_support_examples_gets_the_code_of_all() -> None:
    task = tasks_of(episodes("conv", shots=3))[0]
    kept = (task[1] != 3) & (torch.arange(15) != 1)  # class 0 has two examples, class 3 none, the others three
    support, query = (task[0][kept], task[1][kept]), task[2:]
    learner = MetaLearner(ConvNet(), "leo", latents=LATENTS)
    adapted = dict(learner.adapt(*support, steps=0).named_parameters())
    expected = _adapt(NETS["conv"], learner.meta_parameters, (*support, *query), 0)
    torch.testing.assert_close(adapted[WEIGHT], expected[WEIGHT])
    loss, gradient = learner.meta_gradient(Episodes(*(part[None] for part in (*support, *query))))
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradient.values())
