"""The queue of requests that wait for a row: fair between clients, bounded.

Must not know what a request asks, nor rows.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from accessory.engine.prompt import Prompt
from accessory.engine.request import Answer


class QueueFull(RuntimeError):
    """No place to wait: ask again later."""


class Waiting:
    """Clients take turns; of one client, who came first is first. bound: most requests that wait, None for any."""

    def __init__(self, bound: int | None = None) -> None:
        self.bound = bound
        self._clients: OrderedDict[str, deque[tuple[Answer, Prompt]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        """Whether nobody may join."""
        return self.bound is not None and self._count >= self.bound

    def push(self, answer: Answer, prompt: Prompt) -> None:
        """Wait. Raises QueueFull."""
        if self.full:
            raise QueueFull(f"queue: got a request while {self._count} wait, expected at most {self.bound}; ask later")
        self._clients.setdefault(answer.request.client, deque()).append((answer, prompt))
        self._count += 1

    def first(self) -> tuple[Answer, Prompt]:
        """Whose turn it is."""
        return next(iter(self._clients.values()))[0]

    def pop(self) -> None:
        """The first one waits no more, and its client's next one is the last in turn."""
        client, line = next(iter(self._clients.items()))
        line.popleft()
        self._count -= 1
        if line:
            self._clients.move_to_end(client)
        else:
            del self._clients[client]

    def remove(self, answer: Answer) -> Prompt | None:
        """Take one out; None where it does not wait."""
        client = answer.request.client
        for place, (waiting, prompt) in enumerate(self._clients.get(client, ())):
            if waiting is answer:
                del self._clients[client][place]
                self._count -= 1
                if not self._clients[client]:
                    del self._clients[client]
                return prompt
        return None
