"""Ctrl-C between steps instead of inside one.

Must not know what a step is.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def between_steps() -> Iterator[None]:
    """Hold a SIGINT back until the block is done, then raise KeyboardInterrupt; a second one does not wait.

    Only where Python's own handler is in charge and in the main thread, which alone may set another.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    waiting = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal waiting
        if waiting:
            raise KeyboardInterrupt("stopped inside a step")
        waiting = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if waiting:
        raise KeyboardInterrupt("stopped after a step")
