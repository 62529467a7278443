"""Requests that have a row, and the step that moves them on: which of them take part, and what the ranks are to feed.

Must not know the queue, how tokens are chosen, or other ranks.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from accessory.engine.choose import Choice
from accessory.engine.prompt import Prompt
from accessory.engine.request import Answer, Finish, Odds, Result
from accessory.engine.worker import Forward

log = logging.getLogger(__name__)

PATIENCE = 4  # prompts' steps in a row while answers wait, at most


@dataclass(eq=False)
class Running:
    """A request that has a row."""

    answer: Answer
    prompt: Prompt
    row: int
    fed: int
    """Positions of the prompt that are in the cache."""
    choice: Choice
    cached: int = 0
    """Of these, positions that another request had computed."""

    @property
    def feeding(self) -> bool:
        return self.fed < len(self.prompt.ids)

    @property
    def next_position(self) -> int:
        """The position that the next chosen token will take."""
        return len(self.prompt.ids) + len(self.answer.ids)

    def advance(self, token: int, odds: Odds | None) -> tuple[str, Finish | None]:
        """Add one token to the answer: the text that it settles, and how the answer ends if it does."""
        text, finish = self._add(token, odds)
        if text:
            self.answer.parts.append(text)
        return text, finish

    def result(self, finish: Finish, error: str) -> Result:
        """The result of an answer that ends so."""
        answer, prompt = self.answer, self.prompt
        if finish in ("cancelled", "error"):
            with contextlib.suppress(Exception):  # it may be what failed
                if rest := prompt.text.finish(complete=False):
                    answer.parts.append(rest)
        text, length = "".join(answer.parts), len(prompt.ids)
        return Result(text, answer.ids, finish, length, prompt.dropped, self.cached, answer.odds, error)

    def _add(self, token: int, odds: Odds | None) -> tuple[str, Finish | None]:
        answer, prompt = self.answer, self.prompt
        if token in prompt.stop_ids:
            return prompt.text.finish(complete=True), "stop"
        answer.ids.append(token)
        if odds is not None:
            answer.odds.append(odds)
        self.choice.push(token)
        text = prompt.text.push(token)
        if prompt.text.stopped:
            return text, "stop"
        if self.choice.done:
            return text + prompt.text.finish(complete=True), "stop"
        if len(answer.ids) == prompt.limit:
            text += prompt.text.finish(complete=False)
            return text, "stop" if prompt.text.stopped else "length"
        return text, None


@dataclass
class Stats:
    """What an engine has done so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of these, positions that were taken from another request's cache."""
    generated_tokens: int = 0
    proposed_tokens: int = 0
    """Tokens of answers that were fed before they were chosen."""
    accepted_tokens: int = 0
    """Of these, those that were then chosen."""
    prompt_steps: int = 0
    answer_steps: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    """Requests by how they ended."""


class Turns:
    """Prompts and answers in turn: after some steps of prompts, more where few answers wait, one of answers."""

    def __init__(self) -> None:
        self._fed = 0

    def feed(self, feeding: int, speaking: int) -> bool:
        """Whether the next step feeds prompts, by how many requests are at their prompts and at their answers."""
        fed = bool(feeding) and (not speaking or self._fed < min(PATIENCE, max(1, feeding // speaking)))
        self._fed = self._fed + 1 if fed and speaking else 0
        return fed


def together(feeding: Sequence[Running], *, chunk: int, alone: bool, shortest: bool = False) -> list[Running]:
    """The prompts that share a step: as many as fit a rectangle of `chunk` positions; alone: one.

    The oldest come first, or the `shortest` in what is left of them, so that they need not wait for a long one.
    """
    ordered = sorted(feeding, key=lambda r: (len(r.prompt.ids) - r.fed if shortest else 0, r.answer.id))
    if alone:
        return ordered[:1]
    chosen, widest = list[Running](), 0
    for running in ordered:
        size = max(widest, min(chunk, len(running.prompt.ids) - running.fed))
        if not chosen or size * (len(chosen) + 1) <= chunk:
            chosen.append(running)
            widest = size
    return chosen


def piece(feeding: Sequence[Running], *, chunk: int, cut: bool) -> Forward:
    """The next positions of each prompt, ragged, padded on the right.

    cut: pieces end at multiples of `chunk` from a prompt's beginning, and the step is that wide whatever is in it.
    """
    ends = [min((r.fed // chunk + 1) * chunk if cut else r.fed + chunk, len(r.prompt.ids)) for r in feeding]
    widest = chunk if cut else max(end - r.fed for end, r in zip(ends, feeding, strict=True))
    shape = (len(feeding), widest)
    ids, positions = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    slots, last = torch.full(shape, -1), torch.full(shape[:1], -1)
    for at, (running, stop) in enumerate(zip(feeding, ends, strict=True)):
        start = running.fed
        size = stop - start
        ids[at, :size] = torch.tensor(running.prompt.ids[start:stop])
        positions[at, :size] = torch.arange(start, stop)
        slots[at, :size] = torch.tensor(running.prompt.slots[start:stop])
        if stop == len(running.prompt.ids):
            last[at] = size - 1
    pictured = slots if bool((slots >= 0).any()) else None
    rows = [running.row for running in feeding]
    where = torch.tensor(rows) if cut else _rows(rows)  # cut: the first row is read as all others are
    return Forward(ids, positions, last, max(ends), where, pictured, apart=cut)


def tokens(speaking: Sequence[Running], *, full: int | None, apart: bool) -> Forward:
    """The newest token of each answer, by row. full: feed that many rows, whoever speaks (see `seats`)."""
    rows, places, where = seats(speaking, full=full)
    ids, positions = [0] * len(rows), [-1] * len(rows)
    for at, running in zip(places, speaking, strict=True):
        ids[at], positions[at] = running.answer.ids[-1], running.next_position - 1
    last = [0 if position >= 0 else -1 for position in positions]
    return Forward(
        torch.tensor(ids)[:, None],
        torch.tensor(positions)[:, None],
        torch.tensor(last),
        max(positions) + 1,
        where,
        apart=apart,
    )


def seats(speaking: Sequence[Running], *, full: int | None = None) -> tuple[list[int], list[int], torch.Tensor | None]:
    """The rows that a step of answers feeds, where among them each answer is, and the rows as a `Forward` takes them.

    full: that many rows, whoever speaks; None: rows 0 to B-1 are read without a copy of the cache, so a few holes
    among them are cheaper as padding.
    """
    width = speaking[-1].row + 1 if full is None else full
    own = [running.row for running in speaking]
    if full is not None or width <= 2 * len(speaking):
        return list(range(width)), own, None
    return own, list(range(len(own))), _rows(own)


def _rows(rows: list[int]) -> torch.Tensor | None:
    """Rows as the cache takes them: None where they are the first ones."""
    return None if rows == list(range(len(rows))) else torch.tensor(rows)


def told(error: Exception) -> str:
    """Why a request failed; what nobody expected goes to the log in full."""
    if isinstance(error, ValueError):
        return str(error)
    log.error("a request failed", exc_info=error)
    return f"{type(error).__name__}: {error}"


def fine(result: Result) -> None:
    """ValueError for an answer that could not go on."""
    if result.finish == "error":
        raise ValueError(result.error)
