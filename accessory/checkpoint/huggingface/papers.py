"""Our flat config as Hugging Face's small files: config.json, generation_config.json, preprocessor_config.json.

Must not know torch, tensors or files: values come in, values go out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accessory.checkpoint.huggingface.config import CLIP_LARGE, LLAVA, ORIGINAL

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_qwen": "LlavaQwenForCausalLM",
}
FAMILIES = tuple(ARCHITECTURES)
# timm's names of CLIP's towers -> what differs from the large one of 336 pixels
_NAMED = {
    "vit_large_patch14_clip_quickgelu_336": {},
    "vit_large_patch14_clip_quickgelu_224": {"image_size": 224},
}
_TOKENS = ("bos", "eos", "pad")
# what says the same as fields that we write, in other words
_DOUBLED = ("rope_parameters", "rope_theta", "rope_scaling", "dtype", "torch_dtype", "layer_types", "head_dim")
_OWN = {"_name_or_path", "transformers_version", "quantization_config", "auto_map"}


def family_of(flat: Mapping[str, Any], told: Mapping[str, Any] | None = None) -> str:
    """The family in which a model is written: that of the folder it came from, where it still fits; else by its fields.

    told: of the folder it came from (`Checkpoint.told`). Raises ValueError for models that no family describes.
    """
    before = (told or {}).get("family")
    before = "llama" if before == "Yi" else before
    vision = flat.get("vision")
    if vision is not None and vision.get("kind") != "llava":
        raise ValueError(
            f"vision: got kind {vision.get('kind')!r}, which no Hugging Face form describes; write Accessory's form"
        )
    if vision is not None:
        if before == "llava" and "mm_vision_tower" in (told or {}).get("config", {}):
            before = "llava_llama"  # what the first original LLaVA called itself, as llava-hf does
        if before in (*LLAVA, *ORIGINAL):
            return before
        return "llava_next" if vision.get("aspect") == "anyres" else "llava"
    return before if before == "mistral" and not flat.get("qkv_bias") else _text_family(flat)


def layout_of(family: str) -> str:
    """The layout of names (`names.LAYOUTS`) of a family."""
    return "llava" if family in LLAVA else "original" if family in ORIGINAL else "plain"


def config_json(
    flat: Mapping[str, Any],
    *,
    family: str,
    dtype: str,
    tokens: Mapping[str, int | list[int] | None] | None = None,
    told: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return config.json of a family for our flat config (vocab_size: the rows of the embedding).

    dtype: float32, float16 or bfloat16. tokens: ids of bos, eos, pad, and for llava and llava_next of `image`.
    told: of the folder that the model came from; what we do not set is kept from its config.json.
    Raises ValueError for a config that the family does not describe.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: got {family!r}, expected one of {', '.join(FAMILIES)}")
    base, tokens = dict((told or {}).get("config", {})), tokens or {}
    if base.get("model_type") != family and not (family == "llava_llama" and "mm_vision_tower" in base):
        base = {}
    head = {"architectures": [ARCHITECTURES[family]], "model_type": family, "torch_dtype": dtype}
    if family in LLAVA:
        text = base.pop("text_config", None) or {}
        kind = _text_family(flat, text.get("model_type"))
        said = _text(flat, family=kind, base=text, tokens=tokens)
        said = {**said, "model_type": kind, "architectures": [ARCHITECTURES[kind]], "torch_dtype": dtype}
        vision = _llava(flat["vision"], family=family, image=tokens.get("image", base.get("image_token_index")))
        tied = {"tie_word_embeddings": bool(flat.get("tied"))}
        return {**_kept(base), **vision, **tied, "text_config": said, **head}
    text = _text(flat, family=ORIGINAL.get(family, family), base=base, tokens=tokens)
    vision = _original(flat["vision"], base) if family in ORIGINAL else {}
    return {**text, **vision, **head}


def generation_json(
    tokens: Mapping[str, int | list[int] | None], told: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return generation_config.json: that of the folder the model came from, with the ids of bos, eos and pad."""
    said = {key: value for key, value in (told or {}).get("generation", {}).items() if key != "transformers_version"}
    return {"_from_model_config": True, **said, **_ids(tokens)}


