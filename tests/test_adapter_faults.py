"""Adapters of other layouts, several on one base, and every one that is refused, by name and in one sentence."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import hf
import pytest
import torch
from engine_toys import ONE
from safetensors.torch import load_file, save_file

from accessory.assemble import open_model
from accessory.checkpoint import open_folders, write_folder
from accessory.checkpoint.huggingface.adapter_config import read_adapter
from accessory.inspect import inspect

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base and two adapters that share a linear, of other ranks and factors."""
    work = tmp_path_factory.mktemp("two")
    base = hf.write(work / "base", hf.model_of("llama"))
    adapters.attach(hf.model_of("llama"), work / "first", target_modules=["q_proj", "up_proj"])
    adapters.attach(
        hf.model_of("llama"), work / "second", seed=8, r=3, lora_alpha=2, target_modules=["q_proj", "v_proj"]
    )
    return base, work / "first", work / "second"


def changed(folder: Path, source: Path, *, tensors: Callable[[Tensors], Tensors] | None = None, **config: Any) -> Path:
    """A copy of an adapter with other tensors or words."""
    folder.mkdir()
    said = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, **config}))
    held = load_file(source / "adapter_model.safetensors")
    save_file(tensors(held) if tensors else held, folder / "adapter_model.safetensors")
    return folder


def test_adapters_add_up(two: tuple[Path, Path, Path]) -> None:
    import peft

    base, first, second = two
    both = peft.PeftModel.from_pretrained(hf.model_of("llama"), str(first)).merge_and_unload()
    both = peft.PeftModel.from_pretrained(both, str(second)).eval()
    expected = hf.theirs(both)
    hf.close(hf.ours(ONE, [base, first, second]), expected)
    merged = open_folders([base, first, second], merge=True)
    plain, cuts = open_folders(base), open_folders(base).cuts()
    pairs = zip(plain.tensors(cuts), merged.tensors(cuts), strict=True)
    differ = {key.split(".")[3] for (key, before), (_, after) in pairs if not torch.equal(before, after)}
    assert differ == {"wq", "wv", "w3"}


