"""What people watch of a run: the log file, the progress bar, tensorboard and the picture of the loss; on rank 0 only.

Must not know the model, and never makes the device wait: numbers are read a step after they were handed over. What
goes wrong with a picture, a curve or a full disk is said once, and training goes on.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from accessory.dist import Ranks
from accessory.train.journal import NAME, Journal, duration, seconds_of
from accessory.train.lines import Lines
from accessory.train.meter import Meter
from accessory.train.plot import Curves, Painter

log = logging.getLogger(__name__)

QUIET = 30.0  # seconds between two log lines where there is no progress bar
REDRAW = 0.1  # seconds between two redraws of the bar
BOARD = {"lr": "train/learning_rate", "eval_accuracy": "eval/acc"}
INSIDE = ("tokens", "pictures")  # what `log` counts and does not write down as it comes


@dataclass
class _Entry:
    """A line of the log whose tensors are still on their way."""

    step: int
    facts: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """On the CPU: whole once `arrived` is."""
    arrived: torch.cuda.Event | None = None
    seconds: float = 0.0
    """Of training, over all starts."""

    def read(self) -> dict[str, Any]:
        """All values that there are; waits for copies that have not arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        line = {**self.facts, **{key: float(tensor) for key, tensor in self.tensors.items()}}
        return {key: value for key, value in line.items() if value is not None}


