"""Serves a page until somebody ends it: a socket, uvicorn, signals, and the end of an engine that failed.

Must not know what is on the page, nor how an answer is made.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from accessory.serve.web.gate import Gate
from accessory.serve.web.talk import Model, Talks
from accessory.serve.web.words import LOCAL, WebWords

if TYPE_CHECKING:
    from accessory.engine import Engine
    from accessory.serve.web.front import Front

log = logging.getLogger(__name__)

WEB = ("gradio", "fastapi", "uvicorn")  # packages of the page
LARGEST = "64mb"  # of a picture, as it is read elsewhere
FAREWELL = 2  # seconds that open connections get at the end: a page holds some for as long as it is open
DRAIN = 1.0  # seconds that answers under way get to end by themselves


def serve_page(
    engine: Engine,
    front: Front,
    words: WebWords,
    *,
    template: str,
    stops: Sequence[str] = (),
    queue: int | None = None,
    ready: Callable[[int, Callable[[], None]], None] = lambda port, leave: None,
) -> None:
    """Serve the page of an engine until Ctrl-C or SIGTERM.

    ready: gets the port, and what ends the page from any thread.

    Raises OSError for an address that cannot be had, and what ended the engine.
    """
    from accessory.serve.service import Service

    listener = _listener(words)
    with contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        uploads = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="accessory-page-"))).resolve()
        service = Service(engine, queue=queue)
        service.start()
        stack.callback(service.close, DRAIN)
        model = Model(service, template, sees=front.sees, remembers=front.remembers, stops=stops)
        gate = page_app(Talks(model), front, uploads, key=words.key)
        server = _server(gate)
        end = server.handle_exit

        def leave() -> None:
            server.should_exit = True
            gate.close()

        def hear(number: int, frame: FrameType | None) -> None:
            gate.close()
            end(number, frame)

        server.handle_exit = hear
        service.when_gone(leave)
        port = listener.getsockname()[1]
        with _signals(leave):
            _say(words, port)
            ready(port, leave)
            server.run(sockets=[listener])
        if service.error is not None:
            raise service.error
    log.info("The page is closed.")


def page_app(talks: Talks, front: Front, uploads: Path, *, key: str | None = None) -> Gate:
    """The page as an ASGI app. uploads: an empty folder of its own."""
    import gradio
    from fastapi import FastAPI

    from accessory.serve.web.page import Page

    page = Page(talks, front, uploads)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    blocks = page.blocks()
    gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name="127.0.0.1",
        max_file_size=LARGEST,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        root_path=os.environ.get("GRADIO_ROOT_PATH") or None,
        **page.look(),
    )
    blocks.has_launched = True  # which makes gradio refuse files that nobody uploaded
    return Gate(app, uploads=uploads, key=key)


def wait_for_leader() -> None:
    """On a rank that follows: the leader, which hears of Ctrl-C and SIGTERM too, says when the work is over."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _listener(words: WebWords) -> socket.socket:
    """A socket at the address. OSError that says what to do where it is taken."""
    try:
        found = socket.getaddrinfo(words.host, words.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"host: got {words.host!r}, which is no address of this host ({error}); give another") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OSError(
            f"port: got {words.port} at {words.host}, which cannot be had ({error.strerror}); give another, or 0 for"
            " any free one"
        ) from error
    return listener


def _server(app: Any) -> Any:
    """uvicorn, quiet, with our own way to end."""
    import uvicorn

    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", ws="none", timeout_graceful_shutdown=FAREWELL
    )
    return uvicorn.Server(config)


def _say(words: WebWords, port: int) -> None:
    """Where the page is, and who can see it."""
    name = "127.0.0.1" if words.host in ("", "0.0.0.0", "::") else words.host
    log.info("page: http://%s:%d (Ctrl-C ends it)", f"[{name}]" if ":" in name else name, port)
    if words.host not in LOCAL:
        who = "with its password" if words.key else "and it has no password (key=...)"
        log.info("Everybody who reaches this host can open the page, %s.", who)
    if os.environ.get("GRADIO_SHARE", "").lower() in ("1", "true", "yes"):
        log.info("GRADIO_SHARE: nothing to do, the page is never shared; forward the port (ssh -L) instead")


@contextlib.contextmanager
def _signals(leave: Callable[[], None]) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the server alone, also before uvicorn hears them, which raises them once more when it
    is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        leave()

    before = {number: signal.signal(number, over) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
