"""Folders that transformers wrote open here with the same logits, whatever the family, the files and the ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hf
import pytest
import torch
from engine_toys import ONE
from fixtures import toys
from safetensors.torch import load_file, save_file

from accessory.assemble import open_model
from accessory.checkpoint import open_folders
from accessory.data.tokenizer import open_tokenizer
from accessory.dist import Cut, Ranks
from spawn import run_ranks

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "multi-head": ("llama", {"num_key_value_heads": 4}),
    "grouped-query": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "llama3 scaling": ("llama", {"rope_parameters": hf.LLAMA3}),
    "linear scaling": ("llama", {"rope_parameters": LINEAR}),
    "dynamic scaling beyond the window": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "heads of another width": ("llama", {"head_dim": 24}),
    "mistral": ("mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral with a sliding window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2 with a sliding window from layer 1 on": ("qwen2", WINDOW),
    "llava": ("llava", {}),
    "llava_next": ("llava_next", {"model_type": "mistral", "sliding_window": None}),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Every case's folder and transformers' logits."""
    work, found = tmp_path_factory.mktemp("hf"), {}
    for number, (name, (kind, sizes)) in enumerate(CASES.items()):
        model = hf.model_of(kind, **sizes)
        found[name] = (hf.write(work / str(number), model), hf.theirs(model))
    return found


def all_logits(ranks: Ranks, folders: list[Path]) -> list[torch.Tensor]:
    """Our logits of several folders."""
    return [hf.ours(ranks, folder) for folder in folders]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name: str, written: dict[str, tuple[Path, torch.Tensor]]) -> None:
    folder, expected = written[name]
    hf.close(hf.ours(ONE, folder), expected)


def test_two_ranks_read_their_slices_and_compute_the_same(written: dict[str, tuple[Path, torch.Tensor]]) -> None:
    for logits in run_ranks(all_logits, 2, [folder for folder, _ in written.values()]):
        for mine, (_, expected) in zip(logits, written.values(), strict=True):
            hf.close(mine, expected)


def test_more_ranks_than_kv_heads_hold_replicas(written: dict[str, tuple[Path, torch.Tensor]]) -> None:
    folder, expected = written["grouped-query"]
    for logits in run_ranks(all_logits, 4, [folder]):
        hf.close(logits[0], expected)


