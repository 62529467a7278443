"""The loop: what stops it, what is due when, and that a step which brings no numbers changes nothing.

Must not know files; a run as a whole is tested from the command line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainee_toys import ONE, Case, batches, toy

from accessory.data.feed import Batch
from accessory.dist import Ranks
from accessory.train.feeding import Data
from accessory.train.loop import Loop, Pace, Stepped
from accessory.train.optim import make_optimizer
from accessory.train.trainee import Trainee
from spawn import run_ranks

CASE = Case()


def batch(step: int, *, spoiled: bool = False) -> Batch:
    """One micro-batch; spoiled: its loss is no number."""
    tensors = batches(CASE, step, 0)
    return Batch(
        **{name: tensors.get(name) for name in ("ids", "positions", "labels", "segments", "slots", "pixels")},
        targets=int((tensors["labels"] != -100).sum()),
        tokens=tensors["ids"].numel(),
        rows=[f"data.json:{step + 1}{' spoiled' if spoiled else ''}"],
        skipped=[],
    )


class Spoiler:
    """A trainee whose loss and gradients are NaN for batches that are marked so, or that finds no memory."""

    full = False

    def __init__(self, trainee: Trainee, batches: list[Batch]) -> None:
        self._trainee, self._marks = trainee, {id(b.ids): "spoiled" in b.rows[0] for b in batches}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainee, name)

    def forward_backward(self, tensors: dict[str, Any], *, scale: float, last: bool) -> torch.Tensor:
        if self.full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nand more words")
        bad = self._marks.get(id(tensors["ids"]), False)
        return self._trainee.forward_backward(tensors, scale=float("nan") if bad else scale, last=last) * (
            float("nan") if bad else 1.0
        )


def loop_over(
    feed: list[Batch], *, ranks: Ranks = ONE, stop_at: int | None = None, **pace: Any
) -> tuple[Loop, list[Any]]:
    """A loop over given batches, and what it called."""
    model, parts = toy(CASE, ranks.shard)
    trainee = Trainee(model, parts, ranks, dtype=torch.float32)
    calls: list[Any] = []

    def steps() -> Iterator[list[Batch]]:
        yield from ([one] for one in feed)

    def on_step(done: Stepped, factor: float) -> None:
        calls.append(("step", done.step))

    loop = Loop(
        trainee=Spoiler(trainee, feed),
        optimizer=make_optimizer(trainee, CASE.as_settings()),
        feed=steps(),
        ranks=ranks,
        pace=Pace(total=len(feed), **pace),
        lr=lambda step: 1.0,
        on_step=on_step,
        on_eval=lambda step: calls.append(("eval", step)),
        on_save=lambda step: calls.append(("save", step)),
        stopped=lambda: stop_at is not None and len(calls) >= stop_at,
    )
    return loop, calls


def values(loop: Loop) -> list[torch.Tensor]:
    """Copies of all trained tensors."""
    return [leaf.detach().clone() for leaf in loop.trainee.masters.values()]


def test_validation_and_checkpoints_are_due_at_their_steps() -> None:
    loop, calls = loop_over([batch(i) for i in range(5)], eval_every=2, save_every=2)
    assert loop.run() == (5, False)
    assert [call for call in calls if call[0] != "step"] == [
        ("eval", 2),
        ("save", 2),
        ("eval", 4),
        ("save", 4),
        ("eval", 5),
    ]


def test_a_signal_ends_the_run_between_two_steps_with_a_checkpoint() -> None:
    loop, calls = loop_over([batch(i) for i in range(5)], stop_at=1)
    assert loop.run() == (2, True)
    assert calls == [("step", 1), ("step", 2), ("save", 2)]


def test_a_signal_is_obeyed_before_a_validation_that_is_due() -> None:
    loop, calls = loop_over([batch(i) for i in range(5)], stop_at=1, eval_every=2)
    assert loop.run() == (2, True)
    assert calls == [("step", 1), ("step", 2), ("save", 2)]


@pytest.mark.parametrize(("unjudged", "first"), [(True, [("eval", 2)]), (False, [])])
def test_a_validation_that_a_signal_left_to_the_next_run_comes_first_there(
    unjudged: bool, first: list[tuple[str, int]]
) -> None:
    loop, calls = loop_over([batch(i) for i in range(4)], first=2, eval_every=2, unjudged=unjudged)
    assert loop.run() == (4, False)
    assert calls == [*first, ("step", 3), ("step", 4), ("eval", 4)]


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_brings_no_number_names_its_rows_and_changes_nothing(late: bool) -> None:
    loop, calls = loop_over([batch(0), batch(1, spoiled=True), batch(2)])
    good, _ = loop_over([batch(0)])
    good.run()
    loop.late = late
    with pytest.raises(ValueError, match="step 2: the loss is no number .* data.json:2 spoiled; nothing was updated"):
        loop.run()
    assert all(torch.equal(a, b) for a, b in zip(values(loop), values(good), strict=True))


def test_a_spoiled_step_before_a_checkpoint_is_found_before_the_checkpoint_is_written() -> None:
    loop, calls = loop_over([batch(0), batch(1, spoiled=True), batch(2)], save_every=2)
    loop.late = True
    with pytest.raises(ValueError, match="step 2"):
        loop.run()
    assert ("save", 2) not in calls


def test_a_spoiled_step_before_validation_is_found_before_a_best_model_is_saved() -> None:
    loop, calls = loop_over([batch(0), batch(1, spoiled=True), batch(2)], eval_every=2)
    loop.late = True
    with pytest.raises(ValueError, match="step 2"):
        loop.run()
    assert ("eval", 2) not in calls


def test_masters_in_the_hosts_memory_are_judged_before_their_update() -> None:
    alone, _ = loop_over([batch(0)])
    there = replace(alone, ranks=replace(ONE, device=torch.device("cuda")))
    assert not there.late, "found_inf would still be on its way from the GPU"


def test_memory_that_runs_out_is_one_sentence_with_advice() -> None:
    loop, _ = loop_over([batch(0)])
    loop.trainee.full = True
    with pytest.raises(ValueError, match=r"step 1: memory ran out \(CUDA .* 20.00 GiB\); lower per_device_train"):
        loop.run()


def spoiled_on_one_rank(ranks: Ranks) -> str:
    """What each of two data-parallel ranks says when the first one's batch is spoiled."""
    loop, _ = loop_over([batch(10 * ranks.rank), batch(10 * ranks.rank + 1, spoiled=ranks.rank == 0)], ranks=ranks)
    try:
        loop.run()
    except ValueError as error:
        return str(error)
    return "went on"


def test_a_loss_that_is_no_number_on_one_rank_stops_every_rank_with_the_same_words(tmp_path: Path) -> None:
    one, two = run_ranks(spoiled_on_one_rank, 2, tp=1)
    assert one == two and "data.json:2 spoiled" in one and "data.json:12" not in one


def rows_of(ranks: Ranks, found: list[str]) -> str:
    """What a rank says of the rows that it found."""
    corpus = SimpleNamespace(fingerprint=found[ranks.rank])
    try:
        Data(config=None, corpus=corpus, validation=None).check_equal(ranks.host_group)
    except ValueError as error:
        return str(error)
    return "went on"


def test_ranks_that_read_different_rows_stop_together() -> None:
    assert run_ranks(rows_of, 2, ["a", "a"], tp=1) == ["went on"] * 2
    one, two = run_ranks(rows_of, 2, ["a", "b"], tp=1)
    assert one == two and "the ranks read different rows" in one
