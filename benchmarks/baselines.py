"""Measures what training adds: each algorithm's defaults on each task, the same learner untrained, and two simpler rules.

    METAREG_DATA=FOLDER python benchmarks/baselines.py --tasks cora citeseer --seeds 5   # train what is missing
    python benchmarks/baselines.py --page                                                # docs/baselines.md from the results

A cell is one seed of a task, for the rules or for one algorithm. `benchmarks/results/baselines.json` keeps the cells:
a cell is computed again only if its configuration has changed, and an interrupted run continues from its last checkpoint.
Changes of the code are not noticed; `--again` recomputes the named tasks.
"""

from __future__ import annotations

import argparse
import hashlib
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import RESULTS, machine
from torch import Tensor

from metareg import Episodes, RunConfig, train
from metareg.comparison.statistics import Estimate, over_seeds
from metareg.registry.plugins import resolve
from metareg.registry.task_source import TaskSource
from metareg.runs.options import Selection, assemble
from metareg.runs.training import prepare_run
from metareg.util.files import read_json, write_json, write_text

STORE = RESULTS / "baselines.json"
PAGE = Path(__file__).parent.parent / "docs" / "baselines.md"
TASKS = ("sinusoid", "harmonic", "sinusoid-line", "csbm", "cora", "citeseer", "glyphs", "omniglot-small")
ALGORITHMS = ("maml", "anil", "boil", "metasgd")
OPTIONS: Mapping[str, Mapping[str, Any]] = {"omniglot-small": {"ways": 5, "shots": 1}}
"""The options of a task's command, in addition to its name."""


def selection_of(task: str, algorithm: str, seed: int) -> Selection:
    """The defaults, tested after the inner steps of training and those of the configuration."""
    given = {"task": task, "algo": algorithm, "seed": seed}
    config = assemble(given, OPTIONS.get(task, {})).config
    tested = sorted({config.inner_steps, *config.test_inner_steps})
    return assemble(given, {**OPTIONS.get(task, {}), "test_inner_steps": tested})


def digest(*parts: Any) -> str:
    """A short name for a configuration."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------- rules


def rules(selection: Selection) -> dict[str, float]:
    """Return the scores of rules without a model on a run's test tasks: the means over tasks."""
    config, task = selection.config, selection.task.instance
    name, options = config.task.name, config.task.config
    if "standardised" not in options:
        return _means(TaskSource(selection.task), config, task)
    raw, standardised = (
        _means(TaskSource(resolve("tasks", name, {**options, "inputs": "sgc", "standardised": each})), config, task)
        for each in (False, True)
    )
    return {**raw, "support, standardised": standardised["support"]}


def _means(source: TaskSource, config: RunConfig, task: Any) -> dict[str, float]:
    sums: dict[str, float] = {}
    for episodes in _blocks(source, config):
        ways = task.spec.output_shape[0]
        found = _constant_value(episodes) if task.loss == "mse" else _nearest_centroid(episodes, ways)
        for name, scores in found.items():
            sums[name] = sums.get(name, 0.0) + float(scores.double().sum())
    return {name: total / config.test_tasks for name, total in sums.items()}


def _blocks(source: TaskSource, config: RunConfig) -> Iterable[Episodes]:
    for start in range(0, config.test_tasks, 50):
        indices = range(start, min(start + 50, config.test_tasks))
        yield from source.episodes(config.test_split, indices, config.seed)


def _constant_value(episodes: Episodes) -> dict[str, Tensor]:
    """Return the squared errors of predicting zero and of predicting the mean of the support targets ``[tasks]``."""
    target, mean = episodes.query_y, episodes.support_y.mean(1, keepdim=True)
    return {"constant": target.square().flatten(1).mean(1), "support": (target - mean).square().flatten(1).mean(1)}


def _nearest_centroid(episodes: Episodes, ways: int) -> dict[str, Tensor]:
    """Return the accuracies of chance and of the class with the nearest mean input, for raw and for normalised inputs."""
    support, query = episodes.support_x.flatten(2), episodes.query_x.flatten(2)
    found = {"constant": torch.full((len(support),), 1 / ways)}
    for name, scaled in (("support", lambda x: x), ("support, unit length", lambda x: F.normalize(x, dim=-1))):
        members = F.one_hot(episodes.support_y, ways).to(support)  # [tasks, support, ways]
        means = torch.einsum("tsw,tsf->twf", members, scaled(support)) / members.sum(1).unsqueeze(-1)
        nearest = torch.cdist(scaled(query), means).argmin(-1)
        found[name] = (nearest == episodes.query_y).float().mean(1)
    return found


