"""Sequences of rows as one micro-batch of tensors.

Must not know how rows are chosen, nor models, ranks and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from accessory.data.feed.corpus import Row
from accessory.data.feed.pixels import Seen
from accessory.data.feed.sources import FeedConfig

IGNORED = -100
NARROW = 8  # sequences are padded to a multiple of this


@dataclass
class Batch:
    """One micro-batch on the CPU: tensors [B, T] int64, as `Llama.forward` takes them."""

    ids: Tensor
    positions: Tensor
    """Begin anew with each document, and behind a shared beginning."""
    labels: Tensor
    """What follows on each position; -100 where nothing is learned."""
    segments: Tensor | None
    """Documents 1, 2, ... of each sequence, 0 for a beginning that all of them share, -1 for padding; None: plain rows,
    padded on the right."""
    slots: Tensor | None
    """Into all feature rows of this micro-batch, -1 where there is none; for an adapter's prompt (config.slots 0) the
    number of the row's picture. None without pictures."""
    pixels: Tensor | None
    """[tiles, 3, size, size], those of each picture together"""
    targets: int
    """Positions that have a label."""
    tokens: int
    """Positions that are no padding."""
    rows: list[str]
    """file:row number of all that is in it."""
    skipped: list[str] = field(default_factory=list)
    """Rows whose picture cannot be read: they stand there with a blank one, and nothing of them is learned."""
    order: Tensor | None = None
    """int64: which rows of the stack of all tiles are the feature rows (`data.tiles`); None: all, as they stand."""

    def tensors(self, device: torch.device) -> dict[str, Tensor | None]:
        """The model's inputs, on a device."""
        names = ("ids", "positions", "labels", "segments", "slots", "pixels", "order")
        given = {name: getattr(self, name) for name in names}
        return {name: None if value is None else value.to(device, non_blocking=True) for name, value in given.items()}

    def pinned(self) -> Batch:
        """The same in page-locked memory, from which a GPU copies while it computes."""
        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return replace(self, **{name: value.pin_memory() for name, value in given.items() if isinstance(value, Tensor)})


def collate(sequences: Sequence[Sequence[Row]], config: FeedConfig, seen: Seen | None = None) -> Batch:
    """Sequences as one micro-batch, as long as the longest of them; no sequence: one position that teaches nothing.

    seen: the pictures of all rows, in their order.
    """
    several = config.packing or any(len(rows) > 1 or len(row.documents) > 1 for rows in sequences for row in rows)
    lengths = [sum(len(row.ids) for row in rows) for rows in sequences]
    width = max(lengths, default=1)
    if lengths:
        width = max(width, min(-(-width // NARROW) * NARROW, config.cutoff_len))
    shape = (max(1, len(sequences)), width)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels, segments, slots = np.full(shape, IGNORED), np.full(shape, -1), np.full(shape, -1)
    done, filled, skipped = 0, 0, list[str]()
    for at, rows in enumerate(sequences):
        start, document, own, failed = 0, 0, 0, list[str]()
        for row in rows:
            end = start + len(row.ids)
            ids[at, start:end] = row.ids
            later = np.where(row.supervised[1:], row.ids[1:], IGNORED)
            goes_on = row.shared if start else 0
            if not goes_on:
                own = filled
                failed = [seen.failed[n] for n in range(done, done + len(row.pictures)) if n in seen.failed]
            skipped += [f"{row.where}: as {failed[0]}" if goes_on else failed[0]] if failed else []
            labels[at, start : end - 1] = IGNORED if failed else later
            for first, last in zip(row.documents, [*row.documents[1:], len(row.ids)], strict=True):
                document += 1
                positions[at, start + first : start + last] = np.arange(goes_on, goes_on + last - first)
                segments[at, start + first : start + last] = document
            if not goes_on:
                segments[at, start : start + row.shared] = 0
            if config.slots:
                slots[at, start:end] = np.where(row.slots >= 0, row.slots + own, -1)
            elif row.pictures:
                slots[at] = done
            done += len(row.pictures)
            filled += sum(config.geometry.count(row.sizes))
            start = end
        if not several:
            positions[at, start:] = np.arange(start, width)
    sizes = [size for rows in sequences for row in rows for size in row.sizes]
    order = None if seen is None else config.geometry.order(sizes)
    return Batch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        labels=torch.from_numpy(labels),
        segments=torch.from_numpy(segments) if several else None,
        slots=torch.from_numpy(slots) if seen is not None else None,
        pixels=torch.from_numpy(seen.pixels) if seen is not None else None,
        targets=int((labels != IGNORED).sum()),
        tokens=sum(lengths),
        rows=[row.where for rows in sequences for row in rows],
        skipped=skipped,
        order=None if order is None else torch.from_numpy(order),
    )
