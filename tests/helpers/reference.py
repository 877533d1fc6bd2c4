"""Reference implementations of meta-gradients and trainings: plain loops over tasks, steps and layers.

They use neither metareg nor torch.func; the second derivative is `torch.autograd.grad` with
`create_graph`. The networks take their parameters as dicts, with the names of the modules of `samples`; `networks` has
those of the shipped models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]
Task = tuple[Tensor, Tensor, Tensor, Tensor]


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, rows: int | None = None) -> Tensor:
    """Apply batch normalisation with the statistics of the first `rows` examples, or of all if None."""
    dims = [0, 2, 3]
    sample = x if rows is None else x[:rows]
    mean = sample.mean(dims, keepdim=True)
    variance = ((sample - mean) ** 2).mean(dims, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


@dataclass(frozen=True)
class Net:
    """A network as functions of its parameters; `rows` selects the examples for BatchNorm's statistics."""

    body: Callable[..., Tensor]
    head: Callable[..., Tensor]
    colearner: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


def _mlp_body(p: Mapping[str, Tensor], x: Tensor, *_: Any) -> Tensor:
    hidden = torch.relu(x @ p["body.0.weight"].T + p["body.0.bias"])
    return torch.relu(hidden @ p["body.2.weight"].T + p["body.2.bias"])


def linear_head(p: Mapping[str, Tensor], f: Tensor, *_: Any) -> Tensor:
    return f @ p["head.weight"].T + p["head.bias"]


def colearner_on_vectors(p: Mapping[str, Tensor], f: Tensor) -> Tensor:
    """Hidden layers with ReLU, one by default, and a linear layer."""
    *hidden, last = _list_layers(p)
    for layer in hidden:
        f = torch.relu(f @ p[f"{layer}.weight"].T + p[f"{layer}.bias"])
    return f @ p[f"{last}.weight"].T + p[f"{last}.bias"]


def _conv_body(p: Mapping[str, Tensor], x: Tensor, rows: int | None = None) -> Tensor:
    """Two blocks of convolution, BatchNorm and ReLU, with pooling in the first; the features are not pooled."""
    x = F.conv2d(x, p["body.0.weight"], p["body.0.bias"], padding=1)
    x = torch.relu(batch_norm(x, p["body.1.weight"], p["body.1.bias"], rows))
    x = F.max_pool2d(x, 2)
    x = F.conv2d(x, p["body.4.weight"], p["body.4.bias"], padding=1)
    return torch.relu(batch_norm(x, p["body.5.weight"], p["body.5.bias"], rows))


def _conv_head(p: Mapping[str, Tensor], f: Tensor, *_: Any) -> Tensor:
    return F.max_pool2d(f, 2).flatten(1) @ p["head.2.weight"].T + p["head.2.bias"]


def colearner_on_maps(p: Mapping[str, Tensor], f: Tensor, rows: int | None = None) -> Tensor:
    """The authors' co-learner for images: blocks, two by default, the last one with pooling, and a linear layer.

    A map with one row or column is not pooled.
    """
    *hidden, last = _list_layers(p)
    for convolution, norm in zip(hidden[::2], hidden[1::2], strict=True):
        f = F.conv2d(f, p[f"{convolution}.weight"], p[f"{convolution}.bias"], padding=1)
        f = torch.relu(batch_norm(f, p[f"{norm}.weight"], p[f"{norm}.bias"], rows))
    if min(f.shape[-2:]) > 1:
        f = F.max_pool2d(f, 2)
    return f.flatten(1) @ p[f"{last}.weight"].T + p[f"{last}.bias"]


def _list_layers(p: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the co-learner's layers in order."""
    names = {name.rpartition(".")[0] for name in p if name.startswith("cml.colearner.")}
    return sorted(names, key=lambda name: int(name.rpartition(".")[2]))


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).mean()


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    chosen = outputs.gather(1, targets[:, None]).squeeze(1)
    return (torch.logsumexp(outputs, 1) - chosen).mean()


NETS = {
    "mlp": Net(_mlp_body, linear_head, colearner_on_vectors, mean_squared_error),
    "conv": Net(_conv_body, _conv_head, colearner_on_maps, cross_entropy),
}

ADAPTED = {
    "maml": ("body.", "head."),
    "metasgd": ("body.", "head."),
    "anil": ("head.",),
    "boil": ("body.",),
}


