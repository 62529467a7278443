"""Choosing the next id: each filter alone, determinism by (seed, position), and frequencies."""

from __future__ import annotations

import math

import pytest
import torch

from accessory.model import Sampling, sample
from accessory.model.sample import uniform

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


def test_a_repetition_penalty_lowers_seen_ids_of_both_signs() -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0, -1.1]])
    seen = [torch.tensor([0, 2])]
    assert sample(logits, [Sampling(repetition_penalty=1.2)], [0], seen=seen).tolist() == [1]
    assert sample(logits, [Sampling()], [0], seen=[None]).tolist() == [0]
    assert logits[0, 0] == 3.0, "the caller's logits must not change"


def test_greedy_and_drawing_rows_mix() -> None:
    ids = sample(LOGITS.expand(2, -1), [Sampling(), Sampling(temperature=1.0, top_k=1)], [0, 0])
    assert ids.tolist() == [0, 0]


@pytest.mark.parametrize("temperature", [1e-9, 1e6])
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
    ],
)
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="got .* expected"):
        Sampling(**wrong)


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert draws(top_k=10_000, count=3000) == {0, 1, 2, 3, 4}
