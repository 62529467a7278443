"""Tensor-parallel layers on fairscale's groups and mappings: the Linear seam, embeddings, and which slice a rank holds.

Must not know attention, text, files or devices; rank and size are arguments, so one process can build any rank.

`Linear.forward(x) = leave(matmul(enter(x)))`. Tensor parallelism owns `enter` and `leave`; PEFT adds to `matmul`'s
result, inside the reduction; quantisation replaces storage and `product` only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn

from accessory.dist import Cut, Shard


def cut_units(shape: tuple[int, ...], dim: int, shard: Shard, *, units: int) -> Cut:
    """The slice of `shape` along `dim` when its `units` equal parts (heads, columns) are dealt to the ranks.

    Where tp exceeds the units, neighbouring ranks hold the same one. ValueError when neither divides the other.
    """
    size = shape[dim] // units
    if units % shard.size == 0:
        each = units // shard.size * size
        return Cut(shape, dim, shard.rank * each, (shard.rank + 1) * each)
    if shard.size % units == 0:
        replicas = shard.size // units
        start = shard.rank // replicas * size
        return Cut(shape, dim, start, start + size, replicas=replicas)
    raise ValueError(
        f"tp: got {shard.size}, expected a divisor or a multiple of {units}; choose another number of ranks"
    )


def cut_vocabulary(shape: tuple[int, ...], shard: Shard) -> Cut:
    """The slice of a (vocabulary, dim) tensor along dim 0, padded to equal rows on every rank."""
    rows = -(-shape[0] // shard.size)
    start, stop = min(shard.rank * rows, shape[0]), min((shard.rank + 1) * rows, shape[0])
    return Cut(shape, 0, start, stop, pad=rows - (stop - start))


_ONEDNN = torch.backends.mkldnn.is_available()


class Linear(nn.Module):
    """y = leave(matmul(enter(x))): the seam at which tensor parallelism, PEFT and quantisation meet.

    `cuts` says which slice of each of its tensors this rank holds. `adapter` (PEFT) adds to the local product,
    (linear, x, y) -> y';
    `storage` (quantisation) is a module that holds the weight in its own way and multiplies, (x, bias) -> y;
    `pack` is the joined storage of several linears that read the same input (see `pack`), or a module, x -> all y.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    bias_inside = True  # whether the bias belongs to the local product

    def __init__(self, cut: Cut, shard: Shard, *, bias: bool, device: torch.device | str, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.shard = shard
        self.cuts: dict[str, Cut] = {}
        self.adapter: Callable[[Linear, Tensor, Tensor], Tensor] | None = None
        self.storage: nn.Module | None = None
        self.pack: Tensor | nn.Module | None = None
        self.add_tensor("weight", cut, device=device, dtype=dtype)
        self.register_parameter("bias", None)
        if bias:
            self.add_bias(device=device, dtype=dtype)

    def add_tensor(self, name: str, cut: Cut, *, device: torch.device | str, dtype: torch.dtype) -> None:
        """Register an uninitialised parameter that holds this rank's slice."""
        self._parameters.pop(name, None)
        self.register_parameter(name, nn.Parameter(torch.empty(cut.local_shape, device=device, dtype=dtype)))
        self.cuts[name] = cut

    def add_bias(self, *, device: torch.device | str, dtype: torch.dtype) -> None:
        """Register a bias as this layer cuts it."""
        self.add_tensor("bias", self.bias_cut(), device=device, dtype=dtype)

    def bias_cut(self) -> Cut:
        """The slice of the bias that goes with this rank's weight."""
        cut = self.cuts["weight"]
        return Cut(cut.shape[:1], 0, cut.start, cut.stop, cut.pad, cut.replicas)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.matmul(self.enter(x)))

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, y: Tensor) -> Tensor:
        return y

    def matmul(self, x: Tensor) -> Tensor:
        return self.adapt(self.product(x), x)

    def product(self, x: Tensor) -> Tensor:
        """The frozen or trained base: x W^T, with the bias where it is local."""
        bias = own(self.bias, self.cuts["bias"], self.shard) if self.bias is not None and self.bias_inside else None
        if self.storage is not None:
            return self.storage(x, bias)
        return multiply(x, own(self.weight, self.cuts["weight"], self.shard), bias)

    def adapt(self, y: Tensor, x: Tensor) -> Tensor:
        """Add what PEFT learned, if anything is attached."""
        return y if self.adapter is None else self.adapter(self, x, y)

    def extra_repr(self) -> str:
        full = self.cuts["weight"].shape
        return f"{full[1]} -> {full[0]}, rank {self.shard.rank} of {self.shard.size}"


