"""Tensor parallel sizes 1, 2 and 4 agree: outputs, loss, and the gradient of every trainable tensor, within 1e-4."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from meta import fill, held, whole_weights

from accessory.dist import Cut, Ranks, Shard
from accessory.model import Llama, LlamaConfig, cuts_of
from accessory.peft import PeftConfig, apply_peft
from spawn import run_ranks

BASE = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 131, "multiple_of": 16}
LORA = {"lora_rank": 4, "lora_alpha": 8.0, "bias_tuning": True, "norm_tuning": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain, odd vocabulary": ({}, {}),
    "tied, odd vocabulary, qkv bias": ({"tied": True, "qkv_bias": True}, {}),
    "norm-bias and LoRA": ({}, LORA),
    "zero-init adapter": ({}, {"prefix_layers": 1, "prefix_len": 3, "use_prefix_new_gate": True, "bias_tuning": True}),
    "everything, tied": ({"tied": True}, {**LORA, "prefix_layers": 2, "prefix_len": 3}),
}


def build(case: str, shard: Shard) -> Llama:
    """The case's model with this rank's slices of the same random weights."""
    sizes, peft = CASES[case]
    models = [Llama(LlamaConfig(**BASE, **sizes), place) for place in (Shard(), shard)]
    for model in models:
        apply_peft(model, PeftConfig(**peft))
    return fill(models[1], whole_weights(models[0], seed=5))


def run(model: Llama) -> dict[str, torch.Tensor]:
    """A ragged batch of two with a picture; logits, loss, and its gradients by name."""
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, 131, (2, 10), generator=generator)
    features = torch.randn(3, 64, generator=generator).requires_grad_()
    slots = torch.full((2, 10), -1)
    slots[1, 1:4] = torch.arange(3)
    segments = torch.tensor([[1] * 10, [1] * 7 + [-1] * 3])
    labels = ids.roll(-1, 1).masked_fill(segments < 0, -100)
    labels[1, 0:3] = -100
    inputs = {"segments": segments, "features": features, "slots": slots}
    positions = torch.arange(10).expand(2, 10)
    if model.prompt is not None:
        inputs["visual"] = torch.randn(2, 3, 64, generator=generator)
    with torch.no_grad():
        logits = model.output(model(ids, positions, **inputs))
    total, count = model(ids, positions, labels=labels, **inputs)
    (total / count).backward()
    found = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    return {"logits": logits, "loss": total.detach() / count, "grad of features": features.grad, **found}


def on_rank(ranks: Ranks, case: str) -> tuple[dict[str, torch.Tensor], dict[str, Cut]]:
    """What one rank computes."""
    model = build(case, ranks.shard)
    return run(model), cuts_of(model)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_every_gradient_equal_those_of_one_rank(case: str, tp: int) -> None:
    whole = run(build(case, Shard()))
    for rank, (found, cuts) in enumerate(run_ranks(on_rank, tp, case)):
        assert found.keys() == whole.keys()
        for name, tensor in found.items():
            assert tensor is not None and tensor.isfinite().all(), f"{name}: {tensor}"
            expected = whole[name]
            assert expected.any(), f"{name} is all zero: it proves nothing"
            if name.startswith("grad ") and (cut := cuts.get(name[5:])):
                expected = held(expected, cut)
            torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
            assert (tensor - expected).abs().max() < 1e-4, (rank, name)


def test_any_rank_of_a_70b_is_built_on_meta_in_one_process() -> None:
    config = LlamaConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3)
    model = Llama(config, Shard(5, 16), dtype=torch.bfloat16)
    wk = cuts_of(model)["layers.79.attention.wk.weight"]
    assert wk == Cut((1024, 8192), 0, 256, 384, replicas=2)
    assert config.ffn_dim == 28672 and all(p.device.type == "meta" for p in model.parameters())


def test_a_size_that_cannot_be_cut_names_those_that_can() -> None:
    with pytest.raises(ValueError, match=r"tp: got 3, but n_heads 8.*start 1, 2, 4, 8 rank"):
        Llama(LlamaConfig(**BASE), Shard(0, 3))


def test_first_weights_are_the_same_at_any_size() -> None:
    from accessory.model import init_weights

    def weights(shard: Shard) -> dict[str, torch.Tensor]:
        model = Llama(LlamaConfig(**BASE), shard, device="cpu")
        init_weights(model, seed=3)
        return model.state_dict(), cuts_of(model)

    whole, _ = weights(Shard())
    for rank in range(4):
        mine, cuts = weights(Shard(rank, 4))
        for name, cut in cuts.items():
            assert torch.equal(mine[name], held(whole[name], cut)), name
