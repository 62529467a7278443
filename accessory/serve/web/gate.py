"""What stands before the page: a password, the few paths that the page needs, and a browser that stays on this host.

Must not know gradio's insides beyond its paths, nor models. It is plain ASGI, so that nothing is held back.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST = 4 << 20  # bytes of an event; pictures come through /upload, which has a bound of its own
# the rest of gradio's paths read addresses for others, show statistics or edit the page
OPEN = re.compile(
    r"/(?:|config/?|theme\.css|robots\.txt|favicon\.ico|manifest\.json|(?:assets|static|svelte)/.*|gradio_api/(?:"
    r"info/?|theme\.css|app_id/?|startup-events|heartbeat/\w+|queue/(?:join|data)/?|upload|upload_progress|cancel|reset/?"
    r"|file=.*|run/\w+|call/\w+(?:/\w+)?))"
)
EVENTS = re.compile(r"/gradio_api/(?:queue/join|run/\w+|call/\w+)/?")
FILE = "/gradio_api/file="
PAGE = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:;"
    " object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
SHUT = "default-src 'none'; sandbox"  # what was uploaded is looked at and does nothing
LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Accessory</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px system-ui, sans-serif; display: grid; place-items: center; min-height: 90vh; margin: 0; }}
form {{ display: grid; gap: 12px; width: min(320px, 85vw); }}
input, button {{ font: inherit; padding: 10px 14px; border-radius: 10px; border: 1px solid #94a3b8; }}
button {{ background: #6366f1; color: #fff; border: 0; cursor: pointer; }}
p {{ margin: 0; color: #dc2626; min-height: 1.2em; }}</style>
<form method="post" action="login"><label for="key">Password of this page</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Enter</button><p role="alert">{said}</p></form></html>"""


class Gate:
    """An ASGI app around another one. key: the password, None for none. uploads: the one folder of files."""

    def __init__(self, app: App, *, uploads: Path, key: str | None = None) -> None:
        self._app, self._uploads = app, uploads.resolve()
        self._key = None if key is None else _digest(key)
        self._token = secrets.token_urlsafe(32)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = asyncio.Event()
        self._cookie = f"accessory-{secrets.token_hex(4)}"  # a host's ports share their cookies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            self._loop = asyncio.get_running_loop()
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page has no use for websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        path = scope["path"]
        if self._key is not None and path == "/login" and scope["method"] == "POST":
            await self._login(receive, send)
        elif not self._known(scope):
            await _answer(send, 401, LOGIN.format(said=""))
        elif not OPEN.fullmatch(path) or (path.startswith(FILE) and not self._inside(path[len(FILE) :])):
            await _answer(send, 404, "There is no such page here.")
        elif scope["method"] == "POST" and EVENTS.fullmatch(path):
            await self._event(scope, receive, send)
        else:
            await self._app(scope, self._until_closed(receive), _guarded(send, SHUT if path.startswith(FILE) else PAGE))

    def close(self) -> None:
        """Let go of everybody who listens, from any thread: a page holds a connection for as long as it is open."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._closing.set)

    def _until_closed(self, receive: Receive) -> Receive:
        """What is received, and a farewell once the gate closes."""

        async def receiving() -> MutableMapping[str, Any]:
            coming, closed = asyncio.ensure_future(receive()), asyncio.ensure_future(self._closing.wait())
            try:
                await asyncio.wait({coming, closed}, return_when=asyncio.FIRST_COMPLETED)
                return coming.result() if coming.done() else {"type": "http.disconnect"}
            finally:
                coming.cancel()
                closed.cancel()

        return receiving

    async def _login(self, receive: Receive, send: Send) -> None:
        """Take a password, and give a token for it."""
        body = await _read(receive, 4096)
        given = parse_qs((body or b"").decode("utf-8", "replace")).get("key", [""])[0]
        assert self._key is not None, "a login without a password"
        if not hmac.compare_digest(_digest(given), self._key):
            await _answer(send, 401, LOGIN.format(said="That is not it."))
            return
        cookie = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"
        await _answer(send, 303, "", ("location", "./"), ("set-cookie", cookie))

    def _known(self, scope: Scope) -> bool:
        """Whether the password was given: by the token of this page, or as a bearer's."""
        if self._key is None:
            return True
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        scheme, _, bearer = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(_digest(bearer.strip()), self._key):
            return True
        try:
            cookie = SimpleCookie(headers.get(b"cookie", "")).get(self._cookie)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self._token.encode())

    async def _event(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand an event on, if the files that it names were uploaded here."""
        body = await _read(receive, MOST)
        try:
            if body is None:
                raise ValueError(f"event: got more than {MOST} bytes, expected at most so many; ask something shorter")
            if not all(map(self._inside, _paths(json.loads(body)))):
                raise ValueError("event: got a file that was not uploaded here, expected one that was; upload it")
        except (ValueError, RecursionError) as error:
            await _answer(send, 413 if body is None else 400, str(error))
            return
        left: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> MutableMapping[str, Any]:
            return left.pop() if left else await receive()

        await self._app(scope, again, _guarded(send, PAGE))

    def _inside(self, path: str) -> bool:
        """Whether a file lies in the folder of uploads."""
        try:
            return Path(path).is_absolute() and Path(path).resolve().is_relative_to(self._uploads)
        except (OSError, ValueError):
            return False


def _paths(told: Any) -> list[str]:
    """What an event names as files. ValueError for one that is none."""
    if isinstance(told, list):
        return [path for each in told for path in _paths(each)]
    if not isinstance(told, dict):
        return []
    found = [path for each in told.values() for path in _paths(each)]
    if "path" in told:
        if not isinstance(told["path"], str):
            raise ValueError("event: got a file without a path, expected one; upload it")
        found.append(told["path"])
    return found


async def _read(receive: Receive, most: int) -> bytes | None:
    """A request's body; None where it is longer, and for one whose sender left."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > most:
            return None
    return body


async def _answer(send: Send, status: int, text: str, *headers: tuple[str, str]) -> None:
    """A small page of our own."""
    told = [("content-type", "text/html; charset=utf-8"), ("cache-control", "no-store"), *headers]
    body = text.encode()
    said = [(name.encode(), value.encode()) for name, value in (*told, ("content-length", str(len(body))))]
    await _guarded(send, PAGE)({"type": "http.response.start", "status": status, "headers": said})
    await send({"type": "http.response.body", "body": body})


def _guarded(send: Send, policy: str) -> Send:
    """Add what browsers are to be told with every answer."""
    told = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            extra = [(name.encode(), value.encode()) for name, value in told.items()]
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return sending


def _digest(text: str) -> bytes:
    """Of one length, so that a comparison tells nothing of the other."""
    return hashlib.sha256(text.encode()).digest()