class Watch:
    """Give it every step; it writes down every `every`-th, the last one, and all that is no training step.

        with Watch(folder, ranks, meter, total=1000) as watch:
            watch.log(step, {"loss": loss, "lr": lr, "grad_norm": norm, "epoch": 0.1, "tokens": 4096})
            with watch.pause():
                watch.log(step, {"eval_loss": evaluate(...)})

    Every method does nothing on ranks above 0.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        meter: Meter,
        *,
        total: int,
        first: int = 0,
        every: int = 1,
        tensorboard: bool = True,
        plot: bool = True,
        state: Mapping[str, float] | None = None,
        lines: Lines | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """total: steps of the whole run; first: those that were done before, by a run whose `state` this one goes on.

        lines: the same in another tool's keys, which also wants the first step.

        Raises OSError where the log file cannot be written.
        """
        self.meter, self._leads, self._total, self._first, self._every = meter, ranks.rank == 0, total, first, every
        self._clock, self._pending, self._shown = clock, None, None
        self._steps: list[int] = []
        self._losses: list[float] = []
        self._evals: list[tuple[int, float]] = []
        self._tokens = self._pictures = 0
        self._before = 0.0
        self._lines = lines
        if not self._leads:
            return
        self._journal = Journal(folder / NAME, first=first)
        if lines is not None:
            lines.begin(self._journal.lines, first)
        self._go_on(self._journal.lines, state)
        self._board = _Board(folder / "runs", first) if tensorboard else None
        title = f"training loss of {folder.name or folder.resolve().name}"
        self._painter = Painter(folder / "training_loss.png", self._curves, title=title) if plot else None
        self._closing = contextlib.ExitStack()
        self._bar = self._open_bar()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Hand over what a step brought: loss, lr, grad_norm, epoch, eval_loss, eval_exact_match, or anything else.

        Tensors of one number may be on a device and not yet computed: their copies are read with the next call.
        "tokens" (and "pictures"), of all ranks, make it a training step; loss is that step's own, not a mean over
        steps, so that a resumed run writes the same numbers.
        """
        if not self._leads:
            return
        self.flush()
        trained = "tokens" in values
        if trained:
            self._count(values)
            self._advance(step)
        first = step == 1 and self._lines is not None and self._lines.wants_first
        if not trained or first or step % self._every == 0 or step == self._total:
            self._pending = self._entry(step, values, trained=trained)

    def flush(self) -> None:
        """Write down what is known now. Called before a checkpoint of this step can be resumed from."""
        entry, self._pending = self._pending, None
        if entry is None:
            return
        line = entry.read()
        self._journal.write(line)
        if self._lines is not None:
            self._lines.add(line, entry.seconds)
        self._remember(entry.step, line)
        if self._board is not None:
            self._board.add(entry.step, line)
        self._show(entry.step, line)

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Write the last step down; what happens inside is no training and does not count for tokens per second."""
        self.flush()
        return self.meter.pause()

    def state(self) -> dict[str, float]:
        """What a resumed run needs to go on counting."""
        return {"elapsed": self._elapsed, "total_tokens": self._tokens, "total_pictures": self._pictures}

    def results(self, samples: int | None = None) -> dict[str, float]:
        """train_results.json, under Hugging Face's names; samples: rows that were read, over all restarts."""
        self.flush()
        spent, steps = self._elapsed, self._steps[-1] if self._steps else self._first
        out: dict[str, float] = {"train_runtime": round(spent, 4), "total_tokens": self._tokens}
        if self._losses:
            out["train_loss"] = sum(self._losses) / len(self._losses)
        if (flops := self.meter.flops(self._tokens, self._pictures)) is not None:
            out["total_flos"] = flops
        for name, count in (("samples", samples), ("steps", steps)):
            if count is not None and spent > 0:
                out[f"train_{name}_per_second"] = round(count / spent, 3)
        return out

    def close(self) -> None:
        """Write the last step, draw the picture once more, and let go of all files. A second call does nothing."""
        if not self._leads or self._journal is None:
            return
        try:
            self.flush()
        except RuntimeError as error:  # a device that failed gives its last numbers no more
            log.warning("the numbers of the last step are lost: %s", error)
        self._journal.close()
        self._journal = None
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            self._board.close()
        if self._painter is not None:
            self._painter.close()
        self._closing.close()

    # ---- counting

    @property
    def _elapsed(self) -> float:
        """Seconds of training, over all restarts."""
        return self._before + self.meter.seconds

    def _go_on(self, lines: list[dict[str, Any]], state: Mapping[str, float] | None) -> None:
        """Take up curves and counts where the earlier run was at this step."""
        for line in lines:
            self._remember(line["current_steps"], line)
        last = {key: value for line in lines for key, value in line.items()}
        known = {"elapsed": seconds_of(last.get("elapsed_time")), "total_tokens": last.get("total_tokens", 0)}
        known |= dict(state or {})
        self._before = known["elapsed"]
        self._tokens, self._pictures = int(known["total_tokens"]), int(known.get("total_pictures", 0))

    def _count(self, values: Mapping[str, float | Tensor]) -> None:
        """Tokens and pictures of one step."""
        tokens, pictures = int(values["tokens"]), int(values.get("pictures", 0))
        self.meter.step(tokens, pictures)
        self._tokens += tokens
        self._pictures += pictures

    def _entry(self, step: int, values: Mapping[str, float | Tensor], *, trained: bool) -> _Entry:
        """What is known at once, and copies of the tensors that are on their way."""
        facts: dict[str, Any] = {"current_steps": step, "total_steps": self._total}
        tensors, event = {}, None
        for key, value in values.items():
            if key in INSIDE:
                continue
            facts[key] = None  # its place in the line
            if not isinstance(value, Tensor):
                facts[key] = value
            elif value.device.type == "cuda":
                tensors[key] = torch.empty((), dtype=value.dtype, pin_memory=True)
                tensors[key].copy_(value.detach().reshape(()), non_blocking=True)
                event = event or torch.cuda.Event()
            else:
                tensors[key] = value.detach().clone()
        if event is not None:
            event.record()
        left = self.meter.left(self._total - step)
        facts["percentage"] = round(100 * step / max(1, self._total), 2)
        facts["elapsed_time"] = duration(self._elapsed)
        facts["remaining_time"] = None if left is None else duration(left)
        if trained:
            rate, mfu = self.meter.tokens_per_second, self.meter.mfu
            facts["tokens_per_second"] = None if rate is None else round(rate, 1)
            facts["total_tokens"] = self._tokens
            facts["mfu"] = None if mfu is None else round(mfu, 4)
            facts["memory_gb"] = round(self.meter.memory_gb, 3)
        return _Entry(step, facts, tensors, event, self._elapsed)

    def _remember(self, step: int, line: Mapping[str, Any]) -> None:
        """Add a line to the curves. Losses go in last: the thread that draws counts by them."""
        if "loss" in line:
            self._steps.append(step)
            self._losses.append(float(line["loss"]))
        if "eval_loss" in line:
            self._evals.append((step, float(line["eval_loss"])))
        if self._leads and getattr(self, "_painter", None) is not None:
            self._painter.wake()

    def _curves(self) -> Curves:
        """A copy, for another thread."""
        losses, evals = list(self._losses), list(self._evals)
        return Curves(self._steps[: len(losses)], losses, [step for step, _ in evals], [loss for _, loss in evals])

    # ---- showing

    def _open_bar(self) -> tqdm | None:
        """The progress bar, with log lines above it; None where stderr is no terminal."""
        if sys.stderr is None or not sys.stderr.isatty():
            return None
        form = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        bar = tqdm(total=self._total, initial=self._first, desc="train ", bar_format=form, dynamic_ncols=True)
        self._closing.callback(bar.close)
        self._closing.enter_context(logging_redirect_tqdm([logging.getLogger("accessory")]))
        return bar

    def _advance(self, step: int) -> None:
        """Move the bar, by our own clock: tqdm's stands still when the wall clock is set back."""
        if self._bar is None:
            return
        self._bar.n = step
        now = self._clock()
        if self._shown is None or now - self._shown >= REDRAW or step == self._total:
            self._bar.refresh()
            self._shown = now

    def _show(self, step: int, line: Mapping[str, Any]) -> None:
        """Numbers for the bar, or a log line every so often; validation always gets a line."""
        if "loss" not in line:
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in line.items() if key.startswith("eval_"))
            log.info("step %d/%d: %s", step, self._total, numbers)
            return
        text = _numbers(line)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            return
        now = self._clock()
        if self._shown is None or now - self._shown >= QUIET or step == self._total:
            log.info("step %d/%d, %s", step, self._total, text)
            self._shown = now


