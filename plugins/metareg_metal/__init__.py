"""MeTAL: learn the inner loss, and adapt it to the task."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metareg import Field, TaskView, UsageError, hookimpl
from metareg_maml import MAML

Tensors = dict[str, Tensor]

_LOSS_TENSORS = ("loss.0.weight", "loss.0.bias", "loss.2.weight")


class MeTAL(MAML):
    """A task-adaptive loss: the inner loop descends the task's loss ℓ plus a network's output for the same examples.

    In step k, the state of the task is τ = (ℓ(θₖ; S), the mean of each tensor of θₖ). The inner loop descends

        L = ℓ(θₖ; S) + mean over (x, y) in S of l_φ'(τ, f(x; θₖ), y),
        φ' = (1 + c ⊙ γ) ⊙ φ + d ⊙ β with (γ, β) = g_ψ(τ).

    l and g are perceptrons with one hidden layer, as wide as their inputs, which are normalised to mean 0 and deviation
    1; l has no final bias, because its gradient would be zero. γ and β are one number for each tensor of l, and c and d
    start at 0. Every inner step has its own networks; steps beyond those of training use the last step's. All
    networks learn only through the inner gradient: with `first_order`, they learn nothing.

    With `transductive`, a second loss of this kind is added. Its inputs are the means of θₖ's tensors and, for each
    query example, the outputs and their negative entropy.

    The paper uses 5 inner steps with α = 0.01.

    Reference:
        Baik, Choi, Kim, Cho, Min and Lee, Meta-Learning with Task-Adaptive Loss Function for Few-Shot Learning, ICCV 2021,
        arXiv 2110.03909, §3.3 and Algorithm 1, and the authors' code. Their method is the transductive one, in which
        support and query set also pass BatchNorm together; here each has its own statistics.
    """

    class Config(MAML.Config):
        transductive: bool = Field(
            False, description="Also learn a loss on the query inputs, which adaptation then needs."
        )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.transductive = config.transductive

    @hookimpl
    def init_meta(self, adapted: tuple[str, ...], outputs: Tensor, inner_steps: int) -> Tensors:
        if outputs.dim() != 2:
            raise UsageError(f"MeTAL needs outputs [examples, outputs]; the model gives {tuple(outputs.shape)}.")
        means, width = len(adapted), outputs.shape[-1]
        networks = {"support": _build_networks(means + 1 + 2 * width, means + 1, inner_steps)}
        if self.transductive:
            networks["query"] = _build_networks(means + width + 1, means + width + 1, inner_steps)
        return {f"{part}.{name}": value.to(outputs) for part, net in networks.items() for name, value in net.items()}

    @hookimpl
    def inner_loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        params: Tensors,
        meta: Tensors,
        step: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        task: TaskView,
    ) -> Tensor:
        total = loss(outputs, targets)
        means = torch.stack([value.mean() for value in params.values()])
        state = torch.cat([total[None], means])
        rows = torch.cat([state.expand(len(outputs), -1), outputs, _to_numbers(targets, outputs)], 1)
        total = total + _evaluate(_select(meta, "support", step), _standardize(rows), _standardize(state))
        if self.transductive:
            rows = _standardize(self._describe_query(params, means, task))
            total = total + _evaluate(_select(meta, "query", step), rows, rows.mean(0))
        return total

    def _describe_query(self, params: Tensors, means: Tensor, task: TaskView) -> Tensor:
        if task.query_x is None:
            raise UsageError(
                "MeTAL was trained with transductive = true: it needs the query inputs to adapt to a task."
            )
        if task.support_y.is_floating_point():
            raise UsageError("MeTAL with transductive = true supports only classes; unset transductive.")
        outputs = task.outputs(params, task.query_x)
        log_p = outputs.log_softmax(-1)
        return torch.cat([means.expand(len(outputs), -1), outputs, (log_p.exp() * log_p).sum(-1, keepdim=True)], 1)


def _evaluate(net: Tensors, rows: Tensor, state: Tensor) -> Tensor:
    """Return the learned loss of examples ``[examples, inputs]`` for a task in this state."""
    hidden = F.linear(state, net["adapter.0.weight"], net["adapter.0.bias"]).relu()
    scale, shift = F.linear(hidden, net["adapter.2.weight"], net["adapter.2.bias"]).chunk(2)
    scale, shift = 1 + net["scale"] * scale, net["shift"] * shift
    first, bias, second = (scale[number] * net[name] + shift[number] for number, name in enumerate(_LOSS_TENSORS))
    return F.linear(F.linear(rows, first, bias).relu(), second).mean()


def _build_networks(inputs: int, state: int, inner_steps: int) -> Tensors:
    """Build the loss and its adapter for each inner step ``[inner_steps, …]``."""
    each = [_build_network(inputs, state) for _ in range(inner_steps)]
    return {name: torch.stack([net[name].detach() for net in each]) for name in each[0]}


def _build_network(inputs: int, state: int) -> Tensors:
    first, second = nn.Linear(inputs, inputs), nn.Linear(inputs, 1, bias=False)
    for layer in (first, second):
        nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(first.bias)
    loss = nn.Sequential(first, nn.ReLU(), second)
    adapted = len(_LOSS_TENSORS)
    adapter = nn.Sequential(nn.Linear(state, state), nn.ReLU(), nn.Linear(state, 2 * adapted))
    named = nn.ModuleDict({"loss": loss, "adapter": adapter}).named_parameters()
    return {**dict(named), "scale": torch.zeros(adapted), "shift": torch.zeros(adapted)}


def _select(meta: Tensors, part: str, step: int) -> Tensors:
    """Return the networks of an inner step."""
    return {
        name.removeprefix(f"{part}."): value[min(step, len(value) - 1)]
        for name, value in meta.items()
        if name.startswith(f"{part}.")
    }


def _standardize(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.std() + 1e-12)


def _to_numbers(targets: Tensor, outputs: Tensor) -> Tensor:
    """Return targets with the shape and type of the outputs: numbers unchanged, classes as one-hot rows."""
    if targets.is_floating_point():
        return targets.view_as(outputs)
    return (targets[:, None] == torch.arange(outputs.shape[-1], device=targets.device)).to(outputs)
