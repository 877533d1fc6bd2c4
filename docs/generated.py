"""What the scripts that write pages share."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["HERE", "format_table", "update_pages"]

HERE = Path(__file__).parent


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows, of which the first is the head, as a table."""
    cells = [[re.sub(r"(?<!\\)\|", r"\\|", cell).replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def update_pages(pages: Mapping[str, str]) -> int:
    """Write pages whose text has changed, and return the exit code; with ``--check``, only say which are not current."""
    stale = [name for name, text in pages.items() if (HERE / name).read_text(encoding="utf-8") != text]
    if stale and "--check" in sys.argv:
        print(f"{', '.join(stale)}: not current; run python docs/{Path(sys.argv[0]).name}", file=sys.stderr)
        return 1
    for name in stale:
        (HERE / name).write_text(pages[name], encoding="utf-8")
    return 0
