"""Runs the commands of gallery.md and puts their pictures into gallery/; a picture's title names the file that it is."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
WIDTH = 1200
"""Pixels that a picture is wide at most."""


def draw(page: str, folder: Path) -> None:
    """Run the commands of a page in a folder, and keep the pictures that it shows."""
    for block in re.findall(r"^```sh\n(.*?)^```$", page, flags=re.M | re.S):
        command = re.sub(r"^metareg ", f"{sys.executable} -m metareg ", block, flags=re.M)
        subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=folder, check=True)
    for target, source in re.findall(r'\]\((\S+\.png) "(\S+)"\)', page):
        with Image.open(folder / source) as image:
            image.thumbnail((WIDTH, 4 * WIDTH), Image.Resampling.LANCZOS)
            (HERE / target).parent.mkdir(exist_ok=True)
            image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(HERE / target, optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        draw((HERE / "gallery.md").read_text(encoding="utf-8"), Path(temporary))
