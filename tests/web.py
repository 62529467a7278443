"""A web server on loopback for the tests of what is fetched.

Must not hold tests.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


class Web:
    """Pages by path; `asked` lists (path, Host header) of every request."""

    def __init__(self, port: int) -> None:
        self.port, self.asked = port, list[tuple[str, str]]()
        self.pages: dict[str, Answer | bytes | int | str] = {}
        self.over = threading.Event()

    def url(self, path: str = "/a.png", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@contextlib.contextmanager
def serve() -> Iterator[Web]:
    """A page is bytes (200), a number (that status), text (a redirect to it), or a function that answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            web.asked.append((self.path, self.headers["Host"]))
            page = web.pages.get(self.path, 404)
            with contextlib.suppress(OSError):
                if callable(page):
                    page(self)
                    self.close_connection = True
                    return
                self.send_response(200 if isinstance(page, bytes) else 302 if isinstance(page, str) else page)
                if isinstance(page, str):
                    self.send_header("Location", page)
                self.send_header("Content-Length", str(len(page) if isinstance(page, bytes) else 0))
                self.end_headers()
                self.wfile.write(page if isinstance(page, bytes) else b"")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web = Web(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.over.set()
        server.shutdown()
        server.server_close()
