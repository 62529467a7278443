"""NF4 storage (QLoRA, arXiv 2305.14314): 4-bit codes in blocks of 64, their scales quantised once more to 8 bits.

Must not know layers beyond the Linear seam. bitsandbytes makes and reads the codes; its fused CPU path is not used,
because it repacks the weight in place and later gives no input gradient.
"""

from __future__ import annotations

import logging
from math import prod
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.parallel import Linear

BLOCK, NESTED_BLOCK = 64, 256


class Nf4(nn.Module):
    """The weight of one Linear, [out, in], at about 4.13 bits per element; `forward` is x W^T + b.

    All of it are buffers, so that moving, gathering and broadcasting a model takes the scales along.
    """

    compiles = False
    """Whether torch can compile a model that has it."""
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    code: Tensor
    nested_code: Tensor

    def __init__(self, weight: Tensor) -> None:
        """Quantise a 16- or 32-bit [out, in] weight where it lies (CPU or CUDA)."""
        super().__init__()
        functional = _bitsandbytes().functional
        self.shape, self.dtype = tuple(weight.shape), weight.dtype
        self._even = weight.shape[1] % BLOCK == 0  # whether no block goes on in the next row
        if not self._even:
            weight = F.pad(weight.reshape(-1), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        packed, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        offset = torch.as_tensor(state.offset, device=weight.device, dtype=torch.float32)
        tensors = {
            "packed": packed,
            "absmax": state.absmax,
            "nested_absmax": state.state2.absmax,
            "offset": offset,
            "code": state.code,
            "nested_code": state.state2.code,
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def dequantised(self) -> Tensor:
        """The weight again, [out, in], in the dtype it came in."""
        read = _bitsandbytes().functional.dequantize_4bit
        if self._even:
            return read(self.packed, self._state(self.shape))
        # on a CPU bitsandbytes begins a new block with every row; these are read as rows of one block each
        size = prod(self.shape)
        return read(self.packed, self._state((-(-size // BLOCK), BLOCK))).view(-1)[:size].view(self.shape)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype (autocast's, where that is on)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        one_row = x.device.type == "cuda" and x.numel() == x.shape[-1]
        if one_row and self._even and not torch.is_grad_enabled():
            return _bitsandbytes().matmul_4bit(x, self.packed.t(), quant_state=self._state(self.shape), bias=bias)
        y = _Product.apply(x, self)
        return y if bias is None else y + bias.to(y.dtype)

    def _state(self, shape: tuple[int, ...]) -> object:
        """bitsandbytes' description of the buffers, for a weight of this shape."""
        make = _bitsandbytes().functional.QuantState
        nested = make(absmax=self.nested_absmax, code=self.nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32)
        return make(
            absmax=self.absmax,
            shape=torch.Size(shape),
            dtype=self.dtype,
            blocksize=BLOCK,
            code=self.code,
            quant_type="nf4",
            offset=self.offset,
            state2=nested,
        )


def _bitsandbytes() -> ModuleType:
    """The library, without its advice to fetch a further CPU kernel, whose path is the one not used here."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


class _Product(torch.autograd.Function):
    """x W^T with W dequantised for the moment, forward and backward; W itself is frozen."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, storage: Nf4) -> Tensor:
        ctx.storage = storage
        return F.linear(x, storage.dequantised().to(x.dtype))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.storage.dequantised().to(grad.dtype), None


def quantise(linear: Linear, weight: Tensor) -> None:
    """Give a Linear NF4 storage made of `weight` (its local slice) in place of its own weight."""
    assert tuple(weight.shape) == linear.cuts["weight"].local_shape, (weight.shape, linear.cuts["weight"])
    linear.weight = None
    linear.storage = Nf4(weight)
