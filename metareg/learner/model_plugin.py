"""Models built by plugins, and recipes to build them again."""

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
    """The entry in a learner's file that tells how a plugin built the model."""

    name: str
    config: dict[str, Any]
    input_shape: tuple[PositiveInt, ...]
    output_shape: tuple[PositiveInt, ...]

    @property
    def spec(self) -> TaskSpec:
        """The shapes that the model was built for."""
        return TaskSpec(self.input_shape, self.output_shape)


def resolve_model(
    model: nn.Module | str | type | Plugin, options: Mapping[str, Any] | None, spec: TaskSpec | None, seed: int
) -> tuple[nn.Module, ModelRecipe | None]:
    """Return a model and its recipe; modules and plugins that are not installed have no recipe.

    Raises:
        UsageError: the plugin does not exist, or `spec` is missing.
    """
    if isinstance(model, nn.Module):
        return model, None
    plugin = resolve("models", model, options)
    if spec is None:
        raise UsageError(f"The {plugin.label} needs spec=TaskSpec(input_shape, output_shape) to be built.")
    module = build_model(plugin, spec, seed)
    if plugin.distribution is None:
        return module, None
    # Without paths of pretrained weights, because the learner's file contains the values.
    config = drop_paths(plugin.config) if isinstance(plugin.config, PluginConfig) else {}
    shapes = {"input_shape": spec.input_shape, "output_shape": spec.output_shape}
    return module, ModelRecipe(name=plugin.name, config=config, **shapes)


def build_model(plugin: Plugin, spec: TaskSpec, seed: int) -> nn.Module:
    """Build a plugin's model, with initial weights from a seed.

    Raises:
        PluginError: the plugin does not implement `build`, or it does not return a module.
    """
    build = find_hook(plugin, "build")
    if build is None:
        raise PluginError(f"The {plugin.label} implements no hook 'build'.")
    with use_seed(seed, "model") as generator:
        model = build(spec=spec, generator=generator)
    if not isinstance(model, nn.Module):
        build.reject(f"it must return an nn.Module, not a {type(model).__name__}")
    return model
