"""Few-shot image classification: every algorithm with and without CML, over seeds.

    METAREG_DATA=FOLDER python benchmarks/image_results.py run benchmarks/results/images-accuracy.json
    python benchmarks/image_results.py table benchmarks/results/images-accuracy.json

`run` does what the `metareg train` command of each row does, without its validations and pictures, and writes the file
after every run; started again it goes on where it stopped. The settings are in image_results.yaml.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import metareg

SETTINGS = Path(__file__).with_suffix(".yaml")
_STUDENT_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # 1, 2, … degrees of freedom
_KEYS = ("seed", "task", "ways", "shots", "algorithm", "augment")


def command(settings: Mapping[str, Any], task: str, ways: int, shots: int, algorithm: str, augment: str) -> str:
    """The command of a row, for one seed."""
    options = settings["options"]
    return (
        f"metareg train --algo {algorithm} --augment {augment} --task {task} --ways {ways} --shots {shots} "
        f"--query {options['query']} --model {options['model']} --steps {options['steps']} "
        f"--meta-batch {options['meta_batch']} --inner-steps {options['inner_steps']} --seed SEED "
        f"--set model.width={options['width']} --set inner_lr={settings['inner_lr'][algorithm]} "
        f"--set outer_lr={options['outer_lr']} --set test_tasks={options['test_tasks']} "
        f"--set 'test_inner_steps={options['test_inner_steps']}'"
    )


def combinations(settings: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """``(seed, task, ways, shots, algorithm, augment)``, whole tables seed after seed."""
    for seed, algorithm, (task, ways, shots), augment in itertools.product(
        settings["seeds"], settings["algorithms"], settings["data"], settings["augment"]
    ):
        yield seed, task, ways, shots, algorithm, augment


def one_run(settings: Mapping[str, Any], combination: tuple[Any, ...]) -> dict[str, Any]:
    """Train and test once."""
    from metareg.registry import resolve

    seed, name, ways, shots, algorithm, augment = combination
    options = settings["options"]
    task = resolve("tasks", name, {"ways": ways, "shots": shots, "query": options["query"]}).instance
    learner = metareg.MetaLearner(
        options["model"],
        algo=algorithm,
        augment=augment,
        spec=task.spec,
        model_options={"width": options["width"]},
        inner_steps=options["inner_steps"],
        inner_lr=settings["inner_lr"][algorithm],
        outer_lr=options["outer_lr"],
        seed=seed,
    )
    start = time.perf_counter()
    learner.fit(task, options["steps"], meta_batch=options["meta_batch"])
    seconds = time.perf_counter() - start
    test = learner.evaluate(task, options["test_tasks"], inner_steps=options["test_inner_steps"]).to_dict()["steps"]
    return dict(zip(_KEYS, combination, strict=True)) | {"seconds": round(seconds, 1), "test": test}


def run(path: Path) -> None:
    """Run what the file does not hold yet."""
    settings = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"settings": settings, "runs": []}
    if content["settings"] != settings:
        raise SystemExit(f"{path} was made with other settings; name another file.")
    done = {tuple(each[key] for key in _KEYS) for each in content["runs"]}
    for combination in combinations(settings):
        if combination in done:
            continue
        result = one_run(settings, combination)
        content["versions"] = {"metareg": metareg.__version__, "python": platform.python_version()}
        content["runs"].append(result)
        temporary = path.with_suffix(".part")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(path)
        means = ", ".join(f"{each['inner_steps']}: {each['mean']:.3f} ± {each['ci95']:.3f}" for each in result["test"])
        print(*combination, means, f"{result['seconds']} s", f"load {os.getloadavg()[0]:.1f}", flush=True)


def interval(values: list[float]) -> str:
    """Mean and half the 95 % interval over seeds (Student's t), in percent."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    if len(values) < 2:
        return mean
    half = _STUDENT_95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {100 * half:.1f}"


def table(path: Path) -> str:
    """The results as Markdown; combinations without a run are left out, and seeds are counted."""
    content = json.loads(path.read_text(encoding="utf-8"))
    settings = content["settings"]
    lines: list[str] = []
    for task, ways, shots in settings["data"]:
        lines += [
            f"### {task}, {ways}-way {shots}-shot",
            "",
            "Accuracy in %. With one seed: its mean over the test tasks ± 1.96 standard errors; with several: the mean over "
            "seeds ± 95 % interval over seeds.",
            "",
            f"| algorithm | CML | seeds | {' | '.join(f'{k} steps' for k in settings['options']['test_inner_steps'])} |",
            f"|---|---|---|{'---|' * len(settings['options']['test_inner_steps'])}",
        ]
        commands = []
        for algorithm, augment in itertools.product(settings["algorithms"], settings["augment"]):
            wanted = (task, ways, shots, algorithm, augment)
            runs = [each for each in content["runs"] if tuple(each[key] for key in _KEYS[1:]) == wanted]
            if not runs:
                continue
            cells = []
            for row in zip(*(each["test"] for each in runs), strict=True):
                means = [each["mean"] for each in row]
                alone = f"{100 * means[0]:.1f} ± {100 * row[0]['ci95']:.1f}"
                cells.append(alone if len(row) == 1 else interval(means))
            lines.append(
                f"| {algorithm} | {'no' if augment == 'none' else 'yes'} | {len(runs)} | {' | '.join(cells)} |"
            )
            commands.append(command(settings, *wanted))
        lines += ["", "```sh", *commands, "```", ""]
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
