"""Choosing the next id: each filter alone, determinism by (seed, position), and frequencies."""

from __future__ import annotations

import math

import pytest
import torch

from accessory.model import Sampling, sample
from accessory.model.sample import leading, lowered, penalised, uniform

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])


def draws(count: int = 400, **params: float) -> set[int]:
    """The ids that come up over many seeds."""
    return {int(sample(LOGITS, [Sampling(temperature=1.0, seed=s, **params)], [7])[0]) for s in range(count)}


def test_temperature_zero_takes_the_likeliest() -> None:
    assert sample(LOGITS, [Sampling()], [0]).tolist() == [0]


def test_frequencies_follow_the_probabilities() -> None:
    n = 4000
    ids = sample(LOGITS.expand(n, -1), [Sampling(temperature=0.8, seed=s) for s in range(n)], [3] * n)
    shares = torch.bincount(ids, minlength=5) / n
    expected = (LOGITS[0] / 0.8).softmax(-1)
    assert (shares - expected).abs().max() < 4 * math.sqrt(0.25 / n)


def test_top_k_keeps_the_k_likeliest() -> None:
    assert draws(top_k=2) == {0, 1}


def test_top_p_keeps_the_fewest_that_reach_the_sum() -> None:
    probs = LOGITS[0].softmax(-1)
    assert draws(top_p=float(probs[0]) - 0.01) == {0}
    assert draws(top_p=float(probs[0]) + 0.01) == {0, 1}


def test_min_p_drops_what_is_unlikely_beside_the_likeliest() -> None:
    assert draws(min_p=0.3) == {0, 1} and draws(min_p=1.0) == {0}


def test_the_same_seed_and_position_draw_the_same_whoever_shares_the_batch() -> None:
    noise = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    params = [Sampling(temperature=1.0, seed=s) for s in range(6)]
    together = sample(noise, params, [10, 11, 12, 13, 14, 15])
    alone = [int(sample(noise[i : i + 1], [params[i]], [10 + i])[0]) for i in range(6)]
    assert together.tolist() == alone


def test_positions_of_one_seed_are_independent_enough() -> None:
    values = torch.tensor([uniform(5, p) for p in range(4000)])
    assert abs(values.mean() - 0.5) < 0.02 and abs(torch.corrcoef(torch.stack((values[1:], values[:-1])))[0, 1]) < 0.05
    assert 0 <= values.min() and values.max() < 1


def test_a_repetition_penalty_lowers_logits_of_both_signs() -> None:
    assert penalised(torch.tensor([3.0, -1.0, 0.0]), 1.25).tolist() == pytest.approx([2.4, -1.25, 0.0])


def test_frequency_and_presence_penalties_are_openais() -> None:
    params = Sampling(frequency_penalty=0.5, presence_penalty=0.3)
    assert [lowered(count, params) for count in (0, 1, 3)] == pytest.approx([0.0, -0.8, -1.8])


def test_greedy_and_drawing_rows_mix() -> None:
    ids = sample(LOGITS.expand(2, -1), [Sampling(), Sampling(temperature=1.0, top_k=1)], [0, 0])
    assert ids.tolist() == [0, 0]


@pytest.mark.parametrize("temperature", [1e-9, 1e6, 1e300])
def test_extreme_temperatures_are_defined(temperature: float) -> None:
    ids = [int(sample(LOGITS, [Sampling(temperature=temperature, seed=s)], [0])[0]) for s in range(50)]
    assert set(ids) == {0} if temperature < 1 else len(set(ids)) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"frequency_penalty": 2.1},
        {"frequency_penalty": math.nan},
        {"presence_penalty": -2.1},
        {"presence_penalty": math.inf},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="got .* expected"):
        Sampling(**wrong)


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert draws(top_k=10_000, count=3000) == {0, 1, 2, 3, 4}


def plain_filter(logits: torch.Tensor, params: Sampling) -> torch.Tensor:
    """The distribution [V] that a row is to be drawn from, by the definitions, all sorted and in fp64."""
    ordered, ids = (logits.double() / params.temperature).sort(descending=True, stable=True)
    probs = ordered.softmax(-1)
    keep = torch.zeros(len(probs), dtype=torch.bool)
    for rank in range(len(probs)):
        keep[rank] = float(probs[:rank].sum()) < params.top_p and rank < (params.top_k or len(probs))
        keep[rank] &= bool(probs[rank] >= params.min_p * probs[0])
    keep[0] = True
    kept = probs * keep
    return torch.zeros_like(kept).index_put((ids,), kept / kept.sum())


FILTERS = [
    {},
    {"min_p": 0.05},
    {"top_p": 0.7},
    {"top_k": 3},
    {"top_k": 50},
    {"top_k": 200},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.01},
    {"top_p": 0.999},
    {"top_p": 1e-9},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("size", [7, 300, 700])
