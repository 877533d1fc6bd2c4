"""The base of image classification tasks: options, sampling of tasks, and location of the data."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from metareg import (
    Dataset,
    Episodes,
    MetaLearner,
    PathText,
    PluginConfig,
    Task,
    TaskSpec,
    UsageError,
    data_folder,
    draw_distinct,
    format_count,
    hookimpl,
    task_uniform,
)
from metareg_image.augmentation import crop, flip
from metareg_image.store import ClassImages, ImageStore, Source, SplitIndex, Splits, decode_all, read_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["NORMALISATIONS", "Channels", "ImageConfig", "ImageTask", "crop_middle"]

Channels = Literal[1, 3]


_PICTURED = 3


class Normalisation(NamedTuple):
    """The mean and standard deviation of each channel, for pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


NORMALISATIONS = {
    "none": Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""The normalisations of red, green and blue that pretrained models expect, by the value of the option."""
_NAMED = NORMALISATIONS.keys() - {"none"}


class ImageConfig(PluginConfig):
    """Options of every image task."""

    ways: int = Field(5, ge=2, description="Classes of a task.")
    shots: int = Field(1, ge=1, description="Support images of each class.")
    query: int = Field(15, ge=1, description="Query images of each class in training.")
    eval_query: int = Field(15, ge=1, description="Query images of each class in validation and test.")
    data: PathText | None = Field(
        None, description="Folder of the data set, or a folder that contains it under its name."
    )
    size: int = Field(84, ge=8, description="Height and width of the images, in pixels.")
    channels: Channels = Field(3, description="1 for grey images, 3 for colour.")
    rotations: bool = Field(False, description="Add every class rotated by 90°, 180° and 270° as further classes.")
    train_classes: int | None = Field(
        None,
        ge=2,
        description="Train on this many of the training classes, drawn anew for each seed; by default, on all.",
    )
    flips: bool = Field(False, description="Mirror training images left to right at random.")
    crops: int = Field(0, ge=0, description="Pad training images by this many pixels, and crop at random.")
    resize: Literal["stretch", "crop"] = Field(
        "stretch",
        description="Stretch an image to the size, or scale its shorter side to the size and crop the middle.",
    )
    normalisation: Literal["none", "imagenet", "inception", "clip", "train"] = Field(
        "none",
        description="Subtract a mean from each channel and divide by a standard deviation: those of ImageNet; 0.5, for "
        "weights trained like Inception's; those of CLIP; or those of the training classes. With mean and std, these "
        "numbers.",
    )
    mean: list[float] | None = Field(
        None, description="Means of the channels for the normalisation, of pixels from 0 to 1."
    )
    std: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, description="Standard deviations of the channels for the normalisation, of pixels from 0 to 1."
    )

    @model_validator(mode="after")
    def _narrow_padding(self) -> ImageConfig:
        if self.crops >= self.size:
            raise ValueError(f"crops = {self.crops} must be less than the size, {self.size}: padding mirrors the image")
        return self

    @model_validator(mode="after")
    def _check_normalisation(self) -> ImageConfig:
        given = [each for each in (self.mean, self.std) if each is not None]
        if len(given) == 1:
            raise ValueError("mean and std go together; one of them is missing")
        if any(len(each) != self.channels for each in given):
            raise ValueError(f"mean and std need a number for each channel, {self.channels}")
        if self.normalisation in _NAMED and not given and self.channels != 3:
            raise ValueError(f"normalisation = {self.normalisation} is for channels = 3, not for {self.channels}")
        if self.normalisation == "train" and not given and self.train_classes is not None:
            raise ValueError("normalisation = train cannot go with train_classes, which differ from seed to seed")
        return self


class ImageTask(Task):
    """Classification of images of new classes; a subclass provides the images.

    Pixels are in [0, 1]. They are standardised only if `normalisation` is set; the code of MAML's, BOIL's and CML's
    authors does not standardise them.
    """

    contract = 1
    Config: ClassVar[type[ImageConfig]] = ImageConfig
    loss = "cross_entropy"
    default_model = "conv4"
    recommended: ClassVar[Mapping[str, Any]] = {
        "steps": 30_000,
        "meta_batch": 4,
        "inner_steps": 1,
        "algo.inner_lr": 0.5,
        "outer_lr": 1e-3,
    }
    inherited_options = (
        "ways", "shots", "query", "eval_query", "size", "channels", "normalisation", "mean", "std",
    )  # fmt: skip

    name: ClassVar[str]
    """The plugin's name."""
    folder: ClassVar[str]
    """The data's folder inside the folder of all data."""
    obtain: ClassVar[str]
    """A sentence that says how to get the data."""
    contents: ClassVar[tuple[int, int] | None] = None
    """The numbers of classes and images of the complete data set; None if any number is valid."""
    downloadable: ClassVar[bool] = False
    """Whether `download` works."""
    too_few_classes: ClassVar[str] = "ask for fewer ways"
    """Advice for messages if a split has too few classes."""
    resizing: ClassVar[str | None] = None
    """A description of a subclass's own `resize`, for `image_preparation`."""
    version: ClassVar[int] = 1
    """Increased when the task computes other pixels from the same data, so that older caches are not used."""

    def __init__(self, config: ImageConfig) -> None:
        self.config = config

    # ------------------------------------------------------------------------------------------- what a subclass says

    def classes(self) -> Iterable[ClassImages]:
        """Yield the classes with their images.

        Raises:
            UsageError: the data in `location` is incomplete or wrong.
        """
        raise NotImplementedError

    def is_complete(self) -> bool:
        """Return whether the data seems to be in its `location`."""
        return self.location.is_dir()

    def fingerprint(self) -> str:
        """Return a value that changes when the images can have changed; standard data sets never change."""
        return ""

    def resize(self, image: Image.Image) -> Image.Image:
        """Resize an image to the task's size."""
        size = self.config.size
        if image.size == (size, size):
            return image
        if self.config.resize == "crop":
            return crop_middle(image, size, size)
        return image.resize((size, size), Image.Resampling.BILINEAR)

    def download(self) -> None:
        """Download the data to its `location`, if possible."""
        raise UsageError(f"The data of the task '{self.name}' cannot be downloaded freely. {self.obtain}")

    # ------------------------------------------------------------------------------------------------------------ task

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec((self.config.channels, self.config.size, self.config.size), (self.config.ways,))

    @functools.cached_property
    def store(self) -> ImageStore:
        """The decoded images, from the cache or decoded now."""
        return ImageStore.load_or_build(
            self.name,
            {"version": self.version, "source": self.fingerprint(), **self._resize_identity},
            self._present_classes,
            (self.config.size, self.config.size, self.config.channels),
            self._read_pixels,
            self._check_contents,
        )

    @hookimpl
    def episodes(self, split: str, indices: Sequence[int], seed: int) -> Episodes:
        images, _ = self._draw_tasks(split, indices, seed)
        ways, shots = self.config.ways, self.config.shots
        labels = torch.arange(ways).expand(len(indices), ways)
        return Episodes(
            self._to_inputs(images[:, :, :shots]),
            labels.repeat_interleave(shots, 1),
            self._to_inputs(images[:, :, shots:]),
            labels.repeat_interleave(images.shape[2] - shots, 1),
        )

    def read_image(self, path: Path) -> Tensor:
        pixels = torch.from_numpy(self._read_pixels(path).copy())
        return self._normalise(pixels.to(torch.float32).div_(255)).movedim(-1, 0)

    @property
    def stored_config(self) -> ImageConfig:
        """The options; with ``normalisation=train``, reads the data and adds mean and std of the training classes."""
        if self._constants is None or self.config.normalisation != "train":
            return self.config
        mean, std = self._constants
        return self.config.model_copy(update={"mean": list(mean), "std": list(std)})

    @property
    def image_preparation(self) -> str:  # type: ignore[override]
        """A description of how `read_image` prepares an image."""
        resizing = self.resizing or (
            "resized by Pillow's BILINEAR so that the shorter side is the size, then cropped in the middle"
            if self.config.resize == "crop"
            else "resized to width × height by Pillow's BILINEAR, whatever the aspect"
        )
        steps = ["rotated by its EXIF data, white where transparent, grey or RGB", resizing, "divided by 255"]
        if self._constants is not None:
            mean, std = (", ".join(f"{value:g}" for value in values) for values in self._constants)
            steps.append(f"minus the mean ({mean}) and divided by the standard deviation ({std}) of its channel")
        return "; ".join(steps)

    @functools.cached_property
    def _constants(self) -> Normalisation | None:
        """The mean and standard deviation to normalise with; None without normalisation."""
        config = self.config
        if config.mean is not None and config.std is not None:
            return Normalisation(tuple(config.mean), tuple(config.std))
        if config.normalisation in _NAMED:
            return NORMALISATIONS[config.normalisation]
        if config.normalisation == "train":
            return _measure(self.store.read_split("train"))
        return None

    @property
    def _resize_identity(self) -> dict[str, str]:
        """The part of the cache's key for resizing; empty for stretching, as in earlier caches."""
        return {} if self.config.resize == "stretch" else {"resize": self.config.resize}

    def _to_inputs(self, images: Tensor) -> Tensor:
        """``[tasks, ways, each, channels, height, width]`` uint8 → ``[tasks, ways × each, …]``, normalised.

        The memory layout is channels last, for which convolutions and pooling are faster.
        """
        values = images.movedim(3, -1).flatten(1, 2).to(torch.float32).div_(255)
        return self._normalise(values).movedim(-1, 2)

    def _normalise(self, values: Tensor) -> Tensor:
        """Normalise pixels ``[…, channels]`` in [0, 1] in place."""
        if self._constants is not None:
            mean, std = self._constants
            values.sub_(torch.tensor(mean)).div_(torch.tensor(std))
        return values

    def _to_pixels(self, image: Tensor) -> Tensor:
        """Convert an input ``[channels, height, width]`` to pixels in [0, 1]."""
        if self._constants is None:
            return image
        mean, std = (torch.tensor(values)[:, None, None] for values in self._constants)
        return (image * std + mean).clamp(0, 1)

    @hookimpl
    def figures(self, learner: MetaLearner, seed: int) -> Mapping[str, Figure]:
        """Draw test episodes: support images, query images, predicted and true labels with the model's confidence."""
        from metareg_image.figures import draw_episodes  # imports matplotlib, which nothing else needs

        indices = range(_PICTURED)
        _, names = self._draw_tasks("test", indices, seed)
        return {"episodes": draw_episodes(learner, self.episodes("test", indices, seed), names, self._to_pixels)}

    def _draw_tasks(self, split: str, indices: Sequence[int], seed: int) -> tuple[Tensor, list[list[str]]]:
        """Draw images, uint8 ``[tasks, ways, shots + query, channels, height, width]``, and their classes' names."""
        config, index = self.config, self._find_index(split, seed)
        ways, each = config.ways, config.shots + self._count_queries(split)
        kinds = 4 if config.rotations else 1
        uniform = task_uniform(seed, split, indices, ways * (1 + each), "images")
        chosen = draw_distinct(uniform[:, :ways], kinds * len(index.names))
        turns, classes = np.divmod(chosen, len(index.names))
        picked = draw_distinct(uniform[:, ways:].reshape(*chosen.shape, each), index.counts[classes])
        rows = index.starts[classes][..., None] + picked
        images = torch.from_numpy(self.store.read(rows)).movedim(-1, 3)
        for turn in range(1, kinds):
            turned = torch.from_numpy(turns == turn)
            images[turned] = images[turned].rot90(turn, (-2, -1))
        if split == "train":
            if config.flips:
                images = flip(images, task_uniform(seed, split, indices, ways * each, "flips"))
            if config.crops:
                images = crop(images, config.crops, task_uniform(seed, split, indices, 2 * ways * each, "crops"))
        names = [
            [f"{index.names[c]}{f' {90 * turn}°' if turn else ''}" for c, turn in zip(*pair, strict=True)]
            for pair in zip(classes, turns, strict=True)
        ]
        return images, names

    def _count_queries(self, split: str) -> int:
        return self.config.query if split == "train" else self.config.eval_query

    def _find_index(self, split: str, seed: int) -> SplitIndex:
        """Return the classes of a split, after checking that there are enough classes and images."""
        index = self.store.splits.get(split)
        if index is None:
            raise UsageError(f"There is no split '{split}'; there are {', '.join(self.store.splits)}.")
        if split == "train" and self.config.train_classes is not None:
            index = self._draw_classes(index, self.config.train_classes, seed)
        ways, queries = self.config.ways, self._count_queries(split)
        available = len(index.names) * (4 if self.config.rotations else 1)
        if not available:
            raise UsageError(
                f"The task '{self.name}' has no {split} classes: it is only for testing runs trained on another task, "
                f"with metareg eval RUN --task {self.name}."
                if split == "train" and len(self.store.splits["test"].names)
                else f"The task '{self.name}' has no {split} classes: {self.too_few_classes}."
            )
        if available < ways:
            count = format_count(available, f"{split} class", f"{split} classes")
            raise UsageError(
                f"The task '{self.name}' has {count}; {ways}-way tasks need {ways}: "
                f"{self.too_few_classes}{self._suggest_options()}."
            )
        least = int(index.counts.argmin())
        if index.counts[least] < self.config.shots + queries:
            count = format_count(int(index.counts[least]), "image")
            raise UsageError(
                f"The class '{index.names[least]}' of the task '{self.name}' ({split}) has {count}; "
                f"{self.config.shots} support and {queries} query images need {self.config.shots + queries}: lower shots or "
                f"{'query' if split == 'train' else 'eval_query'}{self._suggest_options()}."
            )
        return index

    def _suggest_options(self) -> str:
        """Suggest options for which every split has enough classes and images; empty if there are none."""
        parts = [each for each in self.store.splits.values() if len(each.names)]
        classes = min(len(each.names) for each in parts) * (4 if self.config.rotations else 1)
        images = min(int(each.counts.min()) for each in parts)
        if classes < 2 or images < 2:
            return ""
        config, shots = self.config, min(self.config.shots, images - 1)
        fitting = {
            "--ways ": (config.ways, min(config.ways, classes)),
            "--shots ": (config.shots, shots),
            "--query ": (config.query, min(config.query, images - shots)),
            "--set eval_query=": (config.eval_query, min(config.eval_query, images - shots)),
        }
        return f" (for all splits: {' '.join(f'{flag}{new}' for flag, (old, new) in fitting.items() if old != new)})"

    def _draw_classes(self, index: SplitIndex, number: int, seed: int) -> SplitIndex:
        """Draw some of the classes of a split."""
        if number > len(index.names):
            count = format_count(len(index.names), "training class", "training classes")
            raise UsageError(f"The task '{self.name}' has {count}; train_classes = {number} asks for more.")
        uniform = task_uniform(seed, "train", [0], number, "train_classes")
        chosen = np.sort(draw_distinct(uniform, len(index.names))[0])
        return SplitIndex(tuple(index.names[each] for each in chosen), index.starts[chosen], index.counts[chosen])

    # ------------------------------------------------------------------------------------------------------------ data

    @property
    def location(self) -> Path:
        """The folder of the data, or for a download."""
        if self.config.data is not None:
            given = Path(self.config.data)
            if not given.is_dir():
                raise UsageError(f"There is no folder {given}.")
            inside = given / self.folder
            return inside if inside.is_dir() else given
        return data_folder() / self.folder

    @property
    def dataset(self) -> Dataset | None:
        return Dataset(
            self.location,
            self.is_complete(),
            self.obtain,
            self.download if self.downloadable else None,
            self.verify,
        )

    def verify(self) -> str:
        """Read every image from its source, ignoring the cache, and return a summary."""
        splits = decode_all(self._present_classes(), self._read_pixels, self._check_contents)
        classes = "/".join(str(len(listed)) for listed in splits.values())
        images = sum(count for listed in splits.values() for _, count in listed)
        return f"{classes} classes ({'/'.join(splits)}), {format_count(images, 'image')}"

    def _read_pixels(self, image: Source) -> np.ndarray:
        return read_pixels(image, self.config.channels, self.resize)

    def _present_classes(self) -> Iterable[ClassImages]:
        if not self.is_complete():
            fetch = f"`metareg data {self.name} --download` downloads it." if self.downloadable else self.obtain
            raise UsageError(
                f"The data of the task '{self.name}' is not in {self.location}. {fetch} To use another folder, set "
                "--data DIR or METAREG_DATA."
            )
        return self.classes()

    def _check_contents(self, splits: Splits) -> None:
        if self.contents is None:
            return
        counts = {name: count for listed in splits.values() for name, count in listed}
        found = (len(counts), sum(counts.values()))
        if found != self.contents:
            empty = [name for name, count in counts.items() if not count]
            missing = f" Without images: {', '.join(empty[:3])}{' …' if len(empty) > 3 else ''}." if empty else ""
            raise UsageError(
                f"The data of the task '{self.name}' in {self.location} is not complete: it has "
                f"{found[0] - len(empty):,} classes and {found[1]:,} images instead of {self.contents[0]:,} and "
                f"{self.contents[1]:,}.{missing} {self.obtain}"
            )


def crop_middle(image: Image.Image, shorter: int, size: int) -> Image.Image:
    """Scale an image's shorter side to `shorter`, and crop the middle ``size × size`` pixels."""
    scale = shorter / min(image.size)
    image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _measure(images: Iterable[np.ndarray]) -> Normalisation:
    """Return the mean and standard deviation of each channel, to six decimals.

    Args:
        images: classes of uint8 images ``[images, height, width, channels]``.
    """
    counts = sum(
        np.stack([np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(each, -1, 0)])
        for each in images
    )
    shares = counts / np.sum(counts, axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = shares @ values
    std = np.sqrt(shares @ values**2 - mean**2)
    if not (std > 0).all():
        raise UsageError(
            "The training images have only one colour: their standard deviation is 0, so they cannot be normalised."
        )
    return Normalisation(*(tuple(np.round(each, 6).tolist()) for each in (mean, std)))
