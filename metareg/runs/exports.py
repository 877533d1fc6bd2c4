"""A finished run's learner put to use elsewhere: as a file, as a program, on a user's own examples."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from metareg.contract.tasks import Task
from metareg.errors import UsageError
from metareg.learner.learner import MetaLearner
from metareg.registry.plugins import Plugin
from metareg.util.files import write_bytes

__all__ = ["export", "predict"]

_LARGEST_TABLE = 1 << 28
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def export(learner: MetaLearner, task: Plugin, to: Path, support: Path | None, inner_steps: int | None) -> None:
    """Write a learner that was trained on a task's tasks, as `metareg.Run.export` says."""
    if to.suffix == ".safetensors":
        if support is not None:
            raise UsageError(
                f"{to} would hold the learner, which adapts wherever it is loaded; --support is for FILE.pt2."
            )
        learner.save(to)
        return
    if to.suffix != ".pt2":
        raise UsageError(f"A run is exported to FILE.safetensors (the learner) or FILE.pt2 (a program), not to '{to}'.")
    if support is None:
        module = learner.model.create_adapted_module(learner.meta_parameters)
    else:
        examples = _Examples(learner, task, support)
        module = learner.adapt(examples.x, examples.y, inner_steps)
    example = torch.zeros(2, *_get_input_shape(task))
    try:
        program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    # Anything can be wrong with a model of somebody's own making, and torch.export has errors of many kinds for it.
    except Exception as error:
        problem = str(error).strip().splitlines()[0]
        raise UsageError(f"torch.export cannot take the {type(module).__name__}: {problem}") from error
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write_bytes(to, buffer.getvalue())


def predict(learner: MetaLearner, task: Plugin, support: Path, query: Path, inner_steps: int | None) -> str:
    """Predict with a learner that was trained on a task's tasks, as `metareg.Run.predict` says."""
    examples = _Examples(learner, task, support)
    module = learner.adapt(examples.x, examples.y, inner_steps)
    header, rows, x = examples.read_queries(query)
    with torch.no_grad():
        outputs = module(x.to(learner.device)).cpu()
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if examples.classes:
        writer.writerow([*header, "class", "probability"])
        best = outputs[:, : len(examples.classes)].softmax(-1).max(-1)
        for row, value, index in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
            writer.writerow([*row, examples.classes[index], f"{value:.4f}"])
    else:
        width = outputs.shape[-1]
        writer.writerow([*header, *(["y"] if width == 1 else (f"y{number}" for number in range(1, width + 1)))])
        writer.writerows(
            [*row, *(f"{value:.9g}" for value in y)] for row, y in zip(rows, outputs.tolist(), strict=True)
        )
    return buffer.getvalue()


class _Examples:
    """A user's labelled examples for a learner that was trained on a task's tasks."""

    def __init__(self, learner: MetaLearner, task: Plugin, support: Path) -> None:
        self._task = task.instance
        self._shape = _get_input_shape(task)
        self._width = math.prod(self._shape)
        self.classes: list[str] | None = None
        """The classes' names in the order of the model's outputs; None where targets are numbers."""
        outputs = math.prod(task.instance.spec.output_shape)
        classifies = learner.loss is nn.functional.cross_entropy
        if support.is_dir():
            paths = {folder.name: _list_images(folder) for folder in sorted(support.iterdir()) if folder.is_dir()}
            labels = [name for name, members in paths.items() for _ in members]
            self.x = self._read_images([path for members in paths.values() for path in members], support)
            if not classifies:
                raise UsageError(
                    f"{support} is a folder of classes; this learner predicts numbers and takes a CSV file."
                )
        else:
            _, rows = self._read_table(support, targets=1 if classifies else outputs)
            self.x = self._parse_inputs(support, rows)
            labels = [row[self._width] for row in rows]
        if classifies:
            self.classes = sorted(set(labels))
            if len(self.classes) > outputs:
                raise UsageError(f"{support} has {len(self.classes)} classes; this learner tells {outputs} apart.")
            self.y = torch.tensor([self.classes.index(label) for label in labels])
        else:
            self.y = torch.tensor([_parse_numbers(support, row[self._width :]) for row in rows])

    def read_queries(self, path: Path) -> tuple[list[str], list[list[str]], Tensor]:
        """What names the rows of the answer (a header, and a list per row), and the inputs."""
        if path.is_dir():
            images = _list_images(path)
            return ["image"], [[image.name] for image in images], self._read_images(images, path)
        header, rows = self._read_table(path)
        inputs = self._parse_inputs(path, rows)
        return header[: self._width], [row[: self._width] for row in rows], inputs

    def _parse_inputs(self, path: Path, rows: Sequence[Sequence[str]]) -> Tensor:
        return torch.tensor([_parse_numbers(path, row[: self._width]) for row in rows]).reshape(-1, *self._shape)

    def _read_table(self, path: Path, targets: int = 0) -> tuple[list[str], list[list[str]]]:
        """The header of a CSV file (``x1, x2, …`` where it has none) and its rows, all of one length."""
        try:
            if path.stat().st_size > _LARGEST_TABLE:
                raise UsageError(f"{path} is larger than {_LARGEST_TABLE >> 20} MiB.")
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = [row for row in csv.reader(file) if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UsageError(f"{path} cannot be read as CSV: {getattr(error, 'strerror', None) or error}.") from error
        header = [f"x{number}" for number in range(1, len(rows[0]) + 1)] if rows else []
        if rows and not _is_number(rows[0][0]):
            header, rows = rows[0], rows[1:]
        if not rows:
            raise UsageError(f"{path} holds no rows.")
        for number, row in enumerate(rows, 1):
            if len(row) != len(header):
                raise UsageError(
                    f"{path} has {len(row)} cells in data row {number}, where it has {len(header)} columns."
                )
        if len(header) < self._width + targets:
            wanted = f"{self._width} input{'s' * (self._width > 1)}"
            wanted += f" and {targets} target{'s' * (targets > 1)}" if targets else ""
            raise UsageError(f"{path} has {len(header)} columns; this learner takes {wanted}.")
        return header, rows

    def _read_images(self, paths: Sequence[Path], where: Path) -> Tensor:
        if len(self._shape) != 3:
            raise UsageError(f"{where} is a folder; this learner takes no images but a CSV file.")
        if not paths:
            raise UsageError(f"{where} holds no images ({', '.join(_IMAGES)}), or not in a folder for each class.")
        read = getattr(self._task, "read_image", None) or partial(Task.read_image, self._task)
        return torch.stack([read(path) for path in paths])


def _get_input_shape(task: Plugin) -> tuple[int, ...]:
    shape = task.instance.spec.input_shape
    if not all(isinstance(size, int) for size in shape):
        raise UsageError(f"The {task.label} has inputs that are neither vectors nor images.")
    return tuple(shape)


def _list_images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGES)


def _parse_numbers(path: Path, cells: Sequence[str]) -> list[float]:
    for cell in cells:
        if not _is_number(cell):
            raise UsageError(f"{path} holds '{cell}' where a finite number belongs.")
    return [float(cell) for cell in cells]


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
