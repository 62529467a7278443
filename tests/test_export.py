"""`accessory export`: any form, adapters merged, verified, refused by name; transformers is the judge."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import adapters
import hf
import pytest
import torch
from engine_toys import ONE

from accessory.assemble import open_model
from accessory.checkpoint import open_folders
from accessory.cli import main
from accessory.engine import Engine, Request
from accessory.export import verify
from accessory.export.main import main as export


def opened(folder: Path, kind: str = "AutoModelForCausalLM") -> torch.nn.Module:
    """The model as transformers reads the folder; nothing may be missing, left over or drawn."""
    import transformers

    model, said = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    return model.eval()


def greedy(paths: list[Path], **options: Any) -> list[list[int]]:
    """The answers of a model to a few questions."""
    bundle = open_model(paths, ranks=ONE, dtype=torch.float32, **options)
    with Engine(bundle, ONE, rows=1) as engine:
        asked = [Request(text, template="alpaca", max_gen_len=12) for text in ("a cat", "two red squares", "7")]
        return [result.ids for result in engine.generate(asked)]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.Tensor]:
    """A base, an adapter of peft, and peft's logits."""
    work = tmp_path_factory.mktemp("export")
    model = hf.model_of("llama", max_position_embeddings=512)
    base = hf.write(work / "base", model)
    both = adapters.attach(model, work / "adapter", target_modules="all-linear", use_rslora=True)
    return base, work / "adapter", hf.theirs(both)


def words(base: Path, adapter: Path | None, target: Path, **more: Any) -> list[str]:
    """The command's words."""
    given = {"model_name_or_path": base, "export_dir": target, "template": "alpaca", **more}
    given |= {} if adapter is None else {"adapter_name_or_path": adapter}
    return [f"{name}={value}" for name, value in given.items()]


def test_a_merged_export_opens_in_transformers_with_the_adapter_s_logits(tuned: Any, tmp_path: Path) -> None:
    base, adapter, expected = tuned
    assert export(words(base, adapter, tmp_path / "out", export_size=0.0001)) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors.index.json", "chat_template.jinja"} <= names
    assert len([name for name in names if name.startswith("model-")]) > 2
    hf.close(hf.theirs(opened(tmp_path / "out")), expected)
    hf.close(hf.ours(ONE, tmp_path / "out"), expected)


@pytest.mark.parametrize("form", ["hf", "meta", "accessory"])
def test_answers_stay_in_every_form(form: str, tuned: Any, tmp_path: Path) -> None:
    base, adapter, _ = tuned
    assert export(words(base, adapter, tmp_path / "out", export_form=form)) == 0
    assert greedy([tmp_path / "out"]) == greedy([base, adapter])


def test_a_16_bit_export_is_as_near_as_its_dtype_allows(tuned: Any, tmp_path: Path, caplog: Any) -> None:
    base, adapter, expected = tuned
    caplog.set_level(logging.INFO)
    assert export(words(base, adapter, tmp_path / "out", export_dtype="bf16", export_legacy_format="true")) == 0
    assert "the model's own in bfloat16 is" in caplog.text
    assert (tmp_path / "out" / "pytorch_model.bin").is_file()
    assert {spec.dtype for spec in open_folders(tmp_path / "out").specs().values()} == {torch.bfloat16}
    assert 1e-3 < (hf.theirs(opened(tmp_path / "out")) - expected).abs().max() < 0.5


def test_in_16_bits_merged_is_as_near_to_the_adapter_as_that_is_to_32_bits(tuned: Any, tmp_path: Path) -> None:
    base, adapter, _ = tuned
    assert export(words(base, adapter, tmp_path / "out", export_dtype="bf16")) == 0
    beside = logits([base, adapter], torch.bfloat16)
    own = (beside - logits([base, adapter], torch.float32)).abs().max()
    assert 0 < (logits([tmp_path / "out"], torch.bfloat16) - beside).abs().max() <= 2 * own


def logits(paths: list[Path], dtype: torch.dtype) -> torch.Tensor:
    """Of a few ids, computed in this dtype."""
    bundle = open_model(paths, ranks=ONE, dtype=dtype)
    with torch.no_grad():
        return bundle.model.output(bundle.model(hf.IDS, hf.positions_of(hf.IDS)))


