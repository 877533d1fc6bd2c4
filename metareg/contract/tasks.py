"""The base class of task plugins, and the facts that they provide."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from metareg.util.images import load_image

if TYPE_CHECKING:
    from torch import Tensor

    from metareg.contract.columns import Columns
    from metareg.contract.named import NamedExamples
    from metareg.util.tables import Table

__all__ = ["Dataset", "Task", "TaskSpec"]


@dataclass(frozen=True)
class TaskSpec:
    """Shapes of one example, without task and example dimensions.

    Args:
        input_shape: the shape of one input, such as ``(1,)`` or ``(3, 84, 84)``.
        output_shape: the shape of one output; for classification ``(ways,)``.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """The data that a task reads, for ``metareg data``."""

    location: Path | None
    """The data's folder, or the folder that `download` writes; None if nothing is read."""
    present: bool
    """Whether the data is there."""
    obtain: str
    """A sentence that says how to get the data."""
    download: Callable[[], None] | None
    """Downloads the data; None if that is impossible."""
    verify: Callable[[], str]
    """Reads all of the data and returns a summary; raises `metareg.UsageError` if it is not as expected."""
    write_example: Callable[[Path], str] | None = None
    """Writes generated example data to a folder and returns how to use it; None if there is none."""


class Task:
    """Base of task plugins; a subclass implements the hook `episodes` and overrides defaults.

    Any object with these attributes and that hook works.
    """

    loss: str = "mse"
    """A name in `metareg.contract.losses.LOSSES`, or a callable ``loss(outputs, targets) -> scalar``."""
    metric: str | None = None
    """A name in `metareg.contract.losses.METRICS`; by default, the metric for the loss."""
    default_model: str | None = None
    """The model plugin that a run uses by default."""
    stackable: bool = True
    """Whether `episodes` returns tasks of equal size, which can be stacked."""
    recommended: ClassVar[Mapping[str, Any]] = {}
    """Options for this task that apply unless the user or a file sets them.

    Options of the run (`metareg.RunConfig`) have their own names, ``"steps"``; options of plugins also name their
    owner, by its part in the run (``"algo.inner_lr"``, ``"model.width"``) or by its name (``"cml.gamma"``). An option
    is ignored if its owner is not in the run or has no such option. A mapping of the same form under an algorithm's
    name is only for that algorithm: ``{"steps": 2000, "anil": {"algo.inner_lr": 1.0}}``. Algorithms and models can have
    such a mapping too. What is recommended for an algorithm on this task overrides what the algorithm itself
    recommends, which overrides the rest of this mapping, which overrides what the model recommends.
    """
    inherited_options: ClassVar[tuple[str, ...]] = ()
    """Options that this task inherits from the run's own task if a run is tested on it (``metareg eval --task``)."""
    image_preparation: str = (
        "rotated by its EXIF data, white where transparent, grey or RGB; resized to width × height by Pillow's BICUBIC, "
        "whatever the aspect; divided by 255"
    )
    """How `read_image` prepares an image, for users of programs that run without metareg."""
    known_columns: Sequence[str] = ()
    """Column names of users' tables that the task knows; they can be numbers."""

    @property
    def spec(self) -> TaskSpec:
        """The shapes of this task's inputs and outputs."""
        raise NotImplementedError(f"{type(self).__name__} must define the property `spec`")

    @property
    def dataset(self) -> Dataset | None:
        """The data that the task reads; None if it needs none."""
        return None

    @property
    def named_examples(self) -> NamedExamples | None:
        """The examples that the task contains, such as a graph's nodes; None if users' tables contain the inputs."""
        return None

    def read_image(self, path: Path) -> Tensor:
        """Load a user's image as an input of this task ``[channels, height, width]``, for ``metareg predict``.

        By default, it is resized to the task's images, with values from 0 (black) to 1; a task that prepares images
        differently overrides this.

        Raises:
            UsageError: the image cannot be read.
        """
        import numpy as np
        import torch
        from PIL import Image

        channels, height, width = self.spec.input_shape
        scaled = load_image(path, channels).resize((width, height), Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(scaled, dtype=np.float32) / 255)
        return values[None] if channels == 1 else values.permute(2, 0, 1)

    def measure_columns(self, support_x: Tensor, support_y: Tensor) -> Columns | None:  # noqa: ARG002
        """Return the scaling of a support table's numbers, for a program that adapts (``metareg export --adaptive``).

        By default, they are not scaled. A task that scales them by the support set overrides this with a function of
        tensors only.

        Args:
            support_x: inputs as `Columns.read_inputs` reads them ``[support, *input_shape]``.
            support_y: targets as `Columns.read_targets` reads them.
        """
        return None

    def choose_columns(self, support: Table, query: Table | None, classifies: bool) -> Columns:
        """Choose the input and target columns of a user's tables, for ``metareg predict``.

        By default, the columns of the query table are the inputs, and the other columns of the support table are the
        targets. A task that knows its columns by name overrides this.

        Args:
            support: labelled examples.
            query: the examples to predict; None if there are none yet.
            classifies: whether targets are classes.

        Raises:
            UsageError: the columns do not fit the task.
        """
        from metareg.contract.columns import match_columns

        spec = self.spec
        return match_columns(tuple(spec.input_shape), math.prod(spec.output_shape), classifies, support, query)
