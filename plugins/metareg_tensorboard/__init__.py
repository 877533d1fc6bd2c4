"""TensorBoard: training curves of several runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import field_validator

from metareg import Field, PluginConfig, Run, Tracker, UsageError, hookimpl

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Tracker):
    """Writes event files to the run's folder: ``tensorboard --logdir runs`` shows all runs together."""

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
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "The observer 'tensorboard' needs the package tensorboard: pip install 'metareg[tensorboard]'."
            ) from error
        self.config = config
        self._open_writer = SummaryWriter
        self._writer: SummaryWriter | None = None

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        self._writer = self._open_writer(run.path / self.config.folder)

    def log(self, values: dict[str, float], step: int) -> None:
        if self._writer is not None:  # without a run (`MetaLearner.fit`), there is nowhere to write
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    @hookimpl
    def on_run_end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
