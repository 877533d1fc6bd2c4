"""MLflow: runs in a tracking server."""

from __future__ import annotations

from typing import Any

from metareg import Evaluation, Field, MetaregError, PluginConfig, Run, hookimpl


class MLflow:
    """Logs a run to MLflow: its configuration as parameters, training and evaluations as metrics, its files as artifacts.

    This is how any tracker is connected: what it needs is in four hooks, and its client is imported when a run starts, so
    that listing plugins does not wait for it.
    """

    contract = 1

    class Config(PluginConfig):
        experiment: str = Field("metareg", description="Name of the MLflow experiment.")
        uri: str | None = Field(None, description="Tracking server; unset, mlruns/ in the run's folder.")

    def __init__(self, config: Config) -> None:
        self.config = config
        self._client: Any = None
        self._run_id = ""

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise MetaregError("The observer 'mlflow' needs the package mlflow: pip install mlflow.") from error
        self._client = MlflowClient(self.config.uri or (run.path / "mlruns").as_uri())
        known = self._client.get_experiment_by_name(self.config.experiment)
        experiment = known.experiment_id if known else self._client.create_experiment(self.config.experiment)
        self._run_id = self._client.create_run(experiment, run_name=run.path.name).info.run_id
        for name, value in run.config.model_dump(mode="json").items():
            self._client.log_param(self._run_id, name, value)

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        for name, value in logs.items():
            self._log(f"train/{name}", value, step)

    @hookimpl
    def on_evaluation(self, step: int, split: str, evaluation: Evaluation) -> None:
        for k in evaluation.inner_steps:
            self._log(f"{split}/{evaluation.metric}/inner_steps_{k}", evaluation.mean(k), step)

    @hookimpl
    def on_run_end(self, run: Run) -> None:
        if self._client is not None:
            self._client.log_artifact(self._run_id, str(run.path / "results.json"))
            self._client.set_terminated(self._run_id)

    def _log(self, name: str, value: float, step: int) -> None:
        if self._client is not None:
            self._client.log_metric(self._run_id, name, value, step=step)
