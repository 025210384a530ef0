"""Ctrl-C and SIGTERM while a run goes: at the end of an iteration, never in the middle of keeping its results."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, final


@final
class Stop:
    """Whether the run has been asked to stop.

    The first request waits for the end of the iteration; a second one breaks it off, which loses that iteration and
    nothing else. While results are being kept, both wait. With `patient`, all wait: torchrun passes on what the terminal
    has sent already, and several processes stop at the end of the same iteration.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.asked = False
        self._patient = patient
        self._again = False
        self._iterating = False
        self._keeping = False

    @contextmanager
    def iterating(self) -> Generator[None]:
        """Inside, the first request only sets `asked`."""
        self._iterating = True
        try:
            yield
        finally:
            self._iterating = False

    @contextmanager
    def keeping(self) -> Generator[None]:
        """Inside, nothing is broken off."""
        self._keeping = True
        try:
            yield
        finally:
            self._keeping = False
        if self._again:
            raise KeyboardInterrupt

    def handle(self, signal_number: int, frame: Any) -> None:
        """What happens on a signal."""
        if self._keeping:
            self._again = self.asked and not self._patient
            self.asked = True
        elif self._iterating and (self._patient or not self.asked):
            self.asked = True
        else:
            raise KeyboardInterrupt


@contextmanager
def stoppable(*, patient: bool = False) -> Generator[Stop]:
    """Answer SIGINT and SIGTERM until the end of the block; only in the main thread, and only those not ignored."""
    stop = Stop(patient=patient)
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: set by what is not Python
                before[number] = signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
