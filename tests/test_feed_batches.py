"""Micro-batches and their dealing: every row once at any dp size, packed or not, resumed bitwise, never hanging.

Must not look at files or shapes of rows.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from feed_toys import alpaca, config, corpus, tokenizer, write_jsonl

from accessory.data.feed import Batch, Feed, open_corpus
from accessory.data.feed.pack import best_fit, pack

ROWS = 53


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A corpus of rows of all lengths."""
    folder = tmp_path_factory.mktemp("rows")
    path = write_jsonl(folder / "a.jsonl", [alpaca(number, words=number * 7 % 31) for number in range(ROWS)])
    return corpus(path, cache=folder / "cache", cutoff_len=256)


def feed(rows, *, packing: bool = True, **more) -> Feed:
    own = config(cache=".", cutoff_len=256, packing=packing)
    return Feed(rows, own, **{"batch": 2, "accumulation": 1, "dp_rank": 0, "dp_size": 1, "seed": 5, **more})


def take(steps, count: int) -> list[list[Batch]]:
    walk = iter(steps)
    return [next(walk) for _ in range(count)]


def names(steps: list[list[Batch]]) -> list[str]:
    return [row for step in steps for batch in step for row in batch.rows]


def equal(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in vars(one)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_epoch_has_every_row_once_at_any_dp_size(rows, packing, dp_size, accumulation):
    ranks = [
        feed(rows, packing=packing, dp_size=dp_size, dp_rank=rank, accumulation=accumulation) for rank in range(dp_size)
    ]
    taken = [take(rank, rank.steps_per_epoch) for rank in ranks]
    assert Counter(name for steps in taken for name in names(steps)) == Counter(rows.where(i) for i in range(ROWS))
    assert {len(step) for steps in taken for step in steps} == {accumulation}
    assert all(rank.state()["epoch"] * rank.sequences + rank.state()["taken"] == rank.sequences for rank in ranks)


def test_two_ranks_take_in_a_step_what_one_takes_in_two_micro_batches(rows):
    alone = take(feed(rows, accumulation=2), 20)
    pair = [take(feed(rows, dp_size=2, dp_rank=rank), 20) for rank in range(2)]
    for step, first, second in zip(alone, *pair, strict=True):
        assert equal(step[0], first[0]) and equal(step[1], second[0])


def test_the_order_is_a_function_of_seed_and_epoch(rows):
    epoch = feed(rows).steps_per_epoch
    steps = take(feed(rows), 2 * epoch)
    assert names(steps) == names(take(feed(rows), 2 * epoch)) != names(take(feed(rows, seed=6), 2 * epoch))
    assert names(steps[:epoch]) != names(steps[epoch:]) and sorted(names(steps[:epoch])) == sorted(names(steps[epoch:]))
    assert names(take(feed(rows, packing=False, shuffle=False), 27)) == [rows.where(index) for index in range(ROWS)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_gets_the_same_batches_bit_by_bit(rows, packing, workers):
    whole = take(feed(rows, packing=packing, workers=workers), 30)
    first = feed(rows, packing=packing, workers=workers)
    walk = iter(first)
    for _ in range(11):
        next(walk)
    again = feed(rows, packing=packing, workers=workers)
    again.restore(first.state())
    rest = take(again, 19)
    assert all(equal(a, b) for x, y in zip(whole[11:], rest, strict=True) for a, b in zip(x, y, strict=True))


def test_a_run_goes_on_with_another_dp_size_and_loses_and_repeats_nothing(rows):
    seen = []
    state = feed(rows, packing=False).state()
    for dp_size, accumulation, steps in ((2, 1, 3), (3, 2, 2), (1, 1, 4)):
        ranks = [
            feed(rows, packing=False, dp_size=dp_size, dp_rank=r, accumulation=accumulation) for r in range(dp_size)
        ]
        for rank in ranks:
            rank.restore(state)
            seen += names(take(rank, steps))
        state = ranks[0].state()
    last = feed(rows, packing=False)
    last.restore(state)
    while last.state()["epoch"] == 0 and last.state()["taken"] < ROWS:
        seen += names(take(last, 1))
    assert sorted(seen) == sorted(rows.where(index) for index in range(ROWS))


def test_the_state_counts_steps_that_were_handed_out_and_not_those_made_ahead(rows):
    ahead, plain = feed(rows, workers=2), feed(rows)
    walks = iter(ahead), iter(plain)
    for _ in range(5):
        [next(walk) for walk in walks]
        assert ahead.state() == plain.state()
    before = ahead.state()
    next(walks[0])
    assert ahead.state(untaken=1) == before != ahead.state()


def test_the_next_step_can_be_looked_at_without_taking_it(rows):
    one = feed(rows)
    assert all(equal(a, b) for a, b in zip(one.first(), next(iter(one)), strict=True))


def test_a_state_of_other_data_or_another_order_is_refused(rows):
    state = feed(rows).state()
    for other in (feed(rows, seed=6), feed(rows, packing=False), feed(rows.split(5, 0)[0])):
        with pytest.raises(ValueError, match="resume: the rows or their order are not the checkpoint's"):
            other.restore(state)


def test_a_state_of_shuffled_rows_is_not_that_of_rows_in_their_order(rows):
    state = feed(rows, packing=False).state()
    with pytest.raises(ValueError, match="shuffle was True, is False"):
        feed(rows, packing=False, shuffle=False).restore(state)


def test_a_ragged_last_step_is_spread_evenly_and_an_idle_rank_gets_nothing_to_learn(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(number) for number in range(5)])
    few = corpus(path, cache=tmp_path / "cache")
    ranks = [
        Feed(few, config(cache=tmp_path, packing=False), batch=4, accumulation=1, dp_rank=rank, dp_size=2, seed=0)
        for rank in range(2)
    ]
    assert sorted(len(next(iter(rank))[0].rows) for rank in ranks) == [2, 3]
    one = few.split(4, 0)[0]
    ranks = [Feed(one, config(cache=tmp_path), batch=1, accumulation=1, dp_rank=r, dp_size=2, seed=0) for r in (0, 1)]
    batches = [next(iter(rank))[0] for rank in ranks]
    idle = next(batch for batch in batches if not batch.rows)
    assert idle.ids.shape == (1, 1) and idle.targets == idle.tokens == 0 and idle.labels.tolist() == [[-100]]
    assert sum(batch.targets for batch in batches) == one.targets.sum()


def test_plain_rows_are_padded_on_the_right_and_labels_are_what_follows(rows):
    (batch,) = next(iter(feed(rows, packing=False, shuffle=False)))
    assert batch.segments is None and batch.slots is None and batch.pixels is None
    for at in range(2):
        row = rows.row(at)
        size = len(row.ids)
        assert batch.ids[at, :size].tolist() == row.ids.tolist() and not batch.ids[at, size:].any()
        assert batch.positions[at].tolist() == list(range(batch.ids.shape[1]))
        wanted = [token if mark else -100 for token, mark in zip(row.ids[1:], row.supervised[1:], strict=True)]
        padding = [-100] * (batch.ids.shape[1] - size + 1)
        assert batch.labels[at].tolist() == [*wanted, *padding]
    assert batch.tokens == rows.lengths[:2].sum() and batch.targets == rows.targets[:2].sum()


def test_packed_sequences_hold_whole_rows_with_positions_and_segments_of_their_own(rows):
    found = feed(rows)
    targets = 0
    for (batch,) in take(found, found.steps_per_epoch):
        assert batch.ids.shape[1] <= 256 and batch.ids.dtype == batch.segments.dtype == torch.int64
        targets += batch.targets
        for at in range(len(batch.ids)):
            segments = batch.segments[at].numpy()
            runs = [segments == number for number in range(1, segments.max() + 1)]
            assert sum(run.sum() for run in runs) + (segments == -1).sum() == len(segments)
            for run in runs:
                (places,) = np.nonzero(run)
                assert (np.diff(places) == 1).all() and batch.labels[at, places[-1]] == -100
                assert batch.positions[at][run].tolist() == list(range(len(places)))
    assert targets == rows.targets.sum()


def test_packing_never_exceeds_the_room_and_fills_it_well():
    dice = np.random.default_rng(0)
    lengths = np.minimum(dice.lognormal(5, 0.8, 20_000).astype(np.int32) + 1, 2048)
    packs = pack(lengths, dice.permutation(len(lengths)), room=2048)
    sizes = np.add.reduceat(lengths[packs.rows], packs.bounds[:-1])
    assert sizes.max() <= 2048 and sizes.sum() / 2048 / len(packs) > 0.97
    assert sorted(packs.rows) == list(range(len(lengths)))


def test_best_fit_takes_the_fullest_place_that_has_room():
    assert best_fit([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="got a row of 11 positions, expected at most 10"):
        best_fit([11], 10)


def test_batches_go_to_a_device_as_the_model_takes_them(rows):
    (batch,) = next(iter(feed(rows)))
    sent = batch.tensors(torch.device("cpu"))
    names = ["ids", "positions", "labels", "segments", "slots", "pixels", "order"]
    assert list(sent) == names and sent["pixels"] is None


def test_no_row_at_all_is_an_error(rows):
    empty = rows.split(1, 0)[1]
    empty.lengths = empty.lengths[:0]
    with pytest.raises(ValueError, match="got no row"):
        next(iter(feed(empty)))


def test_a_feed_that_is_left_in_the_middle_ends_its_thread(rows):
    import threading

    before = threading.active_count()
    walk = iter(feed(rows, workers=1))
    next(walk)
    walk.close()
    assert threading.active_count() == before


def test_packing_a_hundred_thousand_rows_takes_seconds_at_most():
    import time

    lengths = np.random.default_rng(0).integers(1, 2049, 100_000).astype(np.int32)
    begin = time.monotonic()
    pack(lengths, np.arange(len(lengths)), room=2048)
    assert time.monotonic() - begin < 10


def test_open_corpus_and_feed_agree_on_what_is_learned(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(number) for number in range(3)])
    own = config(path, cache=tmp_path / "cache")
    found = open_corpus(own, tokenizer())
    (batch,) = next(iter(Feed(found, own, batch=1, accumulation=1, dp_rank=0, dp_size=1, seed=0)))
    assert (batch.labels != -100).sum() == found.targets.sum() == found.report["targets"]
