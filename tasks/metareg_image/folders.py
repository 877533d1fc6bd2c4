"""Images in users' folders: their own, and benchmarks that cannot be downloaded freely."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from pydantic import Field

from metareg import (
    ImageFiles,
    PathText,
    UsageError,
    draw_distinct,
    find_images,
    find_split,
    parse_in_child,
    read_split_file,
    task_uniform,
)
from metareg_image.base import ImageConfig, ImageTask, crop_middle
from metareg_image.splits import read_splits
from metareg_image.store import SPLITS, ClassImages, Cut, Source

__all__ = ["CUB", "Cars", "ImageFolder", "MiniImageNet", "TieredImageNet"]

log = logging.getLogger("metareg")

_NAMED = 5
"""Maximum number of names in a message, before it counts the rest."""
_CHOICES = "assign classes with --set split_file=FILE"


class ImageFolderConfig(ImageConfig):
    """Options of the image-folder task."""

    split_file: PathText | None = Field(
        None,
        description="JSON or YAML {train: [class, …], validation: […], test: […]}, or CSV with lines class,split; by "
        "default, the classes are split at random by the ratios.",
    )
    ratios: list[float] = Field(
        [0.6, 0.2, 0.2], min_length=3, max_length=3, description="Parts of the classes for train, validation, test."
    )
    split_seed: int = Field(0, ge=0, description="Seed of the split by ratios.")


class ImageFolder(ImageTask):
    """Your own images: one folder per class, at any depth (``DIR/animals/cat/1.png``).

    A folder that contains images is a class; its path in DIR is the class's name. The classes are split into train,
    validation and test by a file, by folders train, validation (valid, val, dev) and test in DIR, or at random by
    ratios. A single folder around all others is ignored. A folder reached again through links is visited once.
    """

    Config = ImageFolderConfig
    config: ImageFolderConfig
    name = "image-folder"
    folder = "image-folder"
    obtain = "Put a folder of images for each class into it."
    too_few_classes = "ask for fewer ways, or give the split more classes (ratios, split_file)"
    # The head of conv4 has 1,600 inputs on 84×84 pixels: with the 0.5 of the other tasks, MAML's loss begins at 25 and is
    # still 60 after 20 training steps; with 0.01, MAML's own on miniImageNet, it is 1.7. BOIL does not adapt the head.
    recommended: ClassVar[Mapping[str, Any]] = {
        **ImageTask.recommended,
        "steps": 5000,
        "algo.inner_lr": 0.01,
        "boil": {"algo.inner_lr": 0.5},
    }

    def __init__(self, config: ImageFolderConfig) -> None:
        if min(config.ratios) < 0 or sum(config.ratios) <= 0:
            raise ValueError(f"ratios must not be negative, and not all zero, got {config.ratios}")
        super().__init__(config)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        if self.location.is_dir():
            for name, part in self._split.items():
                digest.update(f"{name} {part}\n".encode(errors="surrogateescape"))
                for path in self._files.classes[name]:
                    state = path.stat()
                    line = f"{path.name} {state.st_size} {state.st_mtime_ns}\n"
                    digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def classes(self) -> Iterable[ClassImages]:
        for name, part in self._split.items():
            yield ClassImages(part, name, self._files.classes[name])

    @functools.cached_property
    def _split(self) -> dict[str, str]:
        """Return the split of each assigned class, sorted; logs once where it comes from."""
        found = self._files.classes
        if self.config.split_file is not None:
            split, origin = (
                read_split_file(Path(self.config.split_file), found, "class"),
                f"by {self.config.split_file}",
            )
        elif by_folders := _split_by_folders(self._files.base, found):
            split, origin = by_folders, "by its folders"
        else:
            split, origin = self._split_at_random(found), "at random"
        counts = Counter(split.values())
        log.info("%s is split %s: %s classes.", self.location, origin, "/".join(str(counts[part]) for part in SPLITS))
        return dict(sorted(split.items()))

    @functools.cached_property
    def _files(self) -> ImageFiles:
        """The images of each class; logs once what was ignored."""
        files = find_images(self.location)
        files.warn_of_left_out()
        if not files.classes:
            raise UsageError(
                f"There are no images in the folders inside {self.location}; put a folder for each class there."
            )
        inner = [name for name in files.classes if any(str(outer) in files.classes for outer in Path(name).parents)]
        if inner:
            log.warning("Inside another class of %s, and a class of its own: %s.", self.location, _join(inner))
        return files

    def _split_at_random(self, names: Iterable[str]) -> dict[str, str]:
        listed = sorted(names)
        order = draw_distinct(task_uniform(self.config.split_seed, "classes", [0], len(listed)), len(listed))[0]
        ends = [round(sum(self.config.ratios[: n + 1]) / sum(self.config.ratios) * len(listed)) for n in range(3)]
        return {listed[c]: SPLITS[sum(place >= end for end in ends)] for place, c in enumerate(order)}


class _Benchmark(ImageTask):
    """A published data set in the user's folder."""

    def classes(self) -> Iterable[ClassImages]:
        images = self.images()
        for split, names in read_splits(self.name).items():
            for name in names:
                yield ClassImages(split, name, images.get(name, ()))

    def images(self) -> Mapping[str, Sequence[Source]]:
        """Return the images of each class by name; by default, those of the folder with that name, at any depth."""
        return {Path(name).name: paths for name, paths in find_images(self.location).classes.items()}


