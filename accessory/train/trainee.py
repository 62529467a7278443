"""The model as the training loop sees it: micro-batches in, losses out, gradients clipped over all ranks, pieces.

Must not know data, schedules, optimisers or files.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from accessory.checkpoint.boxes import Box, Piece
from accessory.dist import Cut, Ranks
from accessory.model import Llama, cuts_of
from accessory.train.joined import Joined
from accessory.train.masters import Copies, Masters, Shards
from accessory.train.parts import Parts
from accessory.train.remember import Checkpointing, keep_heap, remember

log = logging.getLogger(__name__)

BUCKET = 1 << 25  # elements that one broadcast carries
# fp16: the loss is multiplied by a power of two that halves at an overflow and doubles after so many good steps
FIRST_SCALE, GOOD_STEPS, LEAST_SCALE = 2.0**16, 2000, 1.0


def seed_step(seed: int, step: int, micro: int, dp_rank: int) -> None:
    """Seed torch's generators for one micro-batch: a function of these numbers, and equal on tensor-parallel ranks."""
    digest = hashlib.blake2b(f"{seed} {step} {micro} {dp_rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


class Trainee:
    """A model in training, sharded over the data-parallel ranks where there are several (collective calls, then)."""

    def __init__(
        self,
        model: Llama,
        parts: Parts,
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        zero: Literal[2, 3] = 2,
        offload: bool = False,
        checkpointing: Checkpointing = "none",
        compile: bool = False,
    ) -> None:
        """Take over a loaded model, on the host or on the device: trained tensors in fp32, frozen ones in `dtype`.

        dtype: of computation. zero, offload, checkpointing, compile: as in the settings.
        """
        self.parts, self.ranks, self.dtype = parts, ranks, dtype
        self.cuts = cuts_of(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in parts.names)
        names = [name for name, _ in model.named_parameters() if name in parts.names]
        self._frozen = [name for name, _ in model.named_parameters() if name not in parts.names]
        remember(model, checkpointing=checkpointing, compile=compile)
        if ranks.device.type == "cpu":
            keep_heap()
        sees = any(name.startswith("vision.") for name in names)
        self.module = Joined(model, blank=sees and ranks.dp_size > 1).train()
        if ranks.dp_size > 1:
            self._masters: Masters = Shards(self.module, names, ranks=ranks, dtype=dtype, zero=zero, offload=offload)
        else:
            self._masters = Copies(self.module, names, device=ranks.device, dtype=dtype, offload=offload)
        self._scale = FIRST_SCALE if dtype == torch.float16 else 1.0
        self._good = 0
        self.skipped = 0
        """Steps without an update because fp16 gradients overflowed."""

    @property
    def masters(self) -> dict[str, Tensor]:
        """Canonical name -> fp32 leaf that the optimiser updates: this rank's part."""
        return self._masters.leaves

    def forward_backward(self, batch: Mapping[str, Tensor | None], *, scale: float, last: bool) -> Tensor:
        """The sum of the losses of one micro-batch, detached, on the device.

        batch: `Joined.forward`'s arguments. Gradients of loss sum * scale accumulate in fp32, over micro-batches and
        data-parallel ranks; last: of the step.
        """
        total, _ = self.module(**batch)
        self._masters.begin(last=last)
        if total.requires_grad:  # text teaches nothing to what only pictures reach
            (total * (scale * self.ranks.dp_size * self._scale)).backward()  # the ranks' gradients will be averaged
        return total.detach()

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to this norm (0: never) and return their norm before, fp32, equal on every rank.

        It is taken over all elements of the model, each counted once. In fp16 an overflow lowers the loss scale and
        drops the gradients, so that the optimiser passes over the step; the norm is then 0. At the lowest scale it is
        returned as it is.
        """
        self._masters.collect()
        self._level()
        norm = self._norm() / self._scale
        factor = torch.ones_like(norm)
        if max_norm > 0:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if self.dtype == torch.float16:
            if not bool(torch.isfinite(norm)) and self._scale > LEAST_SCALE:
                return self._skip(norm)
            self._good += 1
        factor /= self._scale
        if factor.is_cuda or factor != 1.0:  # asking a GPU would wait for it
            grads = [leaf.grad for leaf in self.masters.values() if leaf.numel()]
            torch._foreach_mul_(grads, factor.to(grads[0].device))
        return norm.float()

    def count_hits(self) -> None:
        """From here on, count the targets that the model itself would have said; those before are forgotten."""
        self.module.llama.output.hits = torch.zeros((), device=self.ranks.device)

    def take_hits(self) -> Tensor | None:
        """How many there were since, of this data-parallel rank, fp32 on the device; None where nobody counts them."""
        counted = self.module.llama.output.hits
        if counted is not None:
            self.count_hits()
        return counted

    def updated(self) -> None:
        """After the optimiser's step: the model computes with the new weights, gradients are cleared."""
        self._masters.follow()
        if self.dtype == torch.float16 and self._good >= GOOD_STEPS:
            self._scale, self._good = self._scale * 2, 0

    @contextlib.contextmanager
    def judging(self) -> Iterator[Llama]:
        """The model for validation: `loss` and generation, without gradients, all data-parallel ranks in lockstep.

        At zero 3 blocks are gathered while they run; a model with a zero-init adapter is gathered whole.
        """
        self.module.eval()
        with torch.no_grad():
            self._masters.gather(whole=self.module.llama.prompt is not None)
        try:
            yield self.module.llama
        finally:
            self._masters.scatter()
            self.module.train()

    @torch.no_grad()
    def loss(self, batch: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """(loss sum, targets) of a micro-batch, inside `judging`."""
        return self.module(**batch)

    def pieces(self) -> dict[str, Piece]:
        """Every trained tensor: this rank's part of the fp32 masters, views of them."""
        return {name: self.piece(name, leaf.detach()) for name, leaf in self.masters.items()}

    def frozen_pieces(self) -> dict[str, Piece]:
        """The rest of the state dict, without quantised storage."""
        return {name: self.piece(name, self._masters.local(name)) for name in self._frozen}

    def piece(self, name: str, local: Tensor) -> Piece:
        """A tensor that lies as the parameter of this name does (a master, its moments), as a box of the whole one."""
        cut, ranks = self.cuts[name], self.ranks
        box, mine = Box.of(cut), _counts(cut, ranks.shard.rank)
        if name in self._masters.dealt:
            rows = cut.local_shape[0]
            chunk = -(-rows // ranks.dp_size)  # as torch.chunk deals rows
            start = min(ranks.dp_rank * chunk, rows)
            assert len(local) == min(chunk, rows - start), (name, local.shape, cut.local_shape, ranks.dp_rank)
            box = box.rows(start, start + len(local))
        else:
            mine = mine and ranks.dp_rank == 0
        view = local[tuple(slice(0, size) for size in box.size)]
        return Piece(box, view, mine and box.numel > 0)

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write tensors, each of its piece's box, into the masters."""
        pieces = self.pieces()
        for name, tensor in tensors:
            pieces[name].tensor.copy_(tensor)
        self.refresh()

    def refresh(self) -> None:
        """After masters were written: the model computes with them."""
        self._masters.scatter()
        self._masters.follow()

    def state(self) -> dict[str, float]:
        """What a resumed run needs besides tensors: the loss scale of fp16."""
        return {"scale": self._scale, "good": self._good, "skipped": self.skipped}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take up what `state` gave."""
        self._scale, self._good, self.skipped = float(state["scale"]), int(state["good"]), int(state["skipped"])

    def _norm(self) -> Tensor:
        """The norm of all gradients over all ranks, fp64 on the device; no wait for it."""
        ranks = self.ranks
        counted = [leaf.grad for name, leaf in self.masters.items() if self._counts_here(name, leaf)]
        square = torch.nn.utils.get_total_norm(counted).to(ranks.device).double().square()
        if ranks.shard.size > 1:
            torch.distributed.all_reduce(square, group=ranks.tp_group)
        if ranks.dp_size > 1:
            torch.distributed.all_reduce(square, group=ranks.dp_group)
        return square.sqrt()

    def _counts_here(self, name: str, leaf: Tensor) -> bool:
        """Whether this tensor-parallel rank's part enters the norm."""
        return leaf.numel() > 0 and _counts(self.cuts[name], self.ranks.shard.rank)

    def _level(self) -> None:
        """Give every tensor-parallel rank the same gradients of what all of them hold.

        They are equal in exact arithmetic, and the first rank's are taken, since kernels whose sums come in any order
        must not let weights drift apart. Those of a vision part whose tiles the ranks have shared are summed.
        """
        ranks = self.ranks
        if ranks.shard.size == 1:
            return
        vision = getattr(self.module.llama, "vision", None)
        partial = frozenset() if vision is None else {f"vision.{name}" for name in vision.partial}
        held = {name: leaf.grad for name, leaf in self.masters.items() if self.cuts[name].dim is None and leaf.numel()}
        source = ranks.rank - ranks.shard.rank
        for summed in (False, True):
            for bucket in _buckets(grad for name, grad in held.items() if (name in partial) == summed):
                flat = torch.cat([grad.flatten() for grad in bucket]).to(ranks.device)
                if summed:
                    torch.distributed.all_reduce(flat, group=ranks.tp_group)
                else:
                    torch.distributed.broadcast(flat, source, group=ranks.tp_group)
                for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                    grad.copy_(part.view_as(grad))

    def _skip(self, norm: Tensor) -> Tensor:
        """Drop an overflown step."""
        for leaf in self.masters.values():
            leaf.grad = None
        self._scale, self._good = max(LEAST_SCALE, self._scale / 2), 0
        self.skipped += 1
        log.info("fp16 gradients overflowed: step skipped (%d so far), loss scale %g", self.skipped, self._scale)
        return torch.zeros_like(norm, dtype=torch.float32)


def _counts(cut: Cut, rank: int) -> bool:
    """Whether this tensor-parallel rank is the first that holds its slice."""
    return rank == 0 if cut.dim is None else rank % cut.replicas == 0


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors that fill a bucket."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(held.numel() for held in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
