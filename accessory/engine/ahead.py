"""Lookup decoding (Saxena 2023, prompt lookup): what followed the newest tokens before is tried in one step.

Must not know how a token is chosen, nor other ranks: a proposal only says which logits are there before they are asked
for, so that an answer is the same with and without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from accessory.engine.request import Event
from accessory.engine.steps import Running, Stats, seats
from accessory.engine.worker import Forget, Forward, Op

FEW = 32  # tokens, padding included, up to which a step costs little more than one of a token each
SIZES = 3, 2  # newest tokens that are looked up


class Ahead:
    """Proposes tokens for the answers under way, feeds them, and goes along those that would be chosen anyway."""

    def __init__(self, most: int, stats: Stats, *, apart: bool, grows: bool) -> None:
        """most: proposals of an answer in a step, 0 for none. apart: the engine is deterministic; grows: `rope_grows`.

        Raises ValueError for a number below 0, and for what excludes proposals.
        """
        if most < 0:
            raise ValueError(f"speculate: got {most}, expected 0 (never) or the most tokens to try in a step")
        if most and apart:
            raise ValueError(f"speculate: got {most} with deterministic, whose steps have one shape; drop one of them")
        if most and grows:
            raise ValueError(
                f"speculate: got {most} for a model of dynamic rope_scaling, whose keys depend on what is fed beside "
                "them; leave it out"
            )
        self._most, self._stats = most, stats
        self._texts: WeakKeyDictionary[Running, _Text] = WeakKeyDictionary()

    def propose(self, speaking: Sequence[Running]) -> list[list[int]]:
        """Of each answer what may come next; nothing for all where a step of them would be more than FEW tokens."""
        rows = seats(speaking)[0] if self._most else []
        most = min(self._most, FEW // len(rows) - 1) if rows else 0
        if most < 1:
            return [[] for _ in speaking]
        return [self._look_up(running, most) for running in speaking]

    def feed(
        self, speaking: Sequence[Running], run: Callable[[Op], Tensor | None]
    ) -> tuple[list[list[int]], Tensor] | None:
        """Proposals of each answer, and the logits [n, vocabulary] of newest tokens and proposals, answer by answer.

        None where there are no proposals, or where some logits are no numbers: masked NaN are NaN still, so a proposal
        may have spoilt what comes before it. What was fed of such answers is forgotten; they go on with one token.
        """
        proposed = self.propose(speaking)
        if not any(proposed):
            return None
        logits = run(newest(speaking, proposed))
        assert logits is not None, "the logits of all positions were asked for"
        self._stats.proposed_tokens += sum(map(len, proposed))
        fine = [peak < math.inf for peak in logits.amax(-1).tolist()]
        if all(fine):
            return proposed, logits
        for running, start, tokens in zip(speaking, _starts(proposed), proposed, strict=True):
            if not all(fine[start : start + 1 + len(tokens)]):
                run(Forget(running.row, running.next_position - 1))
        return None

    def walk(
        self,
        speaking: Sequence[Running],
        proposed: Sequence[Sequence[int]],
        logits: Tensor,
        *,
        say: Callable[[int, int, int], None],
        accept: Callable[[list[Running], Tensor], list[Event]],
    ) -> list[Event]:
        """Choose tokens from logits as `feed` gives them; each answer ends its walk where another one is chosen.

        say: notes a token (row, position, id) that is in the cache for good. accept: chooses a token for each of some
        answers, and moves them on.
        """
        events, starts = list[Event](), _starts(proposed)
        going, step = list(range(len(speaking))), 0
        while going:
            for at in going:
                running = speaking[at]
                say(running.row, running.next_position - 1, running.answer.ids[-1])
            places = [starts[at] + step for at in going]
            every = len(places) == len(logits)
            said = accept(
                [speaking[at] for at in going], logits if every else logits[torch.tensor(places, device=logits.device)]
            )
            events += said
            told = dict(zip(going, said, strict=True))
            met = [at for at in going if step < len(proposed[at]) and told[at].token == proposed[at][step]]
            self._stats.accepted_tokens += len(met)
            going, step = [at for at in met if told[at].result is None], step + 1
        return events

    def _look_up(self, running: Running, most: int) -> list[int]:
        """Proposals of one answer: with the token that any step adds they are no more than it may still say."""
        if running not in self._texts:
            self._texts[running] = _Text(running)
        left = running.prompt.limit - len(running.answer.ids) - 1
        return look_up(self._texts[running].ids(running), min(most, left)) if left > 0 else []


class _Text:
    """The ids of a prompt and its answer, in one array that the answer grows into."""

    def __init__(self, running: Running) -> None:
        prompt = running.prompt
        self._ids = np.empty(len(prompt.ids) + prompt.limit, dtype=np.int64)
        self._ids[: len(prompt.ids)] = np.where(np.asarray(prompt.slots) < 0, prompt.ids, -1)
        self._said = 0

    def ids(self, running: Running) -> np.ndarray:
        """All of them by now, -1 where a picture stands."""
        start, said = len(running.prompt.ids), running.answer.ids
        self._ids[start + self._said : start + len(said)] = said[self._said :]
        self._said = len(said)
        return self._ids[: start + len(said)]


def look_up(said: np.ndarray, most: int) -> list[int]:
    """What followed where the newest tokens stood before: the last 3, else the last 2, where they stood most recently.

    said: int64 [T], below 0 where no token stands. At most `most` ids; what reaches the end goes on in a circle.
    """
    for size in SIZES:
        newest, starts = said[-size:], len(said) - size
        if starts < 1 or newest.min() < 0:
            continue
        found = said[size:] >= 0
        for place, token in enumerate(newest):
            found &= said[place : place + starts] == token
        places = np.flatnonzero(found)
        if len(places):
            following = np.resize(said[places[-1] + size :], most)
            pictured = np.flatnonzero(following < 0)
            return following[: pictured[0] if len(pictured) else most].tolist()
    return []


def newest(speaking: Sequence[Running], proposed: Sequence[Sequence[int]]) -> Forward:
    """The newest token of each answer and its proposals, ragged, padded on the right; all logits are wanted."""
    rows, places, where = seats(speaking)
    shape = len(rows), 1 + max(map(len, proposed))
    ids, positions = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    for at, running, tokens in zip(places, speaking, proposed, strict=True):
        start = running.next_position - 1
        size = 1 + len(tokens)
        ids[at, :size] = torch.tensor([running.answer.ids[-1], *tokens])
        positions[at, :size] = torch.arange(start, start + size)
    return Forward(ids, positions, torch.full(shape[:1], -1), int(positions.max()) + 1, where, whole=True)


def _starts(proposed: Sequence[Sequence[int]]) -> list[int]:
    """Where the logits of each answer begin."""
    return [0, *accumulate(1 + len(tokens) for tokens in proposed)][:-1]
