"""Images in the user's folders: any of one's own, and the benchmarks that cannot be downloaded freely."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from pydantic import Field

from metareg import PathText, UsageError, read_split_file, task_uniform
from metareg_image.base import ImageConfig, ImageTask
from metareg_image.sampling import draw_distinct
from metareg_image.splits import read_splits
from metareg_image.store import SPLITS, ClassImages, Cut, Source

__all__ = ["CUB", "Cars", "ImageFolder", "MiniImageNet", "TieredImageNet"]

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})


class ImageFolderConfig(ImageConfig):
    """Options of the image-folder task."""

    split_file: PathText | None = Field(
        None,
        description="JSON or YAML {train: [class, …], validation: […], test: […]}, or CSV with lines class,split; without "
        "it the classes are split at random by the ratios.",
    )
    ratios: list[float] = Field(
        [0.6, 0.2, 0.2], min_length=3, max_length=3, description="Parts of the classes for train, validation, test."
    )
    split_seed: int = Field(0, ge=0, description="Seed of the split by ratios.")


class ImageFolder(ImageTask):
    """Your own images: a folder for each class, inside one another as you like (``DIR/animals/cat/1.png``).

    A folder that holds images is a class; its path inside DIR is the class's name. The classes are split into train,
    validation and test by a file, or at random by ratios. If DIR has exactly the folders train, validation (or val) and
    test, these are the split.
    """

    Config = ImageFolderConfig
    config: ImageFolderConfig
    name = "image-folder"
    folder = "image-folder"
    obtain = "Put a folder of images for each class into it."
    too_few_classes = "ask for fewer ways, or give the split more classes (ratios, split_file)"
    recommended: ClassVar[Mapping[str, Any]] = {**ImageTask.recommended, "steps": 5000}

    def __init__(self, config: ImageFolderConfig) -> None:
        if min(config.ratios) < 0 or sum(config.ratios) <= 0:
            raise ValueError(f"ratios must not be negative, and not all zero, got {config.ratios}")
        super().__init__(config)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(f"{self.config.ratios} {self.config.split_seed}".encode(), digest_size=16)
        if self.config.split_file is not None:
            digest.update(_read_bytes(Path(self.config.split_file)))
        if self.location.is_dir():
            for name, paths in sorted(_list_images(self.location).items()):
                for path in paths:
                    state = path.stat()
                    digest.update(f"{name}/{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def classes(self) -> Iterable[ClassImages]:
        found = _list_images(self.location)
        if not found:
            raise UsageError(
                f"There are no images in the folders inside {self.location}; put a folder for each class there."
            )
        if self.config.split_file is not None:
            split = read_split_file(Path(self.config.split_file), found, "class")
        else:
            split = _split_by_folders(found) or self._split_at_random(found)
        for name, paths in sorted(found.items()):
            if name in split:
                yield ClassImages(split[name], name, paths)

    def _split_at_random(self, names: Iterable[str]) -> dict[str, str]:
        listed = sorted(names)
        order = draw_distinct(task_uniform(self.config.split_seed, "classes", [0], len(listed)), len(listed))[0]
        ends = [round(sum(self.config.ratios[: n + 1]) / sum(self.config.ratios) * len(listed)) for n in range(3)]
        return {listed[c]: SPLITS[sum(place >= end for end in ends)] for place, c in enumerate(order)}


class _Benchmark(ImageTask):
    """A published data set that the user has."""

    def classes(self) -> Iterable[ClassImages]:
        images = self.images()
        for split, names in read_splits(self.name).items():
            for name in names:
                yield ClassImages(split, name, images.get(name, ()))

    def images(self) -> Mapping[str, Sequence[Source]]:
        """The images of each class by its name; here, those of the folder of that name, wherever it is."""
        return {Path(name).name: paths for name, paths in _list_images(self.location).items()}


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
        for folder, paths in _list_images(self.location).items():
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
    """Caltech-UCSD Birds-200-2011: 100, 50 and 50 kinds of bird, 11,788 images.

    The shorter side is resized to 1.5 times the size, and the middle is cut out, as in the code of BOIL's and CML's authors.

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

    def resize(self, image: Image.Image) -> Image.Image:
        size = self.config.size
        scale = round(1.5 * size) / min(image.size)
        image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BILINEAR)
        left, top = ((side - size) // 2 for side in image.size)
        return image.crop((left, top, left + size, top + size))


class Cars(_Benchmark):
    """Stanford Cars: 98, 49 and 49 models of car; the 8,144 images of the training part, cut at their boxes, 84×84.

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
        root = self._root()
        annotations, meta = _read_matlab(root / self.marker), _read_matlab(root / "devkit" / "cars_meta.mat")
        names = [str(name) for name in meta["class_names"]]
        found: dict[str, list[Source]] = {}
        for each in annotations["annotations"]:
            path = root / "cars_train" / str(each["fname"])
            if path.is_file():
                # Boxes count pixels from 1, both ends included.
                box = (int(each["bbox_x1"]) - 1, int(each["bbox_y1"]) - 1, int(each["bbox_x2"]), int(each["bbox_y2"]))
                found.setdefault(names[int(each["class"]) - 1], []).append(Cut(path, box))
        return found

    def _root(self) -> Path:
        inside = self.location / "stanford_cars"
        return inside if inside.is_dir() else self.location


def _list_images(root: Path) -> dict[str, list[Path]]:
    """The image files of each folder below `root` that has some, by the folder's path inside `root`."""
    found: dict[str, list[Path]] = {}
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = sorted(name for name in files if Path(name).suffix.lower() in _SUFFIXES and not name.startswith("."))
        if images and Path(folder) != root:
            found[Path(folder).relative_to(root).as_posix()] = [Path(folder, name) for name in images]
    return found


def _split_by_folders(names: Iterable[str]) -> dict[str, str] | None:
    """The split that the first folders of the names are, if they are a split."""
    of_folder = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
    first = {name: name.partition("/")[0] for name in names if "/" in name}
    if len(first) != len(list(names)) or not {"train", "test"} <= set(first.values()) <= set(of_folder):
        return None
    return {name: of_folder[folder] for name, folder in first.items()}


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"The split file {path} cannot be read: {error.strerror}.") from error


def _is_wordnet(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


def _read_matlab(path: Path) -> Any:
    from scipy.io import loadmat

    try:
        return loadmat(path, squeeze_me=True)
    except (OSError, ValueError, NotImplementedError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
