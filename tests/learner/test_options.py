"""The options of a learner: one list, of which the constructor and its help are true copies."""

from __future__ import annotations

import inspect

import pytest

from metareg import MetaLearner
from metareg.learner.config import LearnerConfig

OPTIONS = [name for name in LearnerConfig.model_fields if name != "device"]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_constructor_has_every_option(name: str) -> None:
    parameter = inspect.signature(MetaLearner).parameters[name]
    assert parameter.default == LearnerConfig.model_fields[name].default
    assert parameter.kind is parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", OPTIONS)
def test_help_describes_every_option(name: str) -> None:
    assert f"{name}: {LearnerConfig.model_fields[name].description}" in (MetaLearner.__doc__ or "")
