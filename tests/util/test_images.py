"""Realistic folders of images, and pixels against values computed by hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metareg import UnreadableImageError, UsageError, find_images, load_image

RAMP = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
GREY = Image.fromarray(RAMP)
COLOUR = Image.fromarray(np.dstack([RAMP, 255 - RAMP, RAMP // 2]))


def _on_white(values: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    part = opacity[..., None] / 255
    return values.reshape(*RAMP.shape, -1) * part + 255 * (1 - part)


def _lightness_to_grey(lightness: np.ndarray) -> np.ndarray:
    """Return CIE 1976 L* (0 to 100) of a neutral grey with sRGB's transfer curve (IEC 61966-2-1)."""
    light = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    return 255 * np.where(light > 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055, 12.92 * light)


def _turned(image: Image.Image) -> Image.Exif:
    exif = image.getexif()
    exif[0x0112] = 6  # to be rotated by 90° clockwise
    return exif


PALETTE = COLOUR.quantize(8)
NEUTRAL = Image.new("L", (16, 16), 128)
INKS = np.dstack([RAMP, RAMP // 2, 255 - RAMP, np.full_like(RAMP, 20)])

MODES: dict[str, tuple[str, Image.Image, dict[str, Any], np.ndarray]] = {
    "16 bits": ("png", Image.fromarray(RAMP.astype(np.uint16) * 257), {}, RAMP),
    "16 bits, TIFF": ("tif", Image.fromarray(RAMP.astype(np.uint16) * 257), {}, RAMP),
    "16 bits, transparent": (
        "png", Image.fromarray(RAMP.astype(np.uint16) * 257), {"transparency": 0}, np.where(RAMP == 0, 255, RAMP),
    ),
    "floats": ("tif", Image.fromarray((RAMP / 255).astype(np.float32)), {}, RAMP),
    "one bit": ("png", Image.fromarray(RAMP > 127), {}, np.where(RAMP > 127, 255, 0)),
    "grey with opacity": ("png", Image.merge("LA", [GREY, GREY]), {}, _on_white(RAMP, RAMP)),
    "colour with opacity": ("png", Image.merge("RGBA", [*COLOUR.split(), GREY]), {}, _on_white(np.array(COLOUR), RAMP)),
    "a transparent grey": ("png", GREY, {"transparency": 85}, np.where(RAMP == 85, 255, RAMP)),
    "a transparent colour": (
        "png", COLOUR, {"transparency": (0, 255, 0)}, np.where(RAMP[..., None] == 0, 255, np.array(COLOUR)),
    ),
    "palette": ("png", PALETTE, {}, np.array(PALETTE.getpalette()[:24]).reshape(8, 3)[np.array(PALETTE)]),
    "palette with opacities": (
        "png", PALETTE, {"transparency": bytes(range(0, 256, 32))},
        _on_white(np.array(PALETTE.getpalette()[:24]).reshape(8, 3)[np.array(PALETTE)], 32 * np.array(PALETTE)),
    ),
    "inks": ("tif", Image.merge("CMYK", [Image.fromarray(ink) for ink in np.moveaxis(INKS, -1, 0)]), {},
             (255 - INKS[..., :3].astype(float)) * (255 - 20) / 255),
    "CIELAB": ("tif", Image.merge("LAB", [GREY, NEUTRAL, NEUTRAL]), {},
               _lightness_to_grey(RAMP / 2.55)),
    "turned": ("tif", COLOUR, {"exif": _turned(COLOUR)}, np.rot90(np.array(COLOUR), -1)),
}  # fmt: skip
"""The suffix, the image, the options for saving, and the pixels."""


@pytest.mark.parametrize("name", MODES)
def test_pixels_of_every_mode(name: str, tmp_path: Path) -> None:
    ending, image, options, expected = MODES[name]
    path = tmp_path / f"image.{ending}"
    image.save(path, **options)
    colours = np.broadcast_to(expected.reshape(16, 16, -1), (16, 16, 3))
    read = np.asarray(load_image(path, 3), dtype=float)
    assert read.shape == (16, 16, 3)
    assert abs(read - colours).max() <= 1
    grey = np.asarray(load_image(path, 1), dtype=float)
    assert abs(grey - colours @ [0.299, 0.587, 0.114]).max() <= 2


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("far.tif", Image.fromarray(RAMP.astype(np.float32)), "floating-point numbers from 0 to 255"),
        ("nan.tif", Image.fromarray(np.full((4, 4), np.nan, np.float32)), "between 0 and 1"),
        ("wide.tif", Image.fromarray(RAMP.astype(np.int32)), "32-bit integers"),
        ("page.jpg", b"<html>404</html>", "it is not an image"),
        ("drawing.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is not an image"),
        ("none.png", b"", "it is not an image"),
        ("half.png", "half", "truncated"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, Image.Image):
        content.save(path)
    elif content == "half":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        load_image(path, 1)
    assert caught.value.path == path
    assert str(path) in str(caught.value)


# ------------------------------------------------------------------------------------------------------------------ folders


def _draw(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        GREY.save(path, format="PNG")


def test_each_real_folder_is_visited_once(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    _draw(root / "dog/1.png", root / "cat/persian/1.png", tmp_path / "elsewhere/emu/1.png")
    (root / "cat/up").symlink_to("..")  # a circle
    (root / "cat/around").symlink_to(tmp_path)  # a cycle of links that leads outside
    (root / "a dog").symlink_to("dog")  # earlier in the alphabet
    (root / "far").symlink_to(tmp_path / "elsewhere")
    (root / "linked.png").symlink_to("dog/1.png")
    found = find_images(root)
    assert found.classes == {
        "cat/persian": [root / "cat/persian/1.png"], "dog": [root / "dog/1.png"], "far/emu": [root / "far/emu/1.png"],
    }  # fmt: skip
    assert sorted(found.repeated) == ["a dog", "cat/around", "cat/up"]
    assert found.by_folder[""] == [root / "linked.png"]


def test_what_is_left_out_is_said_in_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "all" / "photos"
    _draw(
        root / "cat/1.PNG", root / "cat/2.jfif", root / "dog/1.avif", root / "dog/.ipynb_checkpoints/1-checkpoint.png"
    )
    _draw(root / "dog/._1.png", root / "__MACOSX/dog/1.png", tmp_path / "loose.png")
    (root / "emu/young").mkdir(parents=True)
    for name in ("cat/a.npy", "cat/b.npy", "dog/c.svg", "dog/README"):
        (root / name).write_text("")
    found = find_images(tmp_path / "all")
    assert {name: len(paths) for name, paths in found.classes.items()} == {"cat": 2, "dog": 1}
    assert found.empty == ["photos/emu"]
    find_images(tmp_path).warn_of_left_out()
    (line,) = (record.getMessage() for record in caplog.records)
    for part in ("2 .npy", "1 .svg", "ipynb_checkpoints", "__MACOSX", "loose.png", "photos/emu"):
        assert part in line
    caplog.clear()
    find_images(root / "cat").warn_of_left_out(of_classes=False)
    assert "png" not in caplog.text


def test_folders_that_cannot_be_read_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _draw(tmp_path / "cat/1.png")
    (tmp_path / "cat/2.png").symlink_to("nowhere.png")
    (tmp_path / "dog").symlink_to("no folder")
    with pytest.raises(UsageError, match=r"broken links: .*cat/2\.png"):
        find_images(tmp_path)

    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match="cannot be read: Permission denied"):
        find_images(tmp_path)
