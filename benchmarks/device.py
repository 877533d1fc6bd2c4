"""Measures what needs a GPU, within a time limit: ``python benchmarks/device.py [--minutes 12] [--quick]``.

The parts, in order: whole training steps against the CPU's; exact resume; the time of a step in each strategy, against a
loop; and, in the remaining time, MAML against MAML with CML. Each part has its own share of the time, each cell its own
process, and every row is written at once. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from device_parts import pairs, parity, resume, strategies
from device_parts.jobs import Job, Row, describe_problem, preload, run_jobs
from harness import RESULTS, machine

from metareg import UnknownNameError
from metareg.testing import combinations
from metareg.testing.steps import PRECISIONS, Precision
from metareg.util.files import write_json, write_text

ENDS = {"parity": 0.36, "resume": 0.45, "strategies": 0.73, "pairs": 1.0}
"""The parts, and the fraction of the total time at which each must end."""
PAIRS_LIKE = "Conv4-64, 28×28, 4 tasks"
"""The setting of the part on strategies whose steps have the size of the pairs' steps."""
_COMPILING = 0.4
"""The share of the time for compiling, if no other part runs at the same time."""
_MINUTE = 60.0
_RESERVE = 4.0
"""Seconds reserved at the end for writing."""
_RESERVE_OF_PAIRS = 12.0
"""Seconds reserved for a last block or test that takes longer than the previous ones."""


@dataclass(frozen=True)
class Size:
    """The extent of each part."""

    parity: Sequence[str]
    """The settings in which all algorithms are compared."""
    parity_precisions: Sequence[Precision]
    compiled: bool
    """Whether all parts compile steps."""
    resume_cases: Sequence[resume.Case]
    resume_steps: int
    cells: Sequence[strategies.Cell]
    seconds: float
    """For each strategy in each setting."""
    pairs: pairs.Size
    seeds: int | None
    """None for the number of cores."""
    pairs_seconds: float = math.inf
    """The maximum for the pairs, which use all the remaining time."""


def _case(setting: str, strategy: str, *, deterministic: bool = False, algorithm: str = "maml") -> resume.Case:
    return {"setting": setting, "strategy": strategy, "algorithm": algorithm, "deterministic": deterministic}


FULL = Size(
    parity=list(parity.SETTINGS),
    parity_precisions=PRECISIONS,
    compiled=True,
    resume_cases=[
        _case("sinusoid", "vectorized"),
        _case("sinusoid", "compiled"),
        _case("sinusoid", "serial", algorithm="metasgd"),
        *(_case("conv4", name, deterministic=each) for name in ("vectorized", "traced") for each in (False, True)),
    ],
    resume_steps=20,
    # The slowest compilations come last.
    cells=[
        (setting, precision)
        for setting in strategies.SETTINGS
        for precision in ("fp32", "bf16")
        if "Conv4-8" not in setting and (precision == "fp32" or "inner steps" not in setting)
    ],
    seconds=1.5,
    pairs=pairs.Size(),
    seeds=None,
)
QUICK = Size(
    parity=("sinusoid",),
    parity_precisions=PRECISIONS[:1],
    compiled=False,
    resume_cases=[_case("sinusoid", "vectorized"), _case("sinusoid", "serial", algorithm="metasgd")],
    resume_steps=5,
    cells=[("sinusoid, 25 tasks", "fp32"), ("Conv4-8, 28×28, 4 tasks", "fp32"), ("Conv4-8, 28×28, 4 tasks", "bf16")],
    seconds=0.3,
    pairs=pairs.Size(width=4, validate_every=2, validation_tasks=4, test_every=4, test_tasks=4),
    seeds=2,
    pairs_seconds=10,
)


@dataclass
class Record:
    """The results, written as they arrive: ``device.json``, and ``device.md`` for readers."""

    folder: Path
    content: dict[str, Any] = field(default_factory=dict)

    def add(self, part: str, row: Row) -> None:
        """Store a row, and print it."""
        self.content.setdefault(part, []).append(row)
        shown = {key: value for key, value in row.items() if key != "traceback"}
        print(part, " ".join(f"{key}={_show(value)}" for key, value in shown.items()), flush=True)
        self.write()

    def write(self) -> None:
        """Write the files."""
        write_json(self.folder / "device.json", self.content)
        write_text(self.folder / "device.md", page(self.content))


@dataclass(frozen=True)
class Session:
    """One call of the command."""

    arguments: argparse.Namespace
    size: Size
    record: Record
    began: float
    scratch: Path

    @property
    def device(self) -> str:
        return str(self.arguments.device)

    def end_of(self, part: str) -> float:
        """Return when a part must have ended, by `time.monotonic`."""
        chosen = self.arguments.only
        share = ENDS[part] if chosen == list(ENDS) else (chosen.index(part) + 1) / len(chosen)
        return self.began + _MINUTE * self.arguments.minutes * share - _RESERVE

    def run(self, jobs: Iterable[Job], at_once: int, until: float) -> Iterator[Row]:
        yield from run_jobs(jobs, at_once, until, self.record.folder / "device.log")


