"""eval_strategy, save_strategy and global_batch_size: when a run judges and saves, and how many rows a step has.

Must not train.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from accessory.train.run import Run
from accessory.train.settings import Settings


def run(**settings: object) -> SimpleNamespace:
    return SimpleNamespace(settings=Settings(**settings), feed=SimpleNamespace(steps_per_epoch=7), total=100, data=None)


@pytest.mark.parametrize(
    ("settings", "every"),
    [({}, 7), ({"eval_steps": 3}, 3), ({"eval_strategy": "epoch", "eval_steps": 3}, 7), ({"eval_steps": 0}, 7)],
)
def test_a_run_judges_by_steps_where_they_are_given_and_else_by_epochs(settings, every):
    assert Run._eval_every(run(**settings)) == every


def test_a_run_that_is_told_not_to_judge_does_not():
    told = run(eval_strategy="no", eval_steps=3)
    told.start, told.data = None, SimpleNamespace(validation=["rows"])
    assert Run._judge(told) is None


@pytest.mark.parametrize(
    ("settings", "every"),
    [({"save_steps": 5}, 5), ({"save_strategy": "epoch"}, 7), ({"save_strategy": "no"}, 0), ({"save_steps": 0}, 0)],
)
def test_a_run_saves_by_steps_by_epochs_or_not(settings, every):
    assert Run._save_every(run(**settings)) == every


def test_a_strategy_of_steps_needs_their_number():
    with pytest.raises(ValueError, match="eval_steps: missing beside eval_strategy steps"):
        Settings(eval_strategy="steps").check()


@pytest.mark.parametrize(("ranks", "each"), [(1, 16), (4, 4), (5, 4), (32, 1)])
def test_the_global_batch_is_reached_at_any_number_of_ranks(ranks, each):
    settings = Settings(global_batch_size=16, per_device_train_batch_size=1)
    settings.settle(ranks)
    assert settings.gradient_accumulation_steps == each


def test_without_a_global_batch_the_micro_batches_stay():
    settings = Settings(gradient_accumulation_steps=3)
    settings.settle(4)
    assert settings.gradient_accumulation_steps == 3
