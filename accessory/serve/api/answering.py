"""Answers: asked of the service, and written whole or as a stream, in the forms of chat and of completions.

Must not know bodies of requests. Whoever asked and went away is told to the service at once.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from accessory.serve.api.chunks import DONE, Chunks, failure
from accessory.serve.api.errors import ApiError, refusal
from accessory.serve.api.tools import Speech, whole_calls

if TYPE_CHECKING:
    from accessory.engine import Event, Odds, Result
    from accessory.serve.api.asking import Asked
    from accessory.serve.api.logprobs import Spelling
    from accessory.serve.service import Lots, Service

T = TypeVar("T")


@dataclass
class Choice:
    """One answer as it is written: what became of its text so far."""

    index: int
    echo: str
    speech: Speech | None
    lots: Lots | None = None
    result: Result | None = None
    written: int = 0
    """Characters so far, those of tokens whose odds were told."""
    reason: str | None = None
    """How it ended, in OpenAI's words."""


@dataclass
class Answering:
    """One request of a client, from its choices to the last byte."""

    asked: Asked
    service: Service
    spelling: Spelling
    chat: bool
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    choices: list[Choice] = field(init=False)
    first: float | None = None
    """When the first event came, of a stream."""

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(16)}"
        box, echoes = self.asked.box, self.asked.echoes
        self.choices = [
            Choice(number, echoes[number] if echoes else "", None if box is None else box.speech(f"{self.id} {number}"))
            for number in range(len(self.asked.requests))
        ]

    # ---- whole

    async def whole(self) -> bytes:
        """The answer in one piece. Raises what a request failed by."""
        results = await together(self.service.ask(request) for request in self.asked.requests)
        choices = []
        for choice, result in zip(self.choices, results, strict=True):
            _check(result)
            choice.result = result
            choices.append(self._chat_choice(choice, result) if self.chat else self._text_choice(choice, result))
        kind = "chat.completion" if self.chat else "text_completion"
        head = json.dumps({"id": self.id, "object": kind, "created": self.created, "model": self.asked.model})
        return f'{head[:-1]},"choices":[{",".join(choices)}],"usage":{json.dumps(self.cost())}}}'.encode()

    def _chat_choice(self, choice: Choice, result: Result) -> str:
        """A choice of chat as JSON."""
        message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
        if choice.speech is not None:
            items = [*choice.speech.push(result.text), *choice.speech.finish()]
            text, calls = whole_calls(items)
            if calls:
                message |= {"content": text or None, "tool_calls": calls}
        odds = self.spelling.chat(result.odds) if self.asked.logprobs else "null"
        return (
            f'{{"index":{choice.index},"message":{json.dumps(message)},"logprobs":{odds},'
            f'"finish_reason":{json.dumps(_reason(result, choice.speech))}}}'
        )

    def _text_choice(self, choice: Choice, result: Result) -> str:
        """A choice of completions as JSON."""
        odds = self.spelling.completion(result.odds, len(choice.echo)) if self.asked.logprobs else "null"
        return (
            f'{{"index":{choice.index},"text":{json.dumps(choice.echo + result.text)},"logprobs":{odds},'
            f'"finish_reason":{json.dumps(_reason(result, None))}}}'
        )

    # ---- streams

    async def open(self) -> None:
        """Have all choices accepted, so that what is wrong with them is said before the first byte."""
        opening = [self.service.open(request) for request in self.asked.requests]
        opened = await together(opening, undo=lambda lots: lots.cancel())
        for choice, lots in zip(self.choices, opened, strict=True):
            choice.lots = lots

    def cancel(self) -> None:
        """Nobody wants it any more."""
        for choice in self.choices:
            if choice.lots is not None:
                choice.lots.cancel()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The stream, once it is open, in as many events as there are, those that came together in one piece."""
        chunks = Chunks(
            chat=self.chat, id=self.id, created=self.created, model=self.asked.model, usage=self.asked.usage
        )
        if self.chat:
            yield "".join(chunks.role(choice.index) for choice in self.choices).encode()
        elif self.asked.echoes:
            yield "".join(chunks.text(choice.index, choice.echo) for choice in self.choices).encode()
        told: list[str] = []
        try:
            async for choice, events in merged(self.choices):
                if self.first is None:
                    self.first = time.monotonic()
                for event in events:
                    for piece in self._event(chunks, choice, event):
                        told.append(piece)
                if told:
                    yield "".join(told).encode()
                    told = []
        except Exception as error:
            self.cancel()
            yield "".join(told).encode() + failure(refusal(error).body())
            return
        end = DONE if not self.asked.usage else chunks.usage(self.cost()).encode() + DONE
        yield end

    def _event(self, chunks: Chunks, choice: Choice, event: Event) -> Iterator[str]:
        """The chunks of one event of the engine."""
        if choice.reason is not None:
            return
        odds = self._odds(choice, [event.odds]) if event.odds is not None and _says(event) else "null"
        if choice.speech is None:
            if event.text or odds != "null":
                yield chunks.text(choice.index, event.text, odds)
        else:
            yield from self._spoken(chunks, choice, choice.speech.push(event.text), odds)
        over = choice.speech is not None and choice.speech.over
        if event.result is None and not over:
            return
        if event.result is not None:
            _check(event.result)
            choice.result = event.result
            if choice.speech is not None:
                yield from self._spoken(chunks, choice, choice.speech.finish(), "null")
        choice.reason = "tool_calls" if event.result is None else _reason(event.result, choice.speech)
        yield chunks.finish(choice.index, choice.reason)
        if over and choice.lots is not None:
            choice.lots.cancel()

    def _spoken(
        self, chunks: Chunks, choice: Choice, items: Iterator[str | dict[str, Any]], odds: str
    ) -> Iterator[str]:
        """Texts and calls; the odds go with the first of them, or alone."""
        for item in items:
            if isinstance(item, str):
                yield chunks.text(choice.index, item, odds)
            else:
                yield chunks.call(choice.index, item, odds)
            odds = "null"
        if odds != "null":
            yield chunks.text(choice.index, "", odds)

    def _odds(self, choice: Choice, odds: list[Odds]) -> str:
        """The odds of new tokens as JSON."""
        if self.chat:
            return self.spelling.chat(odds)
        told = self.spelling.completion(odds, len(choice.echo) + choice.written)
        choice.written += sum(len(self.spelling.text(each.token)) for each in odds)
        return told

    # ---- both

    def cost(self) -> dict[str, Any]:
        """What it cost: a prompt counts once, however many answers it has."""
        results = [choice.result for choice in self.choices if choice.result is not None]
        every = max(1, len(self.choices) // self.asked.prompts)
        prompts = [choice.result for choice in self.choices[::every] if choice.result is not None]
        asked = sum(result.prompt_tokens for result in prompts)
        said = sum(len(result.ids) for result in results)
        return {
            "prompt_tokens": asked,
            "completion_tokens": said,
            "total_tokens": asked + said,
            "prompt_tokens_details": {"cached_tokens": sum(result.cached for result in prompts)},
        }


async def merged(choices: list[Choice]) -> AsyncIterator[tuple[Choice, list[Event]]]:
    """The events of all choices as they come. Raises what the first of them failed by."""
    if len(choices) == 1 and choices[0].lots is not None:
        async for events in choices[0].lots:
            yield choices[0], events
        return
    arrived: asyncio.Queue[Any] = asyncio.Queue()

    async def follow(choice: Choice) -> None:
        assert choice.lots is not None, f"choice {choice.index} was not opened"
        try:
            async for events in choice.lots:
                arrived.put_nowait((choice, events))
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.ensure_future(follow(choice)) for choice in choices]
    try:
        left = len(tasks)
        while left:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


async def together(work: Iterable[Awaitable[T]], *, undo: Any = None) -> list[T]:
    """The results of all, in order. Where one fails the others are cancelled, and undone where they had ended."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            if not task.cancel() and undo is not None and not task.cancelled() and task.exception() is None:
                undo(task.result())
        raise


def _check(result: Result) -> None:
    """ApiError for an answer that could not go on."""
    if result.finish == "error":
        raise ApiError(500, result.error or "the answer failed inside the server; see its log")
    if result.finish == "cancelled":
        raise ApiError(503, "the answer was cut short, since the server ends; ask again")


def _says(event: Event) -> bool:
    """Whether an event's token is one of the answer's, and not only its end."""
    result = event.result
    return event.token >= 0 and (result is None or (bool(result.odds) and result.odds[-1] is event.odds))


def _reason(result: Result, speech: Speech | None) -> str:
    """finish_reason."""
    if speech is not None and speech.called and result.finish == "stop":
        return "tool_calls"
    return "length" if result.finish == "length" else "stop"
