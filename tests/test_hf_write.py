"""Folders that we write in Hugging Face's form open in transformers with the logits of the model that was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf
import pytest
import torch
from engine_toys import ONE
from safetensors import safe_open

from accessory.assemble import read_spec
from accessory.checkpoint import open_folders
from accessory.checkpoint.huggingface import papers
from accessory.checkpoint.huggingface.writer import HuggingFaceForm, HuggingFaceWriter

SLIDES = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": hf.LLAMA3}),
    "tied": ("llama", {"tie_word_embeddings": True, "rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "heads of another width": ("llama", {"head_dim": 24}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", SLIDES),
    "llava": ("llava", {"model_type": "qwen2"}),
    "llava_next": ("llava_next", {"model_type": "mistral", "sliding_window": 7}),
}


def export(paths: list[Path], target: Path, *, bare: bool = False, **options: Any) -> list[str]:
    """Write folders anew; bare: without what their own small files said. Returns the names of the shards."""
    checkpoint = open_folders(paths)
    told = None if bare else checkpoint.told
    family = options.pop("family", None) or papers.family_of(checkpoint.config, told)
    flat = checkpoint.config
    width = flat.get("head_width") or flat["dim"] // flat["n_heads"]
    form = HuggingFaceForm(family, width, **options)
    tokens = {"bos": 1, "eos": [2], "pad": 0, "image": hf.VOCAB - 1}
    if "vision" in flat:
        from accessory.vision import VisionConfig

        flat = {**flat, "vision": VisionConfig.from_dict(flat["vision"]).to_dict()}
    with HuggingFaceWriter(target, checkpoint.specs(), form=form) as writer:
        for key, tensor in checkpoint.tensors(checkpoint.cuts()):
            writer.put(key, tensor)
        writer.finish(
            config=papers.config_json(flat, family=family, dtype="float32", tokens=tokens, told=told),
            generation=papers.generation_json(tokens, told),
            preprocessor=papers.preprocessor_json(flat["vision"], family=family) if "vision" in flat else None,
            tokenizer=checkpoint.tokenizer,
            chat_template="{{ messages }}",
        )
    return writer.files


def opened(folder: Path) -> torch.nn.Module:
    """The model as transformers reads the folder; nothing may be missing, left over or drawn."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    model, info = cls.from_pretrained(folder, attn_implementation="eager", output_loading_info=True, dtype="float32")
    faults = {key: value for key, value in info.items() if value}
    assert not faults, faults
    return model.eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Every case's folder as transformers wrote it, and its logits."""
    work, found = tmp_path_factory.mktemp("hf"), {}
    for number, (name, (kind, sizes)) in enumerate(CASES.items()):
        model = hf.model_of(kind, **sizes)
        found[name] = (hf.write(work / str(number), model), hf.theirs(model))
    return found


@pytest.mark.parametrize("bare", [False, True], ids=["with what its own config said", "from our config alone"])
@pytest.mark.parametrize("name", CASES)
def test_what_we_write_transformers_opens(name: str, bare: bool, written: Any, tmp_path: Path) -> None:
    folder, expected = written[name]
    export([folder], tmp_path / "out", bare=bare)
    assert torch.equal(hf.theirs(opened(tmp_path / "out")), expected)
    again, before = (open_folders([path]) for path in (tmp_path / "out", folder))
    assert read_spec(again.config, llama_type=again.meta["llama_type"]) == read_spec(
        before.config, llama_type=before.meta["llama_type"]
    )
    assert again.meta == {**before.meta, "stop_ids": [2]}


def test_pictures_give_the_same_logits_in_a_written_llava(written: Any, tmp_path: Path) -> None:
    folder, _ = written["llava"]
    export([folder], tmp_path / "out", bare=True)
    ids = hf.IDS.clone()
    ids[:, 3:7] = hf.VOCAB - 1
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (opened(path)(input_ids=ids, pixel_values=pixels).logits for path in (folder, tmp_path / "out"))
    assert torch.equal(one, other) and not torch.equal(one, written["llava"][1])


