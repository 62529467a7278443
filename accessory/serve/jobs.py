"""A request under way: its job, and what an event loop hears of it.

Must not know the thread that steps, nor engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from accessory.engine import Answer, Event, Request, Result

Item = Event | BaseException
Listen = Callable[[Item], None]


class Closed(RuntimeError):
    """The service takes no more requests: it closes, or its engine is gone."""


class Job:
    """A request under way. `future` has its result, or what it failed by."""

    def __init__(self, request: Request, listen: Listen | Inbox | None, drop: Callable[[Job], Any]) -> None:
        self.request, self.listen, self._drop = request, listen, drop
        self.answer: Answer | None = None
        """Once the engine has it."""
        self.future: Future[Result] = Future()
        self.future.set_running_or_notify_cancel()  # so that only `cancel` below cancels
        self.cancelled = False

    def cancel(self) -> None:
        """End it, from any thread; its row is free before the next step. A finished one stays as it is."""
        if not self.future.done() and not self.cancelled:
            self.cancelled = True
            self._drop(self)


class Inbox:
    """What one coroutine waits for: `accepted` once the request waits or runs, then its events in lots.

    whole: only the last event comes, which has the result.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, whole: bool = False) -> None:
        self.loop, self.whole = loop, whole
        self.accepted: asyncio.Future[None] = loop.create_future()
        self._items: list[Item] = []
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: Item | None) -> None:
        """On the loop's thread: None says that the request was accepted."""
        if not self.accepted.done():
            if isinstance(item, BaseException):
                self.accepted.set_exception(item)
                return
            self.accepted.set_result(None)
        if item is not None:
            self._items.append(item)
            if self._reader is not None and not self._reader.done():
                self._reader.set_result(None)

    async def take(self) -> list[Item]:
        """All that came since, at least one."""
        if not self._items:
            self._reader = self.loop.create_future()
            await self._reader
        items, self._items = self._items, []
        return items


class Lots:
    """An accepted request's events: an async iterator of lists, each of at least one."""

    def __init__(self, job: Job, inbox: Inbox) -> None:
        self.job, self._inbox = job, inbox

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        """Raises what the request failed by. Leaving the iteration does not cancel: `cancel` does."""
        while True:
            items = await self._inbox.take()
            events = [item for item in items if isinstance(item, Event)]
            if events:
                yield events
            for item in items:
                if isinstance(item, BaseException):
                    raise item
            if events and events[-1].result is not None:
                return

    def cancel(self) -> None:
        """End the request, if it has not ended."""
        self.job.cancel()


def deliver(letters: list[tuple[Inbox, Item | None]]) -> None:
    """On the loop's thread: everything that one step brought."""
    for inbox, item in letters:
        inbox.put(item)
