"""What the model thinks of text that is given: logits of every position, and how likely continuations are.

Must not schedule: it works on one row that the engine lends it, between the steps of answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accessory.engine.interrupt import between_steps
from accessory.engine.prompt import Prompter, WindowError
from accessory.engine.request import Request
from accessory.engine.worker import Forward, Op, See


@dataclass(frozen=True)
class Score:
    """How likely a continuation is."""

    logprob: float
    """Sum of its tokens' natural log-probabilities."""
    tokens: int
    """How many tokens it is, where a token that straddles its beginning belongs to it."""
    greedy: bool
    """Whether each of its tokens is the likeliest."""


class Reader:
    """Reads prompts on a lent row. run: does one op on all ranks; drop: has them forget what a row holds, if they
    still can; prompted: the model has an adapter's prompt."""

    def __init__(
        self,
        run: Callable[[Op], Tensor | None],
        drop: Callable[[int], None],
        prompter: Prompter,
        *,
        chunk: int,
        vocabulary: int,
        prompted: bool,
    ) -> None:
        self._op, self._forget, self._prompter = run, drop, prompter
        self._chunk, self._vocabulary, self._prompted = chunk, vocabulary, prompted

    def logits(self, row: int, asked: Request | Sequence[int]) -> Tensor:
        """fp32 [T, vocabulary] on the CPU. ValueError for ids that are none, WindowError for too many."""
        if isinstance(asked, Request):
            prompt = self._prompter(replace(asked, max_gen_len=1))
            ids, slots = prompt.ids, prompt.slots
            self._see(row, prompt.pixels, prompt.order)
        else:
            ids = [int(token) for token in asked]
            wrong = [token for token in ids if not 0 <= token < self._vocabulary]
            if wrong or not ids:
                got = f"{wrong[0]}" if wrong else "none"
                raise ValueError(f"ids: got {got}, expected one or more token ids from 0 to {self._vocabulary - 1}")
            slots = [-1] * len(ids)
            self._check(len(ids))
            self._see(row, None, None)
        try:
            return torch.cat([piece.cpu() for piece in self._feed(row, ids, slots, 0)])
        finally:
            self._drop(row)

    def scores(self, row: int, asked: Request, continuations: Sequence[str]) -> list[Score]:
        """How likely each continuation is after the prompt, whose common beginning is read once."""
        prompt = self._prompter(replace(asked, max_gen_len=1, overlong="error"))
        encoded = [self._prompter.encode(asked, answer=text)[2] for text in continuations]
        firsts = [next((i for i, said in enumerate(e.supervised) if said), len(e.ids)) for e in encoded]
        for each, first in zip(encoded, firsts, strict=True):
            self._check(len(each.ids))
            if not first:
                raise ValueError("prompt: got no token before the continuation, expected at least one; say something")
        if not encoded:
            return []
        shared = min(_common([each.ids for each in encoded]), *firsts, len(encoded[0].ids))
        self._see(row, prompt.pixels, prompt.order)
        try:
            last: Tensor | None = None
            for piece in self._feed(row, encoded[0].ids[:shared], encoded[0].slots, 0):
                last = piece[-1:]
            assert last is not None, "a continuation has at least one token before it"
            return [
                self._score(row, each.ids, each.slots, first, shared, last)
                for each, first in zip(encoded, firsts, strict=True)
            ]
        finally:
            self._drop(row)

    def _score(self, row: int, ids: list[int], slots: list[int], first: int, shared: int, last: Tensor) -> Score:
        """One continuation, behind `shared` positions that are in the row already."""
        total, greedy, at = 0.0, True, shared
        for piece in self._feed(row, ids, slots, shared):
            logits = torch.cat([last, piece])  # row i is what was expected at position at + i
            said = torch.tensor(ids[at : at + len(piece)], device=logits.device)
            kept = slice(max(first - at, 0), len(piece))
            odds = logits[:-1].log_softmax(-1)[kept]
            total += float(odds.gather(1, said[kept, None]).double().sum())
            greedy = greedy and bool((odds.argmax(-1) == said[kept]).all())
            last, at = piece[-1:], at + len(piece)
        if total != total:
            raise ValueError("logits: got NaN, expected numbers; fp16 overflows in some models, bf16 or fp32 do not")
        return Score(total, len(ids) - first, greedy)

    def _feed(self, row: int, ids: Sequence[int], slots: Sequence[int], start: int) -> Iterator[Tensor]:
        """Logits [t, vocabulary] of positions `start` on, piece by piece."""
        while start < len(ids):
            stop = min(start + self._chunk, len(ids))
            pictured = torch.tensor([slots[start:stop]])
            forward = Forward(
                torch.tensor([ids[start:stop]]),
                torch.arange(start, stop)[None],
                torch.tensor([-1]),
                stop,
                None if row == 0 else torch.tensor([row]),
                pictured if bool((pictured >= 0).any()) else None,
                whole=True,
            )
            logits = self._run(forward)
            assert logits is not None, "logits of all positions were asked for"
            yield logits[:, : self._vocabulary]
            start = stop

    def _see(self, row: int, pixels: Tensor | None, order: Tensor | None) -> None:
        """Begin a prompt in the row."""
        if pixels is not None or self._prompted:
            self._run(See(row, pixels, order))

    def _run(self, op: Op) -> Tensor | None:
        """A Ctrl-C waits for the end of an op, so that the ranks stay in step."""
        with between_steps():
            return self._op(op)

    def _drop(self, row: int) -> None:
        with between_steps():
            self._forget(row)

    def _check(self, length: int) -> None:
        if length > self._prompter.window:
            raise WindowError(f"prompt: got {length} tokens, expected at most {self._prompter.window}; shorten it")


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many leading ids all rows share."""
    shortest = min(map(len, rows))
    return next((at for at in range(shortest) if len({row[at] for row in rows}) > 1), shortest)
