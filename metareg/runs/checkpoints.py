"""Checkpoints: files from which a run can resume, and the rules for writing them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metareg.errors import DivergenceError, Interrupted, LostProcessError, MetaregError, UsageError
from metareg.util.files import MALFORMED, LinesFile
from metareg.util.seeding import restore_global_generators, save_global_generators
from metareg.util.signals import StopRequest
from metareg.util.tensorfile import DamagedFileError, TensorFile, write_tensors

if TYPE_CHECKING:
    from metareg.learner.learner import MetaLearner
    from metareg.learner.training import Progress

__all__ = ["CheckpointManager", "Checkpoints"]

log = logging.getLogger("metareg")

FILE_FORMAT = 1
LEAST_RATIO = 200
"""The minimum time between timed checkpoints, as a multiple of the time to write one."""

_TENSOR, _TUPLE = "$tensor", "$tuple"


class Checkpoints:
    """A folder with the checkpoints of a run, ``step-000001000.safetensors`` and so on.

    Each file is written under a temporary name, flushed and renamed, and has a checksum, so that damage is detected.
    `keep` is the number of newest checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint after `step` steps."""
        return self.folder / f"step-{step:09d}.safetensors"

    def list_steps(self) -> list[int]:
        """List the steps with a file, ascending, without reading the files."""
        numbers = (path.name[len("step-") : -len(".safetensors")] for path in self.folder.glob("step-*.safetensors"))
        return sorted(int(number) for number in numbers if number.isdecimal())

    def save(self, step: int, state: Mapping[str, Any], best: int | None = None) -> None:
        """Write the checkpoint after a step, then remove all but the newest ones and the best.

        A state consists of tensors, strings, numbers, None, and dicts, lists and tuples of these. If it cannot be
        written, the other checkpoints are unchanged.
        """
        tensors: dict[str, Tensor] = {}
        content = _pack(state, (), tensors)
        write_tensors(self.path(step), tensors, {"format": FILE_FORMAT, "step": step, "content": content})
        for old in self.list_steps()[: -self._keep]:
            if old != best:
                with suppress(OSError):
                    self.path(old).unlink()

    def load(self, step: int) -> dict[str, Any]:
        """Return the state that `save` wrote.

        Raises:
            DamagedFileError: the file is damaged.
        """
        file = TensorFile(self.path(step), "checkpoint")
        tensors = file.read()
        if file.header.get("format") != FILE_FORMAT or file.header.get("step") != step:
            problem = f"is not a checkpoint of format {FILE_FORMAT} after step {step}"
            raise DamagedFileError(f"{file.path} {problem}; it was renamed, or written by another version of metareg.")
        try:
            state: dict[str, Any] = _unpack(file.header["content"], tensors)
        except MALFORMED as error:
            raise DamagedFileError(f"{file.path} is not a metareg checkpoint: it has no {error}.") from error
        return state

    def load_newest(self) -> dict[str, Any] | None:
        """Return the newest valid state, or None. Damaged files are logged and renamed."""
        for step in reversed(self.list_steps()):
            try:
                return self.load(step)
            except DamagedFileError as error:
                aside = self.path(step).with_suffix(".damaged")
                log.warning("%s It is ignored and kept as %s.", error, aside.name)
                with suppress(OSError):
                    self.path(step).replace(aside)
        return None


class CheckpointManager:
    """Writes a run's checkpoints during training, and restores the run from one.

    Args:
        store: the folder of checkpoints.
        learner: the learner being trained.
        progress: the rest of the state.
        lines: files of lines that are truncated when an earlier state is restored.
        every_steps: training steps between checkpoints; None for no limit.
        every_minutes: minutes between checkpoints; longer if writing one takes more than 0.5 % of that time.
        stop: a signal's request to stop.

    If several processes train the learner together, each has a manager. Process 0 reads and writes for all.
    """

    def __init__(
        self,
        store: Checkpoints,
        learner: MetaLearner,
        progress: Progress,
        lines: Sequence[LinesFile],
        *,
        every_steps: int | None,
        every_minutes: float,
        stop: StopRequest,
    ) -> None:
        self.store = store
        self.last_saved: int | None = None
        """The step of the newest valid checkpoint."""
        self._learner = learner
        self._progress = progress
        self._lines = lines
        self.every_steps = every_steps
        self._every_seconds = self._seconds_to_next = 60 * every_minutes
        self._saved_at = time.monotonic()
        self._processes = learner.processes
        self._processes.ask("stop", lambda: stop.asked)
        self._processes.ask("save", lambda: time.monotonic() - self._saved_at >= self._seconds_to_next)

    def after_step(self, *, must: bool) -> None:
        """Write a checkpoint if one is due or `must` is set; then raise Interrupted if a signal asked to stop."""
        step = self._learner.steps_done
        due = self.every_steps is not None and step % self.every_steps == 0
        stop = self._processes.answer("stop")
        if must or due or stop or self._processes.answer("save"):
            self.save()
        if stop:
            raise Interrupted(f"Stopped after step {step}.")

    def save(self) -> None:
        """Write a checkpoint of the run's current state.

        Raises:
            DivergenceError: a meta-parameter is not finite; nothing is written.
            MetaregError: it cannot be written; the message names the newest valid one.
        """
        began, step = time.monotonic(), self._learner.steps_done
        for name, value in self._learner.meta_parameters.items():
            if not torch.isfinite(value).all():
                raise DivergenceError(
                    f"Training diverged: after step {step} the meta-parameter '{name}' is not finite."
                )
        try:
            self._processes.first(self._write)
        except LostProcessError:
            raise
        except MetaregError as error:
            if self.last_saved is None:
                raise
            raise type(error)(f"{error} The checkpoint after step {self.last_saved} is still valid.") from error
        self.last_saved = step
        self._saved_at = time.monotonic()
        self._seconds_to_next = max(self._every_seconds, LEAST_RATIO * (self._saved_at - began))

    def _write(self) -> None:
        state = {
            "learner": self._learner.state(),
            "progress": self._progress.state(),
            "lines": {file.path.name: file.mark() for file in self._lines},
            "generators": save_global_generators(),
        }
        self.store.save(self._learner.steps_done, state, self._progress.best_step)

    def restore(self) -> bool:
        """Restore the run from its newest valid checkpoint; without one, truncate its files to the start.

        Returns:
            Whether there was a checkpoint.
        """
        state = self._processes.first(self.store.load_newest)
        if state is None:
            for file in self._lines:
                file.cut(None)
            return False
        try:
            step = state["learner"]["steps_done"]
            self._learner.load_state(state["learner"], str(self.store.path(step)))
            self._progress.load_state(state["progress"], self._learner.device)
            restore_global_generators(state["generators"])
            for file in self._lines:
                file.cut(state["lines"].get(file.path.name), step)
        # The checksum is right, so the file is undamaged but belongs to another run.
        except MALFORMED as error:
            raise UsageError(
                f"The newest checkpoint in {self.store.folder} contains no state of this run ({type(error).__name__}: "
                f"{error})."
            ) from error
        self._forget_lost_best(step)
        self.last_saved = step
        self._saved_at = time.monotonic()
        return True

    def _forget_lost_best(self, step: int) -> None:
        best = self._progress.best_step
        if best is None or best == step:
            return
        try:
            self._processes.first(lambda: bool(self.store.load(best)))
        except UsageError as error:
            log.warning(
                "The best checkpoint so far, after step %d, is lost: %s The search for the best checkpoint starts "
                "again.",
                best,
                error,
            )
            self._progress.best_step = self._progress.best_score = None
            self._progress.waited = 0


def _pack(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON; move its tensors into `tensors`, named by their paths."""
    if isinstance(value, Tensor):
        tensors[".".join(path)] = value
        return {_TENSOR: ".".join(path)}
    if isinstance(value, dict) and all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: _pack(item, (*path, key), tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_pack(item, (*path, str(number)), tensors) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise MetaregError(
        f"A checkpoint cannot contain the {type(value).__name__} at '{'.'.join(path)}', only tensors, numbers, "
        "strings, None, and lists, tuples and dicts (with strings as keys) of these."
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _TUPLE in value:
            return tuple(_unpack(item, tensors) for item in value[_TUPLE])
        return {key: _unpack(item, tensors) for key, item in value.items()}
    return [_unpack(item, tensors) for item in value] if isinstance(value, list) else value
