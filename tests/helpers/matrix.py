"""Trains every installed algorithm with every augmenter on regression, images and graphs: ``nox -s matrix -- [NAME …]``.

A cell is a training of two steps and its test, by the function behind ``metareg train``. It trains, or is refused with one
sentence, printed below the table; anything else is a failure. Names of algorithms, augmenters and tasks select cells.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import metareg
from metareg.testing import combinations

NONE = "none"
SMALL_IMAGES = {"size": 16, "query": 1, "eval_query": 1}
TASKS: Mapping[str, Any] = {"sinusoid": "sinusoid", "glyphs": ("glyphs", SMALL_IMAGES), "csbm": "csbm"}
"""Tasks for regression, images and graphs that need no data."""
SHORT: Mapping[str, Any] = {
    "steps": 2, "meta_batch": 2, "inner_steps": 1, "test_inner_steps": [1], "test_tasks": 2, "eval_tasks": 2,
    "strategy": "serial",
}  # fmt: skip
TRAINED, FAILED = "✓", "✗"


class Outcome(NamedTuple):
    """The result of a cell: `TRAINED`, `FAILED` or ``"refused"``, and the reason."""

    result: str
    reason: str = ""


def train(algorithm: str, augmenter: str, task: str) -> Outcome:
    """Train and test one cell."""
    augment = None if augmenter == NONE else augmenter
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = metareg.train(algorithm, augment, TASKS[task], out=Path(folder) / "run", **SHORT)
        except metareg.UsageError as error:
            return Outcome("refused", str(error))
        except Exception as error:  # every kind of error is an entry of the table
            return Outcome(FAILED, f"{type(error).__name__}: {error}")
    finite = run.evaluation is not None and math.isfinite(run.evaluation.mean(1))
    return Outcome(TRAINED) if finite else Outcome(FAILED, "The test has no finite result.")


def train_row(algorithm: str, augmenters: Sequence[str], task: str) -> list[Outcome]:
    """Run the cells of an algorithm on one task, in one process."""
    logging.disable(logging.WARNING)
    return [train(algorithm, augmenter, task) for augmenter in augmenters]


def train_all(
    algorithms: Sequence[str], augmenters: Sequence[str], tasks: Sequence[str], jobs: int
) -> dict[tuple[str, str, str], Outcome]:
    """Run every cell; return the results by algorithm, augmenter and task."""
    rows = [(algorithm, task) for task in tasks for algorithm in algorithms]
    outcomes: dict[tuple[str, str, str], Outcome] = {}
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        futures = [pool.submit(train_row, algorithm, augmenters, task) for algorithm, task in rows]
        for (algorithm, task), future in zip(rows, futures, strict=True):
            found = dict(zip(augmenters, future.result(), strict=True))
            print(
                f"{algorithm} on {task}:", *(outcome.result for outcome in found.values()), file=sys.stderr, flush=True
            )
            outcomes |= {(algorithm, augmenter, task): outcome for augmenter, outcome in found.items()}
    return outcomes


def format_table(
    outcomes: Mapping[tuple[str, str, str], Outcome], algorithms: Sequence[str], augmenters: Sequence[str],
    tasks: Sequence[str],
) -> str:  # fmt: skip
    """Format the table, with one mark per task in each cell, and the numbered reasons below it."""
    reasons: dict[str, int] = {}

    def mark(outcome: Outcome) -> str:
        if not outcome.reason:
            return outcome.result
        number = reasons.setdefault(outcome.reason, len(reasons) + 1)
        return f"{FAILED if outcome.result == FAILED else ''}{number}"

    rows = [["", *augmenters]]
    for algorithm in algorithms:
        cells = [" ".join(mark(outcomes[algorithm, augmenter, task]) for task in tasks) for augmenter in augmenters]
        rows.append([algorithm, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    legend = f"In each cell: {', '.join(tasks)}. {TRAINED} trained; a number: refused, and why; {FAILED}: failed."
    return "\n".join([*lines, "", legend, *(f"{number:>3}  {reason}" for reason, number in reasons.items())])


def choose(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return the wanted names; all names if none of them is wanted."""
    return [name for name in names if name in wanted] or [*names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and return 1 if a cell failed."""
    pairs = combinations()
    known = (
        [*dict.fromkeys(pair.algorithm for pair in pairs)],
        [*dict.fromkeys(pair.augmenter for pair in pairs)],
        [*TASKS],
    )
    parser = argparse.ArgumentParser(
        description="Every algorithm with every augmenter on regression, images and graphs."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="algorithms, augmenters ('none' too) and tasks")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    if unknown := set(options.names).difference(*known):
        parser.error(f"There is no algorithm, augmenter or task of the matrix named {', '.join(sorted(unknown))}.")
    chosen = [choose(names, options.names) for names in known]
    start = time.perf_counter()
    outcomes = train_all(*chosen, options.jobs)
    print(format_table(outcomes, *chosen))
    failed = sum(outcome.result == FAILED for outcome in outcomes.values())
    minutes = (time.perf_counter() - start) / 60
    print(f"{len(outcomes)} cells, {failed} failed, in {minutes:.1f} minutes with {options.jobs} processes.")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
