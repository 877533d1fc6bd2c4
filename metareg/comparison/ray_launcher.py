"""A launcher for Ray clusters whose nodes all have metareg and see the comparison's folder."""

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
"""How often Ray restarts a run whose process or node died; the run resumes from its last checkpoint."""
_OBJECT_STORE_BYTES = 100 << 20
"""Size of the object store if a cluster is started here; tasks exchange only a few lines."""


class RayLauncher:
    """Executes runs on a Ray cluster.

    Args:
        jobs: number of runs at a time; by default, as many as the cluster has room for.
        threads: CPU threads of each.
        address: the cluster's address, or ``"auto"`` for this machine's cluster. By default, the cluster named by the
            variable RAY_ADDRESS, or a new one on this machine only, which `close` stops.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
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
        # If the caller has already called ray.init, that connection is used and kept.
        self._connected = not self._ray.is_initialized()
        if self._connected:
            _connect(self._ray, address or os.environ.get("RAY_ADDRESS") or "local", jobs, threads)
        self._gpus = self._ray.cluster_resources().get("GPU", 0) > 0
        self._task = self._ray.remote(_carry_out_with).options(num_cpus=threads, max_retries=_RESTARTS)
        folders = {name: str(absolute_path(os.environ[name])) for name in _FOLDERS if os.environ.get(name)}
        disabled = os.environ.get(DISABLE_VARIABLE, "")
        self._variables = {**folders, DISABLE_VARIABLE: disabled, "MPLBACKEND": "agg"}
        """Environment variables of runs, passed to the nodes."""

    @property
    def capacity(self) -> int:
        """The number of runs to submit at a time: as the cluster has room, or one for each GPU."""
        if self._jobs is not None:
            return self._jobs
        resources = self._ray.cluster_resources()
        room = resources.get("GPU", 0) if self._gpus else resources.get("CPU", 0) // self._threads
        return max(1, int(room))

    def submit(self, run: PlannedRun) -> None:
        """Submit a run; the cluster starts it once a node has room."""
        needs_gpu = self._gpus and run.options.get("device", "auto") != "cpu"
        # Nodes have another working directory.
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
        """Let every run write a checkpoint and stop; after half a minute, kill the rest."""
        for task in self._runs:
            self._ray.cancel(task)
        if self._runs:
            self._ray.wait(list(self._runs), num_returns=len(self._runs), timeout=_GRACE_SECONDS)

    def close(self) -> None:
        """Kill the remaining runs and disconnect from the cluster."""
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
            # Ray's message is a traceback, whose last line is the error.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Outcome(run, f"The cluster could not execute the run: {lines[-1]}", again=True)


def _carry_out_with(run: PlannedRun, variables: dict[str, str]) -> tuple[str | None, bool]:
    """Execute a run on a node; return the error, if any, and whether to try again."""
    os.environ.update(variables)
    outcome = carry_out(run)
    return outcome.error, outcome.again


def _connect(ray: Any, address: str, jobs: int | None, threads: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        # Disable Ray's usage statistics unless the user has configured them.
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
        # Ray replaces the signal handler that stops a comparison with checkpoints, so restore it.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
