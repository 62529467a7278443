"""Joining and cutting tensors: M shards to N ranks, by shapes alone.

Must not know files, names or processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.dist import Cut

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Join:
    """How shards make up a tensor: full shape, and the dim they follow each other on; None: each holds all of it."""

    shape: Shape
    dim: int | None = None


def bounds(size: int, parts: int) -> list[tuple[int, int]]:
    """Cut `size` rows into `parts` runs as even as can be, the longer ones first: 32001 in 2 is 16001 + 16000."""
    small, more = divmod(size, parts)
    starts = [part * small + min(part, more) for part in range(parts + 1)]
    return list(zip(starts, starts[1:], strict=False))


def cut(tensor: Tensor, piece: Cut) -> Tensor:
    """Return what `piece` holds of a full tensor: a view, or a copy where zero rows are appended."""
    assert tuple(tensor.shape) == piece.shape, f"tensor {tuple(tensor.shape)} is not the cut's full {piece.shape}"
    if piece.dim is None:
        return tensor
    rows = tensor.narrow(piece.dim, piece.start, piece.stop - piece.start)
    if not piece.pad:
        return rows
    shape = (*piece.shape[: piece.dim], piece.pad, *piece.shape[piece.dim + 1 :])
    return torch.cat([rows, rows.new_zeros(shape)], piece.dim)


def join(pieces: Sequence[tuple[Cut, Tensor]]) -> Tensor:
    """Return the full tensor from every rank's cut and local tensor; padding is stripped, replicas are used once."""
    first = pieces[0][0]
    if first.dim is None:
        return pieces[0][1]
    rows = {piece.start: (piece, tensor) for piece, tensor in reversed(pieces) if piece.stop > piece.start}
    parts = [tensor.narrow(first.dim, 0, piece.stop - piece.start) for _, (piece, tensor) in sorted(rows.items())]
    full = torch.cat(parts, first.dim)
    assert tuple(full.shape) == first.shape, f"pieces join to {tuple(full.shape)}, not to {first.shape}"
    return full


def find_join(shapes: Sequence[Shape], full: Shape) -> Join | None:
    """How shards of these shapes make up `full`: as copies of it, or on the one dim where sizes add up; else None."""
    if all(shape == full for shape in shapes):
        return Join(full)
    for dim in range(len(full)):
        if _joined(shapes, dim) == full:
            return Join(full, dim)
    return None


def guess_join(shapes: Sequence[Shape], dim: int | None) -> Join | None:
    """How shards make up a tensor cut on `dim` whose full shape nobody knows; None where they do not fit."""
    if len(shapes) == 1 or dim is None:
        return Join(shapes[0]) if all(shape == shapes[0] for shape in shapes) else None
    full = _joined(shapes, dim)
    return None if full is None else Join(full, dim)


def overlaps(sizes: Sequence[int], start: int, stop: int) -> list[tuple[int, int, int, int]]:
    """Which rows of which shard make up rows [start, stop): (shard, first row, last row + 1, place in the result)."""
    found, first = [], 0
    for shard, size in enumerate(sizes):
        low, high = max(start, first), min(stop, first + size)
        if low < high:
            found.append((shard, low - first, high - first, low - start))
        first += size
    return found


def _joined(shapes: Sequence[Shape], dim: int) -> Shape | None:
    """The shape of shards that follow each other on `dim`; None where their other dims differ."""
    first = shapes[0]
    others = [(*shape[:dim], *shape[dim + 1 :]) for shape in shapes]
    if any(len(shape) <= dim or len(shape) != len(first) for shape in shapes) or len(set(others)) > 1:
        return None
    return (*first[:dim], sum(shape[dim] for shape in shapes), *first[dim + 1 :])
