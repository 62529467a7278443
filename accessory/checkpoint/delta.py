"""Delta weights: differences of tensors, their sums, and the elements that a difference cannot carry.

Must not know files or names.

The format (LLaMA2-Accessory's): delta = finetuned - base in fp32, stored in 16 bit; finetuned = base + delta in fp32;
tensors that the base lacks are stored as they are. An fp32 difference is not always enough to get the finetuned
tensor back bit by bit: where |base| is some 2^13 times |finetuned| or more, where signs differ in fp32 weights, for NaN
and for -0.0, no fp32 number added to the base gives it. Those elements are listed beside it, as (index, bits).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from accessory.dist import Cut

BLOCK = 1 << 22  # elements
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def difference(base: Tensor | None, tuned: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return finetuned - base in fp32, stored as `dtype`; without a base, the finetuned tensor itself.

    Raises ValueError when a finite difference becomes infinite in `dtype`.
    """
    stored = torch.empty(tuned.shape, dtype=dtype)
    for _, tuned_block, base_block, block in _blocks(tuned, base, stored):
        exact = tuned_block.float() if base_block is None else tuned_block.float() - base_block.float()
        block.copy_(exact)
        if dtype != torch.float32 and block.isinf().sum() > exact.isinf().sum():
            largest = exact.nan_to_num(0, 0, 0).abs().max().item()
            raise ValueError(f"a difference of {largest:g} does not fit {dtype}; use --delta_dtype fp32 or bf16")
    return stored


def add(base: Tensor | None, delta: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return base + delta, summed in fp32, as `dtype`; without a base, the delta itself."""
    return (delta.float() if base is None else base.float() + delta.float()).to(dtype)


def exceptions(base: Tensor | None, tuned: Tensor, delta: Tensor) -> Tensor:
    """Return int64 (n, 2): flat index and bits of each element of `tuned` that base + delta does not give exactly."""
    bits, found = _BITS[tuned.dtype.itemsize], [torch.empty(0, 2, dtype=torch.int64)]
    for start, tuned_block, base_block, block in _blocks(tuned, base, delta):
        wanted = tuned_block.view(bits)
        index = (add(base_block, block, dtype=tuned.dtype).view(bits) != wanted).nonzero().squeeze(1)
        found.append(torch.stack([index + start, wanted[index].to(torch.int64)], dim=1))
    return torch.cat(found)


def round_trip(base: Tensor | None, tuned: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return what base + (tuned - base), stored as `dtype`, gives in the dtype of `tuned`, and how far it is off."""
    given, worst = torch.empty(tuned.shape, dtype=tuned.dtype), 0.0
    for _, tuned_block, base_block, block in _blocks(tuned, base, given):
        block.copy_(add(base_block, difference(base_block, tuned_block, dtype=dtype), dtype=tuned.dtype))
        worst = max(worst, (block.float() - tuned_block.float()).abs().nan_to_num(0).max().item())
    return given, worst


def set_exceptions(tensor: Tensor, rows: Tensor, piece: Cut) -> None:
    """Write the listed elements into what `piece` holds of the tensor, a contiguous one in the finetuned dtype."""
    index, bits = rows[:, 0], rows[:, 1].to(_BITS[tensor.dtype.itemsize])
    if piece.dim is not None:
        inner = 1
        for size in piece.shape[piece.dim + 1 :]:
            inner *= size
        block = piece.shape[piece.dim] * inner
        outer, row, rest = index // block, index // inner % piece.shape[piece.dim], index % inner
        held = (row >= piece.start) & (row < piece.stop)
        local = outer * piece.local_shape[piece.dim] * inner + (row - piece.start) * inner + rest
        index, bits = local[held], bits[held]
    tensor.view(bits.dtype).view(-1)[index] = bits


def _blocks(first: Tensor, second: Tensor | None, third: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None, Tensor]]:
    """(start, block of each): flat runs of elements, so that what is computed in between stays small."""
    flat = [None if tensor is None else tensor.contiguous().view(-1) for tensor in (first, second, third)]
    for start in range(0, first.numel(), BLOCK):
        yield start, *(None if tensor is None else tensor[start : start + BLOCK] for tensor in flat)
