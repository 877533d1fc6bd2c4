"""Measures the costs of algorithms relative to MAML: ``python benchmarks/family.py [NAME …]``.

Each algorithm runs in fresh processes: 5-way 1-shot glyphs, 4 tasks, 5 inner steps, strategy vectorized, otherwise as
the algorithm and the task recommend. MAML runs with the same model. The figures are ratios. For training steps: CPU time,
in turns, and peak memory above the level before the first step. For evaluations of 20 tasks after 5 inner steps: CPU time
and bytes of live tensors. metareg/registry/costs.json holds them, for `metareg show` and docs/algorithms.md.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from harness import interleaved_clocks, machine, paired

from metareg import Episodes, MetaLearner
from metareg.registry.costs import PATH
from metareg.registry.plugins import Entry, find_entry, list_entries
from metareg.runs.options import assemble
from metareg.runs.training import prepare_run
from metareg.testing.memory import measure_peak
from metareg.util.devices import peak_memory, reset_peak_memory
from metareg.util.torch_internals import tree_leaves

SETTING: dict[str, Any] = {"inner_steps": 5, "meta_batch": 4, "strategy": "vectorized"}
ROUNDS, STEPS, TASKS = 5, 3, 20


@dataclass(frozen=True)
class Bench:
    """A learner, and the tasks for its measurement."""

    learner: MetaLearner
    source: Any
    batch: Sequence[Episodes]

    @classmethod
    def build(cls, algorithm: str, model: str | None) -> Bench:
        chosen = {} if model is None else {"model": model}
        learner, source = prepare_run(assemble({"algo": algorithm, "task": "glyphs", **chosen}, SETTING))
        batch = source.episodes("train", range(SETTING["meta_batch"]), seed=0)
        learner.initialize(batch[0].support_x[0])
        return cls(learner, source, batch)

    def step(self) -> None:
        self.learner.step(self.batch)

    def evaluate(self) -> None:
        self.learner.evaluate(self.source, tasks=TASKS, inner_steps=[SETTING["inner_steps"]])


def repeat(work: Callable[[], None], times: int) -> None:
    """Repeat some work."""
    for _ in range(times):
        work()


def compare_times(work: Callable[[], None], reference: Callable[[], None], times: int) -> float:
    """Return the ratio of CPU times to the reference, measured in turns after one warm-up of each."""
    works = {"work": partial(repeat, work), "reference": partial(repeat, reference)}
    for each in works.values():
        each(times)
    clocks = interleaved_clocks(works, dict.fromkeys(works, times), ROUNDS, math.inf)
    return paired(*([each.cpu for each in blocks] for blocks in clocks.values()))


def measure_memory(device: torch.device, work: Callable[[], None]) -> int:
    """Return the peak bytes of three calls (the second is traced) above what the process used before."""
    reset_peak_memory(device)
    before = peak_memory(device)
    repeat(work, 3)
    after = peak_memory(device)
    if before is None or after is None:
        raise SystemExit("This system does not say how much memory a process took.")
    return after - before


def measure_state(learner: MetaLearner, batch: Sequence[Episodes]) -> dict[str, float]:
    """Return the numbers of state per adapted number, and of learned numbers per number of the model."""
    functions, meta = learner.engine.plain, learner.plain_meta_parameters
    with torch.no_grad():
        adaptation = functions.start(functions.prepare(meta, batch[0].unstack(0)))
    kept = sum(leaf.numel() for leaf in tree_leaves(adaptation.state) if isinstance(leaf, torch.Tensor))
    adapted = sum(value.numel() for value in adaptation.params.values())
    own = sum(value.numel() for name, value in meta.items() if name.startswith(f"{learner.algorithm.name}."))
    model = sum(value.numel() for name, value in meta.items()) - own
    return {"state": kept / max(adapted, 1), "learned": own / model}


def probe(algorithm: str, model: str | None, of: Literal["step", "evaluation"], timed: bool) -> dict[str, float]:
    """Measure memory, and if `timed` also times in turns with MAML, in this process."""

    def get_work(bench: Bench) -> Callable[[], None]:
        return bench.step if of == "step" else bench.evaluate

    bench = Bench.build(algorithm, model)
    work = get_work(bench)
    found = {"memory": float(measure_memory(bench.learner.device, work) if of == "step" else measure_peak(work))}
    if timed:
        times = STEPS if of == "step" else 1
        found["time"] = compare_times(work, get_work(Bench.build("maml", model)), times)
    if of == "step":
        found |= measure_state(bench.learner, bench.batch)
    return found


def run_probe(*request: Any) -> dict[str, float]:
    """Run `probe` in a fresh process."""
    command = [sys.executable, __file__, "--probe", json.dumps(request)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(entry: Entry, baselines: dict[tuple[str | None, str], float]) -> dict[str, float]:
    """Return the rounded figures of one algorithm; `baselines` caches MAML's memory for each model."""
    model = getattr(entry.load(), "default_model", None)
    found: dict[str, float] = {}
    for of, prefix in (("step", ""), ("evaluation", "evaluation_")):
        if (model, of) not in baselines:
            baselines[model, of] = run_probe("maml", model, of, False)["memory"]
        figures = run_probe(entry.qualified, model, of, True)
        figures["memory"] /= baselines[model, of]
        found |= {prefix + name: round(value, 2) for name, value in figures.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="algorithms; all that are installed by default")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.probe:
        print(json.dumps(probe(*json.loads(options.probe))))
        return
    entries = [find_entry("algorithms", name) for name in options.names] or list_entries("algorithms")
    content = json.loads(PATH.read_text("utf-8")) if PATH.exists() else {"figures": {}}
    baselines: dict[tuple[str | None, str], float] = {}
    for entry in entries:
        content["figures"][entry.target] = figures = measure(entry, baselines)
        content["machine"] = machine(threads=1)
        content["figures"] = dict(sorted(content["figures"].items()))
        PATH.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        print(entry.name, figures)


if __name__ == "__main__":
    main()
