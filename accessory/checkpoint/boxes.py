"""Rectangles of tensors: what every rank of a run holds, each in a file of its own, and any other cut joined from them.

Must not know models, optimisers or processes; what a name means is its writer's affair.

A state file (state-00000-of-00002.safetensors) holds one rank's pieces; its metadata says under `boxes`, as JSON, the
full shape, start and stop of each. A tensor that several ranks hold is in the file of one of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.files import FORMS, check_written, few, recognise
from accessory.checkpoint.headers import Spec
from accessory.checkpoint.shards import ShardFile
from accessory.dist import Cut

Shape = tuple[int, ...]
BOXES = "boxes"  # in the metadata of a state file


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor, [start, stop) on every dim; `shape` is the whole tensor's, without padding."""

    shape: Shape
    start: Shape
    stop: Shape

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @classmethod
    def of(cls, piece: Cut) -> Box:
        """What a tensor-parallel rank holds, without padding."""
        box = cls.whole(piece.shape)
        return box if piece.dim is None else box.rows(piece.start, piece.stop, dim=piece.dim)

    def rows(self, start: int, stop: int, *, dim: int = 0) -> Box:
        """Rows [start, stop) of one dim of this box, counted from its own start; those beyond its end are cut off."""
        low, high = (min(self.start[dim] + row, self.stop[dim]) for row in (start, stop))
        return Box(
            self.shape,
            (*self.start[:dim], low, *self.start[dim + 1 :]),
            (*self.stop[:dim], high, *self.stop[dim + 1 :]),
        )

    @property
    def size(self) -> Shape:
        """The shape of a tensor that holds this box."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements; 1 without dims."""
        return prod(self.size)

    def meet(self, other: Box) -> Box | None:
        """What both hold; None where that is nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(self.shape, start, stop) if all(map(int.__lt__, start, stop)) else None

    def minus(self, other: Box) -> list[Box]:
        """What is left of this box without the other: rectangles that do not overlap."""
        hole = self.meet(other)
        if hole is None:
            return [self]
        left, start, stop = [], self.start, self.stop
        for dim in range(len(start)):
            before, after = (*start[:dim],), (*stop[:dim],)
            for low, high in ((start[dim], hole.start[dim]), (hole.stop[dim], stop[dim])):
                if low < high:
                    left.append(Box(self.shape, (*before, low, *start[dim + 1 :]), (*after, high, *stop[dim + 1 :])))
            start = (*before, hole.start[dim], *start[dim + 1 :])
            stop = (*after, hole.stop[dim], *stop[dim + 1 :])
        return left

    def inside(self, outer: Box) -> tuple[slice, ...]:
        """Where this box lies in a tensor that holds `outer`."""
        places = zip(self.start, self.stop, outer.start, strict=True)
        return tuple(slice(start - first, stop - first) for start, stop, first in places)

    def __str__(self) -> str:
        """The box as an index, and the shape it is of."""
        spans = ", ".join(f"{start}:{stop}" for start, stop in zip(self.start, self.stop, strict=True))
        return f"[{spans}] of {self.shape}"


@dataclass
class Piece:
    """A rank's part of a tensor."""

    box: Box
    tensor: Tensor
    """Of the box's size: a view without padding."""
    mine: bool = True
    """Whether this rank writes it; others that hold the same do not."""


def state_file(rank: int, world: int) -> str:
    """The name of a rank's state file."""
    return f"state-{rank:05d}-of-{world:05d}.safetensors"


def describe(pieces: Mapping[str, Piece]) -> dict[str, str]:
    """The metadata that says which boxes the tensors of a state file are."""
    return {BOXES: json.dumps({name: [p.box.shape, p.box.start, p.box.stop] for name, p in pieces.items()})}


def read_boxes(folder: str | Path, wanted: Mapping[str, Box]) -> Iterator[tuple[str, Tensor]]:
    """Check names, shapes and that nothing is missing, then yield (name, tensor of the box's size) in the order asked.

    The state files may have been written by any number of ranks with any other boxes; of each only the bytes that
    intersect are read, dtypes are as stored. The sets that `wanted` names (what stands before the first slash, such as
    model/ and optimizer/) must be wanted whole: an empty box will do.
    Raises ValueError, before the first tensor, naming what is missing, not covered, unexpected or misshaped.
    """
    found = recognise(folder)
    if found.form != "training":
        raise ValueError(
            f"{found.path}: is in {FORMS[found.form]} form, expected the checkpoint of a training run, which holds the"
            " optimizer's state too; begin from these weights with model_name_or_path instead"
        )
    check_written(found, ours=True)
    state = StateFiles(found.shards)
    _check(found.path, state, wanted)
    return _read(state, wanted)


