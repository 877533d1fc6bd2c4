"""Omniglot: handwritten characters of 50 alphabets, 20 drawings each."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, ImageOps
from pydantic import Field

from metareg import UsageError, download
from metareg_image.base import Channels, ImageConfig, ImageTask
from metareg_image.standard import TorchvisionTask
from metareg_image.store import ClassImages, Source

__all__ = ["Omniglot", "OmniglotSmall"]

_ORIGIN = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_SMALL = {
    "images_background_small1.zip": "sha256:f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
    "images_background_small2.zip": "sha256:3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
}
_VALIDATION_ALPHABET = "Early_Aramaic"


class OmniglotConfig(ImageConfig):
    """Options of the Omniglot tasks."""

    size: int = Field(28, ge=8, description="Height and width of the images, in pixels.")
    channels: Channels = Field(1, description="1 for grey images, 3 for colour.")
    rotations: bool = Field(True, description="Add every class rotated by 90°, 180° and 270° as further classes.")


class _Characters(ImageTask):
    Config = OmniglotConfig
    folder = "omniglot"

    @property
    def image_preparation(self) -> str:  # type: ignore[override]
        """A description of how `read_image` prepares an image."""
        return super().image_preparation.replace("; resized", "; inverted, so that ink is bright; resized")

    def resize(self, image: Image.Image) -> Image.Image:
        """Resize and invert an image, so that ink is bright on a dark ground."""
        return super().resize(ImageOps.invert(image))


class Omniglot(_Characters, TorchvisionTask):
    """Omniglot with the split of Vinyals et al.: 1,028 characters for training, 172 for validation, 423 for test.

    28×28 grey images, ink bright; rotations by 90°, 180° and 270° are further classes, in every split.

    Reference:
        Lake, Salakhutdinov and Tenenbaum, Science 350, 2015; Vinyals et al., NeurIPS 2016, arXiv 1606.04080; the split as
        in Snell, Swersky and Zemel, NeurIPS 2017, arXiv 1703.05175.
    """

    name = "omniglot"
    obtain = "torchvision downloads it from the authors' repository (14 MB)."
    contents = (1623, 32_460)
    marker = "omniglot-py/images_evaluation"
    recommended: ClassVar[Mapping[str, Any]] = {**ImageTask.recommended, "algo.inner_lr": 0.4}

    def parts(self, datasets: Any, root: Path, download: bool) -> Sequence[Any]:
        return [datasets.Omniglot(root, background=part, download=download, loader=Path) for part in (True, False)]

    def images(self, parts: Sequence[Any]) -> dict[str, list[Source]]:
        found: dict[str, list[Source]] = {}
        for part, folder in zip(parts, ("background", "evaluation"), strict=True):
            for path in sorted(part[number][0] for number in range(len(part))):
                found.setdefault(f"{folder}/{path.parts[-3]}/{path.parts[-2]}", []).append(path)
        return found


class OmniglotSmallConfig(OmniglotConfig):
    """Options of the omniglot-small task: small images and few query images make training steps short."""

    size: int = Field(20, ge=8, description="Height and width of the images, in pixels; published results use 28.")
    query: int = Field(5, ge=1, description="Query images of each class in training.")


class OmniglotSmall(_Characters):
    """The two 'small' background sets of Omniglot: 3 MB, for runs of minutes.

    Training uses 114 characters of the first set (Balinese, Greek, Korean, Latin), validation its 22 of Early Aramaic,
    the test the 106 of the alphabets that only the second set has (Katakana, Sanskrit, Tagalog). 20×20 grey images, ink
    bright; rotations by 90°, 180° and 270° are further classes, in every split.

    Reference:
        Lake, Salakhutdinov and Tenenbaum, Science 350, 2015.
    """

    Config = OmniglotSmallConfig
    name = "omniglot-small"
    obtain = f"It consists of {' and '.join(_SMALL)} in the authors' repository (3 MB)."
    contents = (242, 4840)
    downloadable = True
    recommended: ClassVar[Mapping[str, Any]] = {
        **ImageTask.recommended,
        "steps": 10_000,
        "outer_lr": 2e-3,
        "model.width": 16,
        "anil": {"inner_steps": 5},
    }

    def is_complete(self) -> bool:
        return all((self.location / name).is_file() for name in _SMALL)

    def download(self) -> None:
        for name, checksum in _SMALL.items():
            download(f"{_ORIGIN}/{name}", self.location / name, checksum)

    def classes(self) -> Iterable[ClassImages]:
        first, second = (_read_characters(self.location / name) for name in _SMALL)
        for name, images in first.items():
            split = "validation" if name.startswith(f"{_VALIDATION_ALPHABET}/") else "train"
            yield ClassImages(split, name, images)
        known = {name.partition("/")[0] for name in first}
        for name, images in second.items():
            if name.partition("/")[0] not in known:
                yield ClassImages("test", name, images)


def _read_characters(path: Path) -> dict[str, list[Image.Image]]:
    """Read the authors' zip archive ``set/alphabet/character/drawing.png``; return images by ``alphabet/character``."""
    characters: dict[str, list[Image.Image]] = {}
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        if f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" != _SMALL[path.name]:
            raise ValueError("it is not the authors' archive")
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".png"):
                    _, alphabet, character, _ = name.split("/")
                    with archive.open(name) as file:
                        image = Image.open(file)
                        image.load()
                    characters.setdefault(f"{alphabet}/{character}", []).append(image)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {error}. Delete it and download it again.") from error
    return characters
