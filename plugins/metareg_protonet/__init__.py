"""Prototypical networks: the head consists of the prototypes of the task's classes."""

from __future__ import annotations

import torch
from torch import Tensor

from metareg import PluginConfig, StepExample, TaskView, UsageError, hookimpl

__all__ = ["ProtoNet", "average_by_class", "start_at_prototypes"]


class ProtoNet:
    """Prototypical networks: an example belongs to the class whose prototype, the mean of its support set, is nearest.

    The logits −‖z − c‖² of an example with embedding z equal those of a linear layer with weights w_c = 2c and biases
    b_c = −‖c‖², up to the term −‖z‖², which is the same for all classes. The prototypes are therefore the values of the
    head's last `nn.Linear`, whose inputs are the embeddings. Inner steps have no effect, whatever their number, and the
    outer loop learns only the embedding.

    The prototype of a class without support examples is the mean of the whole support set.

    The paper trains on more classes than it tests on (Omniglot: 60 classes, 5 query examples each; miniImageNet: 20 or 30
    classes, 15 query examples), one task a step, with Adam at 1e-3, halved every 2,000 tasks. Here, the head has the
    same number of classes for both, and `outer_lr` is constant unless `lr_schedule` is set.

    Reference:
        Snell, Swersky and Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017, arXiv 1703.05175,
        Equations 1 and 2, and §2.4 for the linear layer.
    """

    contract = 1
    adapts = "head"
    targets = "classes"
    step_examples = (StepExample(param=2.0, grad=3.0, after=2.0),)

    class Config(PluginConfig):
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def adapted_parameters(self, output_layer: tuple[str, str | None]) -> tuple[str, ...]:
        return tuple(name for name in output_layer if name is not None)

    @hookimpl
    def start_task(self, params: dict[str, Tensor], task: TaskView) -> dict[str, Tensor]:
        return start_at_prototypes(params, task)

    @hookimpl
    def inner_gradient(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in params.items()}

    @hookimpl
    def inner_update(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(params)


def start_at_prototypes(params: dict[str, Tensor], task: TaskView) -> dict[str, Tensor]:
    """Return the parameters with the task's prototypes in the head's last layer."""
    weight, bias = task.output_layer
    if bias is None:
        raise UsageError(f"Prototypes need a bias, but the layer of '{weight}' has none.")
    embeddings = task.embed(params, task.support_features(params)).to(params[weight])
    prototypes = average_by_class(embeddings, task.support_y, params[weight].shape[0])
    return {**params, weight: 2 * prototypes, bias: -prototypes.square().sum(1)}


def average_by_class(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Average ``[examples, …]`` by class to ``[classes, …]``; a class without examples gets the mean of all values.

    Raises:
        UsageError: the targets are numbers.
    """
    if labels.is_floating_point():
        raise UsageError(f"Prototypes need classes; the targets of this task are numbers ({labels.dtype}).")
    belongs = (labels == torch.arange(classes, device=labels.device)[:, None]).to(values)
    counts = belongs.sum(1, keepdim=True)
    shares = torch.where(counts > 0, belongs / counts.clamp(min=1), 1 / labels.shape[0])
    return shares @ values
