"""What PEFT adds, and that what it adds first changes nothing; LoRA against the peer's definition."""

from __future__ import annotations

import pytest
import torch
from meta import fill, positions_of, toy, whole_weights

from accessory.model import Llama, LlamaConfig, init_weights
from accessory.peft import PeftConfig, apply_peft, init_peft, trainable_names

CONFIG = LlamaConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=100, multiple_of=16)
IDS = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(4))


def with_peft(**peft: object) -> Llama:
    """A random model with PEFT at its first values."""
    model = Llama(CONFIG, device="cpu")
    apply_peft(model, PeftConfig(**peft), device="cpu")
    init_weights(model, seed=1)
    init_peft(model, seed=1)
    return model


@pytest.mark.parametrize(
    "peft",
    [
        {"lora_rank": 4},
        {"bias_tuning": True, "norm_tuning": True},
        {"prefix_layers": 2, "prefix_len": 3, "use_prefix_new_gate": True},
    ],
)
def test_a_fresh_method_changes_no_output_and_no_base_key(peft: dict) -> None:
    plain, tuned = with_peft(), with_peft(**peft)
    assert set(plain.state_dict()) < set(tuned.state_dict())
    assert torch.equal(plain(IDS, positions_of(IDS)), tuned(IDS, positions_of(IDS)))


def test_first_values_leave_the_biases_of_the_base_alone() -> None:
    model = toy(LlamaConfig(dim=64, n_layers=1, n_heads=4, vocab_size=100, multiple_of=16, qkv_bias=True))
    apply_peft(model, PeftConfig(bias_tuning=True), device="cpu")
    before = model.layers[0].attention.wq.bias.clone()
    init_peft(model)
    assert torch.equal(model.layers[0].attention.wq.bias, before) and not model.layers[0].attention.wo.bias.any()
    init_peft(model, names={"layers.0.attention.wq.bias"})
    assert not model.layers[0].attention.wq.bias.any()


def test_only_the_chosen_parameters_are_trainable() -> None:
    model = with_peft(lora_rank=2, bias_tuning=True, norm_tuning=True)
    config = PeftConfig(lora_rank=2, bias_tuning=True, norm_tuning=True)
    names = trainable_names(model, config)
    assert {n for n in names if n.endswith("lora_a.weight")} and "norm.weight" in names
    assert len(names) == 3 * (7 * 3 + 2) + 1
    assert not any(n.endswith(("wq.weight", "output.weight", "tok_embeddings.weight")) for n in names)


def test_a_method_that_would_train_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="trains nothing"):
        trainable_names(with_peft(), PeftConfig())


def test_the_adapter_leaves_keys_and_values_without_bias() -> None:
    model = with_peft(prefix_layers=3, bias_tuning=True)
    attention = model.layers[0].attention
    assert attention.wk.bias is None and attention.wv.bias is None and attention.wq.bias is not None


def test_lora_equals_the_merged_weight() -> None:
    config = PeftConfig(lora_rank=4, lora_alpha=8.0)
    model = Llama(CONFIG)
    apply_peft(model, config)
    weights = whole_weights(model, seed=2)
    fill(model, weights)
    merged = dict(weights)
    for name in weights:
        if name.endswith("lora_b.weight"):
            base = name.removesuffix("lora_b.weight")
            merged[base + "weight"] = merged[base + "weight"] + 2.0 * weights[name] @ weights[base + "lora_a.weight"]
    plain = fill(Llama(CONFIG), {k: v for k, v in merged.items() if ".lora_" not in k})
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, positions_of(IDS)), plain(IDS, positions_of(IDS)), atol=1e-4, rtol=1e-4)


