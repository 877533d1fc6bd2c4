"""Reference implementations of the shipped models, as functions of parameters with the modules' names.

The features of the graph models are the last layer's outputs, concatenated with the propagated inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reference import (
    Net,
    batch_norm,
    colearner_on_maps,
    colearner_on_vectors,
    cross_entropy,
    linear_head,
    mean_squared_error,
)

Params = Mapping[str, Tensor]


def _affine(p: Params, layer: str, x: Tensor) -> Tensor:
    return x @ p[f"{layer}.weight"].T + p[f"{layer}.bias"]


def _mlp_body(p: Params, x: Tensor, *_: Any) -> Tensor:
    for layer in (1, 3):
        x = torch.relu(_affine(p, f"body.{layer}", x))
    return x


def _conv4_body(p: Params, x: Tensor, rows: int | None = None) -> Tensor:
    """Four blocks; the features are taken before the fourth pooling."""
    for block in (0, 2, 4, 6):
        name = f"body.{block}"
        x = F.conv2d(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"], padding=1)
        x = torch.relu(batch_norm(x, p[f"{name}.1.weight"], p[f"{name}.1.bias"], rows))
        if block < 6:
            x = F.max_pool2d(x, 2)
    return x


def _conv4_head(p: Params, f: Tensor, *_: Any) -> Tensor:
    return _affine(p, "head.2", F.max_pool2d(f, 2).flatten(1))


def _resnet12_body(p: Params, x: Tensor, rows: int | None = None) -> Tensor:
    for block in range(4):
        name = f"body.{block}"
        shortcut = F.conv2d(x, p[f"{name}.shortcut.0.weight"])
        shortcut = batch_norm(shortcut, p[f"{name}.shortcut.1.weight"], p[f"{name}.shortcut.1.bias"], rows)
        for layer in (0, 3, 6):
            x = F.conv2d(x, p[f"{name}.layers.{layer}.weight"], padding=1)
            x = batch_norm(x, p[f"{name}.layers.{layer + 1}.weight"], p[f"{name}.layers.{layer + 1}.bias"], rows)
            if layer < 6:
                x = F.leaky_relu(x, 0.1)
        x = F.max_pool2d(F.leaky_relu(x + shortcut, 0.1), 2)
    return x


def _resnet12_head(p: Params, f: Tensor, *_: Any) -> Tensor:
    return _affine(p, "head.2", f.mean((2, 3)))


def _gcn_body(p: Params, x: Any, *_: Any) -> Tensor:
    """Two layers; the inputs are already propagated once, and the block completes the second propagation."""
    (block,) = x["blocks"]
    hidden = torch.relu(_affine(p, "body.layers.0", x["x"]))
    return torch.cat([torch.relu(_affine(p, "body.layers.1", block @ hidden)), block @ x["x"]], 1)


def _sgc_body(p: Params, x: Tensor, *_: Any) -> Tensor:
    return torch.cat([torch.relu(_affine(p, "body.layers.0", x)), x], 1)


def _graphsage_body(p: Params, x: Any, *_: Any) -> Tensor:
    """Two layers; a node's own features come first, and the first rows belong to the task's nodes."""
    (block,) = x["blocks"]
    hidden = torch.relu(_affine(p, "body.layers.0", x["x"]))
    both = torch.cat([hidden[: len(block)], block @ hidden], 1)
    return torch.cat([torch.relu(_affine(p, "body.layers.1", both)), block @ x["x"]], 1)


def _on_vectors(body: Callable[..., Tensor], loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy) -> Net:
    return Net(body, linear_head, colearner_on_vectors, loss)


SHIPPED = {
    "mlp": _on_vectors(_mlp_body, mean_squared_error),
    "conv4": Net(_conv4_body, _conv4_head, colearner_on_maps, cross_entropy),
    "resnet12": Net(_resnet12_body, _resnet12_head, colearner_on_maps, cross_entropy),
    "gcn": _on_vectors(_gcn_body),
    "sgc": _on_vectors(_sgc_body),
    "graphsage": _on_vectors(_graphsage_body),
}

_IN_FRONT_OF_BATCH_NORM = {
    "conv4": ("body.0.0.bias", "body.2.0.bias", "body.4.0.bias", "body.6.0.bias"),
    "resnet12": (),
}


def without_effect(net: str, name: str) -> bool:
    """Return whether a meta-parameter is a bias before BatchNorm, or the step size of one.

    BatchNorm cancels the bias: its gradient is rounding error, which Adam turns into full steps.
    """
    biases = _IN_FRONT_OF_BATCH_NORM.get(net)
    if biases is None:
        return False
    return name.removeprefix("metasgd.step_size.") in (*biases, "cml.colearner.0.bias", "cml.colearner.3.bias")
