"""The loop: micro-batches forward and backward, one agreement, one update, what is due after it; the same on all ranks.

Must not know files, templates or which parameters there are; a step is a function of the state before it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from accessory.checkpoint.files import few
from accessory.data.feed import Batch
from accessory.dist import Ranks
from accessory.train.agree import gather, total
from accessory.train.evaluate import is_memory
from accessory.train.trainee import Trainee, seed_step

log = logging.getLogger(__name__)


@dataclass
class Pace:
    """When what is due, in steps and minutes; 0 or None: never."""

    total: int
    first: int = 0
    """Steps that were done before."""
    eval_every: int | None = None
    save_every: int = 0
    save_minutes: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    accuracy: bool = False
    """Whether the trainee counts the targets that it would have said itself."""
    unjudged: bool = False
    """Whether the validation that is due at step `first` was left to this run, by one that a signal ended."""


@dataclass
class Stepped:
    """What one step brought; tensors are on the device and may not be computed yet."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    targets: int
    tokens: int
    pictures: int = 0
    unread: int = 0
    """Rows of which nothing was learned, since their picture cannot be read."""
    accuracy: Tensor | None = None
    """Share of the targets that the model itself would have said; None where nobody counts them."""


@dataclass
class _Verdict:
    """Whether a step's numbers were numbers: known at once on a CPU, a step later on a GPU, which nobody waits for."""

    step: int
    batches: list[Batch]
    losses: list[Tensor]
    norm: Tensor
    arrived: torch.cuda.Event | None = None


