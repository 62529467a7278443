"""A signal asks the run to stop, between two steps instead of inside one.

Must not know steps or ranks: the loop reads the flag where all ranks are.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger(__name__)

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: ended by a signal with a checkpoint written; start again to go on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ECHO = 2.0  # seconds: launchers and schedulers both hand a signal on, so one that comes twice at once was sent once


class Stopper:
    """SIGTERM and SIGUSR1 set `asked`; the same signal again, not at once, ends the process as if nobody listened.

    SIGUSR1, then SIGTERM (SLURM's warning, then its end) asks twice and waits for the checkpoint still.
    """

    def __init__(self) -> None:
        """Listen to nothing yet."""
        self.asked = False
        self._first: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self.asked

    def __enter__(self) -> Stopper:
        """Listen; outside of the main thread Python allows no handlers, and that is said."""
        if threading.current_thread() is not threading.main_thread():
            log.warning("not in the main thread: SIGTERM and SIGUSR1 end this run without a checkpoint")
            return self
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        now = time.monotonic()
        if now - self._first.setdefault(number, now) > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = True
