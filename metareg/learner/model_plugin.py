"""A model that a plugin builds, and how to build it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import PositiveInt
from torch import nn

from metareg.contract.config import PluginConfig, drop_paths
from metareg.contract.tasks import TaskSpec
from metareg.errors import PluginError, UsageError
from metareg.registry.dispatch import find_hook
from metareg.registry.plugins import Plugin, resolve
from metareg.util.seeding import use_seed

__all__ = ["ModelRecipe", "build_model", "resolve_model"]


class ModelRecipe(PluginConfig):
    """How an installed plugin built a model, in a learner's file."""

    name: str
    config: dict[str, Any]
    input_shape: tuple[PositiveInt, ...]
    output_shape: tuple[PositiveInt, ...]

    @property
    def spec(self) -> TaskSpec:
        """The shapes that it was built for."""
        return TaskSpec(self.input_shape, self.output_shape)


def resolve_model(
    model: nn.Module | str | type | Plugin, options: Mapping[str, Any] | None, spec: TaskSpec | None, seed: int
) -> tuple[nn.Module, ModelRecipe | None]:
    """A model and its recipe; a module has none, nor has a plugin that no package installs.

    Raises:
        UsageError: there is no such plugin, or no `spec`.
    """
    if isinstance(model, nn.Module):
        return model, None
    plugin = resolve("models", model, options)
    if spec is None:
        raise UsageError(f"The {plugin.label} needs spec=TaskSpec(input_shape, output_shape) to be built.")
    module = build_model(plugin, spec, seed)
    if plugin.distribution is None:
        return module, None
    # Without the places of pretrained weights: the learner's file holds the values.
    config = drop_paths(plugin.config) if isinstance(plugin.config, PluginConfig) else {}
    shapes = {"input_shape": spec.input_shape, "output_shape": spec.output_shape}
    return module, ModelRecipe(name=plugin.name, config=config, **shapes)


def build_model(plugin: Plugin, spec: TaskSpec, seed: int) -> nn.Module:
    """The model that a plugin builds, with the initial weights of a seed.

    Raises:
        PluginError: the plugin implements no `build`, or it returns something else than a module.
    """
    build = find_hook(plugin, "build")
    if build is None:
        raise PluginError(f"The {plugin.label} implements no hook 'build'.")
    with use_seed(seed, "model") as generator:
        model = build(spec=spec, generator=generator)
    if not isinstance(model, nn.Module):
        build.reject(f"it must return an nn.Module, not a {type(model).__name__}")
    return model