class Column(Linear, ColumnParallelLinear):
    """Rows of the weight (dim 0) dealt to the ranks; the output stays local. `units` are what must not be torn."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        shard: Shard,
        units: int | None = None,
        bias: bool = False,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        cut = cut_units((d_out, d_in), 0, shard, units=units or d_out)
        Linear.__init__(self, cut, shard, bias=bias, device=device, dtype=dtype)

    def enter(self, x: Tensor) -> Tensor:
        return enter_region(x, self.shard)


class Row(Linear, RowParallelLinear):
    """Columns of the weight (dim 1) dealt to the ranks; the input is local, the output is summed, then biased."""

    bias_inside = False

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        shard: Shard,
        bias: bool = False,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        cut = cut_units((d_out, d_in), 1, shard, units=d_in)
        Linear.__init__(self, cut, shard, bias=bias, device=device, dtype=dtype)

    def bias_cut(self) -> Cut:
        return Cut(self.cuts["weight"].shape[:1])

    def leave(self, y: Tensor) -> Tensor:
        y = reduce_from_model_parallel_region(y) if self.shard.size > 1 else y
        return y if self.bias is None else y + self.bias


class Embedding(ParallelEmbedding):
    """Meta's: every rank holds `dim / tp` columns of each row, gathered after the lookup."""

    def __init__(
        self, vocab_size: int, dim: int, *, shard: Shard, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.shard = shard
        cut = cut_units((vocab_size, dim), 1, shard, units=dim)
        self.cuts = {"weight": cut}
        self.weight = nn.Parameter(torch.empty(cut.local_shape, device=device, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight)
        return rows if self.shard.size == 1 else gather_from_model_parallel_region(rows)


class TiedEmbedding(VocabParallelEmbedding):
    """Cut as the head is, on the vocabulary, so that both can read one weight."""

    def __init__(
        self, vocab_size: int, dim: int, *, shard: Shard, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.shard = shard
        cut = cut_vocabulary((vocab_size, dim), shard)
        self.cuts = {"weight": cut}
        self.weight = nn.Parameter(torch.empty(cut.local_shape, device=device, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        if self.shard.size == 1:
            return F.embedding(ids, self.weight)
        cut = self.cuts["weight"]
        elsewhere = (ids < cut.start) | (ids >= cut.stop)
        rows = F.embedding((ids - cut.start).masked_fill(elsewhere, 0), self.weight)
        return reduce_from_model_parallel_region(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0))


def enter_region(x: Tensor, shard: Shard) -> Tensor:
    """Use a replicated tensor in a sharded region: identity forward, gradients summed over the ranks backward.

    Replicated *parameters* that are used there (LoRA's `a` of a Column, `b` of a Row) must pass here too.
    """
    return copy_to_model_parallel_region(x) if shard.size > 1 else x


def own(weight: Tensor, cut: Cut, shard: Shard) -> Tensor:
    """A slice that several ranks hold, made to receive the gradient of all of them; any other as it is."""
    if cut.replicas == 1 or not (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    return _SumOverReplicas.apply(weight, cut, shard)


class _SumOverReplicas(torch.autograd.Function):
    """Identity forward; backward sums the gradient over the ranks that hold the same slice."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, cut: Cut, shard: Shard) -> Tensor:
        ctx.place = (shard.rank // cut.replicas, shard.size // cut.replicas)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        # all slots in one reduction over the tp group: the slices are small (kv heads), and no further group is needed
        mine, slots = ctx.place
        everyone = grad.new_zeros((slots, *grad.shape))
        everyone[mine] = grad
        return reduce_from_model_parallel_region(everyone)[mine], None, None


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. One bf16 row on a CPU goes to torch's own matrix-vector kernel, which reads memory faster there.

    Measured on two Zen 4 cores, weights from memory: 34.3 GB/s, against 31.4 through oneDNN, of 35.4 that a sum reads.
    """
    one_row = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() == x.shape[-1]
    if not one_row or not _ONEDNN or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return (_opaque if torch.compiler.is_compiling() else _multiply_row)(x, weight, bias)


def _multiply_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product by torch's own kernel."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return F.linear(x, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(enabled)


# an operator of its own, which a compiler calls as it is
_opaque = torch.library.custom_op("accessory::multiply_row", _multiply_row, mutates_args=())
_opaque.register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)))


def pack(linears: Sequence[Linear]) -> None:
    """Move the weights of linears that read one input into one buffer; each weight becomes a view of its rows.

    For inference: `together` then multiplies once. Keys, shapes and values stay as they were.
    """
    joined = torch.cat([linear.weight.detach() for linear in linears])
    start = 0
    for linear in linears:
        rows = linear.weight.shape[0]
        linear.weight = nn.Parameter(joined[start : start + rows], requires_grad=False)
        linear.pack = joined
        start += rows


def together(x: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
    """The local outputs of Column linears that read the same `x`: one `enter`, and one product where packed."""
    x = linears[0].enter(x)
    joined = linears[0].pack
    if isinstance(joined, nn.Module):
        return _split(joined(x), x, linears)
    if joined is None or torch.is_grad_enabled() or any(linear.storage is not None for linear in linears):
        return [linear.matmul(x) for linear in linears]
    if not torch.compiler.is_compiling():  # which knows no addresses
        ends = (linears[0].weight.data_ptr() - joined.data_ptr(), linears[-1].weight.untyped_storage().data_ptr())
        assert ends == (0, joined.untyped_storage().data_ptr()), "a packed weight was replaced: write into it instead"
    return _split(multiply(x, joined), x, linears)


def _split(y: Tensor, x: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
    """Each linear's part of a joined product, with its bias and what PEFT adds."""
    parts = y.split([linear.cuts["weight"].local_shape[0] for linear in linears], dim=-1)
    biased = [part if lin.bias is None else part + lin.bias for part, lin in zip(parts, linears, strict=True)]
    return [linear.adapt(part, x) for part, linear in zip(biased, linears, strict=True)]
