"""The engine on a thread of its own, for callers on event loops and on other threads.

Must not know protocols or what is asked. No lock is held while a step runs, and what one step brought reaches an
event loop in one call, however many answers it has.
"""

from __future__ import annotations

import asyncio
import functools
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from accessory.engine import Answer, Engine, Event, Request, Result
from accessory.engine.waiting import QueueFull
from accessory.serve.jobs import Closed, Inbox, Item, Job, Listen, Lots, deliver

__all__ = ["Closed", "Inbox", "Job", "Lots", "Service"]

T = TypeVar("T")


class Service:
    """Owns the thread that steps an engine: `with Service(engine) as service: ...`.

    preparers: threads that make prompts of requests (text to ids, pictures to pixels). queue: most requests that may
    wait beside those that run, those whose prompts are made included; None: no bound.
    """

    def __init__(self, engine: Engine, *, preparers: int = 2, queue: int | None = None) -> None:
        self.engine, self.error = engine, None
        self.error: BaseException | None
        """What ended the engine."""
        self._bound = None if queue is None else queue + engine.rows
        self._wake = threading.Condition()
        self._told: list[Callable[[], None]] = []
        self._calls: deque[tuple[Callable[[Engine], Any], Future[Any]]] = deque()
        self._jobs: dict[int, Job] = {}  # by the number of its answer: those that the engine has
        self._open: set[Job] = set()  # and those whose prompts are made
        self._post: dict[asyncio.AbstractEventLoop, list[tuple[Inbox, Item | None]]] = {}
        self._mourners: list[Callable[[], None]] = []
        self._closing = self._stop = False
        self._pool = ThreadPoolExecutor(preparers, thread_name_prefix="prepare")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._device: int | None = None

    # ---- callers

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and self.error is None

    @property
    def jobs(self) -> int:
        """Requests under way: prompts in the making, waiting, and running."""
        return len(self._open)

    def start(self) -> None:
        """Begin to answer."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            self._device = torch.cuda.current_device()  # which is a thread's own
        self._thread.start()

    def submit(self, request: Request, listen: Listen | Inbox | None = None) -> Job:
        """Ask, from any thread. listen: gets each event, the last one with the result, or what the request failed by;
        it is called on the engine's thread and must not wait.

        A cancelled request's last event has token -1. Raises QueueFull, and Closed once nothing is answered.
        """
        job = Job(request, listen, self._cancel)
        with self._wake:
            if self.error is not None or self._closing:
                raise Closed("engine: got a request after its end, expected none; start it again") from self.error
            if self._bound is not None and len(self._open) >= self._bound:
                raise QueueFull(
                    f"queue: got a request beside {len(self._open)}, expected at most {self._bound}; ask again later"
                )
            self._open.add(job)
        self._pool.submit(self._prepare, job)
        return job

    async def open(self, request: Request) -> Lots:
        """Ask from an event loop, and wait until the request is accepted.

        Raises what `Engine.submit` raises for what cannot be asked, QueueFull, Closed, or what ended the engine.
        """
        inbox = Inbox(asyncio.get_running_loop())
        job = self.submit(request, inbox)
        try:
            await inbox.accepted
        except BaseException:
            job.cancel()
            raise
        return Lots(job, inbox)

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """The events of an answer. Closing the iterator cancels the request. Raises as `open` does."""
        lots = await self.open(request)
        try:
            async for events in lots:
                for event in events:
                    yield event
        finally:
            lots.cancel()

    async def ask(self, request: Request) -> Result:
        """The whole answer, for event loops; being cancelled cancels the request. Raises as `open` does."""
        inbox = Inbox(asyncio.get_running_loop(), whole=True)
        job = self.submit(request, inbox)
        try:
            await inbox.accepted
            (last,) = await inbox.take()
        finally:
            job.cancel()
        if isinstance(last, BaseException):
            raise last
        assert last.result is not None, f"answer {last.answer.id}: an event that is not its last"
        return last.result

    def iterate(self, request: Request) -> Iterator[Event]:
        """The events of an answer, for threads; leaving the iteration cancels the request. Raises as `open` does."""
        box: queue.SimpleQueue[Item] = queue.SimpleQueue()
        job = self.submit(request, box.put)
        try:
            while True:
                item = box.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.result is not None:
                    return
        finally:
            job.cancel()

    def call(self, work: Callable[[Engine], T]) -> Future[T]:
        """Do work with the engine on its thread, between steps, when a row is free for it; answers wait meanwhile."""
        future: Future[T] = Future()
        with self._wake:
            if self.error is not None or self._stop:
                future.set_exception(self.error or Closed("engine: got work after its end; start it again"))
                return future
            self._calls.append((work, future))
            self._wake.notify()
        return future

    def when_gone(self, tell: Callable[[], None]) -> None:
        """Have it called, on the engine's thread, when the engine fails."""
        self._mourners.append(tell)

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those under way end for so many seconds, cancel the rest, and end the thread.
        The engine stays open. A second call does nothing."""
        deadline = time.monotonic() + drain_s
        with self._wake:
            self._closing = True
            while self._open and self.error is None and (left := deadline - time.monotonic()) > 0:
                self._wake.wait(left)
            left_over = list(self._open)
        for job in left_over:
            job.cancel()
        with self._wake:
            self._stop = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._pool.shutdown(wait=True, cancel_futures=True)
        ended = Closed("engine: it ended before this was asked; ask again")
        for job in list(self._open):
            self._fail(job, ended)
        while self._calls:
            self._refuse(self._calls.popleft()[1], ended)
        self._send()

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- preparing threads

    def _prepare(self, job: Job) -> None:
        """Make the prompt, and hand it to the engine's thread."""
        if job.cancelled:
            return  # the engine's thread finishes it
        try:
            prompt = self.engine.prepare(job.request)
        except BaseException as error:
            self._tell(functools.partial(self._fail, job, error))
            return
        self._tell(functools.partial(self._join, job, prompt))

    # ---- the engine's thread

    def _cancel(self, job: Job) -> None:
        self._tell(functools.partial(self._drop, job))

    def _tell(self, act: Callable[[], None]) -> None:
        """Have the engine's thread do something before its next step; once it is gone nothing is left to do."""
        with self._wake:
            self._told.append(act)
            self._wake.notify_all()

    def _run(self) -> None:
        """Step until told to stop, or until a step fails."""
        try:
            if self._device is not None:
                sys.modules["torch"].cuda.set_device(self._device)
            while self._turn():
                self._send()
        except BaseException as error:
            self._die(error)

    def _turn(self) -> bool:
        """Do what was told, then one step; False at the end."""
        with self._wake:
            while not (self._told or self._calls or self._stop) and self.engine.idle:
                self._wake.wait()
            told, self._told = self._told, []
            if self._stop and not told:
                return False
        for act in told:
            act()
        if self._calls and self.engine.running < self.engine.rows:
            self._work(*self._calls.popleft())
        if not self.engine.idle:
            self._hand_out(self.engine.step())
        return True

    def _join(self, job: Job, prompt: Any) -> None:
        """Queue a request whose prompt is made."""
        if job.future.done() or job.cancelled:
            return
        try:
            job.answer = self.engine.enqueue(job.request, prompt)
        except Exception as error:
            self._fail(job, error)
            return
        self._jobs[job.answer.id] = job
        self._give(job, None)

    def _drop(self, job: Job) -> None:
        """Cancel a request wherever it is."""
        if job.future.done():
            return
        answer = job.answer
        if answer is None:
            answer = Answer(-1, job.request)
            answer.result = Result("", [], "cancelled", 0)
        before = len(answer.parts)
        result = self.engine.cancel(answer)
        self._finish(job, Event(answer, -1, "".join(answer.parts[before:]), result))

    def _hand_out(self, events: list[Event]) -> None:
        """What a step brought, to those who asked."""
        for event in events:
            job = self._jobs.get(event.answer.id)
            if job is None:
                continue
            if event.result is None:
                self._give(job, event)
            else:
                self._finish(job, event)
        ended = [job for job in self._jobs.values() if job.answer is not None and job.answer.result is not None]
        for job in ended:  # without a token
            assert job.answer is not None, f"a job of the engine has an answer: {job.request}"
            self._finish(job, Event(job.answer, -1, "", job.answer.result))

    def _finish(self, job: Job, event: Event) -> None:
        """The last event of a job."""
        assert event.result is not None, f"answer {event.answer.id} ended without a result"
        self._close_job(job)
        job.future.set_result(event.result)
        self._give(job, event)

    def _fail(self, job: Job, error: BaseException) -> None:
        """The end of a job that has no result."""
        if not job.future.done():
            self._close_job(job)
            job.future.set_exception(error)
            self._give(job, error)

    def _close_job(self, job: Job) -> None:
        """Forget a job."""
        if job.answer is not None:
            self._jobs.pop(job.answer.id, None)
        with self._wake:
            self._open.discard(job)
            if not self._open:
                self._wake.notify_all()

    def _give(self, job: Job, item: Item | None) -> None:
        """Hand an item to a listener, or lay it aside for its loop; None: the request was accepted."""
        if isinstance(job.listen, Inbox):
            if job.listen.whole and isinstance(item, Event) and item.result is None:
                return
            self._post.setdefault(job.listen.loop, []).append((job.listen, item))
        elif job.listen is not None and item is not None:
            job.listen(item)

    def _send(self) -> None:
        """What was laid aside for event loops, each in one call."""
        post, self._post = self._post, {}
        for loop, letters in post.items():
            try:
                loop.call_soon_threadsafe(deliver, letters)
            except RuntimeError:  # the loop is closed, and so are those who waited on it
                for inbox, _ in letters:
                    for job in [job for job in self._jobs.values() if job.listen is inbox]:
                        job.cancel()

    def _work(self, work: Callable[[Engine], Any], future: Future[Any]) -> None:
        """One call; its error is its caller's."""
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work(self.engine))
        except BaseException as error:
            future.set_exception(error)
            if self.engine.over:  # the error was its end, and not the caller's alone
                raise

    def _die(self, error: BaseException) -> None:
        """Tell everybody that the engine failed."""
        with self._wake:
            self.error = error
            calls, self._calls = self._calls, deque()
            jobs = list(self._open)
        for job in jobs:
            self._fail(job, error)
        for _, future in calls:
            self._refuse(future, error)
        self._send()
        for tell in self._mourners:
            tell()

    def _refuse(self, future: Future[Any], error: BaseException) -> None:
        """A call that nobody works on."""
        if future.set_running_or_notify_cancel():
            future.set_exception(error)