class MiniImageNet(_Benchmark):
    """miniImageNet: 64, 16 and 20 classes of ImageNet, 600 images each, 84×84.

    Reference:
        Vinyals et al., NeurIPS 2016, arXiv 1606.04080; the classes of Ravi and Larochelle, ICLR 2017.
    """

    name = "miniimagenet"
    folder = "miniimagenet"
    obtain = (
        "Put its 60,000 images there: a folder for each of the 100 classes, named by its WordNet number (n01532829), in "
        "any folders; or all in one folder, their names beginning with that number (n0153282900000005.jpg)."
    )
    contents = (100, 60_000)

    def images(self) -> Mapping[str, Sequence[Source]]:
        found: dict[str, list[Source]] = {}
        for folder, paths in find_images(self.location).classes.items():
            name = Path(folder).name
            for path in paths:
                found.setdefault(name if _is_wordnet(name) else path.name[:9], []).append(path)
        return found


class TieredImageNet(_Benchmark):
    """tieredImageNet: 351, 97 and 160 classes of ImageNet, split by their superclasses; 779,165 images, 84×84.

    Reference:
        Ren et al., Meta-Learning for Semi-Supervised Few-Shot Classification, ICLR 2018, arXiv 1803.00676.
    """

    name = "tieredimagenet"
    folder = "tieredimagenet"
    obtain = (
        "Put its 779,165 images there: a folder for each of the 608 classes, named by its WordNet number (n01530575), in "
        "any folders."
    )
    contents = (608, 779_165)


class CUB(_Benchmark):
    """Caltech-UCSD Birds-200-2011: 100, 50 and 50 species of birds, 11,788 images.

    The shorter side is resized to 1.5 times the size, and the centre is cropped, as in the code of BOIL's and CML's
    authors.

    Reference:
        Wah et al., Caltech CNS-TR-2011-001; the split of Chen et al., A Closer Look at Few-shot Classification, ICLR 2019,
        arXiv 1904.04232.
    """

    name = "cub"
    folder = "cub"
    obtain = (
        "Put the folder CUB_200_2011 of the authors' archive there, or its folder images: one folder for each of the 200 "
        "classes (001.Black_footed_Albatross)."
    )
    contents = (200, 11_788)
    resizing = "resized by Pillow's BILINEAR so that the shorter side is 1.5 times the size, then cropped in the middle"

    def __init__(self, config: ImageConfig) -> None:
        if config.resize != "stretch":
            raise ValueError("this task does not support resize, because it has its own crop")
        super().__init__(config)

    def resize(self, image: Image.Image) -> Image.Image:
        return crop_middle(image, round(1.5 * self.config.size), self.config.size)


