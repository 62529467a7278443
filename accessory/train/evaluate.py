"""Validation while training: the loss over held-out rows, and questions that the model in training answers.

Must not know optimisers, checkpoints or files of data. All ranks do the same at once; what they trained is as before,
also when memory runs out.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accessory.assemble import Bundle
from accessory.data.image import Orientation
from accessory.data.template import Turn
from accessory.dist import Ranks, Shard
from accessory.engine import Answer, Engine, Request, Result
from accessory.engine.prompt import Prompter
from accessory.engine.request import PictureSource
from accessory.metrics import exact_match
from accessory.model.head import IGNORED
from accessory.train.agree import gather, total
from accessory.train.guest import Guest, forget_forwards
from accessory.train.trainee import Trainee

if TYPE_CHECKING:
    from accessory.data.feed import Batch

log = logging.getLogger(__name__)

ROWS = 8  # questions that are answered at once


@dataclass(frozen=True)
class Question:
    """A conversation up to a user turn, and what should be answered."""

    turns: tuple[Turn, ...]
    answer: str
    pictures: tuple[PictureSource, ...] = ()
    template: str | None = None
    """None: the model's."""
    where: str = ""
    """File and row, for people."""


@dataclass(frozen=True)
class Outcome:
    """What one validation found, the same on all ranks."""

    loss: float | None = None
    """Per target; None without rows, or where memory ran out."""
    targets: int = 0
    exact_match: float | None = None
    """Share of the questions whose answer is the expected one, blanks around it aside; failed ones count as wrong."""
    asked: int = 0
    failed: int = 0
    """Questions that could not be asked or answered."""
    accuracy: float | None = None
    """Share of the targets that the model itself would have said; None where nobody counts them."""

    def values(self) -> dict[str, float]:
        """For `Watch.log`."""
        known = {"eval_loss": self.loss, "eval_accuracy": self.accuracy, "eval_exact_match": self.exact_match}
        return {key: value for key, value in known.items() if value is not None}


@dataclass
class Best:
    """The step with the lowest validation loss so far."""

    step: int | None = None
    loss: float = math.inf

    def update(self, step: int, loss: float | None) -> bool:
        """Take a new loss in; True where it is the lowest."""
        if loss is None or not loss < self.loss:
            return False
        self.step, self.loss = step, loss
        return True