def test_shards_end_at_the_size_asked_for_and_the_index_is_right(written: Any, tmp_path: Path) -> None:
    folder, expected = written["qwen2"]
    files = export([folder], tmp_path / "out", max_shard_bytes=120_000)
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes, total = {}, 0
    for name in files:
        with safe_open(tmp_path / "out" / name, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert {index["weight_map"][key] for key in tensors} == {name}
        sizes[name] = sum(tensor.nbytes for tensor in tensors.values())
        total += len(tensors)
        assert sizes[name] <= 120_000 or len(tensors) == 1
    assert index["metadata"]["total_size"] == sum(sizes.values()) and len(index["weight_map"]) == total
    assert torch.equal(hf.theirs(opened(tmp_path / "out")), expected)


@pytest.mark.parametrize("name", ["tied", "llava_next"])
def test_the_legacy_form_is_torch_files(name: str, written: Any, tmp_path: Path) -> None:
    folder, expected = written[name]
    files = export([folder], tmp_path / "out", legacy=True, max_shard_bytes=120_000)
    assert len(files) > 1 and files[0] == f"pytorch_model-00001-of-{len(files):05d}.bin"
    assert (tmp_path / "out" / "pytorch_model.bin.index.json").is_file()
    assert all(set(torch.load(tmp_path / "out" / file, weights_only=True)) for file in files)
    assert torch.equal(hf.theirs(opened(tmp_path / "out")), expected)


def test_the_original_layout_is_written_back(written: Any, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(json.dumps(hf.CLIP))
    export([written["llava_next"][0]], tmp_path / "first", bare=True)
    config = open_folders([tmp_path / "first"]).config
    large = {**config["vision"], "mean": [0.5] * 3, "std": [0.5] * 3, "projector_bias": True}
    with pytest.raises(ValueError, match="which the original LLaVA cannot name"):
        papers.config_json({**config, "vision": large}, family="llava_mistral", dtype="float32")
    told = {"config": {"model_type": "llava_mistral", "mm_vision_tower": str(tmp_path / "clip"), "tune": 1}}
    said = papers.config_json({**config, "vision": large}, family="llava_mistral", dtype="bfloat16", told=told)
    assert said["tune"] == 1 and said["image_aspect_ratio"] == "anyres" and said["torch_dtype"] == "bfloat16"
    checkpoint = open_folders([tmp_path / "first"])
    form = HuggingFaceForm("llava_mistral", 16)
    with HuggingFaceWriter(tmp_path / "out", checkpoint.specs(), form=form) as writer:
        for key, tensor in checkpoint.tensors(checkpoint.cuts()):
            writer.put(key, tensor)
        writer.finish(config=said)
    again = open_folders([tmp_path / "out"])
    assert "model.mm_projector.2.weight" in safe_open(tmp_path / "out" / "model.safetensors", "pt").keys()  # noqa: SIM118
    assert again.specs() == checkpoint.specs() and again.config["vision"]["compat"] == "llava"


def test_a_folder_appears_whole_with_its_small_files(written: Any, tmp_path: Path) -> None:
    export([written["llava_next"][0]], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "manifest.json",
    }
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2]
    from transformers import AutoImageProcessor

    made = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    assert type(made).__name__.startswith("LlavaNext") and made.image_grid_pinpoints == [[28, 56], [56, 28], [56, 56]]
    (tmp_path / "out" / "generation_config.json").write_text('{"eos_token_id": 3}')  # anyone may edit the small files
    assert open_folders([tmp_path / "out"]).meta["stop_ids"] == [3]


def test_a_writer_that_is_left_early_leaves_nothing(written: Any, tmp_path: Path) -> None:
    checkpoint = open_folders([written["llama"][0]])
    with pytest.raises(ValueError, match="tensors were not put"):
        with HuggingFaceWriter(tmp_path / "out", checkpoint.specs(), form=HuggingFaceForm("llama", 16)) as writer:
            writer.finish(config={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flat", "family", "words"),
    [
        ({"qkv_bias": True}, "llama", "expected qwen2"),
        ({}, "qwen2", "expected llama"),
        ({"sliding_window": 7}, "llama", "expected another family"),
        ({}, "gpt2", "family: got 'gpt2'"),
        (
            {"vision": {"aspect": "pad", "merge": "spatial_unpad", "projector": "mlp2x_gelu"}},
            "llava_next",
            "aspect pad",
        ),
    ],
)
def test_a_family_that_cannot_hold_the_model_is_refused(flat: dict, family: str, words: str, written: Any) -> None:
    config = {**open_folders([written["llama"][0]]).config, **flat}
    with pytest.raises(ValueError, match=words):
        papers.config_json(config, family=family, dtype="float32", tokens={"image": 3})


def test_tensors_without_a_place_are_refused_by_name(tmp_path: Path) -> None:
    from accessory.checkpoint import Spec

    with pytest.raises(ValueError, match=r"wq\.lora_a\.weight: .*no place for it"):
        specs = {"layers.0.attention.wq.lora_a.weight": Spec((2, 4), torch.float32)}
        HuggingFaceWriter(tmp_path / "out", specs, form=HuggingFaceForm("llama", 2))


def test_a_multiplier_of_positions_and_a_larger_base_have_words_in_hugging_faces_config() -> None:
    sizes = {"dim": 64, "n_layers": 1, "n_heads": 4, "hidden_dim": 96, "vocab_size": 8, "norm_eps": 1e-5}
    flat = {**sizes, "rope_theta": 1e4, "max_seq_len": 64}
    halved = papers.config_json({**flat, "rope_scaling": 0.5}, family="llama", dtype="float32")
    assert halved["rope_scaling"] == {"rope_type": "linear", "factor": 2.0, "type": "linear"}
    ntk = papers.config_json({**flat, "rope_scaling": {"type": "ntk", "factor": 4.0}}, family="llama", dtype="float32")
    assert ntk["rope_scaling"] is None and ntk["rope_theta"] == pytest.approx(1e4 * 4 ** (16 / 14))


def test_a_hugging_face_folder_becomes_an_accessory_one(written: Any, tmp_path: Path) -> None:
    from accessory.checkpoint.operate import Job, rewrite

    folder, expected = written["llava_next"]
    rewrite([folder], Job(tmp_path / "out", shards=2))
    assert (tmp_path / "out" / "consolidated.01-of-02.model.safetensors").is_file()
    hf.close(hf.ours(ONE, tmp_path / "out"), expected)
