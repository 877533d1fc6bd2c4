"""Few-shot node classification: every algorithm with and without CML, paired over seeds.

    METAREG_DATA=FOLDER python benchmarks/graph_results.py run results-graphs.json
    python benchmarks/graph_results.py table results-graphs.json > docs/results-graphs.md

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
            {"inner_steps": each["inner_steps"], "mean": each["mean"], "scores": each["scores"]}
            for each in found.to_dict()["steps"]
        ]

    if algorithm == "maml" and augment == "none":
        record[UNTRAINED] = test()
    start = time.perf_counter()
    learner.fit(task.instance, options["steps"], meta_batch=options["meta_batch"])
    record["seconds"] = round(time.perf_counter() - start, 2)
    record["test"] = test()
    return record


def run(path: Path) -> None:
    """Run what the file does not hold yet; it is rewritten after every run."""
    torch.set_num_threads(1)
    settings = yaml.safe_load(SETTINGS.read_text())
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
    after = settings["options"]["test_inner_steps"][-1]

    def scores(task: str, shots: int, algorithm: str, augment: str, part: str = "test") -> dict[int, float]:
        return {
            each["seed"]: next(row["mean"] for row in each[part] if row["inner_steps"] == after)
            for each in runs
            if (each["task"], each["shots"], each["algorithm"], each["augment"]) == (task, shots, algorithm, augment)
        }

    lines = []
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
        lines.append("")
        lines += ["```"]
        for algorithm, augment in itertools.product(settings["algorithms"], settings["augment"]):
            lines.append(command(settings, task, shots, algorithm, augment, "SEED"))
        lines += ["```", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.path)
    else:
        print(table(arguments.path))


if __name__ == "__main__":
    main()
