"""What every request passes: the key, a line in the log, a count, and no error without OpenAI's shape.

Must not read bodies. Neither keys nor what was said are ever written down.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from accessory.serve.api.errors import ApiError, broke, refusal

if TYPE_CHECKING:
    from accessory.serve.api.metrics import Metrics

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Send], Awaitable[None]]
ROUTES = frozenset(
    "/v1/models /v1/chat/completions /v1/completions /v1/score /v1/score/evaluation /health /metrics".split()
)


class Gate:
    """An ASGI application around another one. key: None: anybody may ask."""

    def __init__(self, app: App, *, key: str | None, metrics: Metrics, lines: bool) -> None:
        self._app, self._metrics, self._lines = app, metrics, lines
        self._key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Send) -> None:
        """One request, or another protocol's event, which is passed on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        scope["began"] = began

        async def noted(message: Mapping[str, Any]) -> None:
            nonlocal status
            if not status:
                status = message["status"]
            await send(message)

        try:
            if self._key is not None and not self._allowed(scope):
                raise ApiError(
                    401,
                    "authorization: got no valid key, expected Authorization: Bearer and the server's key",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
            await self._app(scope, receive, noted)
        except Exception as error:
            if status:  # nothing can be said any more
                broke(error)
            else:
                await respond(refusal(error), noted)
        finally:
            seconds = time.monotonic() - began
            self._metrics.request(scope["path"] if scope["path"] in ROUTES else "other", status, seconds)
            if self._lines:
                self._line(scope, status, seconds)

    def _allowed(self, scope: Scope) -> bool:
        """Whether the key is right, in a time that does not tell how much of it is."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0].strip(), self._key or b"")

    def _line(self, scope: Scope, status: int, seconds: float) -> None:
        """Who, what, how it ended and how long it took; a path's odd characters are escaped, so that no line is two."""
        client = scope.get("client") or ("?", 0)
        path = quote(scope["path"][:200], safe="/._-~")
        method = quote(scope["method"][:20])
        log.info("%s:%s %s %s %d %.0f ms", *client[:2], method, path, status or 499, seconds * 1000)


async def respond(error: ApiError, send: Send) -> None:
    """Answer with a refusal."""
    body = error.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
