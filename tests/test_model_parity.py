"""Our decoder against transformers' on small random configurations: logits within 1e-4 in fp32."""

from __future__ import annotations

import pytest
import torch
from meta import positions_of, to_hf, toy, whole_weights

from accessory.model import Llama, LlamaConfig

BASE = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 128, "multiple_of": 16, "max_seq_len": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "multi-head": {},
    "grouped-query": {"n_kv_heads": 2},
    "multi-query": {"n_kv_heads": 1},
    "theta 1e6": {"rope_theta": 1e6, "n_kv_heads": 2},
    "linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic scaling beyond the window": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_seq_len": 16},
    "llama3 scaling": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "tied": {"tied": True},
    "qkv bias": {"qkv_bias": True, "n_kv_heads": 2},
    "odd vocabulary": {"vocab_size": 131},
    "ffn multiplier": {"ffn_dim_multiplier": 1.3, "multiple_of": 32},
}


def hf_model(config: LlamaConfig, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """transformers' model of the same sizes with the same weights."""
    import transformers

    scaling = config.rope_scaling or {"rope_type": "default"}
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tied,
        "attn_implementation": "eager",
    }
    if config.qkv_bias:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    missing, unexpected = model.load_state_dict(to_hf(weights, config), strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tied else set()), (missing, unexpected)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name: str) -> None:
    config = LlamaConfig(**{**BASE, **CONFIGS[name]})
    ids = torch.randint(0, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    model = toy(config)
    peer = hf_model(config, whole_weights(Llama(config)))
    with torch.no_grad():
        ours, theirs = model.output(model(ids, positions_of(ids))), peer(ids).logits
    assert ours.std() > 0.1, "logits that hardly differ would prove nothing"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_number_multiplies_positions_as_in_the_reference() -> None:
    ids = torch.arange(20).unsqueeze(0)
    halved = toy(LlamaConfig(**BASE, rope_scaling=0.5))
    linear = toy(LlamaConfig(**BASE, rope_scaling={"rope_type": "linear", "factor": 2.0}))
    torch.testing.assert_close(halved(ids, positions_of(ids)), linear(ids, positions_of(ids)))


def test_fixed_ntk_scaling_is_a_larger_base() -> None:
    ids = torch.arange(20).unsqueeze(0)
    ntk = toy(LlamaConfig(**BASE, rope_scaling={"rope_type": "ntk", "factor": 4.0}))
    larger = toy(LlamaConfig(**BASE, rope_theta=10000.0 * 4 ** (16 / 14)))
    torch.testing.assert_close(ntk(ids, positions_of(ids)), larger(ids, positions_of(ids)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": -1.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"rope_scaling": {"rope_type": "linear", "factor": None}},
        {"rope_scaling": [2.0]},
        {"rope_theta": 0.0},
        {"hidden_dim": 0},
        {"n_kv_heads": 3},
        {"n_heads": 5},
        {"vocab_size": -1},
    ],
)
def test_sizes_that_cannot_work_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="got .* expected|got .* without"):
        Llama(LlamaConfig(**{**BASE, **wrong}))


def test_the_chunked_loss_and_its_gradients_equal_plain_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    from accessory.model import head

    monkeypatch.setattr(head, "CHUNK", 7)
    config = LlamaConfig(**BASE)
    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(2))
    labels = ids.roll(-1, 1).masked_fill(torch.arange(16) % 5 == 0, -100)
    ours, plain = toy(config), toy(config)
    total, count = ours(ids, positions_of(ids), labels=labels)
    (total / count).backward()
    logits = plain.output(plain(ids, positions_of(ids)))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    torch.testing.assert_close(total / count, expected)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_row_without_labels_has_loss_zero_and_zero_gradients() -> None:
    model = toy(LlamaConfig(**BASE))
    ids = torch.arange(8).unsqueeze(0)
    total, count = model(ids, positions_of(ids), labels=torch.full_like(ids, -100))
    total.backward()
    assert total == 0 and count == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