def preprocessor_json(vision: Mapping[str, Any], *, family: str) -> dict[str, Any]:
    """Return preprocessor_config.json of a LLaVA, as CLIP's processor and transformers' LLaVA ones read it."""
    size = vision["image_size"]
    plain = {
        "image_processor_type": {
            "llava": "LlavaImageProcessor",
            "llava_next": "LlavaNextImageProcessor",
        }.get(family, "CLIPImageProcessor"),
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision["mean"]),
        "image_std": list(vision["std"]),
        "do_convert_rgb": True,
    }
    if family == "llava":
        plain["do_pad"] = vision["aspect"] == "pad"
    if family == "llava_next":
        plain |= {"do_pad": True, "image_grid_pinpoints": _pinpoints(vision, "hf")}
    return plain


def processor_json(vision: Mapping[str, Any], *, family: str) -> dict[str, Any] | None:
    """Return processor_config.json, by which transformers counts a picture's tokens; None where the family has none."""
    name = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}.get(family)
    if name is None:
        return None
    return {
        "processor_class": name,
        "image_token": "<image>",
        "patch_size": _clip(vision)["patch_size"],
        "vision_feature_select_strategy": "default" if vision["select_feature"] == "patch" else "full",
        "num_additional_image_tokens": 1,
    }


def _text_family(flat: Mapping[str, Any], before: str | None = None) -> str:
    """The family of a language model by itself."""
    if flat.get("qkv_bias"):
        return "qwen2"
    return "mistral" if flat.get("sliding_window") is not None or before == "mistral" else "llama"


