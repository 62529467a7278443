"""The cache's promises: prefill + decode = one forward, ragged = alone, chunked = whole, also inside a picture."""

from __future__ import annotations

import pytest
import torch
from meta import positions_of, toy
from torch import Tensor

from accessory.model import Llama, LlamaConfig

CONFIG = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=100, multiple_of=16)


@pytest.fixture(scope="module")
def model() -> Llama:
    return toy(CONFIG)


def ids_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 100, (1, length), generator=torch.Generator().manual_seed(seed))


def through_cache(model: Llama, ids: Tensor, cuts: list[int], **picture: Tensor) -> Tensor:
    """Hidden states of one row fed in pieces that end at `cuts`."""
    cache, parts, start = model.new_cache(rows=1, size=ids.shape[1]), [], 0
    slots = picture.pop("slots", None)
    for stop in cuts:
        cache.extent = stop
        positions = torch.arange(start, stop).unsqueeze(0)
        piece = {} if slots is None else {"slots": slots[:, start:stop], **picture}
        parts.append(model(ids[:, start:stop], positions, cache=cache, **piece))
        start = stop
    return torch.cat(parts, dim=1)


@torch.no_grad()
def test_prefill_and_decode_equal_one_forward(model: Llama) -> None:
    ids = ids_of(12)
    whole = model(ids, positions_of(ids))
    torch.testing.assert_close(through_cache(model, ids, [5, *range(6, 13)]), whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_chunked_prefill_equals_a_whole_one(model: Llama) -> None:
    ids = ids_of(300)  # longer than one block of queries
    whole = model(ids, positions_of(ids))
    torch.testing.assert_close(through_cache(model, ids, [7, 290, 300]), whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_chunk_may_end_inside_a_picture(model: Llama) -> None:
    ids, features = ids_of(12), torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    slots = torch.full((1, 12), -1)
    slots[0, 2:7] = torch.arange(5)
    whole = model(ids, positions_of(ids), features=features, slots=slots)
    pieces = through_cache(model, ids, [4, 12], features=features, slots=slots)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)
    assert not torch.allclose(whole, model(ids, positions_of(ids)), atol=1e-2), "the picture must matter"


@torch.no_grad()
def test_ids_under_a_picture_do_not_matter(model: Llama) -> None:
    features, slots = torch.randn(2, 64), torch.tensor([[-1, 0, 1, -1]])
    one, two = torch.tensor([[1, 5, 6, 2]]), torch.tensor([[1, 0, 0, 2]])
    a = model(one, positions_of(one), features=features, slots=slots)
    assert torch.equal(a, model(two, positions_of(two), features=features, slots=slots))


@torch.no_grad()
def test_ragged_rows_equal_rows_alone_in_prefill_and_decode(model: Llama) -> None:
    prompts = [ids_of(n, n) for n in (3, 9, 1, 6)]
    cache = model.new_cache(rows=4, size=16)
    ids, positions = torch.zeros(4, 9, dtype=torch.long), torch.full((4, 9), -1)
    for row, prompt in enumerate(prompts):
        ids[row, : prompt.shape[1]] = prompt[0]
        positions[row, : prompt.shape[1]] = torch.arange(prompt.shape[1])
    cache.extent = 9
    hidden = model(ids, positions, cache=cache)
    lengths = torch.tensor([p.shape[1] for p in prompts])
    cache.extent = 10
    step = model(torch.tensor([[7], [8], [9], [10]]), lengths[:, None], cache=cache)
    for row, prompt in enumerate(prompts):
        n = prompt.shape[1]
        alone = model(torch.cat((prompt, torch.tensor([[7 + row]])), 1), torch.arange(n + 1)[None])
        torch.testing.assert_close(hidden[row, :n], alone[0, :n], atol=1e-5, rtol=0)
        torch.testing.assert_close(step[row, 0], alone[0, n], atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_may_be_any_rows_and_are_reused_without_clearing(model: Llama) -> None:
    cache = model.new_cache(rows=5, size=16)
    first, second = ids_of(12, 1), ids_of(4, 2)
    for ids in (first, second):
        cache.extent = ids.shape[1]
        hidden = model(ids, positions_of(ids), cache=cache, rows=torch.tensor([3]))
    torch.testing.assert_close(hidden, model(second, positions_of(second)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_lies_beyond_the_extent_or_the_position_is_never_seen(model: Llama) -> None:
    ids = ids_of(6)
    cache = model.new_cache(rows=1, size=16)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(1e4)
    assert torch.allclose(model(ids, positions_of(ids), cache=cache), model(ids, positions_of(ids)), atol=1e-5)


@torch.no_grad()
def test_padding_never_writes_where_it_can_be_read(model: Llama) -> None:
    cache = model.new_cache(rows=1, size=4)
    model(ids_of(5), torch.tensor([[0, 1, -1, -1, -1]]), cache=cache)
    assert all(not k[:, :, 2:4].any() and k[:, :, 4].any() for k in cache.keys)


def test_packed_documents_do_not_see_each_other_but_see_the_shared_prefix(model: Llama) -> None:
    prefix, one, two = ids_of(3, 1), ids_of(4, 2), ids_of(5, 3)
    ids = torch.cat((prefix, one, two), 1)
    segments = torch.tensor([[0] * 3 + [1] * 4 + [2] * 5])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7]])
    with torch.no_grad():
        packed = model(ids, positions, segments=segments)
        for part, place in ((one, slice(3, 7)), (two, slice(7, 12))):
            alone = torch.cat((prefix, part), 1)
            expected = model(alone, positions_of(alone))[:, 3:]
            torch.testing.assert_close(packed[:, place], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_changing_one_packed_document_changes_no_bit_of_its_neighbour(model: Llama) -> None:
    ids, segments = ids_of(10), torch.tensor([[1] * 4 + [2] * 6])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    before = model(ids, positions, segments=segments)
    ids[0, :4] = (ids[0, :4] + 1) % 100
    assert torch.equal(model(ids, positions, segments=segments)[:, 4:], before[:, 4:])


@torch.no_grad()
def test_fused_weights_are_views_and_change_nothing(model: Llama) -> None:
    ids, fused = ids_of(9), toy(CONFIG)
    before, keys = fused(ids, positions_of(ids)), list(fused.state_dict())
    fused.fuse()
    wq, wk = fused.layers[0].attention.wq, fused.layers[0].attention.wk
    assert wq.weight.untyped_storage().data_ptr() == wk.weight.untyped_storage().data_ptr()
    assert list(fused.state_dict()) == keys
    torch.testing.assert_close(fused(ids, positions_of(ids)), before, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_row_that_goes_on_sees_its_past_also_beside_one_that_starts(model: Llama) -> None:
    first, second = ids_of(6, 1), ids_of(6, 2)
    cache = model.new_cache(rows=2, size=6)
    cache.extent = 3
    model(first[:, :3], torch.arange(3)[None], cache=cache)
    ids = torch.cat((torch.cat((first[:, 3:], torch.zeros(1, 3, dtype=torch.long)), 1), second))
    positions = torch.tensor([[3, 4, 5, -1, -1, -1], [0, 1, 2, 3, 4, 5]])
    cache.extent = 6
    hidden = model(ids, positions, cache=cache)
    torch.testing.assert_close(hidden[0, :3], model(first, positions_of(first))[0, 3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden[1], model(second, positions_of(second))[0], atol=1e-5, rtol=0)
