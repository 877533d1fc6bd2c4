"""Benchmarks from torchvision's data sets, with the standard few-shot splits."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from metareg import MetaregError, UsageError
from metareg_image.base import ImageConfig, ImageTask
from metareg_image.splits import read_splits
from metareg_image.store import ClassImages, Cut, Source
from metareg_image.vision import import_torchvision

__all__ = ["CIFARFS", "FC100", "SVHN", "Aircraft", "TorchvisionTask", "TrafficSign", "VGGFlower"]


class SmallConfig(ImageConfig):
    """Options of the tasks whose images are 32×32."""

    size: int = Field(32, ge=8, description="Height and width of the images, in pixels.")


class TorchvisionTask(ImageTask):
    """A data set that torchvision reads and downloads; a subclass defines its parts and split."""

    downloadable = True
    marker: ClassVar[str]
    """A file or folder whose presence shows that the data set is there."""

    def parts(self, datasets: Any, root: Path, download: bool) -> Sequence[Any]:
        """Return torchvision's data sets that together form this one."""
        raise NotImplementedError

    def images(self, parts: Sequence[Any]) -> dict[str, list[Source]]:
        """Return the images of each class by name."""
        raise NotImplementedError

    def split(self) -> dict[str, list[str]]:
        """Return the names of the classes by split."""
        return read_splits(self.name)

    def is_complete(self) -> bool:
        return (self.location / self.marker).exists()

    def download(self) -> None:
        datasets = import_torchvision(self.name).datasets
        try:
            location = self.location
            location.mkdir(parents=True, exist_ok=True)
            # Download and extract in a temporary folder, so that the final one is always complete.
            with tempfile.TemporaryDirectory(prefix=".download-", dir=location) as aside:
                self.parts(datasets, Path(aside), download=True)
                for entry in Path(aside).iterdir():
                    if not (location / entry.name).exists():
                        shutil.move(entry, location / entry.name)
        except (OSError, RuntimeError) as error:  # also raised for a wrong checksum
            raise MetaregError(f"The data of the task '{self.name}' cannot be downloaded: {error}.") from error

    def classes(self) -> Iterable[ClassImages]:
        datasets = import_torchvision(self.name).datasets
        try:
            images = self.images(self.parts(datasets, self.location, download=False))
        except Exception as error:  # torchvision raises many kinds of errors for damaged files
            raise UsageError(
                f"The data of the task '{self.name}' in {self.location} cannot be read: {error}"
            ) from error
        for split, names in self.split().items():
            for name in names:
                yield ClassImages(split, name, images.get(name, []))


class _OfCIFAR100(TorchvisionTask):
    Config = SmallConfig
    folder = "cifar-100"
    marker = "cifar-100-python"
    obtain = "torchvision downloads CIFAR-100 (161 MB)."
    contents = (100, 60_000)

    def parts(self, datasets: Any, root: Path, download: bool) -> Sequence[Any]:
        return [datasets.CIFAR100(root, train=train, download=download) for train in (True, False)]

    def images(self, parts: Sequence[Any]) -> dict[str, list[Source]]:
        found: dict[str, list[Source]] = {name: [] for name in parts[0].classes}
        for part in parts:
            for image, label in zip(part.data, part.targets, strict=True):
                found[part.classes[label]].append(image)
        return found


class CIFARFS(_OfCIFAR100):
    """CIFAR-FS: the 100 classes of CIFAR-100 split at random into 64, 16 and 20; 600 images each, 32×32.

    Reference:
        Bertinetto et al., Meta-learning with differentiable closed-form solvers, ICLR 2019, arXiv 1805.08136.
    """

    name = "cifar-fs"


class FC100(_OfCIFAR100):
    """FC100: the classes of CIFAR-100 split by superclass into 60, 20 and 20; 600 images each, 32×32.

    Reference:
        Oreshkin, Rodriguez and Lacoste, TADAM, NeurIPS 2018, arXiv 1805.10123.
    """

    name = "fc100"


