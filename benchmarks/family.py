"""What a training step of each algorithm costs beside MAML's: ``python benchmarks/family.py [NAME …]``.

Each algorithm has a fresh process: 5-way 1-shot glyphs, 4 tasks, 5 inner steps, strategy vectorized, else as the algorithm
and the task recommend, and beside it MAML with the same model. The figures are ratios: CPU time of steps in turns, and peak
memory over that before the first step. They go into metareg/registry/costs.json, which `metareg show` and docs/algorithms.md
read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from harness import machine

from metareg import Episodes, MetaLearner
from metareg.registry.costs import PATH
from metareg.registry.plugins import Entry, find_entry, list_entries
from metareg.runs.options import assemble
from metareg.runs.training import prepare_run
from metareg.util.devices import peak_memory, reset_peak_memory
from metareg.util.torch_internals import tree_leaves

SETTING: dict[str, Any] = {"inner_steps": 5, "meta_batch": 4, "strategy": "vectorized"}
ROUNDS, STEPS = 5, 3


def build(algorithm: str, model: str | None) -> tuple[MetaLearner, Sequence[Episodes]]:
    """A learner and one batch of its tasks."""
    chosen = {} if model is None else {"model": model}
    learner, source = prepare_run(assemble({"algo": algorithm, "task": "glyphs", **chosen}, SETTING))
    batch = source.episodes("train", range(SETTING["meta_batch"]), seed=0)
    learner.initialize(batch[0].support_x[0])
    return learner, batch


def take_steps(learner: MetaLearner, batch: Sequence[Episodes], steps: int) -> float:
    """CPU seconds of one step."""
    start = time.process_time()
    for _ in range(steps):
        learner.step(batch)
    return (time.process_time() - start) / steps


def measure_memory(learner: MetaLearner, batch: Sequence[Episodes]) -> int:
    """Peak bytes of three steps over what the process took before them; the second one is traced."""
    reset_peak_memory(learner.device)
    before = peak_memory(learner.device)
    take_steps(learner, batch, 3)
    after = peak_memory(learner.device)
    if before is None or after is None:
        raise SystemExit("This system does not say how much memory a process took.")
    return after - before


def measure_state(learner: MetaLearner, batch: Sequence[Episodes]) -> dict[str, float]:
    """Numbers kept from step to step, for each that is adapted; those learned beside the model's, for each of these."""
    functions, meta = learner.engine.plain, learner.plain_meta_parameters
    with torch.no_grad():
        adaptation = functions.start(functions.prepare(meta, batch[0].unstack(0)))
    kept = sum(leaf.numel() for leaf in tree_leaves(adaptation.state) if isinstance(leaf, torch.Tensor))
    adapted = sum(value.numel() for value in adaptation.params.values())
    own = sum(value.numel() for name, value in meta.items() if name.startswith(f"{learner.algorithm.name}."))
    model = sum(value.numel() for name, value in meta.items()) - own
    return {"state": kept / max(adapted, 1), "learned": own / model}


def probe(algorithm: str, model: str | None, timed: bool) -> dict[str, float]:
    """What one process measures: memory, and where `timed` what it takes in turns with MAML."""
    learner, batch = build(algorithm, model)
    found = {"memory": float(measure_memory(learner, batch))}
    if not timed:
        return found
    maml, tasks = build("maml", model)
    take_steps(maml, tasks, 3)
    ratios = [take_steps(learner, batch, STEPS) / take_steps(maml, tasks, STEPS) for _ in range(ROUNDS)]
    return found | {"time": statistics.median(ratios)} | measure_state(learner, batch)


def run_probe(algorithm: str, model: str | None, timed: bool) -> dict[str, float]:
    """`probe` in a fresh process."""
    request = json.dumps([algorithm, model, timed])
    command = [sys.executable, __file__, "--probe", request]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(entry: Entry, baselines: dict[str | None, float]) -> dict[str, float]:
    """The figures of one algorithm, rounded; `baselines` keeps MAML's memory for each model."""
    model = getattr(entry.load(), "default_model", None)
    if model not in baselines:
        baselines[model] = run_probe("maml", model, timed=False)["memory"]
    figures = run_probe(entry.qualified, model, timed=True)
    figures["memory"] /= baselines[model]
    return {name: round(figures[name], 2) for name in ("time", "memory", "state", "learned")}


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
    baselines: dict[str | None, float] = {}
    for entry in entries:
        content["figures"][entry.target] = figures = measure(entry, baselines)
        content["machine"] = machine(threads=1)
        content["figures"] = dict(sorted(content["figures"].items()))
        PATH.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        print(entry.name, figures)


if __name__ == "__main__":
    main()