def test_a_folder_that_answers_otherwise_is_renamed_and_an_error(
    tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    base, adapter, _ = tuned
    from accessory.checkpoint.huggingface.writer import HuggingFaceWriter

    put = HuggingFaceWriter.put
    swapped = {"layers.0.feed_forward.w1.weight": lambda t: t.flip(0)}
    monkeypatch.setattr(HuggingFaceWriter, "put", lambda w, key, t: put(w, key, swapped.get(key, lambda t: t)(t)))
    assert main(["export", *words(base, adapter, tmp_path / "out")]) == 1
    assert "away from the model's, expected at most" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and (tmp_path / "out.failed" / "config.json").is_file()


def test_an_adapter_is_merged_once(tuned: Any, tmp_path: Path) -> None:
    base, adapter, _ = tuned
    for form in ("hf", "accessory"):
        export(words(base, adapter, tmp_path / form, export_form=form, export_verify="false"))
        with pytest.raises(ValueError, match=r"adapter: this adapter is merged into .* already; give one of them"):
            export(words(tmp_path / form, adapter, tmp_path / "again"))
    export(words(tmp_path / "hf", None, tmp_path / "copy", export_verify="false"))
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["merged_adapters"][0]["adapter"] == str(adapter)


def test_an_adapter_that_changes_nothing_is_an_error(tuned: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter, _ = tuned
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    zero = {name: tensor * (".lora_A." in name) for name, tensor in tensors.items()}
    save_file(zero, tmp_path / "zero" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="what is merged changes none of the 14 weights"):
        export(words(base, tmp_path / "zero", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"quantization_bit": 4}, "quantization_bit: got 4, but nothing is merged into quantised weights"),
        ({"export_dir": ""}, "export_dir: missing"),
        ({"export_size": 0}, "export_size: got 0.0, expected gigabytes above 0"),
        ({"export_form": "meta", "export_family": "llama"}, "export_family: got llama with export_form meta"),
        ({"export_family": "qwen2"}, "family: got qwen2 for a model with qkv_bias False"),
    ],
)
def test_what_cannot_be_is_refused_by_name(more: dict[str, Any], says: str, tuned: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        export(words(tuned[0], tuned[1], tmp_path / "out", **{"export_verify": "false", **more}))


def test_a_folder_that_is_there_is_never_written_to(tuned: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out, which exists, expected a new folder"):
        export(words(tuned[0], tuned[1], tmp_path / "out"))


def test_a_folder_s_name_is_never_read_by_a_shell(tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "a b; touch x && $(touch y) `touch z` 'q' *"
    export(words(tuned[0], tuned[1], odd))
    assert (odd / "model.safetensors").is_file() and [path.name for path in tmp_path.iterdir()] == [odd.name]


def test_swift_s_words_merge_a_checkpoint_beside_itself(tuned: Any, tmp_path: Path) -> None:
    base, adapter, expected = tuned
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": str(base)}))
    (tmp_path / "sft_args.json").write_text(json.dumps({"sft_type": "lora", "dataset": ["mine.jsonl"]}))
    assert main(["export", "--ckpt_dir", str(folder), "--merge_lora", "true"]) == 0
    hf.close(hf.ours(ONE, tmp_path / "checkpoint-2-merged"), expected)
    noted = json.loads((tmp_path / "checkpoint-2-merged" / "sft_args.json").read_text())
    assert noted == {"sft_type": "full", "dataset": ["mine.jsonl"]}


def test_llava_with_its_tower_s_adapter_is_merged_and_verified_with_a_picture(tmp_path: Path) -> None:
    model = hf.model_of("llava", max_position_embeddings=512)
    base = hf.write(tmp_path / "base", model)
    both = adapters.attach(model, tmp_path / "adapter", target_modules=["q_proj", "fc1", "linear_1", "down_proj"])
    told = words(base, tmp_path / "adapter", tmp_path / "out", template="swift/llava-mistral-instruct")
    assert export(told) == 0
    again = opened(tmp_path / "out", "LlavaForConditionalGeneration")
    hf.close(adapters.features(again), adapters.features(both))
    hf.close(hf.theirs(again), hf.theirs(both))


def test_the_largest_difference_counts_and_no_number_is_infinitely_far() -> None:
    one, nan = torch.zeros(2, 3), torch.full((2, 3), float("nan"))
    assert verify.apart([one], [one + 0.5]) == 0.5 and verify.apart([one], [nan]) == float("inf")
    assert verify.apart([one], [one[:1]]) == float("inf")
