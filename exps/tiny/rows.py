"""Packs questions and answers into rows of tokens: several behind one picture, or several pictures in one row.
Knows the template's ids and the model's input, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from random import Random

import pool as pools
import torch

IGNORE = -100


@dataclass
class Row:
    """One row: token ids, positions, segments, picture slots (-1: none), labels, and the pictures it shows."""

    limit: int
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)

    def add(self, tokens: list[tuple[int, bool]], segment: int, start: int, *, slots: Iterable[int] = ()) -> None:
        """Append (id, supervised) tokens at positions from `start`; labels are already shifted by one."""
        slots = list(slots) or [-1] * len(tokens)
        following = [*tokens[1:], (0, False)]
        self.ids += [token for token, _ in tokens]
        self.positions += range(start, start + len(tokens))
        self.segments += [segment] * len(tokens)
        self.slots += slots
        self.labels += [token if supervised else IGNORE for token, supervised in following]

    @property
    def room(self) -> int:
        return self.limit - len(self.ids)


class Rows:
    """Draws rows of at most `limit` tokens from a pool.

    write(question, answer) -> the exchange's (id, supervised) tokens, EOS included; `bos` opens every conversation.
    """

    def __init__(
        self,
        pool: pools.Pool,
        write: Callable[[str, str], list[tuple[int, bool]]],
        *,
        bos: int,
        picture_slots: int,
        limit: int,
    ) -> None:
        self.pool, self.write, self.bos, self.picture_slots, self.limit = pool, write, bos, picture_slots, limit
        self.scenes = pool.where(pools.SCENE)
        self.others = (pool.where(*range(10)), pool.where(pools.UNKNOWN), pool.where(pools.EMPTY))

    def prefix(self, row: Row, picture: int, segment: int) -> None:
        """BOS and the slots of a picture."""
        row.add([(self.bos, False)], segment, 0)
        first = len(row.pictures) * self.picture_slots
        row.add([(0, False)] * self.picture_slots, segment, 1, slots=range(first, first + self.picture_slots))
        row.pictures.append(picture)

    def behind_one(self, rng: Random) -> Row:
        """Many separate questions that see one drawing and not each other."""
        row, picture = Row(self.limit), rng.choice(self.scenes)
        self.prefix(row, picture, 0)
        start, segment = len(row.ids), 0
        for question, answer in pools.questions_about(rng, self.pool, picture):
            tokens = self.write(question, answer)
            if len(tokens) > row.room:
                return row
            segment += 1
            row.add(tokens, segment, start)
        raise AssertionError("questions never end")

    def conversations(self, rng: Random, *, scene: bool) -> Row:
        """Separate conversations of a few exchanges, each with its own picture or without one."""
        row, segment = Row(self.limit), 0
        while True:
            segment += 1
            turns = 99 if scene else rng.choices((1, 2, 3), (60, 30, 10))[0]
            picture = rng.choice(self.scenes) if scene else self._other(rng)
            source = self._source(rng, picture)
            length = 1 + (picture is not None) * self.picture_slots
            tokens: list[tuple[int, bool]] = []
            for question, answer in source:
                more = self.write(question, answer)
                if not turns or length + len(tokens) + len(more) > row.room:
                    break
                tokens, turns = tokens + more, turns - 1
            if not tokens:
                return row
            if picture is None:
                row.add([(self.bos, False)], segment, 0)
            else:
                self.prefix(row, picture, segment)
            row.add(tokens, segment, length)

    def _other(self, rng: Random) -> int | None:
        kind = rng.choices((0, 1, 2, 3), (58, 18, 5, 19))[0]
        return rng.choice(self.others[kind]) if kind < 3 else None

    def _source(self, rng: Random, picture: int | None) -> Iterator[tuple[str, str]]:
        if picture is None:
            return pools.questions_without_picture(rng)
        return pools.questions_about(rng, self.pool, picture)

    def batch(
        self, rng: Random, *, separate: int, scene_talks: int, other_talks: int
    ) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Tensors [rows, limit] for the model's forward (with labels), and the pictures in order of their slots."""
        rows = [self.behind_one(rng) for _ in range(separate)]
        rows += [self.conversations(rng, scene=True) for _ in range(scene_talks)]
        rows += [self.conversations(rng, scene=False) for _ in range(other_talks)]
        fields = {"ids": 0, "positions": 0, "segments": -1, "slots": -1, "labels": IGNORE}
        out = {name: torch.full((len(rows), self.limit), fill, dtype=torch.long) for name, fill in fields.items()}
        pictures: list[int] = []
        for i, row in enumerate(rows):
            shift = len(pictures) * self.picture_slots
            row.slots = [slot + shift if slot >= 0 else -1 for slot in row.slots]
            for name, tensor in out.items():
                values = getattr(row, name)
                tensor[i, : len(values)] = torch.tensor(values)
            pictures += row.pictures
        return out, pictures
