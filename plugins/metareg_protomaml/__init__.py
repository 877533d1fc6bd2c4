"""ProtoMAML: MAML whose head starts at the task's prototypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from metareg import TaskView, hookimpl
from metareg_maml import MAML
from metareg_protonet import start_at_prototypes


class ProtoMAML(MAML):
    """MAML that starts from a prototypical network.

    The head's last `nn.Linear` starts at w_c = 2c and b_c = −‖c‖², where c is the mean embedding of the class's support
    examples. From there, the inner loop is MAML's, on all parameters. The outer loop also differentiates through the
    prototypes, and learns the body. The head's own values are never used. A class without support examples starts at
    the mean of the whole support set.

    The paper's best settings, found by search: on ImageNet alone 6 first-order steps of 0.0054 from a pretrained ResNet,
    with Adam at 3.6e-4.

    Reference:
        Triantafillou et al., Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples, ICLR 2020,
        arXiv 1903.03096, §3 (Proto-MAML).
    """

    targets = "classes"
    # Outputs are squared distances, whose gradients are larger than those of the heads that tasks' recommendations
    # assume.
    recommended: ClassVar[Mapping[str, float]] = {"algo.inner_lr": 0.01}

    @hookimpl
    def start_task(self, params: dict[str, Tensor], task: TaskView) -> dict[str, Tensor]:
        return start_at_prototypes(params, task)