class Aircraft(TorchvisionTask):
    """FGVC-Aircraft: 70, 15 and 15 variants of aircraft, 100 images each, cropped to their boxes and resized to 32×32.

    Reference:
        Maji et al., 2013, arXiv 1306.5151; the split of Triantafillou et al., Meta-Dataset, ICLR 2020, arXiv 1903.03096;
        boxes and size as in the code of BOIL's and CML's authors.
    """

    Config = SmallConfig
    name = "aircraft"
    folder = "aircraft"
    marker = "fgvc-aircraft-2013b"
    obtain = "torchvision downloads FGVC-Aircraft (2.75 GB)."
    contents = (100, 10_000)

    def parts(self, datasets: Any, root: Path, download: bool) -> Sequence[Any]:
        return [
            datasets.FGVCAircraft(root, split=split, annotation_level="variant", download=download, loader=Path)
            for split in ("trainval", "test")
        ]

    def images(self, parts: Sequence[Any]) -> dict[str, list[Source]]:
        boxes = {}
        for line in (
            (Path(parts[0].root) / self.marker / "data" / "images_box.txt").read_text(encoding="utf-8").splitlines()
        ):
            name, *corners = line.split()
            left, top, right, bottom = map(int, corners)
            boxes[name] = (left - 1, top - 1, right, bottom)  # the file counts pixels from 1, both ends included
        found: dict[str, list[Source]] = {}
        for part in parts:
            for path, label in (part[number] for number in range(len(part))):
                found.setdefault(part.classes[label], []).append(Cut(path, boxes[path.stem]))
        return found


class VGGFlower(TorchvisionTask):
    """Flowers-102: 71, 15 and 16 kinds of flower, 40 to 258 images each, resized to 32×32.

    Reference:
        Nilsback and Zisserman, ICVGIP 2008; the split of Triantafillou et al., Meta-Dataset, ICLR 2020, arXiv 1903.03096.
    """

    Config = SmallConfig
    name = "vgg-flower"
    folder = "vgg-flower"
    marker = "flowers-102/setid.mat"
    obtain = "torchvision downloads Flowers-102 (345 MB)."
    contents = (102, 8189)

    def parts(self, datasets: Any, root: Path, download: bool) -> Sequence[Any]:
        return [
            datasets.Flowers102(root, split=split, download=download, loader=Path) for split in ("train", "val", "test")
        ]

    def images(self, parts: Sequence[Any]) -> dict[str, list[Source]]:
        # Names in the split begin with the number of the class, from 1.
        names = {int(name[:3]) - 1: name for listed in self.split().values() for name in listed}
        found: dict[str, list[Source]] = {}
        for part in parts:
            for path, label in (part[number] for number in range(len(part))):
                found.setdefault(names[label], []).append(path)
        return found


class TrafficSign(TorchvisionTask):
    """German traffic signs (GTSRB): 43 classes, only for testing runs trained on another task; 32×32.

    The images are torchvision's training part (26,640); the whole image is resized, without its region of interest.

    Reference:
        Stallkamp et al., Neural Networks 32, 2012.
    """

    Config = SmallConfig
    name = "traffic-sign"
    folder = "traffic-sign"
    marker = "gtsrb/GTSRB/Training"
    obtain = "torchvision downloads GTSRB (187 MB)."
    contents = (43, 26_640)

    def parts(self, datasets: Any, root: Path, download: bool) -> Sequence[Any]:
        return [datasets.GTSRB(root, split="train", download=download)]

    def split(self) -> dict[str, list[str]]:
        return {"test": [f"{number:05}" for number in range(43)]}

    def images(self, parts: Sequence[Any]) -> dict[str, list[Source]]:
        folders = sorted(folder for folder in (Path(parts[0].root) / self.marker).iterdir() if folder.is_dir())
        return {folder.name: [*sorted(folder.glob("*.ppm"))] for folder in folders}


class SVHN(TorchvisionTask):
    """Street View House Numbers: 10 digits, only for testing runs trained on another task; 32×32.

    The images are those of the test part (26,032), as in the code of BOIL's and CML's authors.

    Reference:
        Netzer et al., NIPS Workshop on Deep Learning and Unsupervised Feature Learning, 2011.
    """

    Config = SmallConfig
    name = "svhn"
    folder = "svhn"
    marker = "test_32x32.mat"
    obtain = "torchvision downloads the test part of SVHN (64 MB)."
    contents = (10, 26_032)

    def parts(self, datasets: Any, root: Path, download: bool) -> Sequence[Any]:
        return [datasets.SVHN(root, split="test", download=download)]

    def split(self) -> dict[str, list[str]]:
        return {"test": [str(digit) for digit in range(10)]}

    def images(self, parts: Sequence[Any]) -> dict[str, list[Source]]:
        (part,) = parts
        images = np.ascontiguousarray(part.data.transpose(0, 2, 3, 1))
        return {str(digit): list(images[part.labels == digit]) for digit in range(10)}
