"""What one browser says and hears: its conversation, the answer under way, and what became of it.

Must not know pages or protocols: it asks a service, and its owner shows what it has. One event loop makes all calls.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from accessory.serve.asking import PLACE, question
from accessory.serve.fitting import fitted

if TYPE_CHECKING:
    from accessory.data.template import Turn
    from accessory.engine import Request, Result
    from accessory.engine.request import PictureSource
    from accessory.model import Sampling
    from accessory.serve.service import Lots, Service

PACE = 0.05  # seconds between two looks at an answer, so that a fast model does not outrun a browser
UNSAID = "Stopped before the answer began."
KEPT = 1000  # conversations; the one that waits longest for its next question goes


@dataclass(frozen=True)
class Wishes:
    """How an answer is to be chosen."""

    system: str = ""
    """Nothing: the template's own."""
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0


def wishes(sampling: Sampling, max_new_tokens: int, system: str | None = None) -> Wishes:
    """The same, from how a verb was told to choose."""
    return Wishes(
        system=system or "",
        max_new_tokens=max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
    )


@dataclass(frozen=True)
class Model:
    """What is asked, and how it is spoken to."""

    service: Service
    template: str
    sees: bool = False
    """Whether pictures can come with a question."""
    remembers: bool = True
    """Whether a question is asked within the conversation; else each stands alone."""
    stops: Sequence[str] = ()


@dataclass(frozen=True)
class Exchange:
    """A question and what was said to it so far."""

    text: str
    pictures: tuple[Path, ...] = ()
    answer: str = ""
    note: str = ""
    """How the answer ended, for the person."""
    attempt: int = 0
    """How often the question was asked before: each time is another draw."""


