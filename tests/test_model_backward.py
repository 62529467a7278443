"""Backward passes written by hand against torch's own: attention over many blocks, norm, gate, the chunked loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from meta import toy
from torch import Tensor

from accessory.model import LlamaConfig, head
from accessory.model.attention import attend
from accessory.model.llama import segment_mask
from accessory.model.pointwise import rms_norm, swiglu
from accessory.model.spelled import BLOCK, first_keys

LENGTH = 2 * BLOCK + 37


def gradients(fn: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result, then the gradient of each input under a fixed random direction."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = fn(*leaves)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


def same(fn: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor, atol: float = 2e-5) -> None:
    for found, expected in zip(gradients(fn, *inputs), gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=atol, rtol=atol)


def packed(ends: list[list[int]]) -> Tensor:
    """Segments [B, LENGTH] whose documents end there; -1 behind the last."""
    rows = torch.full((len(ends), LENGTH), -1)
    for row, stops in zip(rows, ends, strict=True):
        for number, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
            row[start:stop] = number + 1
    return rows


SEGMENTS = {
    "none": None,
    "long and short": packed([[100, 120, 250, LENGTH], [150, 200]]),
    "short": packed([[i for i in range(20, LENGTH, 20)], [i for i in range(31, LENGTH, 31)]]),
    "shared prefix": torch.where(torch.arange(LENGTH) < 9, 0, packed([[100, 200, LENGTH], [150, 280]])),
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("name", SEGMENTS)
def test_attention_over_many_blocks_has_torchs_gradients(name: str, heads: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, LENGTH, heads[0], 16, generator=generator)
    k, v = (torch.randn(2, heads[1], LENGTH, 16, generator=generator) for _ in range(2))
    mask = None if SEGMENTS[name] is None else segment_mask(SEGMENTS[name])
    starts = None if mask is None else first_keys(mask)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return y.transpose(1, 2).flatten(2)

    same(lambda q, k, v: attend(q, k, v, mask=mask, starts=starts), plain, q, k, v)
    same(lambda q, k, v: attend(q, k, v, mask=mask), plain, q, k, v)


def test_a_block_of_queries_reads_only_the_keys_it_may_see() -> None:
    mask = segment_mask(packed([[60, 130, 200, LENGTH], [100, 140, 260, LENGTH]]))
    assert first_keys(mask) == [0, 60, 140]
    assert first_keys(segment_mask(torch.zeros(1, LENGTH, dtype=torch.int64))) == [0, 0, 0]
    shared = torch.where(torch.arange(LENGTH) < 9, 0, packed([[100, 200, LENGTH]]))
    assert first_keys(segment_mask(shared)) == [0, 0, 0]


def test_attention_in_bf16_sums_gradients_of_keys_over_blocks_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 8 * BLOCK, 2, 16, generator=generator)
    k, v = (torch.randn(1, 2, 8 * BLOCK, 16, generator=generator) for _ in range(2))
    exact = gradients(lambda q, k, v: attend(q, k, v, mask=None), q, k, v)
    found = gradients(lambda q, k, v: attend(q, k, v, mask=None), q.bfloat16(), k.bfloat16(), v.bfloat16())
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.bfloat16 and (one.float() - other).norm() / other.norm() < 0.01


def test_the_norm_has_torchs_gradients() -> None:
    x, weight = torch.randn(3, 5, 32), torch.randn(32)
    same(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (32,), w, 1e-5), x, weight)
    frozen = weight.clone()
    same(lambda x: rms_norm(x, frozen, 1e-5), lambda x: F.rms_norm(x, (32,), frozen, 1e-5), x)


def test_the_gate_has_torchs_gradients() -> None:
    gate, up = torch.randn(3, 5, 32), torch.randn(3, 5, 32)
    same(swiglu, lambda gate, up: F.silu(gate) * up, gate, up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "function", [lambda x: rms_norm(x, torch.full((32,), 0.7, dtype=x.dtype), 1e-5), lambda x: swiglu(x, x)]
)
def test_training_and_inference_compute_the_same_bits(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(4, 32, dtype=dtype)
    assert torch.equal(function(x), function(x.clone().requires_grad_()).detach())


@pytest.mark.parametrize("chunk", [1, 7 * 100, 1 << 26])
@pytest.mark.parametrize("piece", [1, 3 * 100, 1 << 21])
def test_the_loss_in_any_chunks_has_torchs_gradients(chunk: int, piece: int, monkeypatch) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk)
    monkeypatch.setattr(head, "PIECE", piece)
    output = toy(LlamaConfig(dim=64, n_layers=1, n_heads=4, vocab_size=100, multiple_of=16)).output
    weight = output.weight.detach()
    labels = torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(0))
    labels[0, 3:7] = labels[1, -1] = -100

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        del output.weight
        output.weight = weight
        total, count = output(hidden, labels)
        assert count == 17
        return total

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")

    same(ours, plain, torch.randn(2, 11, 64), weight, atol=1e-4)


def test_a_loss_without_targets_is_zero_and_has_zero_gradients() -> None:
    output = toy(LlamaConfig(dim=64, n_layers=1, n_heads=4, vocab_size=100, multiple_of=16)).output
    hidden = torch.randn(1, 4, 64).requires_grad_()
    total, count = output(hidden, torch.full((1, 4), -100))
    total.backward()
    assert total == count == 0 and not hidden.grad.any() and not output.weight.grad.any()


def test_a_second_backward_pass_over_one_loss_is_refused() -> None:
    output = toy(LlamaConfig(dim=64, n_layers=1, n_heads=4, vocab_size=100, multiple_of=16)).output
    total, _ = output(torch.randn(1, 4, 64).requires_grad_(), torch.tensor([[1, 2, 3, 4]]))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
