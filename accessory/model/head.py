"""The output head: hidden states to logits, or straight to the loss, over a vocabulary that the ranks share.

Must not know what the ids mean. The weight is read only inside this module's forward, as FSDP2 requires.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region, reduce_from_model_parallel_region
from torch import Tensor, nn

from accessory.dist import Cut, Shard
from accessory.model.parallel import TiedEmbedding, cut_vocabulary, enter_region, multiply

IGNORED = -100
CHUNK = 1 << 26  # logits that exist at once, on one rank
PIECE = 1 << 21  # of these, how many a CPU widens to fp32 at a time, so that they stay in its caches
STRIDE = 64  # a CPU's library keeps a kernel for every number of rows that it met: targets come in multiples of this


class Head(nn.Module):
    """logits = h W^T, W (vocabulary, dim) cut on the vocabulary and padded to equal rows; tied: the embedding's W."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        shard: Shard,
        tied: TiedEmbedding | None,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.vocab_size, self.shard = vocab_size, shard
        self.slice = cut_vocabulary((vocab_size, dim), shard)
        self.cuts: dict[str, Cut] = {}
        self.hits: Tensor | None = None
        """Where it is a number: targets that the model itself would have said (ties count) are added to it."""
        self.storage: nn.Module | None = None
        self._tied = [] if tied is None else [tied]  # in a list: the weight is registered, and saved, once
        if tied is None:
            self.cuts["weight"] = self.slice
            self.weight = nn.Parameter(torch.empty(self.slice.local_shape, device=device, dtype=dtype))

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """hidden [..., dim] -> logits [..., vocab_size] in fp32, the same on every rank.

        With labels [...] (targets of these very positions, -100 ignored): (sum of the losses, number of targets),
        both fp32 scalars; at most CHUNK logits exist at a time, and never those of the whole vocabulary on one rank.
        """
        hidden = enter_region(hidden, self.shard)
        if self.storage is not None:
            assert labels is None, "a head that only answers has no loss"
            return self._whole(self.storage(hidden))
        weight = self._tied[0].weight if self._tied else self.weight
        if labels is not None:
            return self._loss(hidden.flatten(0, -2), weight, labels.flatten())
        return self._whole(multiply(hidden, weight))

    def store(self, make: Callable[[Tensor], nn.Module]) -> None:
        """Let a module hold the weight in its own way, hidden -> local logits, for inference; a tied one is copied."""
        self.put(make((self._tied[0].weight if self._tied else self.weight).detach()))

    def put(self, storage: nn.Module) -> None:
        """Let this module hold the weight."""
        self.storage = storage
        if not self._tied:
            self.weight = None

    def _whole(self, logits: Tensor) -> Tensor:
        """All ranks' logits, without the padding."""
        if self.shard.size > 1:
            logits = gather_from_model_parallel_region(logits)
        return logits[..., : self.vocab_size].float()

    def _loss(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The chunked, vocabulary-parallel cross-entropy of flat tokens; labels out of range are the caller's bug."""
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        valid = labels != IGNORED
        if labels.device.type == "cpu" and not valid.all():  # where looking costs no wait, only targets are multiplied
            places = valid.nonzero().flatten()
            spare = min(-len(places) % STRIDE, len(labels) - len(places))
            places = torch.cat([places, (~valid).nonzero().flatten()[:spare]])
            hidden, labels = hidden[places], labels[places]
        total = _ChunkedLoss.apply(hidden, weight, labels, self.slice, self.shard, self.hits)
        return total, valid.sum().float()


class _ChunkedLoss(torch.autograd.Function):
    """Sum of -log softmax(h W^T)[label]; the gradients are computed along with it, while a chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        cut: Cut,
        shard: Shard,
        hits: Tensor | None,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        rows = max(1, min(len(hidden), CHUNK // len(weight)))
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        total = torch.zeros((), device=hidden.device)
        logits = hidden.new_empty(rows, len(weight))  # of every chunk in turn, then their gradient
        for start in range(0, len(hidden), rows):
            h, target = hidden[start : start + rows], labels[start : start + rows]
            chunk = torch.mm(h, weight.t(), out=logits[: len(h)])
            total += _turn(chunk, target, cut, shard, grad=need_hidden or need_weight, hits=hits)
            if need_hidden:
                torch.mm(chunk, weight, out=grad_hidden[start : start + rows])
            if need_weight:
                grad_weight = _add(grad_weight, chunk.t() @ h, last=start + rows >= len(hidden))
        if need_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        ctx.save_for_backward(grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        # in place: they are used once, and autograd refuses a second backward pass over what has changed
        scaled = [None if saved is None else saved.mul_(grad.to(saved.dtype)) for saved in ctx.saved_tensors]
        return (*scaled, None, None, None, None)


def _turn(logits: Tensor, target: Tensor, cut: Cut, shard: Shard, *, grad: bool, hits: Tensor | None = None) -> Tensor:
    """Loss sum of one chunk; on request its local logits [chunk, local vocabulary] become their own gradient."""
    one = shard.size == 1 and logits.device.type == "cpu"
    rows = max(1, min(len(logits), PIECE // logits.shape[1])) if one else len(logits)
    wide = None if logits.dtype == torch.float32 else torch.empty_like(logits[:rows], dtype=torch.float32)
    losses = []
    for part, labels in zip(logits.split(rows), target.split(rows), strict=True):
        widened = part if wide is None else wide[: len(part)].copy_(part)
        losses.append(_losses(widened, labels, cut, shard, grad=grad, hits=hits).sum())
        if grad and wide is not None:
            part.copy_(widened)
    return torch.stack(losses).sum()


def _losses(
    logits: Tensor, target: Tensor, cut: Cut, shard: Shard, *, grad: bool, hits: Tensor | None = None
) -> Tensor:
    """The loss of each row, 0 where it has no target; fp32 logits become softmax - one_hot(target) there, else 0."""
    if cut.pad:
        logits[:, cut.stop - cut.start :] = float("-inf")
    top = logits.amax(-1)
    if shard.size > 1:
        torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group=get_model_parallel_group())
    shifted = logits.sub_(top[:, None])
    here = (target >= cut.start) & (target < cut.stop)
    column = (target - cut.start).masked_fill(~here, 0)[:, None]
    chosen = shifted.gather(1, column)[:, 0].masked_fill(~here, 0.0)
    exps = shifted.exp_()
    sums = torch.stack((exps.sum(-1), chosen))
    if shard.size > 1:
        sums = reduce_from_model_parallel_region(sums)
    valid = target != IGNORED
    if hits is not None:
        hits += ((sums[1] == 0) & valid).sum()  # the largest logit is 0 by now
    if grad:
        exps.mul_((valid / sums[0])[:, None]).scatter_add_(1, column, -here.to(exps.dtype)[:, None])
    return (sums[0].log() - sums[1]).masked_fill(~valid, 0.0)


def _add(total: Tensor | None, part: Tensor, *, last: bool) -> Tensor:
    """The sum of chunks' gradients in fp32; a lone chunk's as it is."""
    if total is None:
        return part if last else part.float()
    for into, rows in zip(total.split(4096), part.split(4096), strict=True):  # widened in pieces
        into.add_(rows)
    return total