class StateFiles:
    """The pieces in a set of state files, and any box of any tensor joined from them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the headers. ValueError, naming the file, where they are damaged or contradict each other."""
        self.files = [ShardFile(path) for path in paths]
        self.specs: dict[str, Spec] = {}
        """Full shape and dtype by name."""
        self._held: dict[str, list[tuple[int, Box]]] = {}
        for number, file in enumerate(self.files):
            for name, box in _boxes(file).items():
                spec = Spec(box.shape, file.specs[name].dtype)
                if self.specs.setdefault(name, spec) != spec:
                    raise ValueError(
                        f"{file.path}: {name} is of {spec.shape} {spec.dtype}, in another file of"
                        f" {self.specs[name].shape} {self.specs[name].dtype}; copy the files of one checkpoint together"
                    )
                self._held.setdefault(name, []).append((number, box))

    def gaps(self, name: str, wanted: Box) -> list[Box]:
        """What of a box is in no file."""
        return self._plan(name, wanted)[1]

    def read(self, name: str, wanted: Box, *, out: Tensor) -> Tensor:
        """Fill `out` (the box's size, any dtype) with a box that has no gaps."""
        reads, gaps = self._plan(name, wanted)
        assert not gaps, f"{name}: {gaps} is in no file; ask for gaps first"
        for number, stored, part in reads:
            view, within = self.files[number], part.inside(stored)
            shares = [size / full for size, full in zip(part.size, stored.size, strict=True)]
            dim = shares.index(min(shares)) if shares and min(shares) < 1 else None
            if dim is None:
                rows = view.rows(name)
            else:
                rows = view.rows(name, dim=dim, start=within[dim].start, stop=within[dim].stop)
                rows = rows[(*within[:dim], slice(None), *within[dim + 1 :])]
            out[part.inside(wanted)].copy_(rows)
        return out

    def release(self) -> None:
        """Forget all mappings of files."""
        for file in self.files:
            file.release()

    def _plan(self, name: str, wanted: Box) -> tuple[list[tuple[int, Box, Box]], list[Box]]:
        """Which part of which stored box makes up the wanted one, each element once, and what is in none."""
        reads, open_parts = [], [wanted] if wanted.numel else []
        for number, stored in self._held.get(name, ()):
            left = []
            for part in open_parts:
                if both := part.meet(stored):
                    reads.append((number, stored, both))
                left += part.minus(stored)
            open_parts = left
        return reads, open_parts


def _read(state: StateFiles, wanted: Mapping[str, Box]) -> Iterator[tuple[str, Tensor]]:
    """Yield the wanted boxes."""
    try:
        for name, box in wanted.items():
            yield name, state.read(name, box, out=torch.empty(box.size, dtype=state.specs[name].dtype))
    finally:
        state.release()


def _check(folder: Path, state: StateFiles, wanted: Mapping[str, Box]) -> None:
    """Raise one ValueError for all that does not fit."""
    sets = {name.partition("/")[0] for name in wanted}
    missing = [name for name in wanted if name not in state.specs]
    unexpected = [name for name in state.specs if name not in wanted and name.partition("/")[0] in sets]
    misshaped, gaps = [], []
    for name, box in wanted.items():
        if name in state.specs and state.specs[name].shape != box.shape:
            misshaped.append(f"{name} is {state.specs[name].shape}, expected {box.shape}")
        elif name in state.specs:
            gaps += [f"{name} {gap}" for gap in state.gaps(name, box)]
    faults = [
        f"{len(names)} {what}: {few(names, mark)}"
        for what, names, mark in (
            ("missing", missing, ","),
            ("not covered by any file", gaps, ";"),
            ("unexpected", unexpected, ","),
            ("misshaped", misshaped, ";"),
        )
        if names
    ]
    if faults:
        raise ValueError(
            f"{folder}: does not hold what this run needs: {'; '.join(faults)}; resume with the settings of the run"
            " that wrote it, or begin anew from its weights with model_name_or_path"
        )


def _boxes(file: ShardFile) -> dict[str, Box]:
    """The boxes of a state file's tensors. ValueError where its metadata does not say them right."""
    try:
        table = json.loads(file.metadata.get(BOXES, ""))
        boxes = {name: Box(*(tuple(numbers) for numbers in entry)) for name, entry in table.items()}
        fit = all(
            type(number) is int and 0 <= start <= number <= full
            for box in boxes.values()
            for full, start, number in zip(box.shape, box.start, box.stop, strict=True)
        )
        fit &= {name: box.size for name, box in boxes.items()} == {name: s.shape for name, s in file.specs.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        fit, boxes = False, {}
    if not fit:
        raise ValueError(f"{file.path}: its metadata does not say which boxes its tensors are; copy or write it again")
    return boxes