@dataclass
class Talk:
    """One person's conversation: `ask`, `again`, `stop`, `clear`; `exchanges` and `note` are what there is to show."""

    model: Model
    client: str = ""
    """Whose turn it is in the queue."""
    exchanges: list[Exchange] = field(default_factory=list)
    note: str = ""
    """What the person should know about the conversation."""
    busy: bool = False
    """Whether an answer is under way."""
    _told: int = 0
    """The first exchange that the model is still told of."""
    _stopped: asyncio.Event = field(default_factory=asyncio.Event)
    _lots: Lots | None = None
    """Of the answer under way."""

    def ask(self, text: str, pictures: Sequence[Path], wishes: Wishes) -> AsyncGenerator[Exchange, None]:
        """Ask; every look shows the answer so far. It raises ValueError, OSError or RuntimeError for what cannot be
        asked. Closing it cancels the request.

        What was asked is of the conversation once there is an answer, were it a stopped one.
        """
        return self._ask(Exchange(text, tuple(pictures)), wishes)

    def again(self, wishes: Wishes) -> AsyncGenerator[Exchange, None]:
        """Ask the last question once more, with the next seed; the answer that there was stands until there is one.
        ValueError where there is no question."""
        if not self.exchanges:
            raise ValueError("regenerate: got no question yet, expected one; ask something")
        last = self.exchanges[-1]
        return self._ask(replace(last, answer="", note="", attempt=last.attempt + 1), wishes, anew=True)

    def stop(self) -> None:
        """End the answer under way, if there is one: its request is cancelled before the engine's next step."""
        self._stopped.set()
        if self._lots is not None:
            self._lots.cancel()

    def clear(self) -> None:
        """End the answer under way, and forget everything."""
        self.stop()
        self.exchanges, self.note, self._told = [], "", 0

    async def _ask(self, exchange: Exchange, wishes: Wishes, *, anew: bool = False) -> AsyncGenerator[Exchange, None]:
        """One question. anew: it takes the place of the last exchange."""
        if self.busy:
            raise ValueError("question: got one while an answer is under way, expected one at a time; stop it first")
        before = self.exchanges
        earlier = before[:-1] if anew else before
        self.busy, self.note, self._stopped = True, "", asyncio.Event()
        try:
            yield exchange
            request, forgotten = await asyncio.to_thread(self._request, exchange, earlier, wishes)
            async with aclosing(self._look(exchange, request)) as looks:
                async for exchange in looks:
                    yield exchange
            if self.exchanges is before:  # else it was cleared meanwhile
                if exchange.answer or not self._stopped.is_set():
                    self.exchanges = [*earlier, exchange]
                    self._told = min(self._told, len(earlier)) + forgotten
                self._say(exchange, forgotten, wishes)
        finally:
            self.busy = False

    async def _look(self, exchange: Exchange, request: Request) -> AsyncGenerator[Exchange, None]:
        """The exchange as its answer grows, at a pace; the last one has a note."""
        began, shown, parts = time.monotonic(), 0.0, list[str]()
        lots = await self._accepted(request)
        if lots is None:
            yield replace(exchange, note=UNSAID)
            return
        self._lots = lots
        try:
            async for events in lots:
                parts.extend(event.text for event in events)
                result = events[-1].result
                if result is not None:
                    if result.finish == "error":
                        raise ValueError(f"answer: {result.error}")
                    note = self._ending(result, time.monotonic() - began)
                    yield replace(exchange, answer=result.text, note=note)
                elif any(event.text for event in events) and time.monotonic() - shown >= PACE:
                    shown = time.monotonic()
                    yield replace(exchange, answer="".join(parts))
        finally:
            self._lots = None
            lots.cancel()

    async def _accepted(self, request: Request) -> Lots | None:
        """The request's events once the engine has it; None where it was stopped before."""
        opening = asyncio.ensure_future(self.model.service.open(request))
        halt = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({opening, halt}, return_when=asyncio.FIRST_COMPLETED)
            lots = opening.result() if opening.done() else None
            if lots is not None and self._stopped.is_set():
                lots.cancel()
            return None if self._stopped.is_set() else lots
        finally:
            halt.cancel()
            opening.cancel()

    def _request(self, exchange: Exchange, earlier: Sequence[Exchange], wishes: Wishes) -> tuple[Request, int]:
        """The request, and how many of the oldest exchanges the window has no room for. It may read headers of
        pictures: it runs in a thread."""
        from accessory.engine import Conversation, Request
        from accessory.model import Sampling

        sampling = Sampling(
            temperature=wishes.temperature,
            top_p=wishes.top_p,
            top_k=wishes.top_k,
            repetition_penalty=wishes.repetition_penalty,
            seed=wishes.seed + exchange.attempt,
        )
        history = Conversation(system=wishes.system.strip() or None)
        for each in earlier[self._told :] if self.model.remembers else ():
            history.add(self._turn(each), each.answer, each.pictures)

        def make(turns: Sequence[Turn], pictures: Sequence[PictureSource]) -> Request:
            return Request(
                turns,
                pictures=pictures,
                template=self.model.template,
                sampling=sampling,
                max_gen_len=wishes.max_new_tokens,
                stops=self.model.stops,
                client=self.client,
            )

        engine = self.model.service.engine
        return fitted(engine, history, self._turn(exchange), exchange.pictures, make=make)

    def _turn(self, exchange: Exchange) -> Turn:
        """The question with its pictures in their places. ValueError for more places than pictures."""
        given = len(exchange.pictures)
        places = exchange.text.count(PLACE) if given else 0  # without pictures it is text
        if places > given:
            raise ValueError(f"pictures: got {given} for {places} places {PLACE}, expected as many; add the others")
        return question(exchange.text, places=places > 0)

    def _ending(self, result: Result, seconds: float) -> str:
        """How an answer ended, and how fast it came."""
        tokens = len(result.ids)
        pace = f"{tokens} tokens in {seconds:.1f} s"
        if result.finish == "cancelled" and not result.text:
            return UNSAID
        if result.finish == "length":
            full = result.prompt_tokens + tokens >= self.model.service.engine.window
            return f"Cut after {pace}: {'the window is full' if full else 'a longer answer may be allowed'}."
        return f"Stopped after {pace}." if result.finish == "cancelled" else f"{pace}."

    def _say(self, exchange: Exchange, forgotten: int, wishes: Wishes) -> None:
        """What the person should know now."""
        notes = []
        if forgotten:
            notes.append(f"The window is full: the oldest {forgotten} exchange(s) are no longer told to the model.")
        if exchange.attempt and not wishes.temperature:
            notes.append("At temperature 0 the same question gets the same answer; raise it for another one.")
        self.note = " ".join(notes)


class Talks:
    """The conversations by the session of their page."""

    def __init__(self, model: Model, *, kept: int = KEPT) -> None:
        self._model, self._kept = model, kept
        self._talks: OrderedDict[str, Talk] = OrderedDict()

    def of(self, session: str) -> Talk:
        """A page's conversation, which may begin here. Too many of them: the idlest one goes."""
        talk = self._talks.setdefault(session, Talk(self._model, session))
        self._talks.move_to_end(session)
        while len(self._talks) > self._kept:
            idle = next((name for name, each in self._talks.items() if not each.busy and name != session), None)
            if idle is None:
                break
            del self._talks[idle]
        return talk

    @property
    def alive(self) -> bool:
        """Whether questions are answered."""
        return self._model.service.alive

    def leave(self, session: str) -> None:
        """The page is gone, perhaps to come back: nobody waits for its answer."""
        if session in self._talks:
            self._talks[session].stop()
