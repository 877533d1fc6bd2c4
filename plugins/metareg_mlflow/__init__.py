"""MLflow: log runs to a tracking server or a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from metareg import Field, PluginConfig, Run, Tracker, UsageError, hookimpl

_RUN_ID = "mlflow-run-id.txt"
"""The file in the run's folder that lets a resumed run continue the same MLflow run."""


class MLflow(Tracker):
    """Logs a run to MLflow: its options as parameters, training and evaluations as metrics, results.json as an artifact."""

    contract = 1

    class Config(PluginConfig):
        experiment: str = Field("metareg", description="Name of the MLflow experiment.")
        uri: str | None = Field(
            None, description="Tracking server or database; by default, mlflow.db and mlartifacts/ in the run's folder."
        )

    def __init__(self, config: Config) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise UsageError(
                "The observer 'mlflow' needs the package mlflow: pip install 'metareg[mlflow]'."
            ) from error
        self.config = config
        self._mlflow = mlflow
        self._client: Any = None
        self._run_id = ""

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        self._client = self._mlflow.MlflowClient(self.config.uri or f"sqlite:///{run.path.resolve() / 'mlflow.db'}")
        path = run.path / _RUN_ID
        if path.is_file():
            self._run_id = path.read_text(encoding="utf-8")
            with suppress(self._mlflow.exceptions.MlflowException):  # the ID can be from another server
                self._client.update_run(self._run_id, "RUNNING")
                return
        artifacts = None if self.config.uri else (run.path.resolve() / "mlartifacts").as_uri()
        known = self._client.get_experiment_by_name(self.config.experiment)
        experiment = known.experiment_id if known else self._client.create_experiment(self.config.experiment, artifacts)
        self._run_id = self._client.create_run(experiment, run_name=run.path.name).info.run_id
        path.write_text(self._run_id, encoding="utf-8")
        for name, value in _flatten(run.config.model_dump(mode="json")):
            self._client.log_param(self._run_id, name, value)

    def log(self, values: dict[str, float], step: int) -> None:
        if self._client is not None:  # without a run (`MetaLearner.fit`), there is nowhere to log
            for name, value in values.items():
                self._client.log_metric(self._run_id, name, value, step=step)

    @hookimpl
    def on_run_end(self, run: Run) -> None:
        if self._client is not None:
            self._client.log_artifact(self._run_id, str(run.path / "results.json"))
            self._client.set_terminated(self._run_id)
            self._client = None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Flatten ``{"algo": {"name": "maml"}}`` to ``algo.name`` and ``maml``."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