def find_device(name: str) -> Iterator[Row]:
    """Describe the device."""
    import torch

    from metareg.util.devices import find_device

    device = find_device(name)
    row: Row = {"device": str(device), "torch": torch.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {
            "name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}", "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    yield row


# ---------------------------------------------------------------------------------------------------------------- parts


def list_compilations(session: Session) -> list[Job]:
    """Compile in parallel what the parts will need: one by one would take too long."""
    arguments, size, device = session.arguments, session.size, session.device
    jobs: list[Job] = []
    if size.compiled and "strategies" in arguments.only:
        jobs += strategies.list_compilations(size.cells, device)
    if size.compiled and "resume" in arguments.only:
        jobs += resume.list_compilations(size.resume_cases, device, session.scratch)
    return jobs


def compile_ahead(session: Session) -> None:
    """Do what otherwise happens during the part `parity`, if that is left out."""
    until = session.began + _COMPILING * _MINUTE * session.arguments.minutes
    for row in session.run(list_compilations(session), _cores(), until):
        session.record.add("compilations", row)


def run_parity(session: Session) -> None:
    """Compare whole steps; nothing is timed here, so what later parts need is compiled at the same time."""
    size, end = session.size, session.end_of("parity")
    names = parity.STRATEGIES if size.compiled else parity.STRATEGIES[:-1]
    seconds = min(180.0, end - time.monotonic())
    jobs = parity.list_jobs(
        session.arguments.algorithms, size.parity, names, size.parity_precisions, session.device, seconds
    )
    for row in session.run([*list_compilations(session), *jobs], _cores(), end):
        session.record.add("parity" if "augmenter" in row else "compilations", row)


def run_resume(session: Session) -> None:
    size, end, folder = session.size, session.end_of("resume"), session.scratch
    seconds = end - time.monotonic()
    for jobs in (
        resume.list_jobs(size.resume_cases, size.resume_steps, session.device, folder, seconds),
        resume.list_second_jobs(size.resume_cases, size.resume_steps, folder, seconds),
    ):
        for row in session.run(jobs, _cores(), end):
            session.record.add("resume", row)
    for row in resume.compare_runs(size.resume_cases, size.resume_steps, folder):
        session.record.add("resume", row)


def run_strategies(session: Session) -> None:
    size, end = session.size, session.end_of("strategies")
    jobs = strategies.list_jobs(size.cells, session.device, size.seconds, compiled=size.compiled)
    for row in session.run(jobs, 1, end):
        session.record.add("strategies", row)


def run_pairs(session: Session) -> None:
    arguments, size, end = session.arguments, session.size, session.end_of("pairs")
    count = arguments.seeds or size.seeds or _cores()
    seeds, task = range(arguments.first_seed, arguments.first_seed + count), pairs.choose_task()
    strategy = arguments.strategy or _find_fastest(session.record.content)
    print(f"pairs: {count} seeds from {seeds.start} on, {task}, strategy {strategy}", flush=True)
    session.record.content["pairs_of"] = {"task": task, "strategy": strategy}
    seconds = min(size.pairs_seconds, end - time.monotonic() - _RESERVE_OF_PAIRS)
    jobs = pairs.list_jobs(seeds, task, size.pairs, strategy, session.device, seconds)
    for row in session.run(jobs, count, end):
        session.record.add("pairs", row)


PARTS: Mapping[str, Callable[[Session], None]] = {
    "parity": run_parity, "resume": run_resume, "strategies": run_strategies, "pairs": run_pairs,
}  # fmt: skip


def _find_fastest(content: Mapping[str, Sequence[Row]]) -> str:
    """Return the fastest strategy for Conv4-64 on 28×28 pixels; vectorized if that is unknown."""
    timed = {
        row["strategy"]: row["ms"]
        for row in content.get("strategies", [])
        if (row["setting"], row["precision"], row["status"]) == (PAIRS_LIKE, "fp32", "timed")
        and row["strategy"] in parity.STRATEGIES
    }
    return min(timed, key=timed.__getitem__, default="vectorized")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------------------- page


def page(content: Mapping[str, Any]) -> str:
    """Return the results as tables."""
    about = content.get("device", [{}])[0]
    parts = [f"# On {about.get('name', about.get('device', 'an unknown device'))}, torch {about.get('torch', '?')}"]
    if rows := content.get("parity"):
        parts += ["## Whole training steps beside the CPU in float64", *_parity_page(rows)]
    columns = {
        "problems": ("part", "status", "reason"),
        "resume": (
            "setting", "algorithm", "strategy", "deterministic", "repeated", "resumed", "metrics", "status", "reason",
        ),
        "compilations": ("setting", "precision", "strategy", "algorithm", "seconds", "status", "reason"),
        "strategies": (
            "setting", "precision", "strategy", "ms", "loop_ms", "ratio", "peak_mb", "loop_peak_mb",
            "gradient_difference", "ready_seconds", "status", "reason",
        ),
    }  # fmt: skip
    titles = {
        "problems": "Parts that broke",
        "resume": "Exact resume: entries of the weights that differ after the same run again, and after a resumed one",
        "compilations": "Compiling, many at once: seconds to the end of the first step",
        "strategies": "A training step by strategy, beside the loop",
    }
    for name, title in titles.items():
        if rows := content.get(name):
            parts += [f"## {title}", _table(columns[name], rows)]
    if rows := content.get("pairs"):
        parts += [f"## MAML with CML against MAML, {content['pairs_of']['task']}", *_pairs_page(rows)]
    return "\n\n".join(parts) + "\n"


def _parity_page(rows: Sequence[Row]) -> list[str]:
    """Return the worst figures by setting, precision and strategy, then each cell that differs."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key, "") for key in ("setting", "precision", "strategy")), []).append(row)
    summary = []
    for (setting, precision, strategy), cells in groups.items():
        counts = {
            name: sum(row["status"] == name for row in cells) for name in ("same", "differs", "refused", "failed")
        }
        compared = [row for row in cells if "difference" in row]
        worst = {key: max((row[key] for row in compared), default="") for key in ("difference", "of_way")}
        summary.append({"setting": setting, "precision": precision, "strategy": strategy, **counts, **worst})
    others = [row for row in rows if row["status"] != "same"]
    columns = ("setting", "algorithm", "augmenter", "strategy", "precision", "status", "difference", "of_way", "reason")
    about = ("setting", "algorithm", "strategy", "remark")
    said = {tuple(row[key] for key in about) for row in rows if row.get("remark")}
    remarks = [dict(zip(about, each, strict=True)) for each in sorted(said)]
    tables = [(tuple(summary[0]), summary), (columns, others), (about, remarks)]
    return [_table(names, part) for names, part in tables if part]


def _pairs_page(rows: Sequence[Row]) -> list[str]:
    tested = [row for row in rows if "test" in row]
    if not tested:
        return ["No test yet.", _table(("seed", "step", "status", "reason"), rows)]
    summary = pairs.summarise(tested)
    lines = [f"Seeds {summary['seeds']}, tested with the best weights of {summary['steps']} steps."]
    table = [
        {"inner steps": steps, **{k: v for k, v in summary[f"after {steps}"].items() if k != "by_seed"}}
        for steps in pairs.INNER_STEPS
    ]
    by_seed = [
        {"seed": seed, "steps": steps, **{f"after {k}": summary[f"after {k}"]["by_seed"][i] for k in pairs.INNER_STEPS}}
        for i, (seed, steps) in enumerate(zip(summary["seeds"], summary["steps"], strict=True))
    ]
    broken = [row for row in rows if row["status"] in ("failed", "refused", "not run")]
    tables = [_table(tuple(table[0]), table), "CML less none, by seed, in points:", _table(tuple(by_seed[0]), by_seed)]
    return [*lines, *tables, *([_table(("seed", "status", "reason"), broken)] if broken else [])]


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [name for name in columns if any(name in row for row in rows)]
    lines = [columns, ["---"] * len(columns), *([_show(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _show(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


# -------------------------------------------------------------------------------------------------------------- command


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="at most, for all parts; by default 12, with --quick 5")
    parser.add_argument("--quick", action="store_true", help="a little of everything, for a CPU")
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help="these parts"
    )
    parser.add_argument("--algorithms", nargs="+", metavar="NAME", help="compare the steps of these alone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--strategy", help="of the pairs; by default what was fastest in the part before")
    parser.add_argument("--seeds", type=int, help="how many pairs; by default one for each core")
    parser.add_argument("--first-seed", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULTS / "device", help="the folder of device.json and device.md")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out what is compiled, which takes most of the time"
    )
    arguments = parser.parse_args()
    arguments.minutes = arguments.minutes or (5 if arguments.quick else 12)
    arguments.only = [name for name in PARTS if name in arguments.only]
    installed = {pair.algorithm for pair in combinations()}
    for name in set(arguments.algorithms or ()) - installed:
        parser.error(str(UnknownNameError("algorithm", name, installed)))
    return arguments


def main() -> None:
    began, arguments = time.monotonic(), read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end
    os.environ.update({"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"})
    preload("torch", "matplotlib.figure", "metareg.runs.training", "metareg.testing")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        # Compile times are reported for an empty compiler cache.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{scratch}/compiled")
        record = Record(arguments.out, {"machine": machine(1), "minutes": arguments.minutes})
        size = QUICK if arguments.quick else FULL
        if arguments.no_compile:
            cases = [case for case in size.resume_cases if case["strategy"] != "compiled"]
            size = replace(size, compiled=False, resume_cases=cases)
        session = Session(arguments, size, record, began, Path(scratch))
        for row in session.run([Job({}, find_device, {"name": arguments.device})], 1, began + 60):
            record.add("device", row)
            arguments.device = row.get("device", "cpu")
        if "parity" not in arguments.only:
            compile_ahead(session)
        for name in arguments.only:
            try:
                PARTS[name](session)
            except Exception as error:  # an error in one part on an untried device must not cost the other parts
                traceback.print_exc()
                record.add("problems", {"part": name, **describe_problem(error)})
            spent = record.content.setdefault("seconds", {})
            spent[name] = round(time.monotonic() - began - sum(spent.values()), 1)
            record.write()
    print((arguments.out / "device.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
