"""A comparison's runs as tasks of a Ray cluster. All of its nodes have metareg, and see the comparison's folder."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from metareg.comparison.plan import PlannedRun
from metareg.comparison.pool import Outcome, carry_out
from metareg.errors import MetaregError, UsageError
from metareg.registry.plugins import DISABLE_VARIABLE
from metareg.util.data_files import absolute_path

__all__ = ["RayLauncher"]

_FOLDERS = ("METAREG_DATA", "METAREG_CACHE")
_GRACE_SECONDS = 30.0
_RESTARTS = 3
"""How often Ray itself begins a run anew whose process or node died; it goes on from its last checkpoint."""
_OBJECT_STORE_BYTES = 100 << 20
"""Of a cluster that is started here: what tasks take and return is a few lines."""


class RayLauncher:
    """Runs on a Ray cluster.

    Args:
        jobs: how many runs at a time; as many as the cluster has room for by default.
        threads: CPU threads of each.
        address: of a cluster, or ``"auto"`` for the one that this machine is part of; without it, the one that the variable
            RAY_ADDRESS names, or else one of this machine alone, started here and ended by `close`.

    Raises:
        UsageError: Ray is not installed, or no cluster is there.
    """

    def __init__(self, jobs: int | None, threads: int, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise UsageError(
                "The launcher 'ray' needs Ray, which is not installed: pip install 'metareg[ray]'."
            ) from error
        self._ray: Any = ray
        self._jobs = jobs
        self._threads = threads
        self._runs: dict[Any, PlannedRun] = {}
        # Who called ray.init before keeps that connection.
        self._connected = not self._ray.is_initialized()
        if self._connected:
            _connect(self._ray, address or os.environ.get("RAY_ADDRESS") or "local", jobs, threads)
        self._gpus = self._ray.cluster_resources().get("GPU", 0) > 0
        self._task = self._ray.remote(_carry_out_with).options(num_cpus=threads, max_retries=_RESTARTS)
        folders = {name: str(absolute_path(os.environ[name])) for name in _FOLDERS if os.environ.get(name)}
        disabled = os.environ.get(DISABLE_VARIABLE, "")
        self._variables = {**folders, DISABLE_VARIABLE: disabled, "MPLBACKEND": "agg"}
        """What a run takes from the environment, for the nodes."""

    @property
    def capacity(self) -> int:
        """How many runs are handed over at a time: it grows with the cluster; where there are GPUs, one for each."""
        if self._jobs is not None:
            return self._jobs
        resources = self._ray.cluster_resources()
        room = resources.get("GPU", 0) if self._gpus else resources.get("CPU", 0) // self._threads
        return max(1, int(room))

    def submit(self, run: PlannedRun) -> None:
        """Hand a run over; the cluster begins it once a node has room."""
        needs_gpu = self._gpus and run.options.get("device", "auto") != "cpu"
        # A node's working directory is another one.
        absolute = dataclasses.replace(run, path=run.path.absolute())
        task = self._task.options(num_gpus=1) if needs_gpu else self._task
        self._runs[task.remote(absolute, self._variables)] = run

    def wait(self, seconds: float) -> list[Outcome]:
        if not self._runs:
            time.sleep(seconds)
            return []
        ended, _ = self._ray.wait(list(self._runs), timeout=seconds)
        if ended:
            ended, _ = self._ray.wait(list(self._runs), num_returns=len(self._runs), timeout=0)
        return [self._fetch_outcome(task) for task in ended]

    def stop(self) -> None:
        """Let every run write a checkpoint and end; those that do not within half a minute are ended as they are."""
        for task in self._runs:
            self._ray.cancel(task)
        if self._runs:
            self._ray.wait(list(self._runs), num_returns=len(self._runs), timeout=_GRACE_SECONDS)

    def close(self) -> None:
        """End what is left, and leave the cluster."""
        for task in self._runs:
            self._ray.cancel(task, force=True)
        self._runs.clear()
        if self._connected:
            self._ray.shutdown()
            self._connected = False

    def _fetch_outcome(self, task: Any) -> Outcome:
        run = self._runs.pop(task)
        try:
            return Outcome(run, *self._ray.get(task))
        except self._ray.exceptions.RayError as error:
            # Of the traceback that Ray makes a message of, the last line says what happened.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Outcome(run, f"The cluster could not execute the run: {lines[-1]}", again=True)


def _carry_out_with(run: PlannedRun, variables: dict[str, str]) -> tuple[str | None, bool]:
    """What a node does: the run. Returns what went wrong and whether to try again."""
    os.environ.update(variables)
    outcome = carry_out(run)
    return outcome.error, outcome.again


def _connect(ray: Any, address: str, jobs: int | None, threads: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        # Ray reports to its makers how it is used, unless told otherwise; here that is left to who decided on it.
        if not (Path.home() / ".ray" / "config.json").exists():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        if jobs is not None:
            quiet["num_cpus"] = jobs * threads
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise UsageError(f"There is no Ray cluster at '{address}': {str(error).splitlines()[0]}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise MetaregError(f"Ray could not be started: {str(error).splitlines()[0]}") from error
    finally:
        # Ray puts its own in the place of the one that stops a comparison with checkpoints.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
