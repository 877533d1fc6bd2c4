"""Shared by all benchmarks: timing, the check that two steps compute the same, the table and the results file."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("metareg", "torch", "numpy", "higher", "parallel-metalearn", "jax", "optax")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        work: what is measured.
        against: the alternative.
        ours: metareg's measurement, in `unit`.
        theirs: the alternative's measurement.
        unit: ``"ms"``, ``"s"`` or ``"MB"``.
        compare: the figure that is judged: ``"speed-up"`` (theirs over ours, at least `target`), ``"ratio"`` (ours over
            theirs, at most `target`) or ``"difference"`` (ours less theirs, at most `target`).
        target: None where there is none.
        figure: the figure itself, where it is better known than from the two medians (paired measurements).
        note: what a reader has to know.
    """

    work: str
    against: str
    ours: float
    theirs: float
    unit: str
    compare: Literal["speed-up", "ratio", "difference"] = "speed-up"
    target: float | None = None
    figure: float = field(default=float("nan"))
    note: str = ""

    def __post_init__(self) -> None:
        if self.figure != self.figure:
            figures = {
                "speed-up": self.theirs / self.ours,
                "ratio": self.ours / self.theirs,
                "difference": self.ours - self.theirs,
            }
            object.__setattr__(self, "figure", figures[self.compare])

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without a target."""
        if self.target is None:
            return None
        return self.figure >= self.target if self.compare == "speed-up" else self.figure <= self.target

    def shown(self, figure: float) -> str:
        """Format a figure for the table."""
        return {
            "speed-up": f"{figure:.1f}×", "ratio": f"{figure:.3f}", "difference": f"{figure:+.2f} {self.unit}",
        }[self.compare]  # fmt: skip

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        target, verdict = "–", "–"
        if self.target is not None:
            target = f"{'≥' if self.compare == 'speed-up' else '≤'} {self.shown(self.target)}"
            short = abs(self.target - self.figure)
            missed = f"{100 * short / self.target:.0f} % short" if self.compare == "speed-up" else f"{short:.3f} over"
            verdict = "reached" if self.reached else missed
        amounts = [f"{amount:.{2 if amount < 100 else 0}f} {self.unit}" for amount in (self.ours, self.theirs)]
        return (self.work, self.against, *amounts, self.shown(self.figure), target, verdict)


COLUMNS = ("work", "against", "metareg", "the other", "figure", "target", "")


@dataclass(frozen=True)
class Clocks:
    """Seconds per step of one block."""

    cpu: float
    """Of all threads of this process."""
    wall: float


def interleaved(
    works: Mapping[str, Callable[[int], object]], steps: Mapping[str, int], rounds: int, seconds: float = 60.0
) -> dict[str, list[float]]:
    """Return wall-clock seconds per step; arguments as in `interleaved_clocks`."""
    times = interleaved_clocks(works, steps, rounds, seconds)
    return {name: [each.wall for each in blocks] for name, blocks in times.items()}


def interleaved_clocks(
    works: Mapping[str, Callable[[int], object]], steps: Mapping[str, int], rounds: int, seconds: float = 60.0
) -> dict[str, list[Clocks]]:
    """Time several functions in turns, so that other load on the machine affects all alike.

    Args:
        works: functions that each take a given number of steps.
        steps: the steps of one turn.
        rounds: turns of each function; every second round is in reverse order.
        seconds: stop after the round that exceeds this time.
    """
    times: dict[str, list[Clocks]] = {name: [] for name in works}
    end = time.perf_counter() + seconds
    for number in range(rounds):
        for name in list(works)[:: -1 if number % 2 else 1]:
            cpu, wall = time.process_time(), time.perf_counter()
            works[name](steps[name])
            times[name].append(
                Clocks((time.process_time() - cpu) / steps[name], (time.perf_counter() - wall) / steps[name])
            )
        if time.perf_counter() > end:
            break
    return times


def paired(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median ratio of neighbouring measurements."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def check_same_gradient(
    name: str, given: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float = 1e-4
) -> None:
    """Check that two gradients are equal before they are timed.

    Raises:
        SystemExit: the Euclidean distance of the two gradients, relative to the expected one's length, exceeds
            `tolerance`.
    """
    if given.keys() != expected.keys():
        raise SystemExit(f"{name}: its gradient has other names: {sorted(given.keys() ^ expected.keys())}.")
    distance = sum(float((given[key] - expected[key]).double().square().sum()) for key in expected) ** 0.5
    length = sum(float(expected[key].double().square().sum()) for key in expected) ** 0.5
    if not distance <= tolerance * length:
        raise SystemExit(
            f"{name}: its gradient differs by {distance / length:.1e} relative; {tolerance:.0e} is allowed."
        )


def machine(threads: int) -> dict[str, Any]:
    """Describe the machine and versions."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": threads,
        "load_average_before": load,
        "versions": versions,
    }


def report(rows: Sequence[Row], about: Mapping[str, Any], raw: Mapping[str, Any], path: Path) -> None:
    """Print the table and write the results file."""
    caption = f"{about['processor']}, {about['cores']} cores, {about['threads']} thread(s), {about['date'][:10]}"
    table = Table(*COLUMNS, caption=caption)
    for row in rows:
        style = {True: "green", False: "red", None: None}[row.reached]
        table.add_row(*row.cells(), style=style)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.work}, against {row.against}: {row.note}")
    save(rows, about, raw, path)
    console.print(f"Written to {path}")


def save(rows: Sequence[Row], about: Mapping[str, Any], raw: Mapping[str, Any], path: Path) -> None:
    """Write the results file."""
    content = {
        "machine": dict(about),
        "rows": [
            {
                "work": row.work, "against": row.against, "unit": row.unit, "metareg": row.ours, "other": row.theirs,
                "compare": row.compare, "figure": row.figure, "target": row.target, "reached": row.reached,
                "note": row.note,
            }
            for row in rows
        ],
        "raw": dict(raw),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
