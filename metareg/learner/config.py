"""The options of a learner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from metareg.contract.config import Field, PluginConfig

__all__ = ["LearnerConfig"]


class LearnerConfig(PluginConfig):
    """What a `MetaLearner` is told beside its model, algorithm, augmenters and loss."""

    former_names: ClassVar[Mapping[str, str]] = {"norm": "bn_statistics"}

    seed: int = Field(0, ge=0, lt=2**63, description="Fixes initial weights, training tasks, noise and test tasks.")
    inner_steps: int = Field(1, ge=1, description="Adaptation steps on the support set in training.")
    first_order: bool = Field(False, description="Treat inner gradients as constants in the meta-gradient.")
    outer_lr: float = Field(
        1e-3, gt=0, description="Step size of the outer Adam.", json_schema_extra={"search": {"factor": 10}}
    )
    reset_optimizer_every: int | None = Field(
        None,
        ge=1,
        description="Forget the outer optimiser's moments every so many steps, as the CML authors' code does.",
    )
    strategy: Literal["auto", "serial", "traced", "vectorized", "compiled"] = Field(
        "auto", description="How the tasks of a batch are run; the result is the same to rounding."
    )
    memory: Literal["store", "recompute"] = Field(
        "store", description="Keep every inner step's graph, or its parameters only and rebuild the graph."
    )
    bn_statistics: Literal["transductive", "support"] = Field(
        "transductive", description="Whose statistics BatchNorm uses for predictions on the query set."
    )
    precision: Literal["full", "bf16"] = Field(
        "full",
        description="Run the model in its own precision, or in bfloat16 (bf16); parameters, losses, gradients and updates "
        "keep its own.",
    )
    chunk: int | None = Field(None, ge=1, description="At most so many tasks at once; gradients accumulate.")
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.")
