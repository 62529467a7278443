"""A response of server-sent events, which ends its work as soon as nobody listens.

Must not know what the events say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import Response

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream(Response):
    """Sends pieces as they come. over: called once when the stream ends, however it does, and when the client goes."""

    def __init__(self, pieces: AsyncIterator[bytes], *, over: Callable[[], None]) -> None:
        super().__init__()
        self._pieces, self._over = pieces, over

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        gone = asyncio.ensure_future(until_gone(receive))
        gone.add_done_callback(lambda _: self._over())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            self._over()


async def until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Wait until the client's connection is closed."""
    while (await receive())["type"] != "http.disconnect":
        pass
