"""Clients of a server that speaks OpenAI's protocol, as light as they can be: they share its processor cores.

Must not know who serves. A client has one request under way; its answer comes as a stream of events.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accessory.bench.serving_mix import Ask

PATIENCE = 1800.0  # seconds of one load; a server that needs more has failed


@dataclass(frozen=True)
class Answered:
    """One answer, in seconds from the first byte of its request."""

    first: float
    """Until the first text."""
    whole: float
    prompt: int
    """Tokens of the prompt, as the server counts them."""
    tokens: int
    """Tokens of the answer, as the server counts them."""


@dataclass(frozen=True)
class Load:
    """What a load of requests brought."""

    seconds: float
    """From the first request to the end of the last answer."""
    answers: list[Answered]
    """In the order of the requests."""

    @property
    def rate(self) -> float:
        """Generated tokens per second of all clients together."""
        return sum(answer.tokens for answer in self.answers) / self.seconds


def drive(port: int, asks: Sequence[Ask], *, clients: int, model: str) -> Load:
    """Let clients ask for the texts, each client its next one as soon as it is answered.

    model: its name in the requests. Raises RuntimeError for an answer that fails or is shorter than asked for, as
    figures of different work cannot be compared.
    """
    return asyncio.run(asyncio.wait_for(_drive(port, asks, clients, model), PATIENCE))


async def _drive(port: int, asks: Sequence[Ask], clients: int, model: str) -> Load:
    bodies = [_request(port, ask, model) for ask in asks]  # before the clock runs
    waiting: Iterator[tuple[int, bytes]] = iter(enumerate(bodies))
    found: list[Answered | None] = [None] * len(asks)

    async def client() -> None:
        for number, body in waiting:
            found[number] = await _ask(port, body)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    answers = [answer for answer in found if answer is not None]
    for ask, answer in zip(asks, answers, strict=True):
        if (answer.prompt, answer.tokens) != (len(ask.prompt), ask.answer):
            raise RuntimeError(
                f"bench serve: a prompt of {len(ask.prompt)} and an answer of {ask.answer} tokens were asked for, and"
                f" the server counts {answer.prompt} and {answer.tokens}"
            )
    return Load(seconds, answers)


def _request(port: int, ask: Ask, model: str) -> bytes:
    """One request as it goes over the wire; greedy, streamed, with the counts at the end."""
    body: Mapping[str, Any] = {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.answer,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


async def _ask(port: int, request: bytes) -> Answered:
    """Send a request and read its stream. RuntimeError for an answer that is none."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise RuntimeError(f"bench serve: the server answered {_clear(head + await reader.read(2000))}")
        chunked = b"transfer-encoding: chunked" in head.lower()
        first, events = None, Events()
        while chunk := await _chunk(reader, chunked):
            if events.push(chunk) and first is None:
                first = time.perf_counter() - start
        whole = time.perf_counter() - start
    finally:
        writer.close()
    usage = events.usage()
    if first is None or usage is None:
        raise RuntimeError(f"bench serve: the stream ended without text or counts: {_clear(events.last[-1:])}")
    return Answered(first, whole, usage["prompt_tokens"], usage["completion_tokens"])


async def _chunk(reader: asyncio.StreamReader, chunked: bool) -> bytes:
    """The next piece of the body; nothing at its end."""
    if not chunked:
        return await reader.read(1 << 16)
    size = int((await reader.readline()).partition(b";")[0], 16)
    return (await reader.readexactly(size + 2))[:size]  # and the line's end


class Events:
    """Reads server-sent events as cheaply as it can: all are looked into until one has text, later only the last."""

    def __init__(self) -> None:
        self.last: list[bytes] = []
        """The newest events."""
        self._rest, self._spoken = b"", False

    def push(self, chunk: bytes) -> bool:
        """Take in bytes; True once there was text."""
        *whole, self._rest = (self._rest + chunk).split(b"\n\n")
        if whole:
            self._spoken = self._spoken or any(map(_text, whole))
            self.last = (self.last + whole)[-4:]
        return self._spoken

    def usage(self) -> Mapping[str, int] | None:
        """The counts that the server tells at the end; None where it does not."""
        found = (event.get("usage") for event in map(_json, self.last) if event is not None)
        return next(filter(None, found), None)


def _text(event: bytes) -> bool:
    """Whether an event brings text."""
    content = _json(event) or {}
    return any(choice.get("text") for choice in content.get("choices") or ())


def _json(event: bytes) -> dict[str, Any] | None:
    """The content of an event; None for comments and the end mark."""
    data = event.strip().partition(b"data:")[2].strip()
    return json.loads(data) if data.startswith(b"{") else None


def _clear(said: bytes | Iterable[bytes]) -> str:
    """What a server said, for a message."""
    whole = said if isinstance(said, bytes) else b" ".join(said)
    return " ".join(whole.decode(errors="replace").split())[:500]
