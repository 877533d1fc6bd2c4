"""The conformance kit: checks that every plugin of a kind must pass, for its author's tests.

In a plugin's tests, with pytest::

    import pytest
    from metareg.testing import checks

    @pytest.mark.parametrize("check", checks("algorithms", "sign-maml"), ids=str)
    def test_conformance(check):
        check()

or on the command line, ``metareg check-plugin algorithms sign-maml``. Which checks apply follows from the hooks that a
plugin implements and from what its class declares (`metareg.contract.attributes`), never from its name. A failing check
says what is wrong, where, and how to fix it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metareg.errors import UnknownNameError
from metareg.registry.plugins import KINDS
from metareg.testing import general, models, observers, stages, steps, tasks, trainings
from metareg.testing.check import Check, CheckFailed, Subject
from metareg.testing.trainings import NOT_APPLICABLE, Combination, combinations

__all__ = ["NOT_APPLICABLE", "Check", "CheckFailed", "Combination", "checks", "combinations"]

_Function = Callable[[Subject], None]


def checks(
    kind: str, plugin: str | type | object, config: Mapping[str, Any] | None = None, *, compiled: bool = False
) -> list[Check]:
    """Return the checks that apply to a plugin.

    Args:
        kind: ``"algorithms"``, ``"augmenters"``, ``"tasks"``, ``"models"`` or ``"observers"``.
        plugin: the name of an installed plugin, or a plugin class.
        config: options to check it with; by default, its defaults.
        compiled: also compare with `torch.compile`, which takes 10 to 20 seconds and needs a C++ compiler.

    Raises:
        UsageError: there is no such kind or plugin.
        PluginError: the plugin cannot be imported or built.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of plugin", kind, KINDS)
    subject = Subject(kind, plugin, config or {})
    applicable = {
        "contract": general.check_contract_stated,
        "configuration": general.check_configuration,
        **{
            name: function
            for name, function in _OF_KIND[kind].items()
            if (name not in _APPLIES or _APPLIES[name](subject)) and (compiled or name != "compiled")
        },
    }
    return [
        Check(name, (function.__doc__ or "").strip().splitlines()[0], subject, function)
        for name, function in applicable.items()
    ]


_APPLIES: dict[str, Callable[[Subject], bool]] = {
    "recommended": lambda subject: bool(subject.attribute("recommended")),
    "finite-differences": lambda subject: (
        "outer_gradient" not in subject.hooks and bool(subject.attribute("exact_gradient", True))
    ),
    "step-examples": lambda subject: subject.attribute("step_examples", ()) is not None,
    "outer-update": lambda subject: "outer_update" in subject.hooks,
    "meta-parameters": lambda subject: "init_meta" in subject.hooks,
    "export": lambda subject: bool(subject.attribute("training_only", True)),
    "outer-terms": lambda subject: (
        "augment_outer_loss" in subject.hooks and bool(subject.attribute("affine_in_loss", True))
    ),
}
"""Whether a check applies to a plugin, given what it implements and declares; checks not listed apply to all."""

_OF_STAGES: dict[str, _Function] = {
    "purity": stages.check_purity,
    "shapes": stages.check_shapes,
    "wrong-shapes": stages.check_wrong_shapes,
    "devices": stages.check_devices,
    "meta-parameters": trainings.check_meta_parameters,
    "outer-update": trainings.check_outer_update,
    "frozen-layers": trainings.check_frozen_layers,
    "more-steps": trainings.check_more_steps,
    "reload": trainings.check_reload,
    "model-unchanged": trainings.check_model_unchanged,
    "finite-differences": trainings.check_finite_differences,
    "strategies": trainings.check_strategies,
    "whole-steps": steps.check_steps,
    "determinism": trainings.check_determinism,
    "resume": trainings.check_resume,
    "learns": trainings.check_learns,
    "composition": trainings.check_composition,
    "compiled": steps.check_compiled,
}

_OF_KIND: dict[str, dict[str, _Function]] = {
    "algorithms": {
        "recommended": general.check_recommended,
        "adapted": stages.check_adapted,
        "step-examples": stages.check_step_examples,
        **_OF_STAGES,
    },
    "augmenters": {
        "inner-rule": stages.check_inner_rule,
        "outer-terms": stages.check_outer_terms,
        "export": stages.check_export,
        **_OF_STAGES,
    },
    "tasks": {
        "function": tasks.check_task_function,
        "shapes": tasks.check_task_shapes,
        "recommended": general.check_recommended,
        "trains": tasks.check_task_trains,
        "whole-steps": tasks.check_task_steps,
    },
    "models": {
        "seed": models.check_model_seed,
        "split": models.check_model_split,
        "recommended": general.check_recommended,
        "trains": models.check_model_trains,
        "whole-steps": models.check_model_steps,
    },
    "observers": {"run": observers.check_observer, "logs": observers.check_observer_logs},
}
