"""Weights in the order in which a CPU multiplies a few rows of bf16 by them: for engines that answer many at once.

Must not know what the layers mean. oneDNN brings a plain weight into this order at every call: 41 ms for a step of 16
rows of a 110m model on two Zen 4 cores, 18 for what is kept so (one row is faster as it was: see `multiply`).
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor, nn

from accessory.model import Llama
from accessory.model.parallel import Linear

ROWS = 16  # how many rows the order is made for; others are multiplied too


class Repacked(nn.Module):
    """(x [..., in], bias) -> x W^T + b, of a weight that only this multiplies."""

    def __init__(self, weight: Tensor) -> None:
        """weight: bf16 [out, in] on a CPU; it may be let go."""
        super().__init__()
        self.rows = len(weight)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self._number = next(_NUMBERS)
        _KEPT[self._number] = self

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return _opaque(x, bias, self._number, self.rows)
        return self.multiply(x, bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product itself."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")


class Part(nn.Module):
    """Some rows of a weight that several linears share, for whoever wants one of them alone."""

    def __init__(self, whole: Repacked, start: int, rows: int) -> None:
        super().__init__()
        self._whole, self._start, self._rows = [whole], start, rows  # in a list: it is the pack's

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self._whole[0](x)[..., self._start : self._start + self._rows]
        return y if bias is None else y + bias


def repack(model: Llama) -> bool:
    """Reorder all weights of a model that will only answer, where that helps; whether it was done.

    On a CPU, in bf16, with oneDNN. The plain weights are let go; what is quantised stays as it is.
    """
    norm = model.norm.weight
    if norm.device.type != "cpu" or norm.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    for layer in model.layers:
        attention, ffn = layer.attention, layer.feed_forward
        for group in ((attention.wq, attention.wk, attention.wv), (ffn.w1, ffn.w3), (attention.wo,), (ffn.w2,)):
            if all(linear.storage is None for linear in group):
                _repack(group)
    model.output.store(Repacked)
    return True


def _repack(group: tuple[Linear, ...]) -> None:
    """Give linears that read one input one weight."""
    whole = Repacked(torch.cat([linear.weight.detach() for linear in group]))
    start = 0
    for linear in group:
        rows = len(linear.weight)
        linear.storage = whole if len(group) == 1 else Part(whole, start, rows)
        linear.pack = whole if len(group) > 1 else None
        linear.weight = None
        start += rows


_NUMBERS = itertools.count()
_KEPT: weakref.WeakValueDictionary[int, Repacked] = weakref.WeakValueDictionary()


def _multiply(x: Tensor, bias: Tensor | None, number: int, rows: int) -> Tensor:
    """The product, by a number, as a compiler cannot hold a weight in this order."""
    return _KEPT[number].multiply(x, bias)


_opaque = torch.library.custom_op("accessory::multiply_repacked", _multiply, mutates_args=())
_opaque.register_fake(lambda x, bias, number, rows: x.new_empty(*x.shape[:-1], rows))