def test_draws_follow_the_filtered_distribution(filters: dict, size: int) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 2
    params = Sampling(temperature=0.9, **filters)
    expected = plain_filter(logits, params)
    n = 6000
    some = [Sampling(temperature=0.9, seed=seed, **filters) for seed in range(n)]
    counts = torch.bincount(sample(logits.expand(n, -1), some, [5] * n), minlength=size).double()
    assert not counts[expected == 0].any(), "a token was drawn that the filters drop"
    likely = expected * n >= 5
    rest = counts[~likely].sum(), (expected * n)[~likely].sum()
    seen = torch.cat((counts[likely], rest[0][None]))
    hoped = torch.cat(((expected * n)[likely], rest[1][None]))
    used = hoped > 0
    chi = float(((seen - hoped)[used] ** 2 / hoped[used]).sum())
    freedom = max(int(used.sum()) - 1, 1)
    assert chi < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_every_draw_without_a_filter_inverts_the_running_sum() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    edges = logits.double().softmax(-1).cumsum(-1)
    ids = sample(logits.expand(500, -1), [Sampling(temperature=1.0, seed=seed) for seed in range(500)], [9] * 500)
    exact = torch.searchsorted(edges, torch.tensor([uniform(seed, 9) for seed in range(500)], dtype=torch.float64))
    assert (ids == exact).float().mean() > 0.99 and (ids - exact).abs().max() <= 1


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 2000}, {"top_p": 0.8, "min_p": 0.5}], ids=str)
def test_filters_that_keep_very_many_keep_the_right_ones(filters: dict) -> None:
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(1)).mul(40).round().div(80)  # some are equal
    expected = plain_filter(logits, Sampling(temperature=1.0, **filters))
    n = 2000
    ids = sample(logits.expand(n, -1), [Sampling(temperature=1.0, seed=s, **filters) for s in range(n)], [1] * n)
    assert (expected[ids] > 0).all()
    parts = expected.cumsum(-1)[ids]  # even, if the draws follow it
    assert abs(float(parts.mean()) - 0.5) < 0.025 and abs(float((parts > 0.25).double().mean()) - 0.75) < 0.03
    last = logits.argsort(descending=True, stable=True)[int((expected > 0).sum()) - 1]
    edge = float(expected[:last].sum() + expected[last] / 2)
    found = min(range(100_000), key=lambda seed: abs(uniform(seed, 1) - edge))
    assert int(sample(logits[None], [Sampling(temperature=1.0, seed=found, **filters)], [1])[0]) == last


def test_of_equal_logits_the_lowest_ids_are_kept() -> None:
    logits = torch.zeros(1, 5000)
    drawn = {int(sample(logits, [Sampling(temperature=1.0, top_k=3, seed=s)], [0])[0]) for s in range(60)}
    assert drawn == {0, 1, 2} and int(sample(logits, [Sampling()], [0])[0]) == 0
    wide = {int(sample(logits, [Sampling(temperature=1.0, top_p=0.5, seed=s)], [0])[0]) for s in range(60)}
    assert max(wide) < 2500


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 4000), -torch.inf)
    logits[0, [17, 3999]] = torch.tensor([1.0, 0.5])
    for filters in FILTERS[:-1]:
        seen = {int(sample(logits, [Sampling(temperature=1e6, seed=s, **filters)], [0])[0]) for s in range(40)}
        assert seen == {17, 3999} or filters.get("top_p", 1) < 0.8 or "min_p" in filters and seen <= {17, 3999}


@pytest.mark.parametrize("size", [5, 256, 300, 5000])
def test_a_row_alone_is_the_row_in_a_batch_of_sixteen(size: int) -> None:
    made = torch.Generator().manual_seed(size)
    logits = torch.randn(16, size, generator=made) * torch.rand(16, 1, generator=made) * 6
    params = [Sampling(temperature=0.5 + row / 8, seed=row, **FILTERS[row % len(FILTERS)]) for row in range(15)]
    params = [Sampling(), *params]
    for position in range(40):
        together = sample(logits, params, [position] * 16).tolist()
        alone = [int(sample(logits[row : row + 1], [params[row]], [position])[0]) for row in range(16)]
        assert together == alone


def test_the_likeliest_come_sorted_whatever_the_depth() -> None:
    logits = torch.randn(3, 4000, generator=torch.Generator().manual_seed(2)).mul(4).round().div(4)
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    for count in (1, 20, 128, 2048, 4000):
        values, found = leading(logits, count)
        assert values[:, :count].equal(ordered[:, :count]) and found[:, :count].equal(ids[:, :count])
