"""``python -m metareg`` and the command ``metareg``."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

from metareg.util.malloc import keep_freed_memory


def main() -> None:
    """Run the command line and exit with its code: 0 done, 2 wrong use, 1 anything else, 130 interrupted."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    keep_freed_memory()
    from metareg.cli.terminal import guard_streams

    guard_streams()
    from metareg.cli.app import run

    sys.exit(run(sys.argv[1:]))


def _leave(*_: object) -> None:
    """End on Ctrl-C wherever no training is under way, which listens by itself (`metareg.util.signals`).

    An exception would not do: torch imports NumPy without looking at errors, loses it, and goes on with half of NumPy.
    """
    with suppress(OSError):
        show_cursor = b"\r\x1b[K\x1b[?25h" if os.isatty(2) else b""  # a progress display may have hidden it
        os.write(2, show_cursor + b"Stopped.\n")
    os._exit(130)


if __name__ == "__main__":
    main()
