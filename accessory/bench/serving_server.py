"""A server as a program of its own, on a port that is free, frozen while others are measured.

Must not know what it serves.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

PATIENCE = 600.0  # seconds until a server must answer; large weights take time
GRACE = 20.0


def root_env() -> dict[str, str]:
    """The environment of a side's program: this package is importable in it."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def free_port() -> int:
    """A port that nobody listened at a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Paused:
    """A process that stands still except within `awake`, so that what waits takes nothing from what is measured."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()

    def pause(self) -> None:
        """Let it stand still."""
        self.process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        """End it, gently and then not."""
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Server:
    """A server from its start to its end; `port` stands for its port in the command.

    Raises RuntimeError, with its last words, where it ends before it answers GET /health.
    """

    def __init__(self, name: str, command: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        self.name, self.port = name, free_port()
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [part.replace("{port}", str(self.port)) for part in command],
            env={**root_env(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._paused = Paused(self._process)
        self.awake = self._paused.awake

    def __enter__(self) -> Server:
        """Wait until it answers, and let it stand still."""
        try:
            deadline = time.monotonic() + PATIENCE
            while not self._answers():
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"bench serve: {self.name} does not answer: {self.said()}")
                time.sleep(0.1)
            self._paused.pause()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._paused.end()
        self._log.close()

    def said(self) -> str:
        """The end of its log."""
        self._log.seek(0)
        return " ".join(self._log.read()[-2000:].decode(errors="replace").split())

    def _answers(self) -> bool:
        """Whether it is healthy."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()
