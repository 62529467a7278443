"""Beginnings that requests share are computed once, and only where they are the same: ids, pictures, adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_toys import ONE, opened, picture, write_model

from accessory.assemble import Bundle
from accessory.data.template import Turn
from accessory.dist import Ranks
from accessory.engine import Engine, Request
from accessory.engine.prefix import NOTHING, Rows, keys_of
from accessory.engine.worker import Copy, See, Worker
from spawn import run_ranks

LONG = "what is it? the lazy dog and then some human said hello to the fox"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sees") / "model")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return opened(folder)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return opened(write_model(tmp_path_factory.mktemp("adapter") / "model", "llama_adapter"))


def raw(text: str, **options) -> Request:
    return Request(text, template="none", **{"max_gen_len": 8, **options})


def keys(*ids: int) -> np.ndarray:
    return np.asarray(ids, dtype=np.int64)


def filled(rows: Rows, ids: np.ndarray) -> int:
    """A row that holds these keys and is free again."""
    seat = rows.take(ids)
    rows.feed(seat.row, len(ids))
    rows.release(seat.row)
    return seat.row


def ops(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list:
    """What the engine's worker does from now on."""
    kept: list = []
    monkeypatch.setattr(Worker, "run", lambda self, op, run=Worker.run: kept.append(op) or run(self, op))
    return kept


def test_a_repeated_prompt_is_taken_from_the_cache_but_for_its_last_position(bundle):
    engine = Engine(bundle, ONE, rows=2)
    first, second = (engine.generate([raw(LONG)])[0] for _ in range(2))
    assert first == second
    assert first.cached == 0 and second.cached == second.prompt_tokens - 1


def test_a_conversation_goes_on_in_the_row_that_holds_it(bundle, monkeypatch):
    engine = Engine(bundle, ONE, rows=4)
    said = engine.generate([Request([Turn("user", LONG)], template="dialog", max_gen_len=6)])[0]
    kept = ops(engine, monkeypatch)
    turns = [Turn("user", LONG), Turn("assistant", said.text), Turn("user", "and then?")]
    again = engine.generate([Request(turns, template="dialog", max_gen_len=6)])[0]
    assert again.cached >= said.prompt_tokens - 1 and not any(isinstance(op, Copy) for op in kept)
    assert again == Engine(bundle, ONE, reuse=False).generate([Request(turns, template="dialog", max_gen_len=6)])[0]


def test_a_shared_beginning_is_copied_while_its_owner_still_answers(bundle):
    engine = Engine(bundle, ONE, rows=3)
    other = Engine(bundle, ONE, rows=3, reuse=False)
    owner = engine.submit(raw(LONG, max_gen_len=40))
    for _ in range(3):
        engine.step()
    follower = engine.generate([raw(LONG + " and a cat", max_gen_len=12)])[0]
    assert follower.cached > 20
    while owner.result is None:
        engine.step()
    expected = other.generate([raw(LONG, max_gen_len=40), raw(LONG + " and a cat", max_gen_len=12)])
    assert [owner.result, follower] == expected


def test_two_pictures_under_one_prompt_never_share_what_follows_them(bundle):
    engine = Engine(bundle, ONE, rows=2)
    alone = [Engine(bundle, ONE).generate([raw(LONG, pictures=[picture(n)])])[0] for n in (1, 2)]
    assert alone[0].text != alone[1].text
    for number, seed in ((0, 1), (1, 2), (0, 1)):
        result = engine.generate([raw(LONG, pictures=[picture(seed)])])[0]
        assert result == alone[number]
    assert result.cached == result.prompt_tokens - 1


def test_a_picture_that_is_in_the_cache_is_not_looked_at_again(bundle, monkeypatch):
    engine = Engine(bundle, ONE, rows=2)
    request = raw(LONG, pictures=[picture(1)])
    engine.generate([request])
    kept = ops(engine, monkeypatch)
    engine.generate([request])
    assert not any(isinstance(op, See) for op in kept)


