"""Every installed algorithm with every installed augmenter."""

from __future__ import annotations

from dataclasses import dataclass

from metareg.errors import MetaregError
from metareg.registry.plugins import list_entries, resolve
from metareg.testing.benches import Pair
from metareg.testing.check import CheckFailed
from metareg.testing.steps import compare_pair_steps
from metareg.testing.trainings import compare_finite_differences, compare_strategies, compare_trainings

__all__ = ["NOT_APPLICABLE", "Combination", "combinations"]

NO_PLUGIN = "none"
NOT_APPLICABLE = "not applicable"
"""What stands for a check that a plugin's declarations leave out."""


@dataclass(frozen=True)
class Combination:
    """An algorithm and an augmenter, or none, by their names."""

    algorithm: str
    augmenter: str = NO_PLUGIN

    def __str__(self) -> str:
        return f"{self.algorithm}, {self.augmenter}"

    def pair(self) -> Pair:
        """Both, built anew."""
        augmenters = () if self.augmenter == NO_PLUGIN else (resolve("augmenters", self.augmenter),)
        return Pair(resolve("algorithms", self.algorithm), augmenters)

    def check(self) -> dict[str, str | None]:
        """What each check of the combination found: None where it passed, or the problem.

        The strategies and memories agree, in one gradient and over whole steps; the meta-gradient is the objective's
        derivative, where both plugins say that it is; a training repeats itself. `NOT_APPLICABLE` stands where a plugin
        declares otherwise.
        """
        pair = self.pair()
        plugins = [resolve("algorithms", self.algorithm), *pair.augmenters]
        exact = all(getattr(each.instance, "exact_gradient", True) for each in plugins) and not (
            pair.learner(pair.benches[0]).stages.implements("outer_gradient")
        )
        found: dict[str, str | None] = {}
        for name, run in (
            ("strategies", lambda: compare_strategies(pair)),
            ("whole steps", lambda: compare_pair_steps(self.pair)),
            ("finite differences", lambda: compare_finite_differences(pair) if exact else None),
            ("determinism", lambda: compare_trainings(pair, self.pair())),
        ):
            try:
                run()
                found[name] = None if exact or name != "finite differences" else NOT_APPLICABLE
            except (CheckFailed, MetaregError) as error:
                found[name] = str(error)
        return found


def combinations() -> list[Combination]:
    """All of them, each algorithm alone first; read from entry points, nothing is imported."""
    augmenters = [NO_PLUGIN, *_names("augmenters")]
    return [Combination(algorithm, augmenter) for algorithm in _names("algorithms") for augmenter in augmenters]


def _names(kind: str) -> list[str]:
    """Names as a user must write them: with the distribution in front where two claim one."""
    installed = list_entries(kind)
    names = [entry.name for entry in installed]
    return [entry.qualified if names.count(entry.name) > 1 else entry.name for entry in installed]
