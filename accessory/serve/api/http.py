"""HTTP as uvicorn speaks it, for strangers: heads that come slowly or make no sense are answered in OpenAI's shape.

Must not know routes or what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from types import FrameType
from typing import cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from accessory.serve.api.errors import ApiError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """uvicorn's own, with our signals: a first one lets the answers under way end, a second one ends the process."""

    def stop(self) -> None:
        """Begin to end, from any thread."""
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours while it runs, where it runs in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._told) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _told(self, number: int, frame: FrameType | None) -> None:
        """One of them came."""
        if self.should_exit:
            os._exit(128 + number)
        self.stop()


def protocol(*, header_timeout: float, write_timeout: float) -> type[asyncio.Protocol]:
    """The protocol of connections: seconds in which a request's head must arrive, and in which a client must go on
    reading when it has stopped to."""
    limits = {"header_timeout": header_timeout, "write_timeout": write_timeout}
    return cast("type[asyncio.Protocol]", type("Careful", (_Careful,), limits))


class _Careful(H11Protocol):
    """uvicorn's own, with a clock for heads of requests, and one for clients that do not read."""

    header_timeout = write_timeout = 10.0
    _clock: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        self._read()
        super().resume_writing()

    def _read(self) -> None:
        """The client reads on, or is gone."""
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or has too large a head."""
        self._refuse(ApiError(400, "http: got what is no HTTP, or too large a head, expected a request; mend it"))

    def _watch(self) -> None:
        """Start the clock where a head is awaited, stop it where one is there."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop()
        elif self._clock is None:
            late = ApiError(408, f"http: got no head in {self.header_timeout:g} seconds, expected it sooner")
            refuse: Callable[[ApiError], None] = self._refuse
            self._clock = self.loop.call_later(self.header_timeout, refuse, late)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _refuse(self, error: ApiError) -> None:
        """Answer without a request, where nothing was answered yet, and close."""
        self._stop()
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body, phrase = error.body(), HTTPStatus(error.status).phrase
            head = f"HTTP/1.1 {error.status} {phrase}\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()
