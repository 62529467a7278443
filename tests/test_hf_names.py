"""Names and configs of Hugging Face, one by one, without a file."""

from __future__ import annotations

import pytest
import torch

from accessory.checkpoint.huggingface.config import read_config, stop_ids
from accessory.checkpoint.huggingface.names import Place, canonical, in_file, permute, unpermute
from accessory.checkpoint.huggingface.papers import config_json, preprocessor_json
from accessory.vision import VisionConfig

LLAVA_TEXT = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.11.self_attn.q_proj.bias", Place("layers.11.attention.wq.bias", "heads")),
        ("language_model.model.layers.0.mlp.gate_proj.weight", Place("layers.0.feed_forward.w1.weight")),
        ("model.language_model.norm.weight", Place("norm.weight")),
        ("base_model.model.model.embed_tokens.weight", Place("tok_embeddings.weight")),
        ("embed_tokens.weight", Place("tok_embeddings.weight")),
        ("model.layers.3.ln1.weight", Place("layers.3.attention_norm.weight")),
        ("model.mm_projector.weight", Place("vision.proj.0.weight")),
        ("model.mm_projector.4.bias", Place("vision.proj.4.bias")),
        ("base_model.model.model.mm_projector.2.weight", Place("vision.proj.2.weight")),
        (
            "model.vision_tower.vision_tower.vision_model.encoder.layers.7.self_attn.v_proj.bias",
            Place("vision.tower.blocks.7.attn.qkv.bias", None, 2, 3),
        ),
        ("vision_tower.embeddings.class_embedding", Place("vision.tower.cls_token", "add_2")),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("vision_tower.vision_model.embeddings.position_ids", None),
        ("model.layers.0.mlp.experts.weight", Place("model.layers.0.mlp.experts.weight")),
    ],
)
def test_a_name_has_one_place(name: str, place: Place | None) -> None:
    assert canonical(name) == place


@pytest.mark.parametrize("layout", ["plain", "llava", "original"])
def test_names_on_the_way_out_come_back(layout: str) -> None:
    keys = ["tok_embeddings.weight", "output.weight", "layers.2.attention.wk.bias", "layers.0.feed_forward.w2.weight"]
    eyes = [
        "vision.proj.2.bias",
        "vision.image_newline",
        "vision.tower.pos_embed",
        "vision.tower.blocks.1.attn.qkv.bias",
    ]
    for key in keys + ([] if layout == "plain" else eyes):
        names, transform = in_file(key, layout=layout)
        places = [canonical(name) for name in names]
        assert places == [Place(key, transform, part, len(names)) for part in range(len(names))]


def test_rows_of_q_and_k_go_to_pairs_and_back() -> None:
    weight = torch.arange(24.0).view(12, 2)
    turned = unpermute(weight, 6)
    assert turned[:, 0].tolist() == [0, 6, 2, 8, 4, 10, 12, 18, 14, 20, 16, 22]
    assert torch.equal(permute(turned, 6), weight)
    assert torch.equal(unpermute(weight[:, 0], 6), turned[:, 0])


def test_a_nearly_empty_text_config_is_a_llama_of_7b() -> None:
    reading = read_config({"model_type": "llava", "text_config": LLAVA_TEXT}, where="config.json")
    sizes = {key: reading.flat[key] for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "rope_theta")}
    assert list(sizes.values()) == [4096, 32, 32, 32, 11008, 1e4]
    assert reading.flat["norm_eps"] == 1e-5 and reading.flat["vocab_size"] == 32064
    vision = reading.flat["vision"]
    assert vision["image_size"] == 336 and vision["tower_args"]["depth"] == 24 and vision["aspect"] == "crop"
    bare = read_config({"model_type": "llava_next"}, where="config.json")
    assert bare.flat["norm_eps"] == 1e-6 and bare.flat["vision"]["merge"] == "spatial_unpad"


def test_what_a_llava_does_with_pictures_is_in_its_preprocessor_config_too() -> None:
    said = {"do_pad": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    vision = read_config({"model_type": "llava"}, where="config.json", preprocessor=said).flat["vision"]
    assert vision["aspect"] == "pad" and vision["mean"] == [0.5] * 3
    other = {"image_grid_pinpoints": [[336, 672]]}
    with pytest.raises(ValueError, match="make them equal"):
        read_config({"model_type": "llava_next"}, where="config.json", preprocessor=other)


def test_the_original_llavas_config_names_its_tower() -> None:
    said = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "hidden_size": 5120}
    said |= {"num_attention_heads": 40, "image_aspect_ratio": "pad", "mm_projector_type": "mlp2x_gelu"}
    reading = read_config(said, where="config.json")
    assert reading.tower == "openai/clip-vit-large-patch14-336" and reading.flat["dim"] == 5120
    assert reading.flat["vision"]["aspect"] == "pad" and reading.flat["vision"]["merge"] == "flat"


@pytest.mark.parametrize("there", ["llava_next", "llava_llama"])
@pytest.mark.parametrize("compat", ["llava", "hf"])
def test_another_family_reads_the_same_canvases_in_the_same_order(compat: str, there: str) -> None:
    here = {"model_type": "llava_next", "image_grid_pinpoints": [[336, 672], [672, 336], [336, 1008]]}
    flat = read_config(here, where="config.json").flat
    flat["vision"]["compat"] = compat
    before = VisionConfig.from_dict(flat["vision"])
    plain = {**flat, "vision": before.to_dict()}
    said = config_json(plain, family=there, dtype="float32", tokens={"image": 32000})
    eye = preprocessor_json(plain["vision"], family=there)
    after = VisionConfig.from_dict(read_config(said, where="config.json", preprocessor=eye).flat["vision"])
    assert after.compat == {"llava_next": "hf", "llava_llama": "llava"}[there]
    assert after.canvases == before.canvases


def test_mistral_slides_unless_its_config_says_null() -> None:
    for said, window in (({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 512}, 512)):
        flat = read_config({"model_type": "mistral", **said}, where="config.json").flat
        assert flat.get("sliding_window") == window and flat["n_kv_heads"] == 8
    qwen = read_config({"model_type": "qwen2", "sliding_window": 512}, where="config.json").flat
    assert "sliding_window" not in qwen and qwen["qkv_bias"]


def test_stop_ids_come_from_the_nearest_that_says_some() -> None:
    config = {"eos_token_id": 2, "text_config": {"eos_token_id": [7, -1]}}
    assert stop_ids(config, {"eos_token_id": [1, 3]}) == [1, 3]
    assert stop_ids(config, {"eos_token_id": None}) == [7]
    assert stop_ids({"eos_token_id": 2}, {}) == [2] and stop_ids({}, {}) == []
