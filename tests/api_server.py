"""Servers for the tests of `accessory api`: in a process of its own, and in a thread beside the engine it asks.

Must not hold tests.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from engine_toys import ONE, opened
from openai import OpenAI

from accessory.assemble import Bundle
from accessory.engine import Engine
from accessory.serve.api.main import listen, prepared
from accessory.serve.api.settings import ApiSettings

TINY = Path(__file__).parents[1] / "accessory" / "tiny"
CLEAN = ("API_HOST", "API_PORT", "API_KEY", "API_MODEL_NAME", "MAX_CONCURRENT")
DEADLINE = 60.0  # seconds that anything may take on a busy machine


def wait_for(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """The first true value of a condition; an AssertionError after the deadline."""
    end, pause = time.monotonic() + seconds, threading.Event()
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} seconds"
        pause.wait(0.002)
    return value


class Process:
    """`accessory api` in a process of its own, on a free port, ready to be asked."""

    def __init__(self, *words: str, cwd: Path | None = None, **env: str) -> None:
        clean = {name: value for name, value in os.environ.items() if name not in CLEAN}
        command = [sys.executable, "-m", "accessory", "api", *words, "--precision", "fp32"]
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**clean, "API_PORT": "0", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.errors: list[str] = []
        for stream, take in ((self.process.stdout, self._said.put), (self.process.stderr, self.errors.append)):
            assert stream is not None, "both are pipes"
            threading.Thread(target=lambda s=stream, t=take: [t(line) for line in s], daemon=True).start()
        try:
            self.line = self._said.get(timeout=DEADLINE)
        except queue.Empty:
            self.process.kill()
            raise AssertionError(f"the server did not start: {''.join(self.errors)}") from None
        self.base = self.line.strip().rsplit(" ", 1)[1]
        self.root = self.base.removesuffix("/v1")
        self.port = int(self.root.rsplit(":", 1)[1])
        wait_for(self._listens, "the server listens")

    def client(self, **how: Any) -> OpenAI:
        return OpenAI(api_key="0", base_url=self.base, max_retries=0, timeout=DEADLINE, **how)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE)

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
            return True
        return False


@functools.lru_cache(maxsize=1)
def shared() -> Process:
    """One server of the tiny model for all tests that do not end it."""
    server = Process()
    atexit.register(server.process.kill)
    return server


class Inside:
    """A server in a thread of this process: `engine` and `service` are there to be looked at."""

    def __init__(
        self, bundle: Bundle, *, rows: int = 2, window: int | None = None, chunk: int = 32, **words: Any
    ) -> None:
        self.settings = ApiSettings(**{"host": "127.0.0.1", "port": 0, "access_log": False, **words})
        self.settings.check()
        self.engine = Engine(
            bundle, ONE, rows=rows, window=window, prefill_chunk=chunk, queue=self.settings.queue + rows
        )
        self.service, self.server = prepared(self.settings, bundle, self.engine)
        self._socket = listen(self.settings)
        self._http = httpx.Client(verify=False, trust_env=False, timeout=DEADLINE)
        self.port = self._socket.getsockname()[1]
        self.root = f"http://127.0.0.1:{self.port}"
        self.base = f"{self.root}/v1"

    def __enter__(self) -> Inside:
        self.service.start()
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self._socket])), daemon=True)
        self._thread.start()
        wait_for(lambda: self.server.started, "the server starts")
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._http.close()
        self._thread.join(DEADLINE)
        self.service.close()
        self.engine.close()

    def client(self, **how: Any) -> OpenAI:
        return OpenAI(**{"api_key": "0", "base_url": self.base, "max_retries": 0, "timeout": DEADLINE, **how})

    def ask(self, method: str, path: str, body: Any = None, **how: Any) -> httpx.Response:
        return self._http.request(method, f"{self.root}{path}", **({} if body is None else {"json": body}), **how)

    def post(self, path: str, body: Any = None, **how: Any) -> httpx.Response:
        return self.ask("POST", path, body, **how)

    def get(self, path: str, **how: Any) -> httpx.Response:
        return self.ask("GET", path, **how)

    def idle(self) -> None:
        """Wait until nothing is under way."""
        wait_for(lambda: not self.service.jobs and not self.engine.running, "all rows are free")


@functools.lru_cache(maxsize=1)
def tiny() -> Bundle:
    """The tiny model in fp32."""
    return opened(TINY)


def dial(port: int) -> socket.socket:
    """A raw connection."""
    return socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)


def post_bytes(path: str, body: bytes, *headers: str) -> bytes:
    """A POST as it goes over the wire."""
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def read_all(connection: socket.socket) -> bytes:
    """All that comes until the other end closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            parts.append(piece)
    return b"".join(parts)


@contextlib.contextmanager
def inside(bundle: Bundle, **how: Any) -> Iterator[Inside]:
    """An `Inside`, started."""
    with Inside(bundle, **how) as server:
        yield server
