"""Ctrl-C and SIGTERM: the first signal asks for a clean stop, the second stops immediately."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopRequest", "catch_stop_signals"]

log = logging.getLogger("metareg")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO_SECONDS = 2.0
"""Time in which a repeated signal is ignored: launchers forward signals that processes have already received."""


class StopRequest:
    """Whether a signal has asked to stop.

    The first signal sets `asked`, which training checks after each step. A second one, or any while `at_once` is set,
    raises KeyboardInterrupt immediately.

    Args:
        launched: whether a launcher forwards signals, so that two in quick succession count as one.
    """

    def __init__(self, launched: bool = False) -> None:
        self.asked = False
        self.at_once = False
        """Set while there is no step to wait for."""
        self._echo_until = 0.0
        self._echo_seconds = _ECHO_SECONDS if launched else 0.0

    def handle(self, number: int, _frame: FrameType | None) -> None:
        if time.monotonic() < self._echo_until:
            return
        self._echo_until = time.monotonic() + self._echo_seconds
        if self.asked or self.at_once:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("%s: stopping after this step; repeat to stop immediately.", signal.Signals(number).name)


@contextmanager
def catch_stop_signals(launched: bool = False) -> Iterator[StopRequest]:
    """Handle SIGINT and SIGTERM while the block runs. Does nothing outside the main thread, which gets all signals."""
    stop = StopRequest(launched)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # Keep signals ignored that already are (nohup, a shell's background job).
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop.handle) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
