"""The norm, the gate and the rotation of a block, in one pass each, with the roundings of `model`'s formulas.

Must not know layers. For inference: nothing here has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.native.building import library

MULTIPLE = 16  # numbers that are worked on at once


def serves(x: Tensor) -> bool:
    """Whether these can be called for x, bf16 on a CPU: where kernels are, and nothing is compiled or has gradients."""
    if torch.compiler.is_compiling() or x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.shape[-1] % MULTIPLE:
        return False
    return not (torch.is_grad_enabled() and x.requires_grad) and library() is not None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim; weight bf16."""
    flat, y = _rows(x), torch.empty(x.shape, dtype=x.dtype)
    rows, width = flat.shape
    threads = torch.get_num_threads()
    library().norm(flat.data_ptr(), flat.stride(0), weight.data_ptr(), y.data_ptr(), rows, width, eps, threads)
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    left, right, y = _rows(gate), _rows(up), torch.empty(gate.shape, dtype=gate.dtype)
    if left.stride(0) != right.stride(0):
        left, right = left.contiguous(), right.contiguous()
    threads = torch.get_num_threads()
    library().swiglu(left.data_ptr(), right.data_ptr(), left.stride(0), y.data_ptr(), *left.shape, threads)
    return y


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """The pairs of x [B, T, H, D] turned by turns [B, T, 1, D / 2, 2], fp32 cosines and sines."""
    batch, length, heads, width = x.shape
    flat, y = _rows(x.flatten(2)), torch.empty(x.shape, dtype=x.dtype)
    turns = turns.expand(batch, length, 1, width // 2, 2).contiguous()
    library().rotate(
        flat.data_ptr(),
        flat.stride(0),
        turns.data_ptr(),
        y.data_ptr(),
        batch * length,
        heads,
        width,
        torch.get_num_threads(),
    )
    return y


def _rows(x: Tensor) -> Tensor:
    """x [..., n] as [rows, n] whose numbers lie side by side, copied only where they do not."""
    flat = x.flatten(0, -2)
    return flat if flat.stride(-1) == 1 else flat.contiguous()
