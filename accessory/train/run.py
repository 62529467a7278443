"""One training run: folder, data, model and optimiser put together, the loop, and the final model.

Must not know a file format, a template or a collective.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from accessory.assemble import Bundle
from accessory.config import dump
from accessory.data.feed import Stream
from accessory.dist import Ranks
from accessory.dist.ranks import host_group
from accessory.train.evaluate import Best, Validation
from accessory.train.facts import facts_of
from accessory.train.feeding import PATIENCE, Data, feed_config, make_feed, open_data, questions, validation_batches
from accessory.train.final import write_final
from accessory.train.folder import RunFolder
from accessory.train.leaving import leaving
from accessory.train.loop import Loop, Pace, Stepped
from accessory.train.meter import Meter, count_flops, peak_flops
from accessory.train.optim import load_optimizer, make_optimizer, optimizer_pieces
from accessory.train.parts import Parts, table
from accessory.train.results import write_results
from accessory.train.resume import Found, check_facts
from accessory.train.save import Saver, restore
from accessory.train.schedule import lr_factor
from accessory.train.settings import Settings
from accessory.train.start import Start, make_model, open_start
from accessory.train.stop import RESUMABLE, Stopper
from accessory.train.trainee import Trainee
from accessory.train.tree import Tree, place
from accessory.train.watch import Watch

log = logging.getLogger(__name__)

MODEL, OPTIMIZER = "model/", "optimizer/"  # sets of tensors in a checkpoint


def run(settings: Settings, ranks: Ranks) -> int:
    """Train. 0, or RESUMABLE when a signal ended the run after its checkpoint was written."""
    patient = host_group(PATIENCE) if ranks.world > 1 else None
    with contextlib.ExitStack() as stack:
        overwrite = settings.overwrite_output_dir
        where = place(settings, ranks, patient)
        folder = stack.enter_context(RunFolder(where, ranks, overwrite=overwrite, group=patient))
        stopper = stack.enter_context(Stopper())
        found = folder.find(settings.resume)
        start = open_start(settings, ranks)
        config = feed_config(settings, start.template, start.spec.vision, start.slots)
        data = open_data(settings, config, start.tokenizer, ranks, patient)
        data.check_equal(patient)
        model, parts = make_model(start, settings, ranks, pictures=data.pictures)
        return Run(settings, ranks, folder.path, start, data, parts, found, patient).go(model, stopper, stack)


@dataclass
class Run:
    """The pieces of a run, and what is due after its steps."""

    settings: Settings
    ranks: Ranks
    folder: Path
    start: Start
    data: Data
    parts: Parts
    found: Found | None
    patient: ProcessGroup | None = None
    """All ranks, for what one of them does while the others wait."""
    saved: int | None = None
    """The step of the last checkpoint."""
    judged: dict[str, float] = field(default_factory=dict)
    """What the last validation found."""
    judged_at: int = 0
    """The step of the last validation."""
    unread: int = 0
    """Rows, of all ranks and restarts, of which nothing was learned since their picture cannot be read."""

    def go(self, model: torch.nn.Module, stopper: Stopper, stack: contextlib.ExitStack) -> int:
        """Everything after the model is loaded; the exit code."""
        self._introduce()
        self._prepare(model, stack)
        step, stopped = self._loop(stopper).run()
        self.saver.wait(final=stopped)
        self._tell()
        if stopped:
            how = "the same command" if self.settings.resume == "auto" else "the same command with resume auto"
            log.info("stopped by a signal after step %d of %d; %s goes on from there", step, self.total, how)
        else:
            self._finish(step)
        self.tree.draw()
        return RESUMABLE if stopped else 0

    # ---- before the first step

    def _prepare(self, model: torch.nn.Module, stack: contextlib.ExitStack) -> None:
        """Model and optimiser in place, the checkpoint taken up, and everything open that is written to."""
        settings, ranks, start = self.settings, self.ranks, self.start
        flops = count_flops(model, self.parts.names, length=self.data.own_length)
        self.leaving = leaving(start, settings, self.parts.names)
        self.tree = Tree(settings, self.folder, self.leaving, leads=ranks.rank == 0)
        self.trainee = Trainee(
            model,
            self.parts,
            ranks,
            dtype=start.dtype,
            zero=settings.zero,
            offload=settings.cpu_offload,
            checkpointing=settings.activation_checkpointing,
            compile=settings.torch_compile,
        )
        self.optimizer = make_optimizer(self.trainee, settings)
        self.feed = make_feed(settings, self.data, start.tokenizer, ranks)
        if isinstance(self.feed, Stream) and ranks.rank == 0:
            log.info("a first row, what is learned in [[ ]]: %s", self.feed.example(start.tokenizer))
        self.total = _total_steps(settings, self.feed.steps_per_epoch)
        self.first = self._go_on()
        self.best = Best(**(self.found.facts.get("best") or {}) if self.found is not None else {})
        group = host_group(PATIENCE) if ranks.world > 1 else None
        self.saver = Saver(
            self.folder,
            ranks,
            keep=settings.save_total_limit,
            group=group,
            papers=self.leaving.papers,
            adapter=self.leaving.adapter,
            whole=self.leaving.whole,
            best_within=self.tree.layout.final == "last",
        )
        self.saver.best = self.best.step
        stack.enter_context(self.saver)
        self.watch = Watch(
            self.folder,
            ranks,
            Meter(ranks.device, flops=flops, peak=peak_flops(ranks.device, start.dtype), world=ranks.world),
            total=self.total,
            first=self.first,
            every=settings.logging_steps,
            tensorboard="tensorboard" in settings.report_to,
            plot=settings.plot_loss and not self.tree.layout.plots,
            lines=self.tree.lines,
            state=None if self.found is None else self.found.facts["watch"],
        )
        stack.enter_context(self.watch)
        self.validation = self._judge()
        if settings.compute_accuracy:
            self.trainee.count_hits()
        if ranks.rank == 0:
            dump(settings, self.folder / "train.yaml")
        self.tree.begin()

    def _loop(self, stopper: Stopper) -> Loop:
        """The loop and what is due in it."""
        settings = self.settings
        pace = Pace(
            total=self.total,
            first=self.first,
            eval_every=self._eval_every() if self.validation is not None else None,
            save_every=self._save_every(),
            save_minutes=settings.save_minutes,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            accuracy=settings.compute_accuracy,
            unjudged=self.found is not None and self.judged_at < self.first,
        )
        return Loop(
            trainee=self.trainee,
            optimizer=self.optimizer,
            feed=iter(self.feed),
            ranks=self.ranks,
            pace=pace,
            lr=lambda step: lr_factor(step, self.total, settings),
            on_step=self._step,
            on_eval=self._evaluate,
            on_save=self._save,
            stopped=stopper,
        )

    def _introduce(self) -> None:
        """What is trained, on what, and how the first example looks."""
        for line in table(self.parts):
            log.info("%s", line)
        for line in self.data.describe(self.start.tokenizer):
            log.info("%s", line)

    def _go_on(self) -> int:
        """Take up the checkpoint that was found; the number of steps that it had done."""
        if self.found is None:
            return 0
        facts = self.found.facts
        self.total = self._reckoned(int(facts["step"]), facts["feed"])
        check_facts(facts, self._facts())
        restore(self.found.path, self._prefixed(MODEL, self.trainee.pieces()))
        self.trainee.refresh()
        pieces = self._prefixed(OPTIMIZER, optimizer_pieces(self.optimizer, self.trainee))
        restore(self.found.path, pieces)
        load_optimizer(
            self.optimizer,
            self.trainee,
            ((name.removeprefix(OPTIMIZER), piece.tensor) for name, piece in pieces.items()),
        )
        self.trainee.restore(facts["trainee"])
        self.feed.restore(facts["feed"])
        step = int(facts["step"])
        self.unread, self.judged_at = int(facts.get("unread", 0)), int(facts.get("judged_at", step))
        self.judged = facts.get("judged", {})
        return step

    def _reckoned(self, step: int, place: dict[str, Any]) -> int:
        """The steps of a run that goes on: with another batch the rows that are left make another number of them."""
        total = self.total
        if self.settings.max_steps <= 0:
            taken = math.ceil(place.get("taken", 0) / self.feed.global_batch)
            total += step - place.get("epoch", 0) * self.feed.steps_per_epoch - taken
        if step > total:
            raise ValueError(
                f"max_steps: got a run of {total} steps, beyond which the checkpoint of step {step} is; raise max_steps"
                " or num_train_epochs, or choose another output_dir"
            )
        return total

    def _judge(self) -> Validation | None:
        """Validation, where there is data for it."""
        settings, start = self.settings, self.start
        if self.data.validation is None or settings.eval_strategy == "no":
            return None
        bundle = Bundle(
            model=self.trainee.module.llama,
            tokenizer=start.tokenizer,
            config=start.spec.llama,
            vision=start.spec.vision,
            template=start.template,
            llama_type=start.spec.llama_type,
            source=str(self.folder),
            dtype=start.dtype,
            stop_ids=start.stop_ids,
        )
        asked = questions(settings, self.data)
        return Validation(
            self.trainee,
            bundle,
            self.ranks,
            batches=validation_batches(settings, self.data, self.ranks),
            questions=asked,
            zero=settings.zero,
            max_new_tokens=settings.eval_max_new_tokens,
            orientation=settings.orientation,
        )

    def _eval_every(self) -> int:
        """Steps between two validations."""
        epoch = self.feed.steps_per_epoch or self.total
        return epoch if self.settings.eval_strategy == "epoch" else self.settings.eval_steps or epoch

    def _save_every(self) -> int:
        """Steps between two checkpoints; 0: none by steps."""
        epoch = self.feed.steps_per_epoch or self.total
        return {"no": 0, "steps": self.settings.save_steps, "epoch": epoch}[self.settings.save_strategy]

    # ---- after a step

    def _step(self, done: Stepped, factor: float) -> None:
        """Write the step down."""
        values: dict[str, Any] = {
            "loss": done.loss,
            "acc": done.accuracy,
            "grad_norm": done.grad_norm,
            **{name: peak * factor for name, peak in self._rates().items()},
            "tokens": done.tokens,
            "pictures": done.pictures,
        }
        if self._epoch is not None:
            values["epoch"] = self._epoch
        self.unread += done.unread
        self.watch.log(done.step, values)

    def _rates(self) -> dict[str, float]:
        """Peak learning rates: `lr` of the first part that trains, lr_projector and lr_vision where they are others."""
        first, *others = (part for part in self.parts if part.names)
        return {"lr": first.lr, **{f"lr_{part.name}": part.lr for part in others if part.lr != first.lr}}

    def _evaluate(self, step: int) -> None:
        """Judge the model; the best step is kept beside the last ones."""
        assert self.validation is not None, "nothing to judge by"
        began = time.monotonic()
        with self.watch.pause():
            outcome = self.validation(step)
        spent = max(time.monotonic() - began, 1e-9)
        self.judged, self.judged_at = {**outcome.values(), "eval_runtime": round(spent, 4)}, step
        for name, count in (("samples", len(self.data.validation)), ("steps", self.validation.rounds)):
            self.judged[f"eval_{name}_per_second"] = round(count / spent, 3)
        epoch = {} if self._epoch is None else {"epoch": self._epoch}
        self.watch.log(step, {**self.judged, **epoch})
        if self.best.update(step, outcome.loss):
            self._save(step)
            self.saver.best = step

    def _save(self, step: int) -> None:
        """Hand a checkpoint to the saver, once for a step."""
        if self.saved == step:
            return
        self.saved = step
        self.watch.flush()
        pieces = {
            **self._prefixed(MODEL, self.trainee.pieces()),
            **self._prefixed(OPTIMIZER, optimizer_pieces(self.optimizer, self.trainee)),
        }
        best = None if self.best.step is None else {"step": self.best.step, "loss": self.best.loss}
        facts = {
            **self._facts(),
            "feed": self.feed.state(),
            "trainee": self.trainee.state(),
            "watch": self.watch.state(),
            "best": best,
            "unread": self.unread,
            "judged_at": self.judged_at,
            "judged": self.judged,
        }
        texts = self.tree.texts(step, total=self.total, epoch=self._epoch, best=self.best)
        self.saver.save(step, pieces, facts, texts=texts)

    def _facts(self) -> dict[str, Any]:
        """What a run that goes on from a checkpoint of this one is compared by."""
        base, dp = bool(self.trainee.frozen_pieces()), self.ranks.dp_size
        return facts_of(self.settings, self.start, self.data, base=base, total=self.total, dp=dp)

    def _tell(self) -> None:
        """What was passed over while training."""
        if self.unread:
            log.warning("%d times a row was not learned since its picture cannot be read; see above", self.unread)
        if isinstance(self.feed, Stream):
            log.info("data: %s, since this start and ahead of the last step", self.feed.told())

    def _finish(self, step: int) -> None:
        """The final weights and the results, also where the last checkpoint, which is larger, found no room."""
        wanted = bool(self._save_every()) or self.tree.in_last
        fault: OSError | None = None
        try:
            if wanted:
                self._save(step)
            self.saver.wait(final=wanted)
        except OSError as error:  # the same on all ranks
            fault = error
        place = self.folder / f"checkpoint-{step}"
        if fault is not None or not self.tree.in_last:
            place, left = self.folder, self.leaving
            beside = left.release or left.papers
            pieces = left.pieces(self.trainee)
            write_final(place, pieces, form=left.form, papers=beside, ranks=self.ranks, group=self.patient)
        samples = self._samples(step)
        results = self.watch.results(samples)
        if self.ranks.rank == 0:
            epoch = {} if self._epoch is None else {"epoch": self._epoch}
            write_results(self.folder, "train", {**results, **epoch})
            if self.judged:
                write_results(self.folder, "eval", {**self.judged, **epoch})
            told = {"memory": f"{self.watch.meter.memory_gb * 1e9 / 2**30:.2f}GiB", "model_info": table(self.parts)}
            told |= {"dataset_info": self.data.counts()}
            self.tree.end(step, results, samples=samples, best=self.best, told=told)
            log.info("%s: the trained model, after %d steps", place, step)
        if fault is not None:
            raise fault

    @property
    def _epoch(self) -> float | None:
        """Passes over the data so far; a stream has none."""
        feed = self.feed
        return round(feed.epoch + feed.taken / feed.sequences, 6) if feed.steps_per_epoch else None

    def _samples(self, step: int) -> int:
        """Rows that were read, over all starts; of a stream the sequences."""
        corpus = self.data.corpus
        return step * self.feed.global_batch if corpus is None else round((self._epoch or 0) * len(corpus))

    @staticmethod
    def _prefixed(prefix: str, pieces: dict[str, Any]) -> dict[str, Any]:
        return {prefix + name: piece for name, piece in pieces.items()}


def _total_steps(settings: Settings, per_epoch: int | None) -> int:
    """Steps of the whole run."""
    if settings.max_steps > 0:
        return settings.max_steps
    assert per_epoch is not None, "a stream has max_steps"
    return max(1, math.ceil(settings.num_train_epochs * per_epoch))
