"""Layers with a sliding window see the newest tokens only: whole, cached, packed and in pieces alike."""

from __future__ import annotations

import pytest
import torch
from meta import positions_of, toy

from accessory.model import LlamaConfig

CONFIG = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 128, "hidden_dim": 96}
IDS = torch.randint(0, 128, (2, 150), generator=torch.Generator().manual_seed(1))


def model_of(**config: int) -> torch.nn.Module:
    return toy(LlamaConfig(**CONFIG, max_seq_len=256, **config))


def test_a_token_beyond_the_reach_of_all_layers_changes_nothing() -> None:
    model, other = model_of(sliding_window=4), IDS.clone()
    other[:, 10] += 1
    with torch.no_grad():
        one, two = (model(ids % 128, positions_of(ids)) for ids in (IDS, other))
    assert torch.equal(one[:, 17:], two[:, 17:])  # two layers of 4 reach 6 tokens back
    assert not torch.allclose(one[:, 16], two[:, 16])


def test_a_window_as_long_as_the_row_is_none() -> None:
    with torch.no_grad():
        wide = model_of(sliding_window=150)(IDS, positions_of(IDS))
        assert torch.equal(wide, model_of()(IDS, positions_of(IDS)))
        full = model_of(sliding_window=3, full_layers=2)(IDS, positions_of(IDS))
        assert torch.equal(wide, full)


@pytest.mark.parametrize("sizes", [{"sliding_window": 7}, {"sliding_window": 7, "full_layers": 1}])
def test_cached_pieces_and_single_tokens_equal_the_whole_row(sizes: dict) -> None:
    model = model_of(**sizes)
    cache = model.new_cache(rows=2, size=200)
    with torch.no_grad():
        whole, parts = model(IDS, positions_of(IDS)), []
        for start, stop in ((0, 20), (20, 90), (90, 91), (91, 92), (92, 150)):
            cache.extent = stop
            positions = torch.arange(start, stop).expand(2, -1)
            parts.append(model(IDS[:, start:stop], positions, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-6, rtol=1e-5)


def test_packed_documents_and_their_gradients_equal_those_alone() -> None:
    packed, alone = model_of(sliding_window=5), model_of(sliding_window=5)
    first, second = IDS[:1, :140], IDS[1:, :9]
    row = torch.cat([first, second], 1)
    positions = torch.cat([positions_of(first), positions_of(second)], 1)
    segments = torch.tensor([[1] * 140 + [2] * 9])
    joined = packed(row, positions, segments=segments, labels=row)[0]
    apart = sum(alone(ids, positions_of(ids), labels=ids)[0] for ids in (first, second))
    torch.testing.assert_close(joined, apart)
    joined.backward()
    apart.backward()
    for (name, one), other in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_behind_a_shared_prefix_distance_is_counted_in_positions() -> None:
    model = model_of(sliding_window=4)
    prefix, one, two = IDS[:1, :6], IDS[:1, 6:12], IDS[1:, 6:12]
    row = torch.cat([prefix, one, two], 1)
    later = torch.arange(6, 12)
    positions = torch.cat([torch.arange(6), later, later])[None]
    segments = torch.tensor([[0] * 6 + [1] * 6 + [2] * 6])
    with torch.no_grad():
        together = model(row, positions, segments=segments)[:, 12:]
        alone = torch.cat([prefix, two], 1)
        torch.testing.assert_close(together, model(alone, positions_of(alone))[:, 6:])


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="sliding_window: got 0"):
        model_of(sliding_window=0)
