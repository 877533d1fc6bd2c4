"""``python -m metareg`` and the command ``metareg``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code: 0 done, 2 wrong use, 1 anything else, 130 interrupted."""
    from metareg.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
