"""Comparisons on a Ray cluster: requests to a stand-in for Ray, and a real cluster if Ray is installed."""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metareg import UsageError
from metareg.comparison.plan import Arm, PlannedRun
from metareg.comparison.ray_launcher import RayLauncher
from metareg.comparison.runner import compare

TINY = {
    "algo": ["maml", "anil"],
    "seeds": [0, 1],
    "options": {"steps": 5, "eval_tasks": 2, "test_tasks": 3, "test_inner_steps": [0, 1], "strategy": "vectorized"},
}


def run_at(path: Path, **options: Any) -> PlannedRun:
    config = {"algo": "maml", "augment": [], "task": "sinusoid", "seed": 0}
    return PlannedRun(Arm("maml", "none", "sinusoid"), 0, path, config, {**TINY["options"], **options})


class StandIn(types.ModuleType):
    """The part of Ray that `RayLauncher` uses; tasks run when their results are awaited."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self) -> None:
        super().__init__("ray")
        self.connection: dict[str, Any] | None = None
        self.resources = {"CPU": 4.0}
        self.asked: list[dict[str, Any]] = []
        self.cancelled: list[tuple[int, bool]] = []
        self.failure: Exception | None = None
        self._tasks: list[Callable[[], Any]] = []

    def is_initialized(self) -> bool:
        return self.connection is not None

    def init(self, **options: Any) -> None:
        if options["address"] == "nowhere:1":
            raise ConnectionError("nothing answers there\nand so on")
        self.connection = options
        signal.signal(signal.SIGTERM, lambda *_: None)

    def shutdown(self) -> None:
        self.connection = None

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, function: Callable[..., Any]) -> Any:
        ray = self

        class Remote:
            def __init__(self, **options: Any) -> None:
                self._options = options

            def options(self, **options: Any) -> Remote:
                return Remote(**self._options, **options)

            def remote(self, *arguments: Any) -> int:
                ray.asked.append(self._options)
                ray._tasks.append(lambda: function(*arguments))
                return len(ray._tasks) - 1

        return Remote()

    def wait(self, tasks: list[int], num_returns: int = 1, timeout: float | None = None) -> tuple[list[int], list[int]]:
        assert timeout is not None
        return tasks[:num_returns], tasks[num_returns:]

    def get(self, task: int) -> Any:
        if self.failure is not None:
            raise self.failure
        return self._tasks[task]()

    def cancel(self, task: int, force: bool = False) -> None:
        self.cancelled.append((task, force))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    """A stand-in for the package, in an empty folder."""
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return stand_in


def test_runs_are_carried_out_where_they_are_planned(ray: StandIn, tmp_path: Path) -> None:
    launcher = RayLauncher(jobs=2, threads=1)
    run = run_at(Path("runs", "a"))
    launcher.submit(run)
    os.chdir("/")  # as on a node
    (outcome,) = launcher.wait(1)
    assert outcome.run is run
    assert outcome.error is None
    assert json.loads((tmp_path / "runs" / "a" / "results.json").read_text())["split"] == "test"
    assert launcher.wait(0) == []
    launcher.close()
    assert ray.connection is None


@pytest.mark.usefixtures("ray")
def test_what_goes_wrong_in_a_run_comes_back() -> None:
    launcher = RayLauncher(jobs=1, threads=1)
    launcher.submit(run_at(Path("a"), inner_lr=-1))
    (outcome,) = launcher.wait(1)
    assert "inner_lr = -1 cannot be used" in str(outcome.error)
    assert not outcome.again


def test_a_dead_node_is_a_reason_to_try_again(ray: StandIn) -> None:
    launcher = RayLauncher(jobs=1, threads=1)
    launcher.submit(run_at(Path("a")))
    assert ray.asked[0]["max_retries"] > 0
    ray.failure = ray.exceptions.RayError("Traceback\n  of many lines\nThe node died.")
    (outcome,) = launcher.wait(1)
    assert outcome.error == "The cluster could not execute the run: The node died."
    assert outcome.again


def test_stopping_asks_first_and_closing_ends(ray: StandIn) -> None:
    launcher = RayLauncher(jobs=2, threads=1)
    for name in "ab":
        launcher.submit(run_at(Path(name)))
    launcher.stop()
    assert ray.cancelled == [(0, False), (1, False)]
    launcher.close()
    assert ray.cancelled[2:] == [(0, True), (1, True)]


def test_a_run_takes_its_threads_and_a_gpu_where_there_are_some(ray: StandIn) -> None:
    launcher = RayLauncher(jobs=None, threads=2)
    assert launcher.capacity == 2
    launcher.submit(run_at(Path("a")))
    ray.resources["CPU"] = 9.0
    assert launcher.capacity == 4
    ray.resources["GPU"] = 3.0
    with_gpus = RayLauncher(jobs=None, threads=2)
    assert with_gpus.capacity == 3
    with_gpus.submit(run_at(Path("b")))
    with_gpus.submit(run_at(Path("c"), device="cpu"))
    assert [(asked["num_cpus"], asked.get("num_gpus", 0)) for asked in ray.asked] == [(2, 0), (2, 1), (2, 0)]
    assert RayLauncher(jobs=7, threads=2).capacity == 7


def test_a_cluster_of_its_own_is_quiet_and_leaves_signals_alone(ray: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    launcher = RayLauncher(jobs=3, threads=2)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert ray.connection is not None
    assert (ray.connection["address"], ray.connection["num_cpus"]) == ("local", 6)
    assert ray.connection["log_to_driver"] is ray.connection["include_dashboard"] is False
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"  # chosen by the user
    launcher.close()
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    RayLauncher(jobs=1, threads=1).close()
    assert os.environ.pop("RAY_USAGE_STATS_ENABLED") == "0"
    (Path.home() / ".ray").mkdir()
    (Path.home() / ".ray" / "config.json").write_text('{"usage_stats": true}')
    RayLauncher(jobs=1, threads=1).close()
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ


def test_other_clusters_are_joined_and_left(ray: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    RayLauncher(jobs=1, threads=1, address="auto")
    assert ray.connection == {"address": "auto", "log_to_driver": False, "logging_level": "ERROR"}
    # An existing connection is used, and stays open.
    RayLauncher(jobs=1, threads=1).close()
    assert ray.connection is not None
    ray.connection = None
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    RayLauncher(jobs=1, threads=1)
    assert ray.connection is not None
    assert ray.connection["address"] == "head:6379"


@pytest.mark.usefixtures("ray")
def test_no_cluster() -> None:
    with pytest.raises(UsageError, match=r"'nowhere:1'"):
        RayLauncher(jobs=1, threads=1, address="nowhere:1")


def test_without_ray_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'metareg\[ray\]'"):
        compare(config=TINY, out=tmp_path / "out", launcher="ray")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ a real cluster


@pytest.mark.slow
# Ray leaves open files of its processes to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_cluster_gives_what_local_processes_give(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'metareg[ray]'")
    for launcher in ("local", "ray"):
        assert not compare(config=TINY, out=tmp_path / launcher, jobs=2, launcher=launcher).broken
    local = {path.relative_to(tmp_path / "local"): path for path in (tmp_path / "local").rglob("results.json")}
    assert len(local) == 4
    for relative, path in local.items():
        assert (tmp_path / "ray" / relative).read_bytes() == path.read_bytes()