def test_a_prompt_that_ends_within_the_shared_part_of_a_picture_still_sees_it(bundle):
    turns = [Turn("user", LONG, pictures=1), Turn("assistant", "a fox"), Turn("user", "now?", pictures=1)]
    request = Request(turns, pictures=[picture(2), picture(3)], max_gen_len=6)
    other = Request(turns, pictures=[picture(2), picture(4)], max_gen_len=6)
    engine = Engine(bundle, ONE, rows=1)
    engine.generate([request])
    result = engine.generate([other])[0]
    assert result.cached > 16 and result == Engine(bundle, ONE, reuse=False).generate([other])[0]


def test_an_adapters_picture_changes_every_position(adapter):
    engine = Engine(adapter, ONE, rows=3)
    requests = [raw(LONG, pictures=[picture(1)]), raw(LONG, pictures=[picture(2)]), raw(LONG)]
    expected = [Engine(adapter, ONE, reuse=False).generate([request])[0] for request in requests]
    results = [engine.generate([request])[0] for request in [*requests, requests[0]]]
    assert results == [*expected, expected[0]]
    assert [result.cached > 0 for result in results] == [False, False, False, True]


def test_ranks_share_beginnings_in_step(folder: Path) -> None:
    assert run_ranks(_again, 2, folder)[0] == _again(ONE, folder)


def _again(ranks: Ranks, folder: Path) -> list | None:
    with Engine(opened(folder, ranks), ranks, rows=3) as engine:
        if not ranks.leader:
            return engine.follow()
        engine.submit(raw(LONG, max_gen_len=30))
        engine.step()
        results = engine.generate([raw(LONG), raw(LONG + "?", pictures=[picture(1)]), raw(LONG + "!")])
        return [(result, result.cached) for result in results]


def test_what_a_scored_prompt_left_is_not_taken_for_an_answer(bundle):
    engine = Engine(bundle, ONE, rows=1)
    expected = engine.generate([raw(LONG)])[0]
    engine.score(raw(LONG), ["yes", "no"])
    assert engine.generate([raw(LONG)]) == [expected]


def test_logits_that_are_no_numbers_leave_nothing_to_share(bundle, monkeypatch):
    engine = Engine(bundle, ONE, rows=1)
    monkeypatch.setattr(
        Worker, "_forward", lambda self, op, run=Worker._forward: torch.full_like(run(self, op), torch.nan)
    )
    with pytest.raises(ValueError, match="got NaN"):
        engine.generate([raw(LONG)])
    monkeypatch.undo()
    assert engine.generate([raw(LONG)])[0].cached == 0


def test_the_longest_beginning_is_taken_and_the_oldest_row_given_away():
    rows = Rows(3, size=200)
    short, long = keys(*range(40)), keys(*range(100))
    filled(rows, short)
    filled(rows, keys(*range(900, 990)))
    long_row = filled(rows, keys(*range(100), *range(300, 390)))
    seat = rows.take(keys(*range(100), 7))
    assert (seat.source, seat.length) == (long_row, 100) and seat.row not in (long_row,)
    rows.feed(seat.row, 101)
    assert rows.take(long).length == 99


def test_few_shared_positions_are_computed_again():
    rows = Rows(2, size=64)
    filled(rows, keys(*range(10), *range(50, 70)))
    assert rows.take(keys(*range(12))).length == 0


def test_only_what_was_fed_is_shared():
    rows = Rows(2, size=64)
    seat = rows.take(keys(*range(60)))
    rows.feed(seat.row, 20)
    assert rows.take(keys(*range(60))).length == 20


def test_no_row_is_given_where_none_is_free():
    rows = Rows(1, size=8)
    assert rows.take(NOTHING).row == 0 and rows.take(NOTHING) is None


def test_the_same_slot_of_another_picture_has_another_key():
    ids, slots = [5, 0, 0, 6], [-1, 0, 1, -1]
    one, two = (keys_of(ids, slots, [mark], [2]) for mark in (11, 12))
    assert one[0] == two[0] == 5 and (one[1:3] < 0).all() and not (one[1:3] == two[1:3]).any()
    assert one[1] != one[2]


def test_a_slots_key_does_not_depend_on_the_pictures_before_it():
    alone = keys_of([0, 0], [0, 1], [7], [2])
    behind = keys_of([0, 0, 0, 0], [0, 1, 2, 3], [9, 7], [2, 2])
    assert (alone == behind[2:]).all()
