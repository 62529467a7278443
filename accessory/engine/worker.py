"""What every tensor-parallel rank does in one step: read pictures, feed tokens through the cache, give logits.

Must not know requests, text or sampling: it is told rows and positions, and does the same on all ranks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.engine.compiled import CompiledStep
from accessory.model import Llama


@dataclass(frozen=True)
class Forward:
    """Feed tokens. All tensors are int64 on the CPU."""

    ids: Tensor
    """[B, T]"""
    positions: Tensor
    """[B, T]; -1 is padding."""
    last: Tensor
    """[B]: the index in T whose logits are wanted, -1 for none."""
    extent: int
    """Highest position + 1."""
    rows: Tensor | None = None
    """[B] rows of the cache; None: 0 to B-1."""
    slots: Tensor | None = None
    """[B, T]: -1, or a row of the features of that cache row's pictures; None: no picture in this piece."""
    whole: bool = False
    """Whether the logits of all positions are wanted; the pictures then stay until `Forget`."""
    apart: bool = False
    """Whether no row's result may depend on the others: each attends by itself, and the head has all rows."""


@dataclass(frozen=True)
class See:
    """Begin a request in a row: read the tiles of its pictures, and set the adapter's prompt."""

    row: int
    pixels: Tensor | None
    """[tiles, 3, H, W]; None for none."""
    order: Tensor | None = None
    """int64 [n]: which rows of all tiles are the features (`data.tiles`); None: all, as they stand."""


@dataclass(frozen=True)
class Forget:
    """Drop what `See` kept for a row, and what the row holds from a position on."""

    row: int
    start: int = 0


@dataclass(frozen=True)
class Copy:
    """Give a row the first positions of another one, and the adapter's prompt with them."""

    source: int
    target: int
    length: int


Op = Forward | See | Forget | Copy


class Worker:
    """One rank's model and cache; the same ops in the same order keep all ranks in step."""

    def __init__(self, model: Llama, *, rows: int, window: int, compiled: bool = False, apart: bool = False) -> None:
        """compiled: compile the step of answers now; then every step of answers has all rows. apart: find `alike`."""
        self.model = model
        self.cache = model.new_cache(rows=rows, size=window)
        self._device = model.norm.weight.device
        self._features: dict[int, Tensor] = {}  # by row, until its prompt is fed
        if model.prompt is not None:  # whose place in the cache is to be there before anything is compiled
            for row in range(rows):
                self.run(See(row, None))
        self.step = CompiledStep(model, self.cache) if compiled else None
        if self.step is not None:
            self.step.warm()
        self.alike = self._alike() if apart and window > 1 else list(range(rows))
        """Rows that give the same bits for the same tokens; all of them, where nobody asked."""

    @torch.inference_mode()
    def run(self, op: Op) -> Tensor | None:
        """Do one op; a Forward gives the logits [n, vocabulary] fp32 of its n wanted positions, None without any."""
        if isinstance(op, Forward):
            return self._forward(op)
        if isinstance(op, See):
            self._see(op)
        elif isinstance(op, Copy):
            self.cache.copy(op.source, op.target, op.length)
        else:
            self._features.pop(op.row, None)
            self.cache.clear(op.row, op.start)
        return None

    def _see(self, op: See) -> None:
        """Pictures to feature rows, kept for the row, or to the adapter's prompt."""
        self._features.pop(op.row, None)
        seen = None if op.pixels is None else self.model.vision(op.pixels.to(self._device), op.order)
        if seen is not None and self.model.vision.slots:
            self._features[op.row] = seen.reshape(-1, seen.shape[-1])
            seen = None
        if self.model.prompt is not None:
            row = torch.tensor([op.row], device=self._device)
            self.model.prompt.store(self.model, self.cache, row, seen)

    def _forward(self, op: Forward) -> Tensor | None:
        one_each = op.ids.shape == (self.cache.rows, 1) and op.rows is None
        if self.step is not None and one_each and op.slots is None and not op.whole and bool((op.last >= 0).any()):
            self._drop(op)
            return self.step(op.ids, op.positions, op.extent)[(op.last >= 0).nonzero()[:, 0].to(self._device)]
        device, rows = self._device, None if op.rows is None else op.rows.to(self._device)
        features, slots = (None, None) if op.slots is None else self._gather(op, op.slots)
        self.cache.extent = op.extent
        self.cache.reads = [int(row.max()) + 1 for row in op.positions] if op.apart and len(op.ids) > 1 else None
        hidden = self.model(
            op.ids.to(device),
            op.positions.to(device),
            cache=self.cache,
            rows=rows,
            features=features,
            slots=slots,
        )
        wanted = (op.last >= 0).nonzero()[:, 0]
        self._drop(op)
        if op.whole:
            return self.model.output(hidden[op.positions.to(device) >= 0])
        if not len(wanted):
            return None
        if op.apart and op.ids.shape[1] == 1:
            return self.model.output(hidden[:, 0])[wanted.to(device)]
        return self.model.output(hidden[wanted.to(device), op.last[wanted].to(device)])

    def _drop(self, op: Forward) -> None:
        """Forget the features of rows whose prompts end here, be the pictures in this piece or before."""
        if self._features:
            for row in self._rows(op)[op.last >= 0].tolist():
                self._features.pop(row, None)

    def _alike(self) -> list[int]:
        """The most rows that give the same bits: libraries may multiply the last rows of a batch in another way."""
        rows, most = self.cache.rows, self.model.config.vocab_size - 1
        marks = [hashlib.blake2b() for _ in range(rows)]
        for token in (0, most // 3, most // 2, most):
            shape = (rows, 1)
            ids, positions = torch.full(shape, token), torch.ones(shape, dtype=torch.int64)
            logits = self.run(Forward(ids, positions, torch.zeros(rows, dtype=torch.int64), 2, apart=True))
            for row, mark in enumerate(marks):
                for tensor in (logits[row], *(kept[row, :, 1] for kept in (*self.cache.keys, *self.cache.values))):
                    mark.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        for row in range(rows):
            self.cache.clear(row)
        found = [mark.digest() for mark in marks]
        usual = max(found, key=lambda mark: (found.count(mark), -found.index(mark)))
        return [row for row in range(rows) if found[row] == usual]

    def _gather(self, op: Forward, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The features of all rows in one tensor, and the slots that point into it."""
        parts, shifted, start = [], slots.clone(), 0
        for at, row in enumerate(self._rows(op).tolist()):
            if (slots[at] >= 0).any():
                shifted[at] += start * (slots[at] >= 0)
                parts.append(self._features[row])
                start += len(parts[-1])
        return torch.cat(parts), shifted.to(self._device)

    def _rows(self, op: Forward) -> Tensor:
        return torch.arange(len(op.ids)) if op.rows is None else op.rows
