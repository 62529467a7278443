"""Jobs in other processes, answers in the order of the jobs; a worker that dies or hangs is an error and never a wait.

Must not know what a job is. Workers are fresh processes (spawn), so that threads and GPUs of this one do not matter.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Item = TypeVar("Item")

PATIENCE = 600.0  # seconds without an answer to a job, after which its worker counts as hung
_NOT_OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
AHEAD = 2  # jobs per worker that are begun before their turn


class Workers:
    """`count` processes that each make a handler, `make(*args)`, and call it with jobs; 0: all happens in this one.

    Use as a context manager; one `map` at a time. make and args must be picklable, and make a function of a module.
    """

    def __init__(self, make: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...], count: int) -> None:
        self._make, self._args, self._count = make, args, count
        self._crew: list[tuple[BaseProcess, Connection]] = []
        self._own: Callable[[Any], Any] | None = None
        self.patience = PATIENCE

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def map(
        self, items: Iterable[Item], job: Callable[[Item], Any], name: Callable[[Item], str] = str
    ) -> Iterator[tuple[Item, Any]]:
        """(item, answer) in the order of the items; `job` makes a picklable job of an item, None: there is none to do.

        Items are drawn a few ahead. name: an item for people, said where its worker dies. What a handler raises as
        ValueError or OSError is raised here as such, in the item's turn; anything else as RuntimeError with its
        traceback. ChildProcessError for a worker that died, TimeoutError for one that does not answer.
        """
        if not self._count:
            for item in items:
                asked = job(item)
                yield item, None if asked is None else self._handler()(asked)
            return
        source, turns = iter(items), deque[_Turn]()
        idle, busy = deque(self._crew), dict[Connection, tuple[BaseProcess, _Turn, float]]()
        drained = False
        while True:
            while not drained and len(turns) < AHEAD * self._count:
                try:
                    item = next(source)
                except StopIteration:
                    drained = True
                    break
                asked = job(item)
                turns.append(_Turn(item, asked, done=asked is None))
                if asked is not None and not self._crew:
                    idle.extend(self._hire())
            for turn in turns:
                if not turn.sent and not turn.done and idle:
                    process, pipe = idle.popleft()
                    turn.sent = True
                    _send(process, pipe, turn.job, lambda turn=turn: name(turn.item))
                    busy[pipe] = (process, turn, time.monotonic())
            if not turns:
                return
            if turns[0].done:
                turn = turns.popleft()
                yield turn.item, turn.unwrap()
                continue
            for process, pipe in self._receive(busy, name):
                idle.append((process, pipe))

    def close(self) -> None:
        """End the processes, also in the middle of a job."""
        atexit.unregister(self.close)
        for _, pipe in self._crew:
            pipe.close()
        for process, _ in self._crew:
            process.kill()
            process.join()
        self._crew = []

    def _handler(self) -> Callable[[Any], Any]:
        """The handler of this process."""
        if self._own is None:
            self._own = self._make(*self._args)
        return self._own

    def _hire(self) -> list[tuple[BaseProcess, Connection]]:
        """Start the processes."""
        context = multiprocessing.get_context("spawn")
        atexit.register(self.close)  # before multiprocessing's own end, which would send a SIGTERM and wait
        resource_tracker.ensure_running()  # at its start it would lift the mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_OURS)  # a new process has it until it ignores them
        try:
            while len(self._crew) < self._count:
                ours, theirs = context.Pipe()
                process = context.Process(target=_life, args=(theirs, self._make, self._args), daemon=True)
                process.start()
                theirs.close()
                self._crew.append((process, ours))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return self._crew

    def _receive(
        self, busy: dict[Connection, tuple[BaseProcess, _Turn, float]], name: Callable[[Any], str]
    ) -> Iterator[tuple[BaseProcess, Connection]]:
        """Wait for at least one answer; who gave one is free again."""
        oldest = min(since for _, _, since in busy.values())
        ready = multiprocessing.connection.wait(list(busy), max(0.0, oldest + self.patience - time.monotonic()))
        if not ready:
            late = next(turn for _, turn, since in busy.values() if since == oldest)
            raise TimeoutError(
                f"a worker gave no answer for {self.patience:.0f} seconds on {name(late.item)}; see whether the disk"
                " that holds it answers"
            )
        for pipe in list(busy):
            if pipe not in ready:
                continue
            process, turn, _ = busy.pop(pipe)
            try:
                turn.kind, turn.answer = pipe.recv()
            except (EOFError, OSError):
                raise _died(process, name(turn.item)) from None
            turn.done = True
            yield process, pipe


class _Turn:
    """One item, its job, and what came of it."""

    def __init__(self, item: Any, job: Any, *, done: bool) -> None:
        self.item, self.job, self.done, self.sent = item, job, done, False
        self.kind, self.answer = "answer", None

    def unwrap(self) -> Any:
        """The answer, or the error that the handler raised."""
        if self.kind == "user error":
            raise self.answer
        if self.kind == "error":
            raise RuntimeError(f"in a worker:\n{self.answer}")
        return self.answer


def _send(process: BaseProcess, pipe: Connection, job: Any, name: Callable[[], str]) -> None:
    """Give a job to an idle worker."""
    try:
        pipe.send(job)
    except (BrokenPipeError, ConnectionError):
        raise _died(process, name()) from None


def _died(process: BaseProcess, name: str) -> ChildProcessError:
    """What to raise for a dead worker."""
    process.join(5)
    code = process.exitcode
    how = f"signal {-code} ({signal.strsignal(-code)})" if code is not None and code < 0 else f"exit code {code}"
    hint = "; memory may have run out: lower the number of workers" if code == -signal.SIGKILL else ""
    return ChildProcessError(f"a worker died with {how} on {name}{hint}")


def _life(pipe: Connection, make: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...]) -> None:
    """Answer jobs until the other end closes. Signals for the job as a whole are the parent's to obey."""
    for number in _NOT_OURS:
        signal.signal(number, signal.SIG_IGN)
    handler: Callable[[Any], Any] | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionError):
        while True:
            job = pipe.recv()
            try:
                handler = handler or make(*args)
                answer = ("answer", handler(job))
            except (ValueError, OSError) as error:
                answer = ("user error", type(error)(*error.args) if type(error) in _PLAIN else ValueError(str(error)))
            except Exception:
                answer = ("error", traceback.format_exc())
            pipe.send(answer)


_PLAIN = (ValueError, FileNotFoundError, PermissionError, OSError)
