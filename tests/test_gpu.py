"""What only a CUDA device can show: equality with the CPU, NF4's memory, and the engine on it."""

from __future__ import annotations

import pytest
import torch
from meta import positions_of, toy

from accessory.model import Llama, LlamaConfig
from accessory.peft import PeftConfig, apply_peft, init_peft
from accessory.quant import Nf4, quantise

pytestmark = pytest.mark.gpu

CONFIG = LlamaConfig(dim=256, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=500, multiple_of=32)
IDS = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
SEVEN_B = LlamaConfig(dim=4096, n_layers=32, n_heads=32, hidden_dim=11008, vocab_size=32000, max_seq_len=4096)


@torch.no_grad()
def test_logits_equal_those_of_the_cpu() -> None:
    model, cuda = toy(CONFIG), toy(CONFIG).cuda()
    expected = model.output(model(IDS, positions_of(IDS)))
    ids = IDS.cuda()
    found = cuda.output(cuda(ids, positions_of(IDS).cuda()))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_prefill_and_decode_equal_one_forward() -> None:
    model, ids, positions = toy(CONFIG).cuda(), IDS.cuda(), positions_of(IDS).cuda()
    cache, parts = model.new_cache(rows=2, size=64), []
    for start, stop in ((0, 33), *((i, i + 1) for i in range(33, 40))):
        cache.extent = stop
        parts.append(model(ids[:, start:stop], positions[:, start:stop], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, positions), atol=1e-3, rtol=1e-3)


def test_gradients_equal_those_of_the_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = toy(CONFIG).to(device)
        apply_peft(model, PeftConfig(lora_rank=4, bias_tuning=True), device=device)
        init_peft(model)
        ids = IDS.to(device)
        total, count = model(ids, positions_of(IDS).to(device), labels=ids.roll(-1, 1))
        (total / count).backward()
        found.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-4, rtol=1e-3, msg=name)


@torch.no_grad()
def test_one_row_through_the_fused_nf4_kernel_equals_the_dequantised_product() -> None:
    storage = Nf4(torch.randn(256, 512, dtype=torch.bfloat16, device="cuda"))
    x = torch.randn(1, 512, dtype=torch.bfloat16, device="cuda")
    torch.testing.assert_close(storage(x), x @ storage.dequantised().T, atol=0.3, rtol=0.05)


@torch.no_grad()
def test_a_7b_in_nf4_answers_in_less_than_seven_gb() -> None:
    torch.cuda.reset_peak_memory_stats()
    model = Llama(SEVEN_B, dtype=torch.bfloat16)
    for linear in model.linears().values():
        quantise(linear, torch.randn(linear.weight.shape, dtype=torch.bfloat16, device="cuda") * 0.02)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        filled = torch.ones(parameter.shape, dtype=torch.bfloat16, device="cuda")
        model.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(filled, requires_grad=False)
    cache = model.new_cache(rows=1, size=4096)
    cache.extent = 512
    ids = torch.arange(512, device="cuda").unsqueeze(0)
    model.output(model(ids, ids, cache=cache)[:, -1])
    assert torch.cuda.max_memory_allocated() < 7e9
