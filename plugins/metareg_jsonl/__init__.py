"""JSON lines: a run's progress as a stream that other programs can follow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from metareg import Evaluation, Field, MetaregError, PathText, PluginConfig, Run, hookimpl


class JSONLines:
    """Writes one object per line for the start of a run, every training report, every evaluation, and the end.

    Each object has an ``event`` (``"start"``, ``"step"``, ``"evaluation"`` or ``"end"``) and its data; the start
    contains the run's complete configuration. Unlike the run's own metrics.jsonl, the source of its plots, the stream
    can go anywhere: to one file for many runs, or to a pipe.
    """

    contract = 1

    class Config(PluginConfig):
        file: PathText | None = Field(
            None,
            description="The file to append to; by default, events.jsonl in the run's folder. Can be a named pipe.",
        )

    def __init__(self, config: Config) -> None:
        self.config = config
        self._file: TextIO | None = None
        self._run = ""

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        path = Path(self.config.file) if self.config.file else run.path / "events.jsonl"
        try:
            # Follow a link only if the user named the file; a run's folder may be untrusted.
            no_links = 0 if self.config.file else getattr(os, "O_NOFOLLOW", 0)
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | no_links, 0o666)
            self._file = os.fdopen(descriptor, "a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise MetaregError(f"The observer 'jsonl' cannot write {path}: {error.strerror}.") from error
        self._run = str(run.path)
        self._write("start", config=run.config.model_dump(mode="json"))

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        self._write("step", step=step, **logs)

    @hookimpl
    def on_evaluation(self, step: int, split: str, evaluation: Evaluation) -> None:
        rows = [
            {"inner_steps": k, "mean": evaluation.mean(k), "ci95": evaluation.ci95(k)} for k in evaluation.inner_steps
        ]
        self._write("evaluation", step=step, split=split, metric=evaluation.metric, tasks=evaluation.tasks, steps=rows)

    @hookimpl
    def on_run_end(self) -> None:
        self._write("end")
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, event: str, **content: Any) -> None:
        if self._file is not None:  # without a run (`MetaLearner.fit`), there is nowhere to write
            self._file.write(json.dumps({"event": event, "run": self._run} | content) + "\n")
