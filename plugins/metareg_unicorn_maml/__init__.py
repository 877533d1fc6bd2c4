"""UNICORN-MAML: MAML whose head starts with the same values for every class."""

from __future__ import annotations

from torch import Tensor, nn

from metareg import Field, TaskView, hookimpl
from metareg_maml import MAML


class UnicornMAML(MAML):
    """MAML that does not depend on how classes are numbered.

    Every class's row of the head's last `nn.Linear` starts at the same learned vector w and number b: w_c = w, b_c = b.
    From there, the inner loop is MAML's, on all parameters. Permuting a task's classes only permutes the outputs. At
    the start, all classes are equally likely; the first step separates them.

    The paper uses many steps: with a pretrained ResNet-12 on miniImageNet, first-order, 5 of 0.1 for 1-shot and 20 of
    0.1 for 5-shot tasks of 5 classes. Its temperature for the query outputs (0.5) is not implemented.

    Reference:
        Ye and Chao, How to Train Your MAML to Excel in Few-Shot Classification, ICLR 2022, arXiv 2106.16245.
    """

    targets = "classes"

    class Config(MAML.Config):
        inner_lr: float = Field(
            0.1, gt=0, description="Step size α of the inner loop.", json_schema_extra={"search": {"factor": 10}}
        )

    @hookimpl
    def init_meta(self, model: nn.Module, output_layer: tuple[str, str | None]) -> dict[str, Tensor]:
        weight, bias = output_layer
        like = model.get_parameter(weight)
        row = nn.Linear(like.shape[1], 1, bias=bias is not None).to(like)
        return {name: value[0] for name, value in row.named_parameters()}

    @hookimpl
    def start_task(self, params: dict[str, Tensor], meta: dict[str, Tensor], task: TaskView) -> dict[str, Tensor]:
        weight, bias = task.output_layer
        rows = {weight: meta["weight"]} if bias is None else {weight: meta["weight"], bias: meta["bias"]}
        return {**params, **{name: row.expand_as(params[name]) for name, row in rows.items()}}