class _Board:
    """Tensorboard's curves, in `folder`; what an interrupted run wrote after step `first` is hidden."""

    def __init__(self, folder: Path, first: int) -> None:
        self._writer: Any = None
        with self._guarded():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=first + 1, max_queue=1000, flush_secs=30)

    def add(self, step: int, line: Mapping[str, Any]) -> None:
        """All numbers of a line."""
        with self._guarded():
            for key, value in line.items():
                if self._writer is not None and isinstance(value, (int, float)) and not key.endswith("_steps"):
                    prefix = "eval/" if key.startswith("eval_") else "train/"
                    self._writer.add_scalar(BOARD.get(key, prefix + key.removeprefix("eval_")), value, step)

    def close(self) -> None:
        with self._guarded():
            if self._writer is not None:
                self._writer.close()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Give tensorboard up at its first error, and say so."""
        try:
            yield
        except Exception as error:  # not installed, disk full, whatever its writing thread met
            self._writer = None
            log.warning("tensorboard is given up, training goes on: %s", error)


def _numbers(line: Mapping[str, Any]) -> str:
    """The numbers of a step for one line of a screen."""
    parts = [f"loss {line['loss']:.4f}"]
    for key, form in (("lr", "lr {:.3g}"), ("tokens_per_second", "{:,.0f} tokens/s")):
        if line.get(key) is not None:
            parts.append(form.format(line[key]))
    if line.get("mfu") is not None:
        parts.append(f"MFU {100 * line['mfu']:.1f} %")
    if line.get("memory_gb") is not None:
        parts.append(f"{line['memory_gb']:.2f} GB")
    if line.get("remaining_time") is not None:
        parts.append(f"{line['remaining_time']} left")
    return ", ".join(parts)
