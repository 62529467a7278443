"""NF4 storage: close to the weight, with gradients on CPU, under tensor parallelism, and with LoRA on top."""

from __future__ import annotations

import pytest
import torch
from meta import positions_of, toy

from accessory.model import Linear, Llama, LlamaConfig
from accessory.peft import PeftConfig, apply_peft, init_peft
from accessory.quant import Nf4, quantise

CONFIG = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=100, multiple_of=16)
IDS = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(4))


def quantised() -> Llama:
    """A random model with every linear of its layers in NF4."""
    model = toy(CONFIG)
    for linear in model.linears().values():
        quantise(linear, linear.weight.detach())
    return model


def test_a_gaussian_weight_loses_about_nine_percent() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    error = (Nf4(weight).dequantised() - weight).norm() / weight.norm()
    assert 0.07 < error < 0.11


@pytest.mark.parametrize("shape", [(100, 48), (64, 352), (33, 96), (31, 33)])
def test_rows_of_any_length_lose_no_more(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert (Nf4(weight).dequantised() - weight).norm() / weight.norm() < 0.11


def test_codes_are_the_nearest_of_the_published_sixteen() -> None:
    code = Nf4(torch.randn(4, 64)).code
    published = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105, 0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1]
    torch.testing.assert_close(code.cpu(), torch.tensor(published), atol=1e-6, rtol=1e-5)


def test_storage_needs_little_more_than_four_bits() -> None:
    storage = Nf4(torch.randn(1024, 1024, dtype=torch.bfloat16))
    assert sum(buffer.nbytes for buffer in storage.buffers()) * 8 / 1024**2 < 4.2


def test_all_buffers_and_no_attribute_hold_the_weight() -> None:
    storage = Nf4(torch.randn(64, 64))
    copy = Nf4(torch.randn(64, 64))
    copy.load_state_dict(storage.state_dict())
    assert torch.equal(copy.dequantised(), storage.dequantised())


def test_a_row_alone_and_a_batch_give_the_same_product() -> None:
    storage, x = Nf4(torch.randn(128, 64)), torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(storage(x)[2:3], storage(x[2:3]))


def test_zero_and_constant_blocks_survive() -> None:
    weight = torch.zeros(4, 64)
    weight[1] = 0.5
    restored = Nf4(weight).dequantised()
    torch.testing.assert_close(restored, weight, atol=0.02, rtol=0)


def test_the_input_gets_its_gradient_also_after_an_evaluation() -> None:
    storage, x = Nf4(torch.randn(128, 64)), torch.randn(3, 64, requires_grad=True)
    with torch.no_grad():
        storage(x)
    storage(x).sum().backward()
    torch.testing.assert_close(x.grad, storage.dequantised().sum(0).expand(3, -1))


def test_a_quantised_model_answers_as_its_dequantised_weights_would() -> None:
    model, plain = quantised(), toy(CONFIG)
    for name, linear in plain.linears().items():
        linear.weight.data = model.get_submodule(name).storage.dequantised()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, positions_of(IDS)), plain(IDS, positions_of(IDS)))


def test_lora_trains_on_a_quantised_base() -> None:
    model = quantised().requires_grad_(False)
    apply_peft(model, PeftConfig(lora_rank=2, bias_tuning=True), device="cpu")
    init_peft(model)
    trained = [p for n, p in model.named_parameters() if ".lora_" in n or n.endswith("bias")]
    for p in trained:
        p.requires_grad_(True)
    optimiser, losses = torch.optim.SGD(trained, lr=0.5), []
    for _ in range(5):
        total, count = model(IDS, positions_of(IDS), labels=IDS)
        (total / count).backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append((total / count).item())
    assert losses[-1] < losses[0] - 0.1


def test_head_embedding_and_norms_keep_their_dtype() -> None:
    model = quantised()
    assert not isinstance(model.output, Linear) and model.output.weight.dtype == torch.float32
    assert all(linear.weight is None for linear in model.linears().values())
