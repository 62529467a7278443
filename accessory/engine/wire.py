"""How ops travel from the leading rank to the others: whole numbers and pixels over the control group, no pickle.

Must not know what an op does. A step of decoding is one small broadcast; a longer op is a second one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from accessory.engine.worker import Copy, Forget, Forward, Op, See

_CLOSE, _FORWARD, _SEE, _FORGET, _COPY = range(5)
_HEAD = 8  # kind, then its numbers
_PER_ROW = 4  # id, position, last and row of one decoding request


class Wire:
    """One end of the line: rank 0 of `group` sends, the others receive. All ends have the same `rows`."""

    def __init__(self, group: ProcessGroup, *, rows: int) -> None:
        self._group = group
        self._size = _HEAD + _PER_ROW * rows

    def send(self, op: Op | None) -> None:
        """Send an op; None ends the work."""
        if op is None:
            self._cast(self._message([_CLOSE]))
        elif isinstance(op, Forward):
            self._send_forward(op)
        elif isinstance(op, See):
            shape = [0] * 4 if op.pixels is None else op.pixels.shape
            self._cast(self._message([_SEE, op.row, *shape, -1 if op.order is None else len(op.order)]))
            for tensor in (op.pixels, op.order):
                if tensor is not None:
                    self._cast(tensor.contiguous())
        elif isinstance(op, Copy):
            self._cast(self._message([_COPY, op.source, op.target, op.length]))
        else:
            self._cast(self._message([_FORGET, op.row, op.start]))

    def receive(self) -> Op | None:
        """Wait for the next op, for days if need be; None: the work is over."""
        message = self._cast(torch.zeros(self._size, dtype=torch.int64))
        kind, *numbers = message[:_HEAD].tolist()
        if kind == _CLOSE:
            return None
        if kind == _FORWARD:
            return self._receive_forward(numbers, message[_HEAD:])
        if kind == _SEE:
            row, *shape, rows = numbers[:6]
            pixels = self._cast(torch.empty(shape)) if shape[0] else None
            return See(row, pixels, self._cast(torch.empty(rows, dtype=torch.int64)) if rows >= 0 else None)
        if kind == _COPY:
            return Copy(*numbers[:3])
        assert kind == _FORGET, f"ranks are out of step: got a message of kind {kind}"
        return Forget(*numbers[:2])

    def _send_forward(self, op: Forward) -> None:
        batch, length = op.ids.shape
        tensors = [op.ids, op.positions, op.last, op.rows, op.slots]
        body = torch.cat([tensor.flatten() for tensor in tensors if tensor is not None])
        fits = len(body) <= self._size - _HEAD
        numbers = [
            _FORWARD,
            batch,
            length,
            op.extent,
            op.rows is not None,
            op.slots is not None,
            op.whole + 2 * op.apart,
        ]
        self._cast(self._message(numbers, body if fits else None))
        if not fits:
            self._cast(body)

    def _receive_forward(self, numbers: list[int], body: Tensor) -> Forward:
        batch, length, extent, has_rows, has_slots, flags = numbers[:6]
        square = (batch, length)
        shapes = [square, square, (batch,), (batch,) if has_rows else None, square if has_slots else None]
        total = sum(math.prod(shape) for shape in shapes if shape is not None)
        if total > len(body):
            body = self._cast(torch.empty(total, dtype=torch.int64))
        ids, positions, last, rows, slots = _split(body, shapes)
        assert ids is not None and positions is not None and last is not None, f"a forward without tokens: {numbers}"
        return Forward(ids, positions, last, extent, rows, slots, whole=bool(flags & 1), apart=bool(flags & 2))

    def _message(self, numbers: list[int], body: Tensor | None = None) -> Tensor:
        """Numbers, and the body where it fits, in the one size that receivers wait for."""
        message = torch.zeros(self._size, dtype=torch.int64)
        message[: len(numbers)] = torch.tensor(numbers)
        if body is not None:
            message[_HEAD : _HEAD + len(body)] = body
        return message

    def _cast(self, tensor: Tensor) -> Tensor:
        torch.distributed.broadcast(tensor, group=self._group, group_src=0)
        return tensor


def _split(body: Tensor, shapes: list[tuple[int, ...] | None]) -> Iterator[Tensor | None]:
    """Tensors of these shapes that lie one after another."""
    at = 0
    for shape in shapes:
        if shape is None:
            yield None
            continue
        stop = at + math.prod(shape)
        yield body[at:stop].view(shape)
        at = stop