class Cars(_Benchmark):
    """Stanford Cars: 98, 49 and 49 models of car; the 8,144 images of the training part, cropped to their boxes, 84×84.

    Reference:
        Krause et al., 3D Object Representations for Fine-Grained Categorization, 3dRR 2013; split, part and boxes as in the
        code of BOIL's and CML's authors.
    """

    name = "cars"
    folder = "cars"
    obtain = (
        "Put cars_train (8,144 images) and devkit (with cars_train_annos.mat and cars_meta.mat) of the authors' archives "
        "there, or in a folder stanford_cars inside it."
    )
    contents = (196, 8144)
    marker: ClassVar[str] = "devkit/cars_train_annos.mat"

    def is_complete(self) -> bool:
        return (self._root() / self.marker).is_file()

    def images(self) -> Mapping[str, Sequence[Source]]:
        # Imported here because it imports scipy.
        from metareg_image.matlab import read_boxes, read_class_names

        root = self._root()
        places = root / self.marker, root / "devkit" / "cars_meta.mat"
        (annotations,) = parse_in_child(read_boxes, places[:1], "MATLAB's annotations of Stanford Cars")
        (meta,) = parse_in_child(read_class_names, places[1:], "MATLAB's names of Stanford Cars")
        names = meta["names"].tolist()
        found: dict[str, list[Source]] = {}
        columns = (annotations[each].tolist() for each in ("names", "classes", "boxes"))
        for name, number, (left, top, right, bottom) in zip(*columns, strict=True):
            if not 1 <= number <= len(names):
                raise UsageError(f"{places[0]} names the class {number}, of {len(names)} in {places[1]}.")
            path = root / "cars_train" / Path(name).name
            if path.is_file():
                # Boxes count pixels from 1, both ends included.
                found.setdefault(names[number - 1], []).append(Cut(path, (left - 1, top - 1, right, bottom)))
        return found

    def _root(self) -> Path:
        inside = self.location / "stanford_cars"
        return inside if inside.is_dir() else self.location


def _split_by_folders(root: Path, names: Iterable[str]) -> dict[str, str] | None:
    """Return the split by the classes' outermost folders; None if these are not splits.

    Raises:
        UsageError: the folders resemble a split without being one, or a class is in two parts of it.
    """
    outer: dict[str, list[str]] = {}
    for name in names:
        outer.setdefault(name.partition("/")[0], []).append(name)
    part_of = {folder: split for folder in outer if (split := find_split(folder))}
    _refuse_other_names(root, outer, part_of)
    wrap_classes = [folder for folder in part_of if folder not in outer[folder]]
    if not part_of or (len(part_of) == 1 and not wrap_classes):  # a class can be named "test"
        return None
    others = [folder for folder in outer if folder not in part_of]
    if others:
        raise UsageError(
            f"{root} has {_join(part_of)}, which look like a split, and also {_join(others)}: put all classes into the "
            f"folders of the split, or {_CHOICES}."
        )
    for folder in part_of:
        if folder not in wrap_classes:
            raise UsageError(
                f"{root / folder} looks like part of a split, which must contain one folder per class, but it contains "
                "images itself."
            )
        twins = [other for other in part_of if part_of[other] == part_of[folder]]
        if len(twins) > 1:
            raise UsageError(f"{root} has {_join(twins)}, which mean the same part of a split; keep one of them.")
    _refuse_shared_classes(root, outer, sorted(part_of, key=lambda folder: SPLITS.index(part_of[folder])))
    return {name: part for folder, part in part_of.items() for name in outer[folder]}


def _refuse_other_names(root: Path, outer: Iterable[str], part_of: Mapping[str, str]) -> None:
    """Refuse folders such as ``train_set`` and ``test images``, which are not classes."""
    meant = {folder: set(map(find_split, re.split(r"[^a-z]+", folder.casefold()))) for folder in outer}
    alike = [folder for folder in meant if folder not in part_of and meant[folder] != {None}]
    if alike and len(set().union(*meant.values()) - {None}) > 1:
        raise UsageError(
            f"{root} has {_join([*part_of, *alike])}, which look like a split: name the folders train, validation and "
            f"test, or {_CHOICES}."
        )


def _refuse_shared_classes(root: Path, outer: Mapping[str, Sequence[str]], folders: Sequence[str]) -> None:
    """Refuse classes in two parts of a split, because test classes must not be used in training."""
    inside = {folder: {name.partition("/")[2].casefold(): name for name in outer[folder]} for folder in folders}
    for first, second in itertools.combinations(folders, 2):
        shared = sorted(inside[first].keys() & inside[second].keys())
        if shared:
            names = [inside[first][name].partition("/")[2] for name in shared]
            raise UsageError(
                f"{root} has {_join(names)} in {first} and in {second}; test classes must not be used in training. To "
                f"split the classes of one folder, use --data {shlex.quote(str(root / first))}; or {_CHOICES}."
            )


def _join(names: Iterable[str]) -> str:
    """Join names to ``a, b and c``; list only the first of many."""
    listed = list(names)
    if len(listed) > _NAMED:
        return f"{', '.join(listed[:_NAMED])} and {len(listed) - _NAMED} more"
    return " and ".join(filter(None, (", ".join(listed[:-1]), listed[-1])))


def _is_wordnet(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()