def _text(
    flat: Mapping[str, Any],
    *,
    family: str,
    base: Mapping[str, Any],
    tokens: Mapping[str, int | list[int] | None],
) -> dict[str, Any]:
    """The language model's part of config.json."""
    bias, window, full = bool(flat.get("qkv_bias")), flat.get("sliding_window"), flat.get("full_layers", 0)
    if bias != (family == "qwen2"):
        raise ValueError(f"family: got {family} for a model with qkv_bias {bias}, expected {_text_family(flat)}")
    if (window is not None and family == "llama") or (full and family == "mistral"):
        raise ValueError(f"family: got {family} for a model with sliding_window {window}, expected another family")
    theta, scaling, length = _rope(flat)
    said = {
        "hidden_size": flat["dim"],
        "intermediate_size": flat["hidden_dim"],
        "num_hidden_layers": flat["n_layers"],
        "num_attention_heads": flat["n_heads"],
        "num_key_value_heads": flat.get("n_kv_heads") or flat["n_heads"],
        "vocab_size": flat["vocab_size"],
        "max_position_embeddings": length,
        "rms_norm_eps": flat["norm_eps"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "tie_word_embeddings": bool(flat.get("tied")),
        "use_cache": True,
    }
    if flat.get("head_width"):
        said["head_dim"] = flat["head_width"]
    if family == "llama":
        said |= {"attention_bias": False, "mlp_bias": False}
    if family == "mistral":
        said["sliding_window"] = window
    if family == "qwen2":
        first = full if window is not None else flat["n_layers"]
        said |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": first}
    return {**_kept(base), **said, **_ids(tokens)}


def _rope(flat: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None, int]:
    """rope_theta, rope_scaling and max_position_embeddings."""
    theta, scaling, length = flat["rope_theta"], flat.get("rope_scaling"), flat["max_seq_len"]
    if scaling is None:
        return theta, None, length
    if isinstance(scaling, int | float):  # a multiplier of positions
        scaling = {"rope_type": "linear", "factor": 1.0 / scaling}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("none", "default"):
        return theta, None, length
    if kind == "ntk":  # a larger base, and nothing else
        width = flat.get("head_width") or flat["dim"] // flat["n_heads"]
        return theta * scaling["factor"] ** (width / (width - 2)), None, length
    if kind == "dynamic":
        length = scaling.get("original_max_position_embeddings") or length
    return theta, {**scaling, "rope_type": kind, "type": kind}, length


def _llava(vision: Mapping[str, Any], *, family: str, image: int | list[int] | None) -> dict[str, Any]:
    """The encoder's part of llava-hf's config.json."""
    if type(image) is not int:
        raise ValueError(
            f"image token: got {image!r}, expected the id of <image> in the tokenizer, which {family} needs; add it to"
            " the tokenizer, or write the original form (llava_llama, llava_mistral, llava_qwen)"
        )
    wanted = {"aspect": "anyres", "merge": "spatial_unpad"} if family == "llava_next" else {"merge": "flat"}
    if vision["projector"] != "mlp2x_gelu" or any(vision[key] != value for key, value in wanted.items()):
        raise ValueError(
            f"family: got {family} for aspect {vision['aspect']}, merge {vision['merge']} and projector"
            f" {vision['projector']}, which it does not describe; write the original form (llava_llama, ...)"
        )
    clip = _clip(vision)
    said = {
        "image_token_index": image,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": vision.get("projector_bias", True),
        "vision_feature_layer": vision["select_layer"],
        "vision_feature_select_strategy": "default" if vision["select_feature"] == "patch" else "full",
        "image_seq_length": (clip["image_size"] // clip["patch_size"]) ** 2,
        "vision_config": clip,
    }
    if family == "llava_next":
        said["image_grid_pinpoints"] = _pinpoints(vision, "hf")
    return said


def _original(vision: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's part of the original LLaVA's config.json."""
    clip = _clip(vision)
    large = all(clip[key] == value for key, value in CLIP_LARGE.items() if key != "image_size")
    names = {336: "openai/clip-vit-large-patch14-336", 224: "openai/clip-vit-large-patch14"}
    tower = base.get("mm_vision_tower") or (names.get(clip["image_size"]) if large else None)
    if tower is None:
        raise ValueError(f"vision: got a tower of {clip}, which the original LLaVA cannot name; write family llava")
    said = {
        "mm_vision_tower": tower,
        "mm_hidden_size": clip["hidden_size"],
        "mm_projector_type": vision["projector"],
        "mm_vision_select_layer": vision["select_layer"],
        "mm_vision_select_feature": vision["select_feature"],
        "image_aspect_ratio": "square" if vision["aspect"] == "crop" else vision["aspect"],
        "mm_patch_merge_type": vision["merge"],
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }
    if vision["aspect"] == "anyres":
        said["image_grid_pinpoints"] = _pinpoints(vision, "llava")
    return said


def _clip(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The tower as CLIP's vision_config."""
    args, name = vision["tower_args"], vision["tower"].partition(".")[0]
    if name in _NAMED and not args:
        sizes = {**CLIP_LARGE, **_NAMED[name]}
    elif name == "vit" and args.get("pre_norm"):
        sizes = {
            "hidden_size": args["embed_dim"],
            "intermediate_size": int(args["embed_dim"] * args["mlp_ratio"]),
            "num_hidden_layers": args["depth"],
            "num_attention_heads": args["num_heads"],
            "image_size": vision["image_size"],
            "patch_size": args["patch_size"],
            "hidden_act": args.get("act_layer", "gelu"),
            "layer_norm_eps": vision["tower_eps"] or 1e-6,
        }
    else:
        raise ValueError(f"vision tower: got {vision['tower']!r}, expected a CLIP's; write Accessory's form")
    return {**sizes, "model_type": "clip_vision_model", "num_channels": 3, "projection_dim": 768}


def _kept(base: Mapping[str, Any]) -> dict[str, Any]:
    """What stays of the config.json that the model came with."""
    return {key: value for key, value in base.items() if key not in _OWN and key not in _DOUBLED}


def _ids(tokens: Mapping[str, int | list[int] | None]) -> dict[str, int | list[int]]:
    """bos_token_id, eos_token_id and pad_token_id, where they are known."""
    return {f"{name}_token_id": tokens[name] for name in _TOKENS if tokens.get(name) is not None}


def _pinpoints(vision: Mapping[str, Any], reader: str) -> list[list[int]]:
    """Pinpoints for a reader, llava (width, height) or hf (height, width), to whom they are the same canvases."""
    turn = 1 if vision.get("compat", "llava") == reader else -1
    return [list(pair)[::turn] for pair in vision["grid_pinpoints"]]