def inner_loop(
    net: Net,
    meta: Mapping[str, Tensor],
    task: Task,
    *,
    algo: str,
    inner_lr: float,
    inner_steps: int,
    first_order: bool = False,
    change: Callable[[int, dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Tensors:
    """Return the model's parameters after adaptation, with their graph to `meta`.

    Args:
        change: an augmenter's change of the gradients of an inner step, ``change(step, grads)``.
    """
    support_x, support_y, _, _ = task
    params = {name: value for name, value in meta.items() if name.startswith(("body.", "head."))}
    adapted = [name for name in params if name.startswith(ADAPTED[algo])]
    for step in range(inner_steps):
        loss = net.loss(net.head(params, net.body(params, support_x)), support_y)
        # retain_graph: if gradients are constants, the earlier steps stay part of the outer graph.
        grads = torch.autograd.grad(
            loss, [params[name] for name in adapted], create_graph=not first_order, retain_graph=True
        )
        by_name = dict(zip(adapted, grads, strict=True))
        if change is not None:
            by_name = change(step, by_name)
        for name in adapted:
            size = meta[f"metasgd.step_size.{name}"] if algo == "metasgd" else inner_lr
            params = {**params, name: params[name] - size * by_name[name]}
    return params


def meta_gradient(
    net: Net,
    meta: Mapping[str, Tensor],
    tasks: list[Task],
    *,
    algo: str,
    inner_lr: float,
    inner_steps: int,
    gamma: float | None = None,
    first_order: bool = False,
    bn_statistics: str = "transductive",
    change: Callable[[int, int, dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> tuple[Tensor, Tensors]:
    """Return the objective and the gradient of every meta-parameter, averaged over tasks.

    Args:
        gamma: the weight of the co-learner's loss; None without a co-learner.
        bn_statistics: the set whose statistics BatchNorm uses for the query set: the query set, or ``"support"``.
        change: as in `inner_loop`, with the task's number as first argument.
    """
    meta = {name: value.detach().clone().requires_grad_() for name, value in meta.items()}
    total = torch.zeros((), dtype=torch.float64)
    for number, task in enumerate(tasks):
        support_x, _, query_x, query_y = task
        of_task: Any = None if change is None else lambda step, grads, n=number: change(n, step, grads)
        params = inner_loop(
            net, meta, task, algo=algo, inner_lr=inner_lr, inner_steps=inner_steps, first_order=first_order,
            change=of_task,
        )  # fmt: skip
        if bn_statistics == "support":
            rows = len(support_x)
            both = net.body(params, torch.cat([support_x, query_x]), rows)
            features, outputs = both[rows:], net.head(params, both, rows)[rows:]
        else:
            features = net.body(params, query_x)
            outputs = net.head(params, features)
        total = total + net.loss(outputs, query_y)
        if gamma is not None:
            total = total + gamma * net.loss(net.colearner(meta, features), query_y)
    total = total / len(tasks)
    grads = torch.autograd.grad(total, list(meta.values()))
    return total.detach(), dict(zip(meta, grads, strict=True))


def train(
    net: Net,
    meta: Mapping[str, Tensor],
    batches: list[list[Task]],
    *,
    outer_lr: float,
    change: Callable[[int, int, int, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    **options: Any,
) -> Tensors:
    """Return the meta-parameters after one step of `torch.optim.Adam` per batch of tasks.

    Args:
        change: as in `meta_gradient`, with the training step's number as first argument.
        options: options of `meta_gradient`.
    """
    meta = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in meta.items()}
    optimizer = torch.optim.Adam(meta.values(), lr=outer_lr, foreach=False, fused=False)
    for number, tasks in enumerate(batches):
        of_step = None if change is None else partial(change, number)
        _, grads = meta_gradient(net, meta, tasks, change=of_step, **options)
        for name, value in meta.items():
            value.grad = grads[name].contiguous()
        optimizer.step()
    return meta


def difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative difference of a tensor in the Euclidean norm, among gradients or parameters.

    A gradient that is zero up to rounding (of a bias before BatchNorm) is measured relative to a thousandth of the norm of
    the whole gradient.
    """
    assert actual.keys() == expected.keys()
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    return max(
        ((actual[name] - value).norm() / torch.maximum(value.norm(), 1e-3 * whole)).item()
        for name, value in expected.items()
    )
