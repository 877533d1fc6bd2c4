"""The head of an adapted module if a plugin predicts instead of the model's own head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from metareg.engine.stages import Stages

__all__ = ["PluginHead"]


class PluginHead(nn.Module):
    """A head that calls the plugin that predicts.

    Args:
        stages: the stages with this plugin.
        meta: every meta-parameter; the plugin's own become the module's parameters.
        support_features: as in the hook `predict`.
    """

    def __init__(self, stages: Stages, meta: Mapping[str, Tensor], support_features: Tensor | None) -> None:
        super().__init__()
        self._stages = stages
        self._names = tuple(name for name in meta if stages.owner(name) == stages.predictor)
        self.own = nn.ParameterList(nn.Parameter(meta[name].detach().clone()) for name in self._names)
        self.support_features: Tensor | None
        self.register_buffer("support_features", support_features)

    def forward(self, features: Tensor) -> Tensor:
        return self._stages.predict(features, self.support_features, dict(zip(self._names, self.own, strict=True)))