def test_a_rank_reads_no_more_than_its_heads(tmp_path: Path, written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_folders([written["grouped-query"][0]])
    key = "layers.0.attention.wq.weight"
    whole = dict(checkpoint.tensors({name: cut for name, cut in checkpoint.cuts().items()}))[key]
    source, read = checkpoint.sources[0], []
    rows = type(source.files[0]).rows
    monkeypatch.setattr(type(source.files[0]), "rows", lambda *a, **k: read.append(k) or rows(*a, **k))
    for start, stop, wanted in ((32, 64, (32, 64)), (20, 40, (16, 48))):  # heads of 16; and a piece across heads
        cut = Cut((64, 64), 0, start, stop)
        out = source.read(key, source.guess(key), cut, out=torch.empty(cut.local_shape))
        assert torch.equal(out, whole[start:stop])
        assert (read[-1]["start"], read[-1]["stop"]) == wanted
    columns = Cut((64, 64), 1, 8, 24)
    assert torch.equal(source.read(key, None, columns, out=torch.empty(64, 16)), whole[:, 8:24])


def test_shards_with_an_index_and_without_hold_the_same(tmp_path: Path, written: Any) -> None:
    expected = written["qwen2"][1]
    folder = hf.write(tmp_path / "m", hf.model_of("qwen2"), max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    hf.close(hf.ours(ONE, folder), expected)
    (folder / "model.safetensors.index.json").unlink()
    hf.close(hf.ours(ONE, folder), expected)


def as_bin(folder: Path, target: Path) -> Path:
    """A copy whose weights are torch files, in two shards with an index; a tied head is stored twice."""
    tensors = load_file(folder / "model.safetensors")
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    target.mkdir()
    names, table = sorted(tensors), {}
    halves = (
        ["lm_head.weight", "model.embed_tokens.weight"],
        [n for n in names if "layers" in n or n.endswith("norm.weight")],
    )
    for number, part in enumerate(halves, 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, target / file)
        table |= dict.fromkeys(part, file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(folder / name, target / name)
    return target


@pytest.mark.parametrize("name", ["grouped-query", "tied"])
def test_torch_files_hold_the_same(name: str, tmp_path: Path, written: Any) -> None:
    folder, expected = written[name]
    hf.close(hf.ours(ONE, as_bin(folder, tmp_path / "bin")), expected)


def test_a_tied_head_of_its_own_is_used_as_it_is(tmp_path: Path, written: Any, caplog: Any) -> None:
    folder = shutil.copytree(written["grouped-query"][0], tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    hf.close(hf.ours(ONE, folder), written["grouped-query"][1])
    assert "both are used as they are" in caplog.text


def renamed(folder: Path, target: Path, names: dict[str, str], **config: Any) -> Path:
    """A copy whose tensors have other prefixes."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    turned = {}
    for name, tensor in tensors.items():
        prefix = max((old for old in names if name.startswith(old)), key=len)
        turned[names[prefix] + name.removeprefix(prefix)] = tensor
    save_file(turned, target / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**said, **config}))
    return target


FAMILIES = {
    "of old on disk": {
        "language_model": "language_model",
        "vision_tower.": "vision_tower.vision_model.",
        "multi_modal_projector": "multi_modal_projector",
        "image_newline": "image_newline",
    },
    "in memory": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head": "lm_head",
        "vision_tower": "model.vision_tower",
        "multi_modal_projector": "model.multi_modal_projector",
        "image_newline": "model.image_newline",
    },
}
ORIGINAL = {
    "language_model.model.": "model.",
    "language_model.lm_head": "lm_head",
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "multi_modal_projector.linear_1": "model.mm_projector.0",
    "multi_modal_projector.linear_2": "model.mm_projector.2",
    "image_newline": "model.image_newline",
}


def everything(paths: list[Path]) -> dict[str, torch.Tensor]:
    """All tensors, in full."""
    checkpoint = open_folders(paths)
    return dict(checkpoint.tensors(checkpoint.cuts()))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether names and values are equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_llavas_names_of_every_time_are_one(family: str, tmp_path: Path, written: Any) -> None:
    folder = written["llava_next"][0]
    assert same(everything([renamed(folder, tmp_path / "m", FAMILIES[family])]), everything([folder]))


def original(written: Any, target: Path, **config: Any) -> Path:
    """The case llava_next as the original LLaVA lays it out, with a tower whose config lies beside it."""
    clip = target.parent / "clip"
    clip.mkdir()
    text = {key: value for key, value in hf.TEXT.items() if key not in ("attn_implementation",)}
    said = {
        **text,
        "model_type": "llava_mistral",
        "sliding_window": None,
        "rms_norm_eps": 1e-6,
        "mm_vision_tower": str(clip),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": "[(28, 56), (56, 28), (56, 56)]",
        **config,
    }
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": hf.CLIP}))
    return renamed(written["llava_next"][0], target, ORIGINAL, **said)


def test_the_original_layout_opens_and_computes_the_same(tmp_path: Path, written: Any) -> None:
    folder = original(written, tmp_path / "llava")
    assert same(everything([folder]), everything([written["llava_next"][0]]))
    vision = open_folders([folder]).config["vision"]
    assert vision["compat"] == "llava" and vision["grid_pinpoints"] == [[28, 56], [56, 28], [56, 56]]
    hf.close(hf.ours(ONE, folder), written["llava_next"][1])


def test_a_tower_that_the_folder_lacks_comes_from_the_one_it_names(tmp_path: Path, written: Any) -> None:
    folder, whole = original(written, tmp_path / "llava"), everything([written["llava_next"][0]])
    tensors = load_file(folder / "model.safetensors")
    mark = "model.vision_tower.vision_tower."
    tower = {name.removeprefix(mark): t for name, t in tensors.items() if name.startswith(mark)}
    rest = {"text_model.embeddings.token_embedding.weight": torch.ones(3, 3), "logit_scale": torch.tensor(2.0)}
    torch.save(
        {**tower, **rest, "vision_model.embeddings.position_ids": torch.arange(5)},
        tmp_path / "clip" / "pytorch_model.bin",
    )
    (tmp_path / "clip" / "tokenizer.json").write_text("{}")
    save_file(
        {n: t for n, t in tensors.items() if n not in {mark + name for name in tower}}, folder / "model.safetensors"
    )
    assert same(everything([folder]), whole)
    assert open_folders([folder]).tokenizer == folder / "tokenizer.model"
    (tmp_path / "clip" / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="its vision tower is not there, and .*clip"):
        open_folders([folder])
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "unfreeze_mm_vision_tower": True}))
    with pytest.raises(ValueError, match="its vision tower was trained with it"):
        open_folders([folder])


def test_a_trained_projector_lies_on_top_of_a_language_model(tmp_path: Path, written: Any) -> None:
    llava, whole = original(written, tmp_path / "llava"), everything([written["llava_next"][0]])
    tensors = load_file(llava / "model.safetensors")
    eyes = ("model.mm_projector", "model.vision_tower", "model.image_newline")
    base = {name: tensor for name, tensor in tensors.items() if not name.startswith(eyes)}
    text = shutil.copytree(llava, tmp_path / "text")
    save_file(base, text / "model.safetensors")
    said = json.loads((llava / "config.json").read_text())
    plain = {key: value for key, value in said.items() if not key.startswith(("mm_", "image_"))}
    (text / "config.json").write_text(json.dumps({**plain, "model_type": "mistral"}))
    projector = tmp_path / "projector"
    projector.mkdir()
    torch.save({name: t for name, t in tensors.items() if name.startswith(eyes)}, projector / "mm_projector.bin")
    shutil.copy(llava / "config.json", projector)
    assert same(everything([text, projector]), whole)
    bundle = open_model([text, projector], ranks=ONE, dtype=torch.float32)
    assert bundle.llama_type == "llava" and bundle.vision.aspect == "anyres"


def test_non_lora_trainables_replace_what_the_base_holds(tmp_path: Path, written: Any) -> None:
    folder = original(written, tmp_path / "llava")
    (tmp_path / "more").mkdir()
    name = "base_model.model.model.mm_projector.0.bias"
    torch.save({name: torch.full((64,), 7.0)}, tmp_path / "more" / "non_lora_trainables.bin")
    assert (everything([folder, tmp_path / "more"])["vision.proj.0.bias"] == 7).all()


def test_answers_end_where_the_generation_config_says(tmp_path: Path, written: Any) -> None:
    folder = shutil.copytree(written["grouped-query"][0], tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9, 100000]}')
    assert open_model([folder], ranks=ONE).stop_ids == {2, 9}
    (folder / "generation_config.json").unlink()
    assert open_model([folder], ranks=ONE).stop_ids == {2}


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_pictures_give_the_features_of_transformers(name: str, written: Any) -> None:
    import transformers

    folder = written[name][0]
    bundle = open_model([folder], ranks=ONE, dtype=torch.float32)
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval().model
    with torch.no_grad():
        seen = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        expected = model.multi_modal_projector(seen)
        found = bundle.model.vision.proj(bundle.model.vision.tokens(pixels))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    if name == "llava_next":
        assert torch.equal(bundle.model.vision.image_newline, model.image_newline)


def test_a_folder_says_its_template(tmp_path: Path, written: Any) -> None:
    folder = shutil.copytree(written["llava"][0], tmp_path / "m")
    assert open_model([written["llava_next"][0]], ranks=ONE).template == "mistral_instruct"
    (folder / "chat_template.json").write_text(
        '{"chat_template": "{% for m in messages %}{{ m.role.nope() }}{% endfor %}"}'
    )
    assert open_model([folder], ranks=ONE).template == "vicuna_v1"
    assert open_model([written["qwen2"][0]], ranks=ONE).template == "none"


def test_a_pad_added_behind_the_embedding_is_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(toys.sentencepiece_model())
    size = open_tokenizer(tmp_path / "tokenizer.model").size
    model = hf.model_of("llama", vocab_size=size)
    folder = hf.write(tmp_path / "whole", model)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    ids = torch.arange(5, 25)[None]
    hf.close(hf.ours(ONE, folder, ids), hf.theirs(model, ids))
    assert "has no row for <pad>" in caplog.text
