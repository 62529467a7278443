"""Hugging Face folders that cannot be read are refused in one sentence; hub ids are looked up on this machine first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from accessory.checkpoint import hub, open_folders
from accessory.inspect import inspect, main

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 33,
}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 16, "num_attention_heads": 2}


def tensors() -> dict[str, torch.Tensor]:
    """A decoder of one layer, under Hugging Face's names."""
    block = {f"self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"}
    block |= {"mlp.gate_proj.weight": (24, 16), "mlp.up_proj.weight": (24, 16), "mlp.down_proj.weight": (16, 24)}
    block |= {"input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,)}
    shapes = {f"model.layers.0.{name}": shape for name, shape in block.items()}
    shapes |= {"model.embed_tokens.weight": (33, 16), "model.norm.weight": (16,), "lm_head.weight": (33, 16)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sharded(folder: Path, **config: Any) -> Path:
    """Two shards of safetensors with their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    table, names = {}, sorted(tensors())
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors()[name] for name in part}, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def refusal(paths: list[Any], kind: type[Exception] = ValueError) -> str:
    """The one sentence with which folders are refused."""
    with pytest.raises(kind) as caught:
        open_folders(paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(folder: Path, edit: Callable[[dict[str, Any]], Any], file: str = "model.safetensors.index.json") -> None:
    """Edit a JSON file in place."""
    table = json.loads((folder / file).read_text())
    edit(table)
    (folder / file).write_text(json.dumps(table))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "lacks 1 of the 2 shards" in refusal([folder]) and "model-00002-of-00002" in refusal([folder])
    (folder / "model.safetensors.index.json").unlink()
    assert "1 shards are not all of one set (of 2)" in refusal([folder])


def test_an_index_and_shards_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    folder = sharded(tmp_path / "a")
    change(folder, lambda table: table["weight_map"].update({"lm_head.weight": second}))
    assert f"lm_head.weight is not in {second}" in refusal([folder])
    folder = sharded(tmp_path / "b")
    change(folder, lambda table: table["weight_map"].pop("lm_head.weight"))
    assert f"lm_head.weight in {first} is not in the index" in refusal([folder])
    folder = sharded(tmp_path / "c")
    change(folder, lambda table: table["weight_map"].update({"model.more.weight": first}))
    assert f"model.more.weight is not in {first}" in refusal([folder])


@pytest.mark.parametrize("name", ["../../model.safetensors", "/etc/passwd", "a\\b.bin", "", 3, "run.sh"])
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path, name: Any) -> None:
    folder = sharded(tmp_path / "m")
    change(folder, lambda table: table["weight_map"].update({"lm_head.weight": name}))
    assert "expected a file of weights beside it" in refusal([folder])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', expected one of llama"),
        ({"model_type": None}, "model_type is None"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights (quant_method gptq)"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised weights (quant_method awq)"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected silu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"rope_scaling": [2.0]}, "rope_scaling is [2.0]"),
        ({"model_type": "llava", "text_config": {"model_type": "gemma"}}, "language model is a 'gemma'"),
        ({"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}, "vision tower is a 'siglip"),
        ({"model_type": "llava", "vision_feature_layer": [-2, -3]}, "vision_feature_layer is [-2, -3]"),
        ({"model_type": "llava_llama", "mm_vision_tower": "google/siglip"}, "google/siglip"),
        (
            {"model_type": "llava_llama", "mm_vision_tower": "x/clip-vit-large-patch14", "mm_use_im_start_end": True},
            "mm_use_im_start_end",
        ),
        (
            {
                "model_type": "llava_llama",
                "mm_vision_tower": "x/clip-vit-large-patch14",
                "image_aspect_ratio": "anyres_max_9",
            },
            "image_aspect_ratio is 'anyres_max_9'",
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "num_hidden_layers": 3,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            "layer_types alternate",
        ),
    ],
)
def test_models_that_are_not_computed_here_are_refused(tmp_path: Path, config: dict, words: str) -> None:
    kind = OSError if config.get("mm_vision_tower") == "google/siglip" else ValueError
    assert words in refusal([sharded(tmp_path / "m", **config)], kind)


def test_a_pickle_that_is_more_than_tensors_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save({**tensors(), "lm_head.weight": Path("x")}, folder / "pytorch_model.bin")
    assert "never loaded" in refusal([folder])


def test_folders_without_config_or_with_half_of_a_tower_are_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal([folder])
    half = tmp_path / "half"
    half.mkdir()
    mark = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn."
    torch.save({f"{mark}q_proj.bias": torch.ones(4), f"{mark}v_proj.bias": torch.ones(4)}, half / "mm_projector.bin")
    assert "of the 3 tensors that make up vision.tower.blocks.0.attn.qkv.bias" in refusal([half])


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    for index in folder.glob("*.json"):
        if "index" in index.name:
            index.unlink()
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    save_file({**tensors(), "language_model.model.norm.weight": torch.ones(16)}, folder / "model.safetensors")
    assert "are both norm.weight; keep one of them" in refusal([folder])


def test_an_unknown_tensor_is_unexpected_and_a_buffer_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.layers.0.extra": torch.ones(1)}
    save_file({**tensors(), **more}, folder / "model.safetensors")
    checkpoint = open_folders([folder])
    cuts = checkpoint.cuts()
    assert "model.layers.0.extra" in cuts and checkpoint.sources[0].discarded == [next(iter(more))]
    with pytest.raises(ValueError, match=r"1 unexpected: model\.layers\.0\.extra"):
        checkpoint.tensors({key: cut for key, cut in cuts.items() if key != "model.layers.0.extra"})


def test_inspect_describes_a_hugging_face_folder(tmp_path: Path, capsys: Any) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "pytorch_model.bin").write_bytes(b"older")
    report = inspect(folder)
    assert report.form == "huggingface" and not report.faults and not report.partial and report.llama_type == "llama"
    assert report.leftovers == 2 and report.tensors == 12 and report.config["vocab_size"] == 33
    assert main([str(folder)]) == 0
    assert "Hugging Face's" in capsys.readouterr().out
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert main([str(folder)]) == 1


# ---- the hub


def cached(cache: Path, *, whole: bool = True) -> Path:
    """A snapshot in a cache as the hub's client lays it out."""
    repo = cache / "models--org--name"
    snapshot = sharded(repo / "snapshots" / "0123456789abcdef")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123456789abcdef")
    if not whole:
        (snapshot / "model-00002-of-00002.safetensors").unlink()
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that nobody may reach."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    plain = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: plain(*a, **{"cache_dir": tmp_path / "hub", **k})
    )
    return tmp_path / "hub"


def test_a_model_in_the_cache_is_opened_without_the_network(cache: Path) -> None:
    snapshot = cached(cache)
    assert hub.find("org/name") == snapshot == hub.find("hf://org/name")
    assert open_folders("org/name").folders[0].path == snapshot
    assert hub.cached("hf://org/name") == snapshot
    assert [hub.cached(name) for name in ("org/none", "org", "./org/name")] == [None] * 3


def test_a_model_that_is_nowhere_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "org/none: no such folder here" in refusal(["org/none"], OSError)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    import huggingface_hub

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("name resolution failed\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    assert "the hub cannot be reached (name resolution failed)" in refusal(["org/none"], OSError)


def test_half_a_model_in_the_cache_is_fetched_to_its_end(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached(cache, whole=False)
    assert hub.cached("org/name") is None
    import huggingface_hub
    from huggingface_hub.hf_api import RepoSibling

    monkeypatch.delenv("HF_HUB_OFFLINE")
    files = ["config.json", "model.safetensors.index.json", "original/consolidated.00.pth", "pytorch_model.bin"]
    files += [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)] + ["README.md", "tokenizer.model"]

    class Info:
        siblings = [RepoSibling(rfilename=name) for name in files]

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: Info())
    asked = []
    there = huggingface_hub.snapshot_download

    def download(repo: str, **options: Any) -> str:
        if "allow_patterns" not in options:
            return there(repo, **options)
        asked.extend(options["allow_patterns"])
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.find("org/name") == snapshot
    assert asked == sorted(
        name for name in files if name not in ("original/consolidated.00.pth", "pytorch_model.bin", "README.md")
    )


@pytest.mark.parametrize("name", ["./org/name", "a/b/c", "name", "../name", "org/na me", "org/.."])
def test_paths_are_never_asked_of_the_hub(name: str, cache: Path) -> None:
    assert hub.find(name) == Path(name)


def test_of_a_repository_one_kind_of_weights_is_fetched() -> None:
    both = ["model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "config.json", "flax_model.msgpack"]
    assert hub.wanted(both) == ["config.json", "model.safetensors"]
    assert hub.wanted(["pytorch_model.bin", "mm_projector.bin", "training_args.bin", "x.py"]) == [
        "mm_projector.bin",
        "pytorch_model.bin",
    ]
    assert hub.wanted(["consolidated.00.pth", "params.json"]) == ["consolidated.00.pth", "params.json"]
