"""The body of a request: read within limits of size and time, and taken as strict JSON.

Must not know what it asks for.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from accessory.serve.api.errors import ApiError, busy

Receive = Callable[[], Awaitable[Mapping[str, Any]]]

_CLOSE = {"connection": "close"}
_DEPTH = 64  # of nested lists and objects
_VALUES = 500_000  # commas and brackets, roughly values; more would take the parser long


class Bodies:
    """Reads bodies. limit: bytes of one; total: of all that are held at once; seconds: for one to arrive."""

    def __init__(self, *, limit: int, total: int, seconds: float) -> None:
        self.limit, self.total, self.seconds = limit, total, seconds
        self.held = 0

    async def read(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytearray:
        """The whole body. ApiError where it is too large, comes too slowly, or breaks off."""
        told = headers.get(b"content-length", b"0")
        if told.isdigit() and int(told) > self.limit:
            raise _too_large(self.limit)
        whole, values, end = bytearray(), 0, time.monotonic() + self.seconds
        try:
            while True:
                try:
                    message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
                except asyncio.TimeoutError:
                    raise ApiError(
                        408, f"body: got no end of it in {self.seconds:g} seconds, expected it sooner", headers=_CLOSE
                    ) from None
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "body: it broke off, expected all of it; send it again")
                piece = message.get("body", b"")
                whole += piece
                self.held += len(piece)
                values += sum(piece.count(mark) for mark in (b",", b"[", b"{"))
                if len(whole) > self.limit:
                    raise _too_large(self.limit)
                if values > _VALUES:
                    raise ApiError(413, f"body: got more than {_VALUES} values, expected fewer", headers=_CLOSE)
                if self.held > self.total:
                    raise busy("body: got it beside too many others, expected fewer at once; ask again later")
                if not message.get("more_body", False):
                    return whole
        finally:
            self.held -= len(whole)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"body: got more than {limit} bytes, expected at most so many; send less", headers=_CLOSE)


def read_json(data: bytes | bytearray, content_type: bytes) -> dict[str, Any]:
    """A body as an object. ApiError for anything that is not strict JSON (RFC 8259), for keys that come twice, and
    for numbers that are none."""
    kind = content_type.split(b";")[0].strip().lower()
    if kind != b"application/json" and not kind.endswith(b"+json"):
        got = kind.decode("latin-1")[:60] or "none"
        raise ApiError(415, f"content-type: got {got!r}, expected application/json; name it so")
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except RecursionError:
        raise ApiError(400, f"body: nested deeper than {_DEPTH} levels, expected fewer; flatten it") from None
    except UnicodeDecodeError:
        raise ApiError(400, "body: got bytes that are no UTF-8, expected JSON in UTF-8; encode it again") from None
    except ValueError as error:
        raise ApiError(400, f"body: is no JSON ({str(error)[:120]}); mend it") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"body: got a JSON {type(content).__name__}, expected an object; see /docs")
    if _deep(content):
        raise ApiError(400, f"body: nested deeper than {_DEPTH} levels, expected fewer; flatten it")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys come once each."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _deep(content: Any) -> bool:
    """Whether it is nested too deep."""
    level = [content]
    for _ in range(_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
