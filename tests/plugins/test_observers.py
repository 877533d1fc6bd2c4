"""The shipped observers: what they write, and their messages if they cannot."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import metareg
from metareg import MetaregError, PluginError, UsageError


def trained(path: Path, observer: Any) -> metareg.Run:
    options: dict[str, Any] = {"steps": 4, "log_every": 2, "eval_every": 2, "eval_tasks": 2, "test_tasks": 4}
    options |= {"test_inner_steps": [0, 1], "strategy": "serial"}
    return metareg.train("maml", task="sinusoid", out=path, observers=[observer], **options)


def test_json_lines_hold_the_whole_run_in_order(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "jsonl")
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == [
        "start", "step", "evaluation", "step", "evaluation", "evaluation", "end",
    ]  # fmt: skip
    assert events[0]["config"]["algo"]["name"] == "maml"
    assert events[-2]["split"] == "test"
    assert run.evaluation is not None
    assert events[-2]["steps"][1] == {"inner_steps": 1, "mean": run.evaluation.mean(1), "ci95": run.evaluation.ci95(1)}
    assert {event["run"] for event in events} == {str(run.path)}


def test_json_lines_of_several_runs_share_a_file(tmp_path: Path) -> None:
    from metareg.registry.plugins import resolve

    shared = tmp_path / "all.jsonl"
    for number in range(2):
        trained(tmp_path / f"run-{number}", resolve("observers", "jsonl", {"file": str(shared)}))
    assert len({json.loads(line)["run"] for line in shared.read_text().splitlines()}) == 2


def test_json_lines_that_cannot_be_written_are_one_sentence(tmp_path: Path) -> None:
    from metareg.registry.plugins import resolve

    with pytest.raises(MetaregError, match="cannot write"):
        trained(tmp_path / "run", resolve("observers", "jsonl", {"file": str(tmp_path / "no" / "folder.jsonl")}))


def test_tensorboard_holds_training_and_evaluation(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
    assert run.evaluation is not None
    (tested,) = events.Scalars("test/mse/inner_steps_1")
    assert tested.value == pytest.approx(run.evaluation.mean(1), rel=1e-6)


def read_history(run: metareg.Run, name: str) -> dict[int, float]:
    """Read a metric by step from MLflow's files in the run's folder."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path / 'mlflow.db'}")
    (tracked,) = client.search_runs([client.get_experiment_by_name("metareg").experiment_id])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["algo.name"] == "maml"
    assert [each.path for each in client.list_artifacts(tracked.info.run_id)] == ["results.json"]
    return {each.step: each.value for each in client.get_metric_history(tracked.info.run_id, name)}


@pytest.mark.filterwarnings("ignore")  # warnings of mlflow's own dependencies
def test_mlflow_holds_one_run_that_goes_on_when_resumed(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    run = trained(tmp_path / "run", "mlflow")
    assert run.evaluation is not None
    losses = {line["step"]: line["loss"] for line in run.metrics() if line["split"] == "train"}
    assert read_history(run, "train/loss") == losses
    assert read_history(run, "test/mse/inner_steps_1") == {4: run.evaluation.mean(1)}
    longer = metareg.resume(run.path, steps=6)
    losses = {line["step"]: line["loss"] for line in longer.metrics() if line["split"] == "train"}
    assert sorted(losses) == [2, 4, 6]
    assert read_history(longer, "train/loss") == losses


def test_wandb_keeps_a_run_offline_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    run = trained(tmp_path / "run", "wandb")
    assert not any(path.is_symlink() for path in run.path.rglob("*"))
    metareg.resume(run.path, steps=6)
    assert run.evaluation is not None
    identity = (run.path / "wandb-run-id.txt").read_text()
    files = sorted(run.path.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(files) == 2
    for name, value in (("train/loss", run.metrics()[0]["loss"]), ("test/mse/inner_steps_1", run.evaluation.mean(1))):
        assert name.encode() in files[0].read_bytes()
        assert repr(value).encode() in files[0].read_bytes()


@pytest.mark.parametrize(
    ("name", "module"), [("mlflow", "mlflow"), ("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_run_whose_tracker_is_not_installed_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"pip install 'metareg\[{name}\]'"):
        trained(tmp_path / "run", name)
    assert not list(tmp_path.iterdir())


def test_trackers_name_metrics_alike() -> None:
    class Log(metareg.Tracker):
        def __init__(self) -> None:
            self.logged: list[tuple[dict[str, float], int]] = []

        def log(self, values: dict[str, float], step: int) -> None:
            self.logged.append((values, step))

    evaluation = metareg.Evaluation("mse", False, (1, 5), torch.tensor([[1.0, 0.0], [2.0, 0.0]]), "none")
    log = Log()
    log.on_step(step=10, logs={"loss": 0.5})
    log.on_evaluation(step=20, split="test", evaluation=evaluation)
    assert log.logged == [
        ({"train/loss": 0.5}, 10),
        ({"test/mse/inner_steps_1": 1.5, "test/mse/inner_steps_5": 0.0}, 20),
    ]


def test_observers_take_no_part_where_there_is_no_run() -> None:
    learner = metareg.MetaLearner("mlp", spec=metareg.TaskSpec((1,), (1,)), loss="mse", strategy="vectorized")
    installed = [name for name in ("tensorboard", "mlflow", "wandb") if find_spec(name)]
    learner.fit("sinusoid", steps=2, log_every=1, observers=["jsonl", *installed])
    assert learner.steps_done == 2


def test_a_run_refused_before_its_first_step_leaves_no_folder(tmp_path: Path) -> None:
    class Unreachable:
        @metareg.hookimpl
        def on_run_start(self) -> None:
            raise UsageError("There is no tracker at this address.")

    class Mistaken:
        @metareg.hookimpl
        def augment_outer_loss(self) -> torch.Tensor:
            return torch.zeros(3)

    with pytest.raises(UsageError, match="no tracker at this address"):
        trained(tmp_path / "run", Unreachable())
    with pytest.raises(PluginError, match="scalar tensor"):
        metareg.train(augment=[Mistaken], out=tmp_path / "run", steps=2, strategy="serial")
    assert not list(tmp_path.iterdir())


def test_a_failing_observer_is_named(tmp_path: Path) -> None:
    class Broken:
        @metareg.hookimpl
        def on_step(self) -> None:
            raise RuntimeError("the tracker is down")

    with pytest.raises(PluginError, match=r"'broken'.*on_step.*the tracker is down"):
        trained(tmp_path / "run", Broken())
