"""What LoRA's training leaves on a Hugging Face base: an adapter that peft opens, at the end and in checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapters
import hf
import pytest
import torch
from engine_toys import ONE
from safetensors.torch import load_file
from train_runs import sums, train

from accessory.assemble import build, read_spec
from accessory.checkpoint import open_folders
from accessory.export.main import main as export
from accessory.train.main import main
from accessory.train.parts import choose_parts, lora_targets, peft_config
from accessory.train.settings import Settings

LORA: dict[str, Any] = {"finetuning_type": "lora", "lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.1}
SHORT: dict[str, Any] = {"max_steps": 2, "cutoff_len": 384, "learning_rate": 0.05, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A small base of transformers, with room for a row."""
    model = hf.model_of("llama", max_position_embeddings=512)
    return hf.write(tmp_path_factory.mktemp("base") / "model", model), model


def fresh() -> torch.nn.Module:
    """The same model, untouched by an earlier adapter."""
    return hf.model_of("llama", max_position_embeddings=512)


def run(folder: Path, base: Path, **settings: Any) -> Path:
    """A short run in this process."""
    given = {**LORA, **SHORT, "model_name_or_path": base, "dataset": sums(folder), "output_dir": folder / "run"}
    given |= {"cache_dir": folder / "cache", "report_to": "none", "plot_loss": "false", "device": "cpu"}
    given |= {"precision": "fp32", "dataloader_num_workers": 0, "preprocessing_num_workers": 1, **settings}
    assert main([f"{name}={value}" for name, value in given.items()]) == 0
    return folder / "run"


def test_a_run_on_two_ranks_leaves_adapters_that_peft_opens_with_our_logits(base: Any, tmp_path: Path) -> None:
    train(
        tmp_path,
        **{**LORA, **SHORT, "precision": "fp32", "nproc_per_node": 2, "tensor_parallel_size": 2},
        model_name_or_path=base[0],
        dataset=sums(tmp_path),
        output_dir=tmp_path / "run",
    )
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        mine = hf.ours(ONE, [base[0], folder])
        hf.close(mine, hf.theirs(adapters.reopened(fresh(), folder)))
        assert (mine - hf.theirs(base[1])).abs().max() > 1e-3, "the run must have learned something"
    told = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(base[0]) and told["lora_dropout"] == 0.1
    hf.close(hf.ours(ONE, tmp_path / "run"), mine)


def test_training_goes_on_from_an_adapter(base: Any, tmp_path: Path) -> None:
    adapters.attach(fresh(), tmp_path / "first", r=3, target_modules=["q_proj", "down_proj"])
    folder = run(tmp_path, base[0], adapter_name_or_path=tmp_path / "first", lora_target="v_proj", max_steps=1)
    told = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(told["target_modules"]) == ["down_proj", "q_proj", "v_proj"]
    mine = hf.ours(ONE, [base[0], folder])
    hf.close(mine, hf.theirs(adapters.reopened(fresh(), folder)))
    assert (mine - hf.ours(ONE, [base[0], tmp_path / "first"])).abs().max() > 1e-4


def test_what_peft_has_no_place_for_lies_beside_the_adapter(base: Any, tmp_path: Path, caplog: Any) -> None:
    folder = run(tmp_path, base[0], finetuning_type="norm_bias_lora", save_adapter="true", max_steps=1)
    beside = load_file(folder / "accessory.safetensors")
    assert beside and all(name.endswith(".bias") for name in beside)
    assert "accessory.safetensors, which only Accessory reads" in caplog.text
    told = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(told["modules_to_save"]) == ["input_layernorm", "model.norm", "post_attention_layernorm"]
    hf.close(hf.ours(ONE, [base[0], folder]), hf.ours(ONE, [base[0], folder / "checkpoint-1"]))


def test_a_base_in_another_form_keeps_accessory_s_form_unless_asked(tmp_path: Path) -> None:
    from accessory.assemble import TINY

    folder = run(tmp_path, TINY, max_steps=1, save_steps=0, only_save_trainable="true", lora_target="q_proj")
    assert not (folder / "adapter_config.json").exists() and list(folder.glob("consolidated.*"))
    words = [f"model_name_or_path={TINY}", f"adapter_name_or_path={folder}", f"export_dir={tmp_path / 'merged'}"]
    assert export([*words, "export_form=accessory"]) == 0
    merged = open_folders(tmp_path / "merged")
    assert merged.meta["llama_type"] == "llama_qformerv2" and not any(".lora_" in key for key in merged.specs())


