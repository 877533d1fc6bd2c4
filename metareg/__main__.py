"""``python -m metareg`` and the command ``metareg``."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

from metareg.util.imports import own_collector
from metareg.util.malloc import keep_freed_memory


def main() -> None:
    """Run the command line and exit with its code: 0 success, 2 wrong use, 130 interrupted, 1 any other failure."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    keep_freed_memory()
    own_collector()
    from metareg.cli.terminal import guard_streams

    guard_streams()
    from metareg.cli.app import run

    sys.exit(run(sys.argv[1:]))


def _leave(*_: object) -> None:
    """Exit on Ctrl-C, except during training, which has its own handler (`metareg.util.signals`).

    An exception is not enough: torch ignores errors when it imports NumPy, and would continue with half of NumPy.
    """
    with suppress(OSError):
        show_cursor = b"\r\x1b[K\x1b[?25h" if os.isatty(2) else b""  # a progress display can have hidden it
        os.write(2, show_cursor + b"Stopped.\n")
    os._exit(130)


if __name__ == "__main__":
    main()
