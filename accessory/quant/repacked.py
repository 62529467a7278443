"""Weights in the order in which a CPU multiplies bf16 by them: for models that only answer.

Must not know what the layers mean. The order is our kernels' where there are some (`native.Packed`). Elsewhere it is
oneDNN's, for engines of several rows: it brings a plain weight into this order at every call, 28 ms for a step of 16
rows of a 110m model on two Zen 4 cores, 16 for what is kept so and 10 with our kernels; one row is faster as it was.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from accessory.model import Llama
from accessory.model.parallel import Linear
from accessory.native import GROUP, Packed, available

ROWS = 16  # how many rows oneDNN's order is made for; others are multiplied too


class Reordered(nn.Module):
    """(x [..., in], bias) -> x W^T + b, of a weight in oneDNN's order."""

    def __init__(self, *weights: Tensor) -> None:
        """weights: bf16 [out, in] each, one behind the other, on a CPU; they may be let go."""
        super().__init__()
        self.rows = sum(map(len, weights))
        self._packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat([w.detach() for w in weights]), ROWS)
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

    def __init__(self, whole: nn.Module, start: int, rows: int) -> None:
        super().__init__()
        self._whole, self._start, self._rows = [whole], start, rows  # in a list: it is the pack's

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self._whole[0](x)[..., self._start : self._start + self._rows]
        return y if bias is None else y + bias


def settle(model: Llama, *, rows: int) -> None:
    """Bring the weights of a model that will only answer into the form that is the fastest: repacked, else joined."""
    if not repack(model, rows=rows):
        model.fuse()


def repack(model: Llama, *, rows: int) -> bool:
    """Reorder all weights of a model that will only answer, `rows` at once, where that helps; whether it was done.

    On a CPU, in bf16. The plain weights are let go; what is quantised, or packed already, stays as it is.
    """
    make = _order(model.norm.weight, rows)
    if make is None:
        return False
    for group in _groups(model):
        if all(linear.storage is None for linear in group):
            whole = make(*(linear.weight for linear in group))
            for linear, start in _starts(group):
                _hand_over(linear, whole, start, group)
    if model.output.storage is None:
        model.output.store(make)
    return True


class Packer:
    """Packs the weights of a model as they arrive, so that none is there twice; `repack` does what is left."""

    def __init__(self, model: Llama) -> None:
        """model: on meta; its weights will come in bf16 to a CPU where the kernels are `available`."""
        self._model = model
        self._groups: dict[Linear, tuple[Linear, ...]] = {}
        self._wholes: dict[tuple[Linear, ...], Packed] = {}
        for group in _groups(model):
            if all(start % GROUP == 0 for _, start in _starts(group)):
                self._groups |= dict.fromkeys(group, group)

    def take(self, module: nn.Module, weight: Tensor) -> bool:
        """Whether this module's weight was packed, and may be let go."""
        if module is self._model.output:
            module.put(Packed(weight))
            return True
        if module not in self._groups:
            return False
        group = self._groups[module]
        if group not in self._wholes:
            self._wholes[group] = Packed.empty(sum(map(_outputs, group)), weight.shape[1])
        start = dict(_starts(group))[module]
        self._wholes[group].put(start, weight)
        _hand_over(module, self._wholes[group], start, group)
        return True


def _order(norm: Tensor, rows: int) -> type[nn.Module] | None:
    """What keeps the weights of a model with such a norm; None: they stay as they are."""
    if norm.device.type != "cpu" or norm.dtype != torch.bfloat16:
        return None
    if available():
        return Packed
    return Reordered if rows > 1 and torch.backends.mkldnn.is_available() else None


def _groups(model: Llama) -> Iterator[tuple[Linear, ...]]:
    """Linears that read one input, layer by layer."""
    for layer in model.layers:
        attention, ffn = layer.attention, layer.feed_forward
        yield from ((attention.wq, attention.wk, attention.wv), (ffn.w1, ffn.w3), (attention.wo,), (ffn.w2,))


def _starts(group: tuple[Linear, ...]) -> Iterator[tuple[Linear, int]]:
    """Each linear of a group, and its first output among all of theirs."""
    start = 0
    for linear in group:
        yield linear, start
        start += _outputs(linear)


def _outputs(linear: Linear) -> int:
    """Outputs of a linear on this rank."""
    return linear.cuts["weight"].local_shape[0]


def _hand_over(linear: Linear, whole: nn.Module, start: int, group: tuple[Linear, ...]) -> None:
    """Let a linear multiply by its rows of the group's weight."""
    linear.storage = whole if len(group) == 1 else Part(whole, start, _outputs(linear))
    linear.pack = whole if len(group) > 1 else None
    linear.weight = None


_NUMBERS = itertools.count()
_KEPT: weakref.WeakValueDictionary[int, Reordered] = weakref.WeakValueDictionary()


def _multiply(x: Tensor, bias: Tensor | None, number: int, rows: int) -> Tensor:
    """The product, by a number, as a compiler cannot hold a weight in this order."""
    return _KEPT[number].multiply(x, bias)


_opaque = torch.library.custom_op("accessory::multiply_repacked", _multiply, mutates_args=())
_opaque.register_fake(lambda x, bias, number, rows: x.new_empty(*x.shape[:-1], rows))
