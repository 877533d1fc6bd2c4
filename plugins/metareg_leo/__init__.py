"""LEO: the inner loop adapts a latent code that is decoded into the head's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metareg import Field, PluginConfig, StepExample, TaskView, hookimpl
from metareg_protonet import average_by_class

_SMALLEST_STD = 1e-10


class LEO:
    """Latent embedding optimization: adaptation in a space of few dimensions that generates the head's weights.

    A linear encoder and a relation network of three layers, on every pair of support embeddings, give each class c the
    mean and the standard deviation of its code, averaged over its examples. A linear decoder gives those of its weights:

        z_c ~ N(μ_c, σ_c²),    w_c ~ N(μ(z_c), σ(z_c)²),    outputs for an embedding x: w_c · x + b_c.

    The first `code_steps` inner steps descend the support loss in z and decode w again; the others continue with w
    itself. Both have learned step sizes, one for each dimension of the code and of the embedding. The outer loop
    minimises

        ℓ(w; Q) + β KL(N(μ, σ²) ‖ N(0, 1)) + γ ‖stop_gradient(z') − z‖² + λ₁/2 ‖φ‖² + λ₂ ‖C − I‖²,

    where z' is the adapted code, φ the encoder, relation network and decoder, and C the correlations of the decoder's
    dimensions. As in the authors' code, all terms except λ₁'s are means over their entries, and a network's output s
    means the standard deviation exp(s) − 1 + σ₀. Only training draws; evaluation uses the means. A class without
    support examples gets the code of all examples.

    The paper uses fixed embeddings of a pretrained network, and its head has no b; here, the body and b learn in the
    outer loop. There is no dropout on embeddings, and w is drawn once per task instead of at every decoding.

    Settings of the authors' code, for tasks of 5 classes of miniImageNet: the defaults except the step sizes, 1 and
    0.001 for losses summed over the examples; 12 tasks a step, Adam at 1e-4, gradients clipped to 0.1. On a body that
    learns from the start, a step size of 1 in the code diverged.

    Reference:
        Rusu et al., Meta-Learning with Latent Embedding Optimization, ICLR 2019, arXiv 1807.05960, Algorithm 1.
    """

    contract = 1
    adapts = "head*weight"
    targets = "classes"
    exact_gradient = False  # the encoder's penalty treats the adapted code as a constant
    step_examples = (StepExample(param=2.0, grad=3.0, after=1.7, config={"code_steps": 0, "weight_lr": 0.1}),)
    recommended: ClassVar[Mapping[str, Any]] = {"inner_steps": 10}

    class Config(PluginConfig):
        latents: int = Field(64, ge=1, description="Dimensions of a class's code.")
        code_steps: int = Field(
            5, ge=0, description="Number of first inner steps that adapt the code; the others adapt the weights."
        )
        code_lr: float = Field(
            0.1, gt=0, description="Initial step size in the code.", json_schema_extra={"search": {"factor": 10}}
        )
        weight_lr: float = Field(0.005, gt=0, description="Initial step size in the weights.")
        kl_weight: float = Field(0.001, ge=0, description="Weight β of the divergence of the codes from N(0, 1).")
        encoder_penalty: float = Field(1e-9, ge=0, description="Weight γ of the distance to the adapted code.")
        l2_penalty: float = Field(1e-8, ge=0, description="Weight λ₁ of the squared weights.")
        orthogonality: float = Field(0.001, ge=0, description="Weight λ₂ of the decoder's correlations.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def init_meta(self, model: nn.Module, output_layer: tuple[str, str | None], inner_steps: int) -> dict[str, Tensor]:
        config, weight = self.config, model.get_parameter(output_layer[0])
        size, features = config.latents, weight.shape[1]
        shapes = {"encoder": (size, features), "decoder": (2 * features, size)}
        shapes |= {f"relation.{layer}": (2 * size, 2 * size) for layer in range(3)}
        meta = {name: nn.init.xavier_uniform_(torch.empty(shape)).to(weight) for name, shape in shapes.items()}
        if config.code_steps > 0:
            meta["code_lr"] = weight.new_full((size,), config.code_lr)
        if inner_steps > config.code_steps:  # otherwise, only evaluation could reach these steps
            meta["weight_lr"] = weight.new_full((features,), config.weight_lr)
        return meta

    @hookimpl
    def adapted_parameters(self, output_layer: tuple[str, str | None]) -> tuple[str]:
        return (output_layer[0],)

    @hookimpl
    def draw_noise(self, shapes: dict[str, tuple[int, ...]], generator: torch.Generator, stage: str) -> Any:
        if stage != "task":
            return None
        ((classes, features),) = shapes.values()
        widths = {"code": self.config.latents, "weight": features}
        return {name: torch.randn(classes, width, generator=generator) for name, width in widths.items()}

    @hookimpl
    def start_task(
        self, params: dict[str, Tensor], meta: dict[str, Tensor], noise: Any, task: TaskView
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ((weight, like),) = params.items()
        embeddings = task.embed(params, task.support_features(params)).to(like)
        relations = average_by_class(_relate(embeddings, meta), task.support_y, like.shape[0])
        mean, std = _find_moments(relations, 0.0)
        code = mean if noise is None else mean + std * noise["code"]
        start = {weight: _decode(code, meta, noise)}
        return start, {"code": code, "start": code, "mean": mean, "std": std}

    @hookimpl
    def inner_update(
        self,
        params: dict[str, Tensor],
        grads: dict[str, Tensor],
        meta: dict[str, Tensor],
        step: int,
        state: dict[str, Tensor],
        noise: Any,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ((weight, gradient),) = grads.items()
        if step >= self.config.code_steps:
            return {weight: params[weight] - meta.get("weight_lr", self.config.weight_lr) * gradient}, state
        pull_back = torch.func.vjp(lambda code: _decode(code, meta, noise), state["code"])[1]
        (gradient,) = pull_back(gradient)
        code = state["code"] - meta["code_lr"] * gradient
        return {weight: _decode(code, meta, noise)}, {**state, "code": code}

    @hookimpl
    def outer_objective(
        self, meta: dict[str, Tensor], adapted: dict[str, Tensor], state: dict[str, Tensor], task: TaskView
    ) -> Tensor:
        config, mean, std = self.config, state["mean"], state["std"]
        divergence = ((mean.square() + std.square() - 1) / 2 - std.log()).mean()
        distance = (state["code"].detach() - state["start"]).square().mean()
        squares = sum(meta[name].square().sum() for name in meta if not name.endswith("_lr"))
        return (
            task.query_loss(adapted)
            + config.kl_weight * divergence
            + config.encoder_penalty * distance
            + config.l2_penalty / 2 * squares
            + config.orthogonality * _measure_correlations(meta["decoder"])
        )


def _relate(embeddings: Tensor, meta: dict[str, Tensor]) -> Tensor:
    """Return the relation network's mean output over all pairs with each example ``[examples, 2 latents]``."""
    codes = embeddings @ meta["encoder"].T
    pairs = (codes.shape[0], codes.shape[0], codes.shape[1])
    hidden = torch.cat([codes[:, None].expand(pairs), codes[None].expand(pairs)], -1)
    for layer in (0, 1):
        hidden = (hidden @ meta[f"relation.{layer}"].T).relu()
    return (hidden @ meta["relation.2"].T).mean(1)


def _decode(code: Tensor, meta: dict[str, Tensor], noise: Any) -> Tensor:
    """Decode ``[classes, latents]`` to weights ``[classes, features]``: drawn, or their means without noise."""
    moments = code @ meta["decoder"].T
    classes, width = moments.shape
    mean, std = _find_moments(moments, math.sqrt(2 / (classes + width // 2)))
    return mean if noise is None else mean + std * noise["weight"]


def _find_moments(outputs: Tensor, std_at_zero: float) -> tuple[Tensor, Tensor]:
    """Convert a network's outputs ``[classes, 2 width]`` to a mean and a standard deviation."""
    mean, log = outputs.chunk(2, -1)
    return mean, (log.exp() - 1 + std_at_zero).clamp(min=_SMALLEST_STD)


def _measure_correlations(decoder: Tensor) -> Tensor:
    """Return the mean squared difference between the columns' correlations (the code's dimensions) and identity."""
    columns = decoder / decoder.norm(dim=0)
    identity = torch.eye(decoder.shape[1], dtype=decoder.dtype, device=decoder.device)
    return (columns.T @ columns - identity).square().mean()
