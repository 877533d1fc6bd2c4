"""Weights & Biases: runs in a project of wandb."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Literal

from metareg import Evaluation, Field, MetaregError, PluginConfig, Run, hookimpl

if TYPE_CHECKING:
    import wandb

_RUN_ID = "wandb-run-id.txt"
"""The file in the run's folder with which a resumed run continues the same wandb run."""


class WandB:
    """Logs a run to Weights & Biases: its configuration, training and evaluations.

    Metrics are ``train/KEY`` for what is logged in training, and ``SPLIT/METRIC/inner_steps_K`` for evaluations, by the
    training step. Nothing leaves the machine unless ``mode=online`` says so: ``wandb sync RUN/wandb/offline-run-*`` sends it
    later.
    """

    contract = 1

    class Config(PluginConfig):
        project: str = Field("metareg", description="The project of Weights & Biases.")
        entity: str | None = Field(None, description="The user or team; unset, that of the login.")
        mode: Literal["offline", "online"] = Field(
            "offline", description="Keep the run in wandb/ in its folder, or send it while it trains."
        )

    def __init__(self, config: Config) -> None:
        self.config = config
        self._run: wandb.Run | None = None

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MetaregError("The observer 'wandb' needs the package wandb: pip install 'metareg[wandb]'.") from error
        path = run.path / _RUN_ID
        if not path.is_file():
            path.write_text(secrets.token_hex(4), encoding="utf-8")
        config = self.config
        resume: dict[str, Any] = {"resume": "allow"} if config.mode == "online" else {}
        self._run = wandb.init(
            project=config.project, entity=config.entity, mode=config.mode, dir=run.path, name=run.path.name,
            id=path.read_text(encoding="utf-8"), config=run.config.model_dump(mode="json"), reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", symlink=False), **resume,
        )  # fmt: skip
        # wandb's core links to its log elsewhere all the same, and metareg goes on with no folder that has a link out of it.
        for path in (run.path / "wandb").rglob("*"):
            if path.is_symlink():
                path.unlink()
        # The test of the best weights is of an earlier step than the last, which wandb's own count of steps refuses.
        self._run.define_metric("*", step_metric="step")

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        if self._run is not None:  # a learner's own fit() has no run, and then nowhere to log
            self._run.log({"step": step, **{f"train/{name}": value for name, value in logs.items()}})

    @hookimpl
    def on_evaluation(self, step: int, split: str, evaluation: Evaluation) -> None:
        if self._run is not None:
            names = {f"{split}/{evaluation.metric}/inner_steps_{k}": evaluation.mean(k) for k in evaluation.inner_steps}
            self._run.log({"step": step, **names})

    @hookimpl
    def on_run_end(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