def test_logits_with_lora_equal_those_of_the_peft_library() -> None:
    import peft
    from test_model_parity import hf_model

    ours = Llama(CONFIG)
    apply_peft(ours, PeftConfig(lora_rank=4, lora_alpha=16.0, lora_targets=("wv", "wo", "w1", "w2")))
    weights = whole_weights(ours, seed=2)
    fill(ours, weights)
    base = hf_model(CONFIG, {k: v for k, v in weights.items() if ".lora_" not in k})
    names = {"wv": "self_attn.v_proj", "wo": "self_attn.o_proj", "w1": "mlp.gate_proj", "w2": "mlp.down_proj"}
    targets = [name.rpartition(".")[2] for name in names.values()]
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets))
    state = theirs.state_dict()
    for name in [n for n in weights if ".lora_" in n]:
        _, layer, _, linear, factor, _ = name.split(".")
        key = f"base_model.model.model.layers.{layer}.{names[linear]}.lora_{factor[-1].upper()}.default.weight"
        state[key].copy_(weights[name])
    with torch.no_grad():
        logits = ours.output(ours(IDS, positions_of(IDS)))
        torch.testing.assert_close(logits, theirs.eval()(IDS).logits, atol=1e-4, rtol=0)


def test_a_zero_init_prompt_is_what_the_formula_says() -> None:
    model = Llama(LlamaConfig(dim=16, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=20, multiple_of=8))
    apply_peft(model, PeftConfig(prefix_layers=1, prefix_len=3))
    fill(model, whole_weights(model, seed=3))
    attention, prefix = model.layers[0].attention, model.prefix[0]
    q = torch.randn(2, 5, 4, 4)
    step = model._step(torch.arange(5).expand(2, 5), None, None, None)
    extra = model.prompt.begin(model, step, None)(0, q).unflatten(-1, (4, 4))
    for head in range(4):
        rows = slice(head // 2 * 4, head // 2 * 4 + 4)
        keys, values = prefix[0] @ attention.wk.weight[rows].T, prefix[0] @ attention.wv.weight[rows].T
        expected = (q[:, :, head] @ keys.T / 2).softmax(-1) @ values * model.prefix_gate[0, head].tanh()
        torch.testing.assert_close(extra[:, :, head], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_stored_prompts_equal_prompts_computed_in_the_forward() -> None:
    model = Llama(CONFIG)
    apply_peft(model, PeftConfig(prefix_layers=2, prefix_len=3))
    fill(model, whole_weights(model, seed=3))
    visual = torch.randn(2, 3, 64)
    whole = model(IDS, positions_of(IDS), visual=visual)
    cache = model.new_cache(rows=4, size=9)
    rows = torch.tensor([3, 1])
    model.prompt.store(model, cache, rows, visual)
    parts = [model(IDS[:, a:b], torch.arange(a, b).expand(2, -1), cache=cache, rows=rows) for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
    assert not torch.allclose(whole, model(IDS, positions_of(IDS)), atol=1e-3), "the picture must matter"


@pytest.mark.parametrize(
    ("peft", "word"),
    [
        ({"lora_rank": 2, "lora_targets": ("q_projection",)}, "lora_targets"),
        ({"prefix_layers": 2, "prefix_len": 0}, "prefix_len"),
        ({"prefix_layers": 9}, "prefix_layers"),
        ({"prefix_layers": -1}, "prefix_layers"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ],
)
def test_values_that_cannot_work_are_refused(peft: dict, word: str) -> None:
    with pytest.raises(ValueError, match=f"{word}: got .* expected"):
        apply_peft(Llama(CONFIG), PeftConfig(**peft))


def test_rank_stabilised_scaling_divides_by_the_root() -> None:
    assert PeftConfig(lora_rank=16, lora_alpha=8.0, lora_rslora=True).lora_scale == 2.0
    assert PeftConfig(lora_rank=16, lora_alpha=8.0).lora_scale == 0.5 and PeftConfig(lora_rank=16).lora_scale == 1.0


def test_a_frozen_base_gives_gradients_to_peft_alone() -> None:
    model = toy(CONFIG).requires_grad_(False)
    apply_peft(model, PeftConfig(lora_rank=2), device="cpu")
    init_peft(model)
    total, _ = model(IDS, positions_of(IDS), labels=IDS)
    total.backward()
    assert all((p.grad is not None) == (".lora_" in n) for n, p in model.named_parameters())
