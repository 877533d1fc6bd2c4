"""Runs the notebooks, or those that are named, and keeps what they show; ``--check`` keeps nothing."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"
LARGEST = 250_000
"""Bytes that a notebook may have with its outputs."""


def execute(path: Path) -> nbformat.NotebookNode:
    """A notebook with its outputs, run in an empty folder, so that its runs lie outside of the project.

    Raises:
        CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=600, record_timing=False, resources={"metadata": {"path": folder}}, kernel_name="python3"
        )
        client.execute()
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return notebook


def main(arguments: list[str]) -> int:
    """Run the notebooks; without ``--check`` write them with their outputs."""
    named = [FOLDER / f"{name}.ipynb" for name in arguments if name != "--check"]
    for path in named or sorted(FOLDER.glob("*.ipynb")):
        text = nbformat.writes(execute(path)) + "\n"
        if len(text) > LARGEST:
            print(f"{path.name} has {len(text):,} bytes, of which {LARGEST:,} are allowed; show less", file=sys.stderr)
            return 1
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
