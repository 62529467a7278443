"""Which parameters a setting trains, how many they are, and the settings that would train nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_toys import ONE, TOWER, VISION, opened, write_model
from trainee_toys import SEES, SIZES, Case, batches

from accessory.assemble import build, read_spec
from accessory.dist import Shard
from accessory.model import Llama, LlamaConfig
from accessory.model.llama import init_weights
from accessory.peft import PeftConfig, init_peft
from accessory.train.parts import Parts, choose_parts, peft_config, table
from accessory.train.settings import Settings
from accessory.train.start import Start, _check_absent
from accessory.train.trainee import Trainee

PROJECTION = {"vision.proj.0.bias", "vision.proj.1.bias"}


def chosen(
    *, kind: str = "llama", config: dict[str, Any] | None = None, pictures: bool = False, **settings: Any
) -> Parts:
    """The parts of a model on the meta device."""
    wanted = Settings(**settings)
    spec = read_spec({**SIZES, "max_seq_len": 64, **(config or {}), **peft_config(wanted)}, llama_type=kind)
    return choose_parts(build(spec), wanted, pictures=pictures)


def test_lora_of_rank_8_on_llama_2_7b_has_the_published_number_of_parameters() -> None:
    settings = Settings(finetuning_type="lora", lora_rank=8)
    config = {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000, "max_seq_len": 4096}
    model = build(read_spec({**config, **peft_config(settings)}, llama_type="llama_peft"), dtype=torch.bfloat16)
    parts = choose_parts(model, settings, pictures=False)
    assert parts.trained == 19_988_480 and parts.llm.total - parts.trained == 6_738_415_616
    cut = build(read_spec({**config, **peft_config(settings)}, llama_type="llama_peft"), shard=Shard(1, 4))
    assert choose_parts(cut, settings, pictures=False).trained == 19_988_480
    assert any("19,988,480" in line and "lora" in line for line in table(parts))


@pytest.mark.parametrize(
    ("kind", "settings", "marks"),
    [
        ("llama", {}, None),
        ("llama_peft", {"finetuning_type": "lora"}, {"lora_a", "lora_b"}),
        ("llama_peft", {"finetuning_type": "norm_bias"}, {"bias", "norm"}),
        ("llama_peft", {"finetuning_type": "norm_bias_lora"}, {"bias", "norm", "lora_a", "lora_b"}),
        ("llama_peft", {"finetuning_type": "bias"}, {"bias"}),
        ("llama_adapter", {"finetuning_type": "adapter"}, {"bias", "norm", "prefix"}),
    ],
)
def test_a_finetuning_type_trains_what_it_says(kind: str, settings: dict[str, Any], marks: set[str] | None) -> None:
    parts = chosen(kind=kind, **settings)
    wanted = Settings(**settings)
    model = build(read_spec({**SIZES, "max_seq_len": 64, **peft_config(wanted)}, llama_type=kind))
    names = {name for name, _ in model.named_parameters()}
    expected = names if marks is None else {name for name in names if any(mark in name for mark in marks)}
    assert parts.names == expected and parts.projector.names == parts.vision.names == ()
    assert marks is None or {mark for mark in marks if any(mark in name for name in parts.names)} == marks


def test_only_the_chosen_parameters_require_gradients() -> None:
    settings = Settings(finetuning_type="norm_bias")
    model = build(read_spec({**SIZES, "max_seq_len": 64, **peft_config(settings)}, llama_type="llama_peft"))
    parts = choose_parts(model, settings, pictures=False)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == parts.names


@pytest.mark.parametrize(("count", "layers"), [(1, {1}), (2, {0, 1}), (-1, {0})])
def test_freeze_trains_the_last_layers_or_the_first(count: int, layers: set[int]) -> None:
    parts = chosen(finetuning_type="freeze", freeze_trainable_layers=count)
    assert {int(name.split(".")[1]) for name in parts.names} == layers


@pytest.mark.parametrize(
    ("settings", "projector", "vision"),
    [
        ({}, "all", "none"),
        ({"train_projector": "frozen"}, "none", "none"),
        ({"train_projector": "lora"}, "lora", "none"),
        ({"finetuning_type": "frozen", "train_vision": "full"}, "all", "all"),
        ({"train_vision": "lora"}, "all", "lora"),
    ],
)
def test_projector_and_tower_are_trained_apart(settings: dict[str, Any], projector: str, vision: str) -> None:
    parts = chosen(kind="llama_qformerv2", config=SEES, pictures=True, projector_lr=1e-3, vision_lr=1e-4, **settings)
    for part, how in ((parts.projector, projector), (parts.vision, vision)):
        lora = [".lora_" in name for name in part.names]
        assert (how == "none") == (not lora) and (how != "lora" or all(lora))
        assert how != "all" or part.trained == part.total > 0
    assert all(name.startswith("vision.tower.") for name in parts.vision.names)
    assert not any(name.startswith("vision.tower.") for name in parts.projector.names)
    assert (parts.llm.lr, parts.projector.lr, parts.vision.lr) == (5e-5, 1e-3, 1e-4)


def test_without_pictures_in_the_data_the_projector_rests() -> None:
    assert chosen(kind="llama_qformerv2", config=SEES).projector.names == ()


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("qformer", {"finetuning_type": "norm_bias"}, PROJECTION),
        ("clip", {"finetuning_type": "norm_bias_lora"}, PROJECTION | {"vision.proj.1.weight"}),
        ("clip", {"finetuning_type": "bias"}, PROJECTION),
        ("clip", {"finetuning_type": "norm_bias", "train_projector": "frozen"}, set()),
    ],
)
def test_norm_and_bias_tuning_reaches_the_projection_as_the_references_does(
    kind: str, settings: dict[str, Any], expected: set[str]
) -> None:
    config = {"vision": {"kind": kind, "image_size": 16, "tower_args": TOWER, **VISION[kind]}}
    llama = {"qformer": "llama_qformerv2_peft", "clip": "llama_peft"}[kind]
    assert set(chosen(kind=llama, config=config, pictures=True, **settings).projector.names) == expected


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"finetuning_type": "frozen"}, "finetuning_type: got frozen"),
        ({"train_vision": "full"}, "train_vision: got full, but there is no vision part"),
        ({"train_projector": "full"}, "train_projector: got full, but there is no vision part"),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 0}, "freeze_trainable_layers: got 0"),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": -3}, "freeze_trainable_layers: got -3"),
    ],
)
def test_a_part_that_would_train_nothing_is_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        chosen(**settings)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_rslora": True}, "lora_alpha: missing beside use_rslora"),
        ({"seed": -1}, "seed: got -1"),
        ({"save_steps": -1}, "save_steps: got -1"),
        ({"eval_steps": 0}, "eval_steps: got 0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers: got -1"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size: got 0"),
    ],
)
def test_settings_that_would_do_nothing_or_make_no_sense_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Settings(**settings).check()


def test_a_part_that_only_pictures_teach_is_refused_without_pictures() -> None:
    for part in ("train_projector", "train_vision"):
        with pytest.raises(ValueError, match=f"{part}: got full, but there is no picture in the data"):
            chosen(kind="llama_qformerv2", config=SEES, **{part: "full"})


def test_a_method_whose_parameters_were_not_built_is_refused() -> None:
    model = Llama(LlamaConfig(**SIZES))
    for kind in ("lora", "norm_bias", "adapter"):
        with pytest.raises(ValueError, match="expected"):
            choose_parts(model, Settings(finetuning_type=kind), pictures=False)


def test_lora_outside_the_decoder_needs_linears_there() -> None:
    with pytest.raises(ValueError, match="vision_lora_rank: got 8 for a model without linears"):
        chosen(train_vision="lora")


def test_what_the_model_has_is_kept_under_a_new_method() -> None:
    stored = PeftConfig(bias_tuning=True, norm_tuning=True)
    fields = peft_config(Settings(finetuning_type="lora"), stored=stored)
    assert fields["bias_tuning"] and fields["lora_rank"] == 8
    parts = chosen(kind="llama_peft", config={"bias_tuning": True}, finetuning_type="lora")
    assert all(".lora_" in name for name in parts.names)


def test_a_model_with_lora_everywhere_opens_again_and_answers_the_same(tmp_path: Path) -> None:
    config = {"lora_rank": 4, "projector_lora_rank": 4, "vision_lora_rank": 2, "lora_alpha": 8.0}
    folder = write_model(tmp_path / "model", "llama_qformerv2_peft", **config)
    model = opened(folder).model
    keys = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert {"vision.proj.0.lora_a.weight", "vision.tower.blocks.0.attn.qkv.lora_b.weight"} < keys
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        with_lora = model.vision(pixels)
        qkv = model.vision.tower.blocks[0].attn.qkv
        x = torch.randn(3, qkv.in_features)
        merged = qkv.weight + 4.0 * qkv.lora_b.weight @ qkv.lora_a.weight  # alpha 8 / rank 2
        torch.testing.assert_close(qkv(x), x @ merged.T + qkv.bias, atol=1e-4, rtol=1e-4)
        for name in keys:
            if name.endswith("lora_b.weight"):
                model.get_parameter(name).zero_()
        assert not torch.allclose(model.vision(pixels), with_lora, atol=1e-2)


def test_types_without_peft_may_have_lora_on_their_vision_part(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama_qformerv2", projector_lora_rank=2)
    assert any(".lora_" in name for name, _ in opened(folder).model.named_parameters())


def test_fresh_lora_on_the_vision_part_changes_nothing() -> None:
    settings = Settings(train_projector="lora", train_vision="lora")
    config = {**SIZES, "max_seq_len": 64, **SEES, **peft_config(settings)}
    model = build(read_spec(config, llama_type="llama_qformerv2")).to_empty(device="cpu")
    init_weights(model, seed=1)
    init_peft(model, seed=1)
    model.vision.init_weights(torch.Generator().manual_seed(0))  # also after LoRA was added
    lora_b = [p for name, p in model.vision.named_parameters() if name.endswith("lora_b.weight")]
    assert lora_b and not any(p.any() for p in lora_b)
    parts = choose_parts(model, settings, pictures=True)
    trainee = Trainee(model, parts, ONE, dtype=torch.float32)
    case = Case(config=SEES, pictures=True)
    trainee.forward_backward(batches(case, 0, 0), scale=1.0, last=True)
    trainee.clip(0)
    for name in (*parts.projector.names, *parts.vision.names):
        assert trainee.masters[name].grad.any() == name.endswith("lora_b.weight"), name


def test_biases_of_the_base_itself_are_missed_and_those_that_a_method_adds_are_not() -> None:
    spec = read_spec({**SIZES, "max_seq_len": 64, "qkv_bias": True, "bias_tuning": True}, llama_type="llama_peft")
    start = Start(spec, None, None, torch.float32, "alpaca", build(spec))
    _check_absent({"layers.0.attention.wo.bias"}, Settings(), start, blind=None)
    with pytest.raises(ValueError, match=r"lack 1 tensors of the model \(layers.0.attention.wq.bias"):
        _check_absent({"layers.0.attention.wq.bias"}, Settings(), start, blind=None)
