"""Ctrl-C and SIGTERM: the first asks for a clean stop, the second stops now."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopRequest", "stop_requests"]

log = logging.getLogger("metareg")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody asked for an end.

    The first signal sets `asked`, for the training to look at after each step; a second one, or any while `at_once` is
    set, raises KeyboardInterrupt where the program stands.
    """

    def __init__(self) -> None:
        self.asked = False
        self.at_once = False
        """Set where there is no step to wait for."""

    def handle(self, number: int, _frame: FrameType | None) -> None:
        if self.asked or self.at_once:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("%s: stopping after this step; once more stops now.", signal.Signals(number).name)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listen for SIGINT and SIGTERM while the block runs. Outside the main thread, where none arrive, it does nothing."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # Who ignores a signal (nohup, a shell's background job) has a reason.
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop.handle) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