def test_an_adapter_lies_on_a_base_of_any_form(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, _ = two
    whole = open_folders(base)
    tokenizer = base / "tokenizer.model"
    tensors = dict(whole.tensors(whole.cuts()))
    write_folder(
        tmp_path / "ours", tensors, config=whole.config, meta={"llama_type": "llama"}, tokenizer=tokenizer, shards=2
    )
    hf.close(hf.ours(ONE, [tmp_path / "ours", first]), hf.ours(ONE, [base, first]))


def test_an_adapter_lies_beside_weights_that_are_stored_in_4_bit(two: tuple[Path, Path, Path]) -> None:
    coarse, plain, bare = (
        open_model(paths, ranks=ONE, dtype=torch.float32, quant=quant).model.layers[0].attention.wq
        for paths, quant in (([*two[:2]], True), ([*two[:2]], False), ([two[0]], True))
    )
    assert coarse.storage is not None and torch.equal(coarse.lora_b.weight, plain.lora_b.weight)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    learned = plain(x) - plain.product(x)
    torch.testing.assert_close(coarse(x) - bare(x), learned, atol=1e-5, rtol=1e-4)


def test_an_adapter_alone_brings_the_base_that_it_names(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, _ = two
    alone = changed(tmp_path / "alone", first, base_model_name_or_path=str(base))
    hf.close(hf.ours(ONE, alone), hf.ours(ONE, [base, first]))
    nameless = changed(tmp_path / "nameless", first, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="nameless: an adapter that names no base; give the base's folder before it"):
        open_folders(nameless)


def test_inspect_describes_an_adapter(two: tuple[Path, Path, Path]) -> None:
    report = inspect(two[1])
    assert report.form == "adapter" and not report.faults and set(report.parts) == {"lora"} and report.partial


@pytest.mark.parametrize("family", ["before 4.52", "original"])
def test_llava_s_older_names_are_read(family: str, tmp_path: Path) -> None:
    model = hf.model_of("llava")
    base = hf.write(tmp_path / "base", model)
    target = r".*(language_model.*|vision_tower.*)\.(q|k|v)_proj"
    both = adapters.attach(model, tmp_path / "new", target_modules=target, modules_to_save=["linear_1", "linear_2"])
    prefixes = {
        "before 4.52": ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector.linear_{}"),
        "original": ("model.", "model.vision_tower.vision_tower.vision_model.", "model.mm_projector.{}"),
    }[family]

    def older(tensors: Tensors) -> Tensors:
        renamed = {}
        for name, tensor in tensors.items():
            for at, now in enumerate(("model.language_model.", "model.vision_tower.")):
                name = name.replace(f"base_model.model.{now}", f"base_model.model.{prefixes[at]}")
            for old, number in (("1", "0"), ("2", "2")):
                now = prefixes[2].format(old if family == "before 4.52" else number)
                name = name.replace(f"model.multi_modal_projector.linear_{old}", now)
            renamed[name] = tensor
        return renamed

    folder = changed(tmp_path / "old", tmp_path / "new", tensors=older, target_modules=["q_proj", "k_proj", "v_proj"])
    hf.close(hf.ours(ONE, [base, folder]), hf.theirs(both))
    seen = open_model([base, folder], ranks=ONE, dtype=torch.float32).model.vision
    with torch.no_grad():
        hf.close(seen(adapters.PIXELS), adapters.features(both))


def test_the_original_llava_s_lora_folder_makes_a_llava_of_a_plain_base(tmp_path: Path) -> None:
    model = hf.model_of("llava")
    state = model.state_dict()
    text = hf.model_of("llama")
    inner = {name.replace("model.language_model.", "model."): value for name, value in state.items()}
    text.load_state_dict({name: inner[name] for name in text.state_dict()})
    base = hf.write(tmp_path / "vicuna", text)
    tower = {
        name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.vision_tower")
    }
    tower = {name.replace("vision_tower.", "vision_model."): value.contiguous() for name, value in tower.items()}
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": hf.CLIP}))
    save_file(tower, tmp_path / "clip" / "model.safetensors")
    both = adapters.attach(model, tmp_path / "new", target_modules=r".*language_model.*\.(q|k|v)_proj")
    lora = changed(
        tmp_path / "llava-lora",
        tmp_path / "new",
        tensors=lambda held: {name.replace(".model.language_model.", ".model."): t for name, t in held.items()},
        target_modules=["q_proj", "k_proj", "v_proj"],
    )
    names = {"linear_1": "mm_projector.0", "linear_2": "mm_projector.2"}
    projector = {
        f"base_model.model.model.{new}.{leaf}": state[f"model.multi_modal_projector.{old}.{leaf}"]
        for old, new in names.items()
        for leaf in ("weight", "bias")
    }
    torch.save(projector, lora / "non_lora_trainables.bin")
    said = json.loads((base / "config.json").read_text())
    said |= {"model_type": "llava_llama", "mm_vision_tower": str(tmp_path / "clip"), "mm_projector_type": "mlp2x_gelu"}
    (lora / "config.json").write_text(json.dumps({**said, "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"}))
    bundle = open_model([base, lora], ranks=ONE, dtype=torch.float32)
    assert bundle.llama_type == "llava" and bundle.vision.aspect == "pad"
    hf.close(hf.ours(ONE, [base, lora]), hf.theirs(both))
    with torch.no_grad():
        hf.close(bundle.model.vision(adapters.PIXELS), adapters.features(both))


SAID = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected LORA"),
        ({"use_dora": True}, "use_dora is set, which is not computed here"),
        ({"use_qalora": True, "layer_replication": [[0, 1]]}, "layer_replication, use_qalora is set"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config is set"),
        ({"target_parameters": ["w"]}, "target_parameters is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
        ({"r": 0}, "r is 0, lora_alpha 8, bias 'none', expected a positive rank"),
        ({"bias": "some"}, "bias 'some', expected .* none, all, lora_only"),
        ({"target_modules": "(q"}, "target_modules is '\\(q', expected a regular expression"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern is .*, expected an object of positive numbers"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(said: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"here: .*{says}"):
        read_adapter({**SAID, **said}, where="here")


def test_modules_are_chosen_as_peft_chooses_them() -> None:
    names = [f"model.layers.{n}.{block}" for n in range(11) for block in ("self_attn.q_proj", "mlp.up_proj")]
    names += ["lm_head", "model.vision_tower.encoder.layers.1.self_attn.q_proj"]
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    for said in (
        {"target_modules": ["q_proj"]},
        {"target_modules": ["layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"]},
        {"target_modules": r".*layers\.[0-3]\..*q_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 10]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "exclude_modules": r".*vision_tower.*"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    ):
        theirs = LoraConfig(**said)
        expected = [name for name in names if check_target_module_exists(theirs, name)]
        found = read_adapter({**SAID, **said}, where="here")
        excluded = [name for name in expected if "Excluded" in type(check_target_module_exists(theirs, name)).__name__]
        assert [name for name in names if found.reaches(name)] == [name for name in expected if name not in excluded]


def test_an_adapter_is_not_put_on_twice(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, second = two
    again = tmp_path / "again"
    shutil.copytree(first, again)
    for merge in (False, True):
        with pytest.raises(ValueError, match=r"again: this adapter is given already, as .*first; give it once"):
            open_folders([base, first, second, again], merge=merge)


def test_what_was_trained_whole_wins_over_the_original_beside_it(tmp_path: Path) -> None:
    base = hf.write(tmp_path / "base", hf.model_of("llama"))
    adapters.attach(hf.model_of("llama"), tmp_path / "plain", modules_to_save=["lm_head"])
    head = "base_model.model.lm_head"

    def unfiltered(held: Tensors) -> Tensors:
        trained = held.pop(f"{head}.weight")
        more = {f"{head}.modules_to_save.default.weight": trained, f"{head}.original_module.weight": trained * 0}
        return {**held, **more}

    raw = changed(tmp_path / "raw", tmp_path / "plain", tensors=unfiltered)
    hf.close(hf.ours(ONE, [base, raw]), hf.ours(ONE, [base, tmp_path / "plain"]))


@pytest.mark.parametrize(
    ("name", "other", "says"),
    [
        ("lm_head.weight", "lm_head.modules_to_save.default.weight", "are both base_model.model.lm_head.weight; keep"),
        ("x.lora_A.first.weight", "x.lora_A.second.weight", "x.lora_A.first.weight are one factor; keep one"),
    ],
)
def test_two_names_of_one_tensor_are_refused(
    name: str, other: str, says: str, two: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    more = {f"base_model.model.{each}": torch.ones(3, 3) for each in (name, other)}
    twice = changed(tmp_path / "twice", two[1], tensors=lambda held: {**held, **more})
    with pytest.raises(ValueError, match=says):
        open_folders([two[0], twice])


def without(part: str) -> Callable[[Tensors], Tensors]:
    """Tensors without those whose name holds a part."""
    return lambda held: {name: tensor for name, tensor in held.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": 5}, "has A \\(4, 64\\) and B \\(96, 4\\), expected rank 5 by adapter_config.json"),
        ({"target_modules": ["q_proj"]}, "holds LoRA on .*up_proj, which target_modules .* do not reach"),
        ({"tensors": without("0.self_attn.q_proj.lora_B")}, "0.self_attn.q_proj has no lora_B"),
        ({"tensors": without("layers.1.self_attn.q_proj")}, "lacks model.layers.1.self_attn.q_proj, which target_modu"),
        (
            {"tensors": lambda held: {**held, "base_model.model.x.lora_magnitude_vector": torch.ones(3)}},
            "lora_magnitude_vector: no part of plain LoRA",
        ),
        (
            {
                "tensors": lambda held: {
                    **held,
                    **{n.replace("layers.1", "layers.7"): t.clone() for n, t in held.items()},
                }
            },
            "lora_modules: got layers.7.* which this model does not have",
        ),
        ({"tensors": lambda held: {n: t[:32] if "lora_B" in n else t for n, t in held.items()}}, "misshaped"),
        ({"tensors": lambda held: {"base_model.model.model.norm.weight": torch.ones(64)}}, "bad: holds no LoRA"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    change: dict[str, Any], says: str, two: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder = changed(tmp_path / "bad", two[1], **change)
    with pytest.raises(ValueError, match=says):
        open_model([two[0], folder], ranks=ONE, dtype=torch.float32)


def test_an_adapter_of_another_base_is_refused(
    two: tuple[Path, Path, Path], tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, first, _ = two
    torch.manual_seed(9)
    other = hf.model_of("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    strange = hf.write(tmp_path / "strange", other)
    named = changed(tmp_path / "named", first, base_model_name_or_path=str(base))
    with pytest.raises(ValueError, match=r"named: an adapter for .*/base, got .*/strange, whose weights are others"):
        open_folders([strange, named])
    half = open_folders(base)
    tensors = dict(half.tensors(half.cuts(), dtype=torch.bfloat16))
    write_folder(tmp_path / "half", tensors, config=half.config, meta={"llama_type": "llama"})
    open_folders([tmp_path / "half", named])  # the same model in another dtype and form
    monkeypatch.setattr("accessory.checkpoint.hub.cached", {"someone/llama": base}.get)
    hers = changed(tmp_path / "hers", first, base_model_name_or_path="someone/llama")
    with pytest.raises(ValueError, match=r"hers: an adapter for someone/llama, got .*/strange, whose weights are oth"):
        open_folders([strange, hers])
    open_folders([base, hers])
    caplog.set_level(logging.WARNING)
    elsewhere = changed(tmp_path / "elsewhere", first, base_model_name_or_path="someone/vicuna")
    open_folders([base, elsewhere])
    assert "says that it is for someone/vicuna; it is put on" in caplog.text


def test_an_adapter_on_linears_with_lora_of_their_own_is_refused_unless_merged(
    two: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, first, second = two
    tuned = open_folders([base, first])
    tensors = dict(tuned.tensors(tuned.cuts()))
    config = {**tuned.config, "bias_tuning": False, "norm_tuning": False}
    tokenizer = base / "tokenizer.model"
    write_folder(tmp_path / "own", tensors, config=config, meta={"llama_type": "llama_peft"}, tokenizer=tokenizer)
    hf.close(hf.ours(ONE, tmp_path / "own"), hf.ours(ONE, [base, first]))
    with pytest.raises(ValueError, match="LoRA of its own in .*own; merge that first"):
        open_folders([tmp_path / "own", second])
    merged = open_folders([tmp_path / "own", second], merge=True)
    plain = open_folders([base, first, second], merge=True)
    pairs = zip(merged.tensors(merged.cuts()), plain.tensors(merged.cuts()), strict=True)
    for (key, mine), (_, expected) in pairs:
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5, msg=key)


def test_lora_on_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    model = hf.model_of("llama", tie_word_embeddings=True)
    base = hf.write(tmp_path / "base", model)
    adapters.attach(hf.model_of("llama"), tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(ValueError, match="LoRA on output of a model that ties head and embedding"):
        open_folders([base, tmp_path / "adapter"])
