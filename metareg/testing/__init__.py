"""The conformance kit: checks that every plugin of a kind must pass, for its author's tests.

In a plugin's tests, with pytest::

    import pytest
    from metareg.testing import checks

    @pytest.mark.parametrize("check", checks("algorithms", "sign-maml"), ids=str)
    def test_conformance(check):
        check()

or on the command line, ``metareg check-plugin algorithms sign-maml``. Which checks apply follows from the hooks that a
plugin implements and from what its class declares (`metareg.contract.attributes`), never from its name. A failing check
says what is wrong, where, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metareg.errors import UnknownNameError
from metareg.registry.plugins import KINDS
from metareg.testing import _general, _others, _stages, _steps
from metareg.testing._check import Check, CheckFailed, Subject
from metareg.testing._matrix import NOT_APPLICABLE, Combination, combinations

__all__ = ["NOT_APPLICABLE", "Check", "CheckFailed", "Combination", "checks", "combinations"]

_Function = Callable[[Subject], None]


def checks(
    kind: str, plugin: str | type | object, config: Mapping[str, Any] | None = None, *, compiled: bool = False
) -> list[Check]:
    """The checks that apply to a plugin, ready to be called.

    Args:
        kind: ``"algorithms"``, ``"augmenters"``, ``"tasks"``, ``"models"`` or ``"observers"``.
        plugin: the name of an installed plugin, or a plugin class.
        config: options to check it with; its defaults where there are none.
        compiled: also compare with `torch.compile`, which takes some 10 to 20 seconds and a C++ compiler.

    Raises:
        UsageError: there is no such kind or plugin.
        PluginError: the plugin cannot be imported or built.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of plugin", kind, KINDS)
    subject = Subject(kind, plugin, config or {})
    applicable = {
        "contract": _general.check_contract_stated,
        "configuration": _general.check_configuration,
        **{name: function for name, (function, applies) in _OF_KIND[kind].items() if applies(subject)},
    }
    if not compiled:
        applicable.pop("compiled", None)
    return [
        Check(name, (function.__doc__ or "").strip().splitlines()[0], subject, function)
        for name, function in applicable.items()
    ]


def _always(_: Subject) -> bool:
    return True


def _recommends(subject: Subject) -> bool:
    return bool(subject.declared("recommended"))


def _differentiable(subject: Subject) -> bool:
    return "outer_gradient" not in subject.hooks and bool(subject.declared("exact_gradient", True))


def _has_outer_term(subject: Subject) -> bool:
    return "augment_outer_loss" in subject.hooks and bool(subject.declared("affine_in_loss", True))


_OF_STAGES: dict[str, tuple[_Function, Callable[[Subject], bool]]] = {
    "purity": (_stages.check_purity, _always),
    "shapes": (_stages.check_shapes, _always),
    "wrong-shapes": (_stages.check_wrong_shapes, _always),
    "model-unchanged": (_stages.check_model_unchanged, _always),
    "finite-differences": (_stages.check_finite_differences, _differentiable),
    "strategies": (_stages.check_strategies, _always),
    "whole-steps": (_steps.check_steps, _always),
    "determinism": (_stages.check_determinism, _always),
    "resume": (_stages.check_resume, _always),
    "learns": (_stages.check_learns, _always),
    "composition": (_stages.check_composition, _always),
    "compiled": (_steps.check_compiled, _always),
}

_OF_KIND: dict[str, dict[str, tuple[_Function, Callable[[Subject], bool]]]] = {
    "algorithms": {
        "recommended": (_general.check_recommended, _recommends),
        "adapted": (_stages.check_adapted, _always),
        "step-examples": (_stages.check_step_examples, _always),
        **_OF_STAGES,
    },
    "augmenters": {
        "inner-rule": (_stages.check_inner_rule, _always),
        "outer-terms": (_stages.check_outer_terms, _has_outer_term),
        "export": (_stages.check_export, _always),
        **_OF_STAGES,
    },
    "tasks": {
        "function": (_others.check_task_function, _always),
        "shapes": (_others.check_task_shapes, _always),
        "recommended": (_general.check_recommended, _recommends),
        "trains": (_others.check_task_trains, _always),
        "whole-steps": (_steps.check_task_steps, _always),
    },
    "models": {
        "seed": (_others.check_model_seed, _always),
        "split": (_others.check_model_split, _always),
        "recommended": (_general.check_recommended, _recommends),
        "trains": (_others.check_model_trains, _always),
        "whole-steps": (_steps.check_model_steps, _always),
    },
    "observers": {
        "run": (_others.check_observer, _always),
        "logs": (_others.check_observer_logs, _always),
    },
}
