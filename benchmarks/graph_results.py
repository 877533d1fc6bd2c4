"""Few-shot node classification: every algorithm with and without CML, paired over seeds.

    METAREG_DATA=FOLDER python benchmarks/graph_results.py run benchmarks/results/graphs.json
    METAREG_DATA=FOLDER python benchmarks/graph_results.py run benchmarks/results/graphs-long.json \\
        --settings benchmarks/graph_results_long.yaml
    python benchmarks/graph_results.py table benchmarks/results/graphs.json benchmarks/results/graphs-long.json \\
        > docs/results-graphs.md

`run` does what the `metareg train` command beside each row of the table does, in one process and without its pictures; what
it finds in the file already it does not run again. The settings are in graph_results.yaml.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

import metareg

INTRODUCTION = """\
# Results: few-shot node classification

Accuracy on unseen classes, in %, mean over seeds ± 95 % interval over the seeds (Student's t); the last column is the
difference of the two methods on the same seed. A seed fixes the class split, the initial network and all tasks, so that
every row of a table sees the same test tasks.

Protocol: classes are kept apart as in Tan et al. (Transductive Linear Probing, LoG 2022), Cora 3 / 2 / 2 and CiteSeer
2 / 2 / 2 for training / validation / test, drawn anew for each seed; 2-way, 10 query nodes a class. Graphs: the npz files
of gnn-benchmark (Shchur et al., 2018), undirected, features as they are. Model: `sgc` with two propagations, one layer of
32 and a linear head, as in Meta-GNN. Step sizes and the number of training steps were chosen on Cora's validation tasks,
3 shots, seeds 0 to 2. 100 test tasks a run. The raw figures are in `benchmarks/results/`, the settings in
`benchmarks/graph_results*.yaml`; `benchmarks/graph_results.py` makes both them and this page.

What the figures say:

- With two or three classes to learn from, 60 training steps add little to what adapting the initial network gives ("not
  meta-trained"), and 300 take away from it: the features become those of the training classes. Which classes are in the
  test moves the accuracy by more than the algorithm does.
- At 60 steps CML and the algorithm alone differ by tenths of a point, within the intervals: no gain is shown. At 300
  steps CML loses less: the paired difference is positive, beyond its interval, for Meta-SGD on both graphs and for MAML
  on CiteSeer. It does not make the longer training better than the shorter one.
- ANIL, which leaves the body as it is within a task, is far behind: the test classes need features of their own.

Published figures, whose settings differ or are not stated, so that they are no comparison: Meta-GNN on Cora 72.5 and on
CiteSeer 61.3 (an aggregator's page; shots not stated). Meta-GNN's own code trains on all classes but the two of the test
(5 of Cora's, 4 of CiteSeer's) and takes 10 inner steps.
"""
SETTINGS = Path(__file__).with_suffix(".yaml")
UNTRAINED = "untrained"
_STUDENT_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # 1, 2, … degrees of freedom


def command(settings: Mapping[str, Any], task: str, shots: int, algorithm: str, augment: str, seed: int | str) -> str:
    """The command of one run."""
    options = settings["options"]
    return (
        f"metareg train --algo {algorithm} --augment {augment} --task {task} --ways 2 --shots {shots} --query 10 "
        f"--model {options['model']} --steps {options['steps']} --meta-batch {options['meta_batch']} "
        f"--inner-steps {options['inner_steps']} --seed {seed} --set inner_lr={settings['inner_lr'][algorithm]} "
        f"--set outer_lr={options['outer_lr']} --set hidden={options['hidden']} "
        f"--set test_tasks={options['test_tasks']} --set 'test_inner_steps={options['test_inner_steps']}'"
    )


def combinations(settings: Mapping[str, Any]) -> Iterator[tuple[int, str, int, str, str]]:
    """``(seed, task, shots, algorithm, augment)``, whole tables seed after seed."""
    yield from itertools.product(
        settings["seeds"], settings["tasks"], settings["shots"], settings["algorithms"], settings["augment"]
    )


def one_run(
    settings: Mapping[str, Any], seed: int, name: str, shots: int, algorithm: str, augment: str
) -> dict[str, Any]:
    """Train and test once."""
    from metareg.registry import resolve

    options = settings["options"]
    task = resolve("tasks", name, {"shots": shots, "inputs": options["model"]})
    learner = metareg.MetaLearner(
        options["model"],
        algo=algorithm,
        augment=augment,
        spec=task.instance.spec,
        model_options={"hidden": options["hidden"]},
        inner_steps=options["inner_steps"],
        inner_lr=settings["inner_lr"][algorithm],
        outer_lr=options["outer_lr"],
        seed=seed,
    )
    record: dict[str, Any] = {"task": name, "shots": shots, "algorithm": algorithm, "augment": augment, "seed": seed}

    def test() -> list[dict[str, Any]]:
        found = learner.evaluate(task.instance, options["test_tasks"], inner_steps=options["test_inner_steps"])
        return [
            {"inner_steps": each["inner_steps"], "mean": round(each["mean"], 6), "ci95": round(each["ci95"], 6)}
            for each in found.to_dict()["steps"]
        ]

    if algorithm == "maml" and augment == "none":
        record[UNTRAINED] = test()
    start = time.perf_counter()
    learner.fit(task.instance, options["steps"], meta_batch=options["meta_batch"])
    record["seconds"] = round(time.perf_counter() - start, 2)
    record["test"] = test()
    return record


def run(path: Path, chosen: Path) -> None:
    """Run what the file does not hold yet; it is rewritten after every run."""
    torch.set_num_threads(1)
    settings = yaml.safe_load(chosen.read_text())
    content = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": []}
    if content["settings"] != settings:
        raise SystemExit(f"{path} was made with other settings; name another file.")
    content["versions"] = {
        "metareg": metareg.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    keys = ("seed", "task", "shots", "algorithm", "augment")
    done = {tuple(each[key] for key in keys) for each in content["runs"]}
    for combination in combinations(settings):
        if combination in done:
            continue
        content["runs"].append(one_run(settings, *combination))
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(content))
        temporary.replace(path)
        last = content["runs"][-1]
        print(*combination, f"{last['test'][-1]['mean']:.3f}", f"{last['seconds']} s", flush=True)


def interval(values: list[float]) -> str:
    """Mean and half the 95 % interval over seeds (Student's t), in percent."""
    if len(values) < 2:
        return f"{100 * values[0]:.1f}"
    half = _STUDENT_95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.fmean(values):.1f} ± {100 * half:.1f}"


def table(path: Path) -> str:
    """The results as Markdown."""
    content = json.loads(path.read_text())
    settings, runs = content["settings"], content["runs"]
    each_seed = math.prod(len(settings[key]) for key in ("tasks", "shots", "algorithms", "augment"))
    seeds = [seed for seed in settings["seeds"] if sum(run["seed"] == seed for run in runs) == each_seed]
    runs = [run for run in runs if run["seed"] in seeds]
    after = settings["options"]["test_inner_steps"][-1]

    def scores(task: str, shots: int, algorithm: str, augment: str, part: str = "test") -> dict[int, float]:
        return {
            each["seed"]: next(row["mean"] for row in each[part] if row["inner_steps"] == after)
            for each in runs
            if (each["task"], each["shots"], each["algorithm"], each["augment"]) == (task, shots, algorithm, augment)
        }

    lines = [f"## {settings['options']['steps']} training steps, {len(seeds)} seeds", ""]
    for task, shots in itertools.product(settings["tasks"], settings["shots"]):
        untrained = interval(list(scores(task, shots, "maml", "none", UNTRAINED).values()))
        lines += [
            f"### {task}, 2-way {shots}-shot",
            "",
            f"Accuracy in % after {after} inner steps, mean over seeds ± 95 % interval. The initial network, not "
            f"meta-trained and adapted by MAML's rule: {untrained}.",
            "",
            "| algorithm | alone | with CML | CML − alone, paired |",
            "|---|---|---|---|",
        ]
        for algorithm in settings["algorithms"]:
            alone, with_cml = (scores(task, shots, algorithm, augment) for augment in ("none", "cml"))
            both = sorted(alone.keys() & with_cml.keys())
            gain = interval([with_cml[seed] - alone[seed] for seed in both])
            lines.append(
                f"| {algorithm} | {interval(list(alone.values()))} | {interval(list(with_cml.values()))} | {gain} |"
            )
        lines += ["", "```"]
        for algorithm, augment in itertools.product(settings["algorithms"], settings["augment"]):
            lines.append(command(settings, task, shots, algorithm, augment, "SEED"))
        lines += ["```", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("paths", type=Path, nargs="+", help="the raw results; `table` takes several")
    parser.add_argument("--settings", type=Path, default=SETTINGS)
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.paths[0], arguments.settings)
    else:
        print("\n".join([INTRODUCTION, *(table(path) for path in arguments.paths)]).rstrip())


if __name__ == "__main__":
    main()