# ------------------------------------------------------------------------------------------------------------- learners


def learners(selection: Selection, folder: Path) -> dict[str, Any]:
    """Return a run's mean test scores before and after training, for each number of inner steps."""
    config = selection.config
    learner, source = prepare_run(selection)
    untrained = learner.evaluate(
        source, config.test_tasks, split=config.test_split, inner_steps=config.test_inner_steps
    )
    began = time.process_time()
    run = train(config=config.model_dump(mode="json"), out=folder, resume=True)
    evaluation = run.evaluation
    assert evaluation is not None  # the run has ended
    return {
        "metric": evaluation.metric, "higher_is_better": evaluation.higher_is_better, "test_tasks": evaluation.tasks,
        "steps": config.steps, "meta_batch": config.meta_batch, "trained_inner_steps": config.inner_steps,
        "inner_steps": list(evaluation.inner_steps), "cpu_seconds": round(time.process_time() - began, 1),
        "untrained": [untrained.mean(k) for k in evaluation.inner_steps],
        "trained": [evaluation.mean(k) for k in evaluation.inner_steps],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- cells


def fill(store: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Compute the wanted cells that are missing, and save after each."""
    done = set()

    def cell(key: str, mark: str, compute: Callable[[], dict[str, Any]]) -> None:
        known = store["cells"].get(key)
        if known is None or known["configuration"] != mark or arguments.again:
            store["cells"][key] = {"configuration": mark, **compute()}
            store["cells"] = dict(sorted(store["cells"].items()))
            write_json(STORE, store)
            print(key, store["cells"][key], flush=True)
        done.add(key)

    for task in arguments.tasks:
        for seed in range(arguments.seeds):
            for algorithm in arguments.algorithms:
                selection = selection_of(task, algorithm, seed)
                config = selection.config
                mark = digest(config.task.model_dump(), config.test_tasks, config.test_split)
                if f"{task}/rules/{seed}" not in done:
                    cell(f"{task}/rules/{seed}", mark, lambda selection=selection: rules(selection))
                mark = digest(config.to_yaml())
                folder = arguments.runs / f"{task}-{algorithm}-{seed}-{mark}"
                cell(
                    f"{task}/{algorithm}/{seed}",
                    mark,
                    lambda selection=selection, folder=folder: learners(selection, folder),
                )


# ----------------------------------------------------------------------------------------------------------------- page


INTRODUCTION = """\
# What training adds

`python benchmarks/baselines.py` trains every algorithm on each task with the defaults
(`metareg train --algo NAME --task TASK`), and tests it on tasks that no choice was based on. On the same test tasks, it
computes

- a *constant*: chance, or the error of predicting zero;
- a *rule*: the class with the nearest mean of its support examples (of pixels; on graphs, of the features after two
  propagations, raw or standardised as for the model), or the mean of the support targets. "Of unit length" means that
  each example is first scaled to length 1;
- the same learner *untrained*: the initial weights of the seed, adapted by the algorithm's own inner loop.

"Training adds" is the improvement of the trained learner over the untrained one, paired by seed. ± is half the 95 %
interval of the mean over seeds (Student's t). A seed fixes initial weights, training tasks and test tasks; on cora and
citeseer, it also fixes the split of the classes. *Diverges*: in this many seeds, the score of a test task was not finite
after more inner steps than in training.
"""
NOTES: Mapping[str, str] = {
    "cora": "Three training classes add nothing to an untrained learner on standardised features. On validation tasks, "
    "larger outer steps, more steps, larger batches, and training tasks with masked words or random signs lowered the "
    "accuracy or did not change it: the features specialise on the training classes. The defaults are the longest tested "
    "training that did no harm.",
    "sinusoid-line": "On lines, untrained learners differ greatly between seeds, so the intervals are wide.",
    "citeseer": "The settings were chosen on cora.",
}
"""Remarks on a task's figures."""


def page(store: Mapping[str, Any]) -> str:
    """Return the page with all tasks that have cells."""
    tasks = [task for task in TASKS if any(key.startswith(f"{task}/") for key in store["cells"])]
    return "\n".join([INTRODUCTION, *(_section(task, store["cells"]) for task in tasks)]).rstrip() + "\n"


def _section(task: str, cells: Mapping[str, Any]) -> str:
    by_name: dict[str, list[dict[str, Any]]] = {}
    for key, cell in cells.items():
        of_task, name, _ = key.split("/")
        if of_task == task:
            by_name.setdefault(name, []).append(cell)
    rule_cells = by_name.pop("rules")
    example = next(iter(by_name.values()))[0]
    percent = example["metric"] == "accuracy"
    figures = f"{example['metric']}{' in %' if percent else ''}, "
    figures += f"{'higher' if example['higher_is_better'] else 'lower'} is better"
    named = {
        "constant": "chance" if percent else "predicting zero",
        "support": "nearest mean" if percent else "mean of the support targets",
        "support, unit length": "nearest mean, of unit length",
        "support, standardised": "nearest mean, standardised as for the model",
    }
    rules_said = "; ".join(
        f"{named[name]} {_shown(over_seeds([cell[name] for cell in rule_cells]), percent)}"
        for name in named
        if name in rule_cells[0]
    )
    lines = [
        f"## {task}",
        "",
        _wrapped(f"{figures[0].upper()}{figures[1:]}; {example['test_tasks']} test tasks. {rules_said.capitalize()}."),
        "",
        "| algorithm | seeds | training steps × tasks | inner steps | untrained | trained | training adds | seeds better |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    order = [*ALGORITHMS, *(name for name in by_name if name not in ALGORITHMS)]
    for name in (each for each in order if each in by_name):
        lines += [_row(name, by_name[name], steps, percent) for steps in _shown_steps(by_name[name][0])]
    return "\n".join([*lines, *(["", _wrapped(NOTES[task])] if task in NOTES else []), ""])


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, 120, break_on_hyphens=False)


def _shown_steps(cell: Mapping[str, Any]) -> list[int]:
    """Return the number of inner steps in training, and the largest that was tested."""
    return sorted({cell["trained_inner_steps"], cell["inner_steps"][-1]})


def _row(name: str, cells: list[dict[str, Any]], inner_steps: int, percent: bool) -> str:
    at = cells[0]["inner_steps"].index(inner_steps)
    untrained, trained = (np.array([cell[kind][at] for cell in cells]) for kind in ("untrained", "trained"))
    gain = (trained - untrained) * (1 if cells[0]["higher_is_better"] else -1)
    figures = [_shown(over_seeds(values), percent) for values in (untrained, trained)]
    training = f"{cells[0]['steps']:,} × {cells[0]['meta_batch']}"
    gained = _shown(over_seeds(gain), percent, sign="+")
    if diverged := int((~np.isfinite(trained)).sum()):
        figures[1], gained = f"diverges ({diverged} of {len(cells)})", "–"
    columns = [name, len(cells), training, inner_steps, *figures, gained, int((gain > 0).sum())]
    return f"| {' | '.join(map(str, columns))} |"


def _shown(found: Estimate, percent: bool, sign: str = "") -> str:
    factor, decimals = (100, 1) if percent else (1, 3)
    text = f"{factor * found.mean:{sign}.{decimals}f}".replace("-", "−")
    constant = not np.isfinite(found.half) or found.half == 0
    return text if constant else f"{text} ± {factor * found.half:.{decimals}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, metavar="NAME", help="installed algorithms")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/baselines"), help="where the runs' folders are")
    parser.add_argument("--again", action="store_true", help="compute also the cells that are there")
    parser.add_argument("--page", action="store_true", help="only write docs/baselines.md")
    arguments = parser.parse_args()
    store = read_json(STORE) if STORE.is_file() else {"cells": {}}
    if not arguments.page:
        torch.set_num_threads(1)
        store["machine"] = machine(1)
        fill(store, arguments)
    write_text(PAGE, page(store))
    print(f"Written to {PAGE}")


if __name__ == "__main__":
    main()
