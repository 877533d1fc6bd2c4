"""TensorBoard: training curves of several runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import field_validator

from metareg import Evaluation, Field, MetaregError, PluginConfig, Run, hookimpl

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes event files to the run's folder: ``tensorboard --logdir runs`` shows all runs together.

    Scalars are ``train/KEY`` for training logs and ``SPLIT/METRIC/inner_steps_K`` for evaluations.
    """

    contract = 1

    class Config(PluginConfig):
        folder: str = Field("tensorboard", description="Folder of the event files, in the run's folder.")

        @field_validator("folder")
        @classmethod
        def _stay_inside(cls, folder: str) -> str:
            if Path(folder).is_absolute() or ".." in Path(folder).parts:
                raise ValueError("it should be a folder inside the run's folder")
            return folder

    def __init__(self, config: Config) -> None:
        self.config = config
        self._writer: SummaryWriter | None = None

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MetaregError(
                "The observer 'tensorboard' needs the package tensorboard: pip install 'metareg[tensorboard]'."
            ) from error
        self._writer = SummaryWriter(run.path / self.config.folder)

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        if self._writer is not None:  # without a run (`MetaLearner.fit`), there is nowhere to write
            for name, value in logs.items():
                self._writer.add_scalar(f"train/{name}", value, step)

    @hookimpl
    def on_evaluation(self, step: int, split: str, evaluation: Evaluation) -> None:
        if self._writer is not None:
            for k in evaluation.inner_steps:
                self._writer.add_scalar(f"{split}/{evaluation.metric}/inner_steps_{k}", evaluation.mean(k), step)

    @hookimpl
    def on_run_end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
