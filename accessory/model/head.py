"""The output head: hidden states to logits, or straight to the loss, over a vocabulary that the ranks share.

Must not know what the ids mean. The weight is read only inside this module's forward, as FSDP2 requires.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region, reduce_from_model_parallel_region
from torch import Tensor, nn

from accessory.dist import Cut, Shard
from accessory.model.parallel import TiedEmbedding, cut_vocabulary, enter_region, multiply

IGNORED = -100
CHUNK = 1024  # tokens whose logits exist at once


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
        self._tied = [] if tied is None else [tied]  # in a list: the weight is registered, and saved, once
        if tied is None:
            self.cuts["weight"] = self.slice
            self.weight = nn.Parameter(torch.empty(self.slice.local_shape, device=device, dtype=dtype))

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """hidden [..., dim] -> logits [..., vocab_size] in fp32, the same on every rank.

        With labels [...] (targets of these very positions, -100 ignored): (sum of the losses, number of targets),
        both fp32 scalars; logits exist for CHUNK tokens at a time, and never for the whole vocabulary on one rank.
        """
        weight = self._tied[0].weight if self._tied else self.weight
        hidden = enter_region(hidden, self.shard)
        if labels is not None:
            return self._loss(hidden.flatten(0, -2), weight, labels.flatten())
        logits = multiply(hidden, weight)
        if self.shard.size > 1:
            logits = gather_from_model_parallel_region(logits)
        return logits[..., : self.vocab_size].float()

    def _loss(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The chunked, vocabulary-parallel cross-entropy of flat tokens; labels out of range are the caller's bug."""
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        total = _ChunkedLoss.apply(hidden, weight, labels, self.slice, self.shard)
        return total, (labels != IGNORED).sum().float()


class _ChunkedLoss(torch.autograd.Function):
    """Sum of -log softmax(h W^T)[label]; the gradients are computed along with it, while a chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor, labels: Tensor, cut: Cut, shard: Shard
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            h, target = hidden[start : start + CHUNK], labels[start : start + CHUNK]
            loss, grad = _chunk(h, weight, target, cut, shard, grad=need_hidden or need_weight)
            total += loss
            if need_hidden:
                grad_hidden[start : start + CHUNK] = grad @ weight
            if need_weight:
                grad_weight += (grad.T @ h).float()
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors]
        return (*scaled, None, None, None)


def _chunk(
    h: Tensor, weight: Tensor, target: Tensor, cut: Cut, shard: Shard, *, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss sum of one chunk and, on request, its gradient by the local logits [chunk, local vocabulary]."""
    shifted = F.linear(h, weight).float()
    if cut.pad:
        shifted[:, cut.stop - cut.start :] = float("-inf")
    top = shifted.detach().amax(-1)
    if shard.size > 1:
        torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group=get_model_parallel_group())
    shifted -= top[:, None]
    here = (target >= cut.start) & (target < cut.stop)
    column = (target - cut.start).masked_fill(~here, 0)[:, None]
    chosen = shifted.gather(1, column)[:, 0].masked_fill(~here, 0.0)
    exps = shifted.exp_()
    sums = torch.stack((exps.sum(-1), chosen))
    if shard.size > 1:
        sums = reduce_from_model_parallel_region(sums)
    valid = target != IGNORED
    loss = (sums[0].log() - sums[1]).masked_fill(~valid, 0.0).sum()
    if not grad:
        return loss, None
    exps /= sums[0][:, None]
    exps.scatter_add_(1, column, -here.to(exps.dtype)[:, None])
    return loss, exps.masked_fill_(~valid[:, None], 0.0).to(h.dtype)