@dataclass
class Loop:
    """Runs steps to the end, or to the end of the one in which a signal came; all ranks call back at the same steps."""

    trainee: Trainee
    optimizer: torch.optim.Optimizer
    feed: Iterator[list[Batch]]
    ranks: Ranks
    pace: Pace
    lr: Callable[[int], float]
    """Factor of every group's peak learning rate at a step (0 is the first)."""
    on_step: Callable[[Stepped, float], None]
    on_eval: Callable[[int], None]
    on_save: Callable[[int], None]
    stopped: Callable[[], bool] = lambda: False
    late: bool = field(init=False)
    """Whether a step is judged after the next one was begun."""
    _open: _Verdict | None = None
    _peaks: list[float] = field(default_factory=list)
    _saved: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # masters on the host: AdamW there would read `found_inf` before its copy from the GPU has arrived
        away = any(parameter.is_cpu for group in self.optimizer.param_groups for parameter in group["params"])
        self.late = self.ranks.device.type == "cuda" and isinstance(self.optimizer, torch.optim.AdamW) and not away

    def run(self) -> tuple[int, bool]:
        """The last finished step, and whether a signal ended the run before its last one."""
        group, pace = self.ranks.host_group, self.pace
        self._peaks = [entry.setdefault("peak_lr", entry["lr"]) for entry in self.optimizer.param_groups]
        step, steps = pace.first, iter(self.feed)
        if pace.unjudged and self._is_judged(step):
            self.on_eval(step)
        while step < pace.total:
            batches = next(steps)
            wants_save = pace.save_minutes > 0 and time.monotonic() - self._saved >= 60 * pace.save_minutes
            targets, tokens, pictures, unread, stop, due = total(
                [
                    *(_counts(batches) if self.ranks.leader else (0, 0, 0, 0)),
                    self.stopped(),
                    wants_save and self.ranks.rank == 0,
                ],
                group,
            )
            with _advice(step + 1):
                stepped = self.step(step, batches, int(targets), int(tokens))
            step += 1
            self.on_step(replace(stepped, pictures=int(pictures), unread=int(unread)), self.lr(step - 1))
            if stop and step < pace.total:  # before a validation, which may take longer than whoever stops us waits
                self._save(step)
                return step, True
            if self._is_judged(step):
                self.settle()  # the best model so far is saved there
                self.on_eval(step)
            if due or (pace.save_every and step % pace.save_every == 0 and step < pace.total):
                self._save(step)
        self.settle()
        return step, False

    def step(self, step: int, batches: list[Batch], targets: int, tokens: int) -> Stepped:
        """One update from the micro-batches of this rank; `targets` and `tokens` are those of all ranks.

        Raises ValueError on every rank, before any weight changed, when loss or gradient is no number.
        """
        losses = []
        for micro, batch in enumerate(batches):
            seed_step(self.pace.seed, step, micro, self.ranks.dp_rank)
            losses.append(
                self.trainee.forward_backward(
                    batch.tensors(self.ranks.device), scale=1.0 / max(1, targets), last=micro == len(batches) - 1
                )
            )
        norm = self.trainee.clip(self.pace.max_grad_norm)
        loss, accuracy = self._means(losses, targets)
        self._judge(_Verdict(step, batches, losses, norm))
        factor = self.lr(step)
        for entry, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            entry["lr"] = peak * factor
        self.optimizer.step()
        self.trainee.updated()
        return Stepped(step + 1, loss, norm, targets, tokens, accuracy=accuracy)

    def _is_judged(self, step: int) -> bool:
        """Whether validation is due after a step."""
        every = self.pace.eval_every
        return bool(every) and (step % every == 0 or step == self.pace.total)

    def _means(self, losses: list[Tensor], targets: int) -> tuple[Tensor, Tensor | None]:
        """Loss and accuracy per target over all data-parallel ranks."""
        hits = self.trainee.take_hits() if self.pace.accuracy else None
        sums = torch.stack([torch.stack(losses).sum(), *([] if hits is None else [hits])])
        if self.ranks.dp_size > 1:
            torch.distributed.all_reduce(sums, group=self.ranks.dp_group)
        sums /= max(1, targets)
        return sums[0], None if hits is None else sums[1]

    def _judge(self, verdict: _Verdict) -> None:
        """Stop before an update by what is no number. Every rank sees the same norm, in which a NaN of any spreads.

        Fused AdamW on a GPU passes over the update by itself where `found_inf` says so; the step before is judged here,
        whose norm has arrived meanwhile.
        """
        if not self.late:
            self._check(verdict)
            return
        self.optimizer.found_inf = (~torch.isfinite(verdict.norm)).float()
        if verdict.norm.is_cuda:
            copy = torch.empty((), dtype=verdict.norm.dtype, pin_memory=True)
            verdict.norm = copy.copy_(verdict.norm, non_blocking=True)
            verdict.arrived = torch.cuda.Event()
            verdict.arrived.record()
        self.settle()
        self._open = verdict

    def settle(self) -> None:
        """Wait for the verdict that is not yet known, if there is one. Raises ValueError as `step` does."""
        verdict, self._open = self._open, None
        if verdict is None:
            return
        if verdict.arrived is not None:
            verdict.arrived.synchronize()
        self._check(verdict)

    def _check(self, verdict: _Verdict) -> None:
        """Raise on all ranks, or on none."""
        if bool(torch.isfinite(verdict.norm)):
            return
        pairs = list(zip(verdict.batches, verdict.losses, strict=True))
        group, step = self.ranks.host_group, verdict.step + 1
        bad = [row for batch, loss in pairs if not bool(torch.isfinite(loss)) for row in batch.rows]
        mine = (bad, [row for batch, _ in pairs for row in batch.rows])
        lost, shown = (
            sorted({row for rows in kinds for row in rows}) for kinds in zip(*gather(mine, group), strict=True)
        )
        if lost:
            raise ValueError(
                f"step {step}: the loss is no number in the micro-batch of {few(lost)}; nothing was updated: look at"
                " these rows, lower learning_rate, or train in fp32"
            )
        raise ValueError(
            f"step {step}: the gradient norm is {float(verdict.norm)} though the loss is a number, in the step of"
            f" {few(shown)}; nothing was updated: lower learning_rate, or train in fp32"
        )

    def _save(self, step: int) -> None:
        self._saved = time.monotonic()
        self.settle()
        self.on_save(step)


def _counts(batches: list[Batch]) -> tuple[int, int, int, int]:
    """Targets, tokens, pictures and unread rows of a step."""
    targets, tokens = sum(batch.targets for batch in batches), sum(batch.tokens for batch in batches)
    pictures = sum(0 if batch.pixels is None else len(batch.pixels) for batch in batches)
    return targets, tokens, pictures, sum(len(batch.skipped) for batch in batches)


@contextlib.contextmanager
def _advice(step: int) -> Iterator[None]:
    """One sentence, with what to change, where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        reason = (str(error) or "of this host").splitlines()[0]
        raise ValueError(
            f"step {step}: memory ran out ({reason:.200}); lower per_device_train_batch_size or cutoff_len, set"
            " activation_checkpointing full, zero 3 or cpu_offload true, or cut the model over more ranks: dry_run true"
            " says what each of them needs"
        ) from error
