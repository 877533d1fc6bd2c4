"""Fetch freely licensed fonts of kanji for the task font-folder: four families, 16 faces, 33 MB.

    python benchmarks/fonts.py FOLDER

They are under the SIL Open Font License 1.1 and come from packages of npm; the checksum of each archive is verified.
All 16 faces contain 4,913 kanji (U+4E00-9FFF), and kana, Latin, Greek and Cyrillic letters.
"""

from __future__ import annotations

import argparse
import tarfile
from pathlib import Path, PurePosixPath

from metareg import download

ORIGIN = "https://registry.npmjs.org/@expo-google-fonts"
PACKAGES = {
    "dela-gothic-one-0.4.1": "872442c04c6eb9d1f1c4590ec41c1fa1fee9f3a8c8ac8dcbb8ff01299a10da37",
    "kaisei-decol-0.4.1": "adffef42c315e9d13e29c0d4d2e562d3ee80f4db5fd023bfb5683cc5a433db7d",
    "m-plus-rounded-1c-0.4.4": "273d6b5f5a4de023effb8192adfa898806545e6495f6ca062bc19f067eec76bb",
    "zen-maru-gothic-0.4.1": "4511eb0b11847b3e4a7c9515271f65476f305458ebed04f55470bee92340cdb2",
}


def fetch(folder: Path) -> list[Path]:
    """Download the missing font files into a folder, with their archives, and return the files."""
    fonts = []
    for package, digest in PACKAGES.items():
        name = package.rpartition("-")[0]
        archive = folder / "archives" / f"{package}.tgz"
        download(f"{ORIGIN}/{name}/-/{package}.tgz", archive, f"sha256:{digest}")
        with tarfile.open(archive) as content:
            for member in content:
                if member.isfile() and member.name.endswith(".ttf"):
                    font = folder / PurePosixPath(member.name).name
                    font.write_bytes(content.extractfile(member).read())
                    fonts.append(font)
    return fonts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args().folder
    print(f"{len(fetch(chosen))} fonts in {chosen}")
