"""Weights & Biases: log runs to a wandb project."""

from __future__ import annotations

import secrets
from typing import Any, Literal

from metareg import Field, PluginConfig, Run, Tracker, UsageError, hookimpl

_RUN_ID = "wandb-run-id.txt"
"""The file in the run's folder that lets a resumed run continue the same wandb run."""


class WandB(Tracker):
    """Logs a run to Weights & Biases: its configuration, training and evaluations.

    Nothing is sent from the machine unless you set ``mode=online``; ``wandb sync RUN/wandb/offline-run-*`` sends a run
    later.
    """

    contract = 1

    class Config(PluginConfig):
        project: str = Field("metareg", description="The Weights & Biases project.")
        entity: str | None = Field(None, description="The user or team; by default, that of the login.")
        mode: Literal["offline", "online"] = Field(
            "offline", description="Keep the run in wandb/ in its folder, or send it during training."
        )

    def __init__(self, config: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError("The observer 'wandb' needs the package wandb: pip install 'metareg[wandb]'.") from error
        self.config = config
        self._wandb = wandb
        self._run: Any = None

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        path = run.path / _RUN_ID
        if not path.is_file():
            path.write_text(secrets.token_hex(4), encoding="utf-8")
        config = self.config
        resume: dict[str, Any] = {"resume": "allow"} if config.mode == "online" else {}
        self._run = self._wandb.init(
            project=config.project, entity=config.entity, mode=config.mode, dir=run.path, name=run.path.name,
            id=path.read_text(encoding="utf-8"), config=run.config.model_dump(mode="json"), reinit="create_new",
            settings=self._wandb.Settings(silent=True, console="off", symlink=False), **resume,
        )  # fmt: skip
        # wandb links to its log outside the folder, but metareg refuses to resume a folder with such a link.
        for path in (run.path / "wandb").rglob("*"):
            if path.is_symlink():
                path.unlink()
        # The test of the best weights can be of an earlier step, which wandb's own step count refuses.
        self._run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        if self._run is not None:  # without a run (`MetaLearner.fit`), there is nowhere to log
            self._run.log({"step": step, **values})

    @hookimpl
    def on_run_end(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
