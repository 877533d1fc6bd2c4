"""Models that plugins build, and the recipes of those that can be built again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metareg import PluginError, TaskSpec, UsageError, hookimpl
from metareg.learner.model_plugin import build_model, resolve_model
from metareg.registry.plugins import resolve

SPEC = TaskSpec((2,), (3,))


class Line:
    """A model plugin that no package installs."""

    @hookimpl
    def build(self, spec: TaskSpec, generator: torch.Generator) -> nn.Module:
        layer = nn.Linear(*spec.input_shape, *spec.output_shape)
        nn.init.normal_(layer.weight, generator=generator)
        return layer


class Number:
    @hookimpl
    def build(self) -> int:
        return 3


class Nothing:
    pass


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (build_model(resolve("models", Line), SPEC, seed).weight for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_an_installed_plugin_has_a_recipe() -> None:
    model, recipe = resolve_model("mlp", {"hidden": [7]}, SPEC, 0)
    assert recipe is not None
    assert (recipe.name, recipe.config["hidden"], recipe.spec) == ("mlp", [7], SPEC)
    again, _ = resolve_model(recipe.name, recipe.config, recipe.spec, 0)
    assert repr(again) == repr(model)


def test_others_have_none() -> None:
    module = nn.Linear(2, 3)
    assert resolve_model(module, None, None, 0) == (module, None)
    assert resolve_model(Line, None, SPEC, 0)[1] is None


@pytest.mark.parametrize(("plugin", "sentence"), [(Number, "must return an nn.Module"), (Nothing, "no hook 'build'")])
def test_plugins_that_build_no_model(plugin: type, sentence: str) -> None:
    with pytest.raises(PluginError, match=sentence):
        resolve_model(plugin, None, SPEC, 0)


def test_shapes_are_needed() -> None:
    with pytest.raises(UsageError, match="spec=TaskSpec"):
        resolve_model(Line, None, None, 0)