def parts_of(folder: Path, *, pictures: bool = True, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """What settings train of a folder's model."""
    checkpoint = open_folders(folder)
    words = Settings(**{"finetuning_type": "lora", "lora_rank": 2, **settings})
    kind = checkpoint.meta["llama_type"]
    fields = peft_config(words, sees=kind == "llava")
    spec = read_spec({**checkpoint.config, **fields}, llama_type=f"{kind}_peft")
    return choose_parts(build(spec), words, pictures=pictures), fields


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaVA."""
    return hf.write(tmp_path_factory.mktemp("llava") / "model", hf.model_of("llava"))


def test_a_suffix_never_reaches_the_vision_tower(llava: Path) -> None:
    parts, _ = parts_of(llava, lora_target=["q_proj", "k_proj", "v_proj"], train_projector="frozen")
    assert not parts.vision.names and not parts.projector.names
    assert {name.split(".")[3] for name in parts.llm.names} == {"wq", "wk", "wv"}


def test_scopes_reach_every_part_that_is_read(llava: Path) -> None:
    parts, _ = parts_of(llava, lora_target=["all", "projector:all", "vision:all"])
    assert (parts.projector.mode, parts.vision.mode) == ("lora", "lora")
    blocks = {name.split(".")[3] for name in parts.vision.names if ".blocks." in name}
    assert blocks == {"0", "1"}, "the last block is behind the layer that is read"
    assert all(part.trained > 0 for part in parts) and all(".lora_" in name for name in parts.names)


def test_everywhere_means_what_there_is(base: Any) -> None:
    assert lora_targets(Settings(finetuning_type="lora", lora_target=["all", "vision:all"]), sees=False)["vision"] == ()
    parts, _ = parts_of(base[0], lora_target=["all", "projector:all", "vision:all"], pictures=False)
    assert parts.llm.trained and not parts.vision.names


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora_target": ["vision:q_proj", "all"]}, "expected q_proj, k_proj and v_proj together"),
        ({"lora_target": ["all", "vision:fc9"]}, "vision_lora_targets: got fc9, which no linear of the vision part is"),
        ({"lora_target": ["vision:all"]}, "expected linears of the language model too"),
        ({"lora_target": ["all", "vision:all"], "train_vision": "full"}, "train_vision: got full with vision:all in"),
        ({"lora_target": ["queries"]}, "lora_target: got queries, expected some of q_proj"),
        ({"lora_target": ["all", "vision:all"], "pictures": False}, "train_vision: got lora, but there is no picture"),
    ],
)
def test_targets_that_would_train_nothing_or_contradict_are_refused(settings: Any, says: str, llava: Path) -> None:
    with pytest.raises(ValueError, match=says):
        parts_of(llava, **settings)


def test_lora_in_the_tower_gets_real_gradients(llava: Path) -> None:
    from accessory.assemble import load

    checkpoint = open_folders(llava)
    words = Settings(finetuning_type="lora", lora_rank=2, lora_target=["q_proj", "projector:all", "vision:all"])
    spec = read_spec({**checkpoint.config, **peft_config(words)}, llama_type="llava_peft")
    model = build(spec)
    names = [name for name, _ in model.named_parameters() if ".lora_" in name]
    load(model, checkpoint, device="cpu", dtype=torch.float32, optional=names)
    torch.manual_seed(0)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        holder = model.get_submodule(owner)._parameters
        holder[leaf] = torch.nn.Parameter(torch.randn(holder[leaf].shape) * 0.1)
    parts = choose_parts(model, words, pictures=True)
    rows = model.vision(adapters.PIXELS)
    slots = torch.full((1, 12), -1)
    slots[0, 1 : 1 + len(rows)] = torch.arange(len(rows))
    ids = torch.arange(5, 17)[None]
    total, _ = model(ids, torch.arange(12)[None], labels=ids, features=rows, slots=slots)
    total.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if name in parts.names}
    assert parts.vision.names and all(grads[name].abs().max() > 0 for name in parts.names)
