"""Stopping cleanly.

Input: signals. Output: a `Stop` that says whether to stop, and by which signal. Invariants: the
first SIGTERM or Ctrl-C asks to stop, the second stops at once.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass
class Stop:
    """Whether to stop, and which signal asked for it."""

    event: threading.Event
    signal_number: int | None = None


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """The first signal sets `event`; the second raises KeyboardInterrupt."""
    stop = Stop(threading.Event())
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread receives signals
        return

    def handle(number: int, frame: object) -> None:
        if stop.event.is_set():
            raise KeyboardInterrupt
        stop.signal_number = number
        stop.event.set()
        log.warning(
            "%s: finishing the current work and saving; send it again to stop at once",
            signal.Signals(number).name,
        )

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
