"""Requests that have a row, and the step that moves them on: which of them take part, and what the ranks are to feed.

Must not know the queue, how tokens are chosen, or other ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from accessory.engine.choose import Choice
from accessory.engine.prompt import Prompt
from accessory.engine.request import Answer
from accessory.engine.worker import Forward

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


@dataclass
class Stats:
    """What an engine has done so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of these, positions that were taken from another request's cache."""
    generated_tokens: int = 0
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


def together(feeding: Sequence[Running], *, chunk: int, alone: bool) -> list[Running]:
    """The prompts that share a step, oldest first: as many as fit a rectangle of `chunk` positions; alone: one."""
    ordered = sorted(feeding, key=lambda running: running.answer.id)
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
    return Forward(ids, positions, last, max(ends), _rows([running.row for running in feeding]), pictured, apart=cut)


def tokens(speaking: Sequence[Running], *, full: int | None, apart: bool) -> Forward:
    """The newest token of each answer, by row.

    full: feed that many rows, whoever speaks; None: rows 0 to B-1 are read without a copy of the cache, so a few holes
    among them are cheaper as padding.
    """
    width = speaking[-1].row + 1 if full is None else full
    whole = full is not None or width <= 2 * len(speaking)
    rows = list(range(width)) if whole else [running.row for running in speaking]
    ids, positions = [0] * len(rows), [-1] * len(rows)
    for number, running in enumerate(speaking):
        at = running.row if whole else number
        ids[at], positions[at] = running.answer.ids[-1], running.next_position - 1
    last = [0 if position >= 0 else -1 for position in positions]
    return Forward(
        torch.tensor(ids)[:, None],
        torch.tensor(positions)[:, None],
        torch.tensor(last),
        max(positions) + 1,
        _rows(rows),
        apart=apart,
    )


def _rows(rows: list[int]) -> torch.Tensor | None:
    """Rows as the cache takes them: None where they are the first ones."""
    return None if rows == list(range(len(rows))) else torch.tensor(rows)
