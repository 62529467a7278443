"""x W^T of bf16 for a weight that only this multiplies: packed for the kernel, the fastest from one row to many.

Must not know layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.native.building import library
from accessory.native.memory import widen, zeros

PANEL, GROUP = 64, 16  # outputs of a panel, and of what it is packed by, as in common.h


class Packed(nn.Module):
    """(x [..., in], bias [out]) -> x W^T + b, bf16, for inference. A row's result does not depend on the other rows."""

    def __init__(self, *weights: Tensor) -> None:
        """weights: bf16 [out, in] each, one behind the other, on a CPU where the kernels are `available`.

        They may be let go.
        """
        super().__init__()
        if any(len(weight) % GROUP for weight in weights[:-1]):
            weights = (torch.cat(weights),)
        self._reserve(sum(map(len, weights)), weights[0].shape[1])
        start = 0
        for weight in weights:
            self.put(start, weight.detach())
            start += len(weight)

    @classmethod
    def empty(cls, rows: int, inputs: int) -> Packed:
        """Room for weights that are still to come, `rows` outputs in all."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._reserve(rows, inputs)
        return made

    def put(self, start: int, weight: Tensor) -> None:
        """Pack a weight [out, in] from output `start` on, a multiple of GROUP; it may be let go."""
        assert weight.dtype == torch.bfloat16 and weight.device.type == "cpu", f"no kernel for {weight.dtype} here"
        assert start % GROUP == 0 and start + len(weight) <= self.rows, f"{len(weight)} at {start} of {self.rows}"
        weight = _even(weight).contiguous()
        place = weight.data_ptr(), self.packed.data_ptr(), start, *weight.shape
        library().pack(*place, torch.get_num_threads())
        self._left -= len(weight)
        if not self._left:
            widen(self.packed)

    def _reserve(self, rows: int, inputs: int) -> None:
        """Take the memory."""
        self.rows = self._left = rows
        packed = zeros([-(-rows // PANEL) * PANEL * (inputs + inputs % 2)], dtype=torch.bfloat16)
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.accessory.multiply_packed(x, self.packed, bias, self.rows)
        return _multiply(x, self.packed, bias, self.rows)


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """The product itself."""
    dtypes = {x.dtype, packed.dtype, *(() if bias is None else (bias.dtype,))}
    assert dtypes == {torch.bfloat16} and x.device == packed.device, f"no kernel for {dtypes} on {x.device}"
    flat = _even(x)
    flat = flat.reshape(-1, flat.shape[-1])
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    library().multiply(
        flat.data_ptr(),
        flat.stride(0),
        packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        len(flat),
        rows,
        flat.shape[1],
        torch.get_num_threads(),
    )
    return y


def _even(x: Tensor) -> Tensor:
    """x [..., in], with a zero behind an odd `in`: inputs are multiplied two by two."""
    return F.pad(x, (0, 1)) if x.shape[-1] % 2 else x


# an operator, which a compiler calls as it is
_LIBRARY = torch.library.Library("accessory", "FRAGMENT")
_LIBRARY.define("multiply_packed(Tensor x, Tensor packed, Tensor? bias, int rows) -> Tensor")
_LIBRARY.impl("multiply_packed", _multiply, "CPU")
torch.library.register_fake(
    "accessory::multiply_packed", lambda x, packed, bias, rows: x.new_empty(*x.shape[:-1], rows), lib=_LIBRARY
)