@dataclass
class Validation:
    """Judges a model in training; every rank makes one and calls it at the same steps: `outcome = validation(step)`."""

    trainee: Trainee
    bundle: Bundle
    """Tokenizer, template and sizes; its model is the trainee's."""
    ranks: Ranks
    batches: Sequence[Batch] = ()
    """This rank's; those of tensor-parallel ranks are equal. Ranks with fewer of them run empty ones."""
    questions: Sequence[Question] = ()
    """The same on all ranks."""
    zero: int = 2
    """3: more than one data-parallel rank, and not enough memory to gather all weights at once."""
    max_new_tokens: int = 64
    orientation: Orientation = "keep"
    """Of the questions' pictures, as of those that are trained on."""
    _local: bool = field(init=False)
    """Whether a forward needs no other rank once weights are gathered: then one rank's failure is its own affair."""
    rounds: int = field(init=False)
    """Batches of the rank that has most of them."""

    def __post_init__(self) -> None:
        self._local = self.ranks.shard.size == 1 and (self.ranks.dp_size == 1 or self.zero == 2)
        self.rounds = max(gather(len(self.batches), self.ranks.host_group))

    def __call__(self, step: int) -> Outcome:
        """Judge the model as it is. Raises ValueError where memory ran out and the other ranks would wait for ever."""
        try:
            with self.trainee.judging():
                if self.ranks.dp_size > 1:  # learns which module is the root, and gathers what stays whole
                    self.trainee.loss(self._nothing())
                loss, targets, accuracy = self._loss(step)
                outcome = Outcome(loss, targets, accuracy=accuracy)
                if self.questions:
                    matches, failed = self._exact_match(step)
                    asked = len(self.questions)
                    outcome = replace(outcome, exact_match=matches / asked, asked=asked, failed=failed)
        finally:
            forget_forwards(self.trainee.module)
        return outcome

    # ---- loss

    def _loss(self, step: int) -> tuple[float | None, int, float | None]:
        """Loss per target, number of targets and accuracy, of all ranks."""
        device = self.ranks.device
        self.trainee.take_hits()
        sums, failures = torch.zeros(2, dtype=torch.float64, device=device), 0
        for index in range(self.rounds):
            batch = self.batches[index].tensors(device) if index < len(self.batches) else self._nothing()
            with self._contained(f"batch {index + 1} of {self.rounds}") as problem:
                sums += torch.stack(self.trainee.loss(batch)).double()
            failures += len(problem)
        hits = self.trainee.take_hits()
        mine = [*sums.tolist(), 0.0 if hits is None else float(hits), failures] if self.ranks.leader else [0.0] * 4
        loss, targets, right, failures = total(mine, self.ranks.host_group)
        if failures:
            log.warning(
                "validation at step %d has no loss: memory ran out in %d batches; training goes on."
                " Lower per_device_eval_batch_size",
                *(step, failures),
            )
        if failures or not targets:
            return None, int(targets), None
        return loss / targets, int(targets), None if hits is None else right / targets

    def _nothing(self) -> dict[str, Tensor]:
        """One row, one position, no target: a forward that only keeps in step."""
        zeros = torch.zeros(1, 1, dtype=torch.int64, device=self.ranks.device)
        return {"ids": zeros, "positions": zeros, "labels": torch.full_like(zeros, IGNORED)}

    # ---- answers

    def _exact_match(self, step: int) -> tuple[int, int]:
        """How many questions got the expected answer, and how many could not be answered, of all ranks.

        Where a forward is local each data-parallel rank answers its share. Else rank 0 leads all others through the
        same ops, so that collectives match whatever the answers are.
        """
        ranks, world = self.ranks, self.ranks.world
        if self._local:
            mine = self.questions[ranks.dp_rank :: ranks.dp_size]
            place = replace(ranks, shard=Shard(), control=None)
        else:
            mine, place = self.questions, replace(ranks, shard=Shard(ranks.rank, world), control=ranks.host_group)
        counts = [0, 0]
        if mine:
            results: list[Result | None] = [None] * len(mine)
            with self._contained(f"{len(mine)} questions"):
                results = self._ask(mine, place)
            if place.leader:
                counts = [_matches(mine, results), sum(result is None for result in results)]
                _show(mine[0], results[0], step)
        matches, failed = total(counts, ranks.host_group)
        if failed:
            log.warning("validation at step %d: %d of %d questions failed", step, failed, len(self.questions))
        return int(matches), int(failed)

    def _ask(self, questions: Sequence[Question], ranks: Ranks) -> list[Result | None]:
        """The leader's results, None for what failed; other ranks follow and get none."""
        requests = [
            Request(question.turns, question.pictures, question.template, max_gen_len=self.max_new_tokens)
            for question in questions
        ]
        bundle = replace(self.bundle, model=Guest(self.trainee.module.llama, dtype=self.trainee.dtype))
        rows, window = min(ROWS, len(requests)), self._window(bundle, requests)
        with Engine(bundle, ranks, rows=rows, window=window, orientation=self.orientation) as engine:
            if ranks.leader:
                return _answers(engine, requests, questions)
            engine.follow()
            return []

    def _window(self, bundle: Bundle, requests: Sequence[Request]) -> int:
        """Positions of the longest prompt and its answer, as far as the model's window goes."""
        most = bundle.config.max_seq_len
        prompter, longest = Prompter(bundle, window=most, orientation=self.orientation), 1
        for request in requests:
            with contextlib.suppress(ValueError, OSError):  # said when it is asked
                longest = max(longest, len(prompter.encode(request)[2].ids))
        return min(most, longest + self.max_new_tokens)

    @contextlib.contextmanager
    def _contained(self, what: str) -> Iterator[list[str]]:
        """Note in the list that memory ran out, where the other ranks do not depend on this one; else ValueError."""
        problem: list[str] = []
        try:
            yield problem
        except (RuntimeError, MemoryError) as error:
            if not is_memory(error):
                raise
            if not self._local:
                raise ValueError(
                    f"validation: rank {self.ranks.rank} ran out of memory in {what}, and the other ranks cannot go on"
                    " without it; lower per_device_eval_batch_size, eval_answers or eval_max_new_tokens. The last"
                    " checkpoint is untouched"
                ) from error
            problem.append(str(error))
            log.warning("validation ran out of memory in %s, training goes on: %s", what, str(error).splitlines()[0])
        if problem and self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def is_memory(error: BaseException) -> bool:
    """Whether memory was all that was missing; CPUs say so in words alone."""
    words = ("not enough memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def _answers(engine: Engine, requests: Sequence[Request], questions: Sequence[Question]) -> list[Result | None]:
    """Ask all and step until all are answered; what cannot be asked, or ends in no numbers, is None."""
    answers: list[Answer | None] = []
    for request, question in zip(requests, questions, strict=True):
        try:
            answers.append(engine.submit(request))
        except (ValueError, OSError) as error:
            log.warning("validation: the question of %s cannot be asked: %s", question.where or "a row", error)
            answers.append(None)
    while not engine.idle:
        engine.step()
    results = [None if answer is None else answer.result for answer in answers]
    if failed := {result.error: None for result in results if result is not None and result.finish == "error"}:
        log.warning("validation: answers failed: %s", "; ".join(failed))
    return [None if result is None or result.finish in ("cancelled", "error") else result for result in results]


def _matches(questions: Sequence[Question], results: Sequence[Result | None]) -> int:
    """Answers that are the expected ones."""
    pairs = zip(questions, results, strict=True)
    return sum(result is not None and exact_match(result.text, question.answer) for question, result in pairs)


def _show(question: Question, result: Result | None, step: int) -> None:
    """One question and its answer, for whoever reads the log."""
    if result is not None:
        asked = question.turns[-1].text if question.turns else ""
        log.info("step %d: %.80r is answered %.120r, expected %.120r", step, asked, result.text, question.answer)
