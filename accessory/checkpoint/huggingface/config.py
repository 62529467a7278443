"""Hugging Face's config.json as our flat config: families, their defaults, and what of them we do not compute.

Must not know torch, tensors or files: values come in, values go out.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# what a config.json of each family means where it says nothing
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "Yi": {**_LLAMA, "vocab_size": 64000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 5e6},
    "mistral": {
        **_LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        **_LLAMA,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}
CLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_LARGE: dict[str, Any] = {
    **CLIP_DEFAULTS,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
# the original LLaVA names its tower by its folder on the hub, and says no size
TOWERS = {"clip-vit-large-patch14-336": CLIP_LARGE, "clip-vit-large-patch14": {**CLIP_LARGE, "image_size": 224}}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ORIGINAL = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
LLAVA = ("llava", "llava_next")
CLIP = ("clip", "clip_vision_model")


@dataclass(frozen=True)
class Reading:
    """What a config.json means to us."""

    family: str
    """A key of DEFAULTS, LLAVA or CLIP, or the original LLaVA's model_type."""
    flat: dict[str, Any] = field(default_factory=dict)
    """Fields of LlamaConfig, and `vision`: those of VisionConfig; empty for a tower by itself."""
    llama_type: str | None = None
    tower: str | None = None
    """Of the original LLaVA: the folder or hub id of the tower, which its weights may lack."""


def read_config(
    config: Mapping[str, Any],
    *,
    where: str,
    preprocessor: Mapping[str, Any] | None = None,
    tower: Mapping[str, Any] | None = None,
) -> Reading:
    """Translate a config.json.

    preprocessor: preprocessor_config.json; tower: config.json of the original LLaVA's tower. Raises
    ValueError, naming `where`, for model types and features that we do not compute.
    """
    kind, preprocessor = config.get("model_type"), preprocessor or {}
    _refuse_quantised(config, where)
    if kind in CLIP:
        return Reading(kind)
    if "mm_vision_tower" in config and kind in ORIGINAL:
        flat = {**_text(ORIGINAL[kind], config, where), "vision": _original(config, tower, preprocessor, where)}
        return Reading(kind, flat, "llava", str(config["mm_vision_tower"]))
    if kind in LLAVA:
        said = dict(config.get("text_config") or {})
        if config.get("tie_word_embeddings"):
            said["tie_word_embeddings"] = True
        _refuse_quantised(said, where)
        flat = _text(said.get("model_type", "llama"), said, where)
        return Reading(kind, {**flat, "vision": _llava(kind, config, preprocessor, where)}, "llava")
    if kind in DEFAULTS:
        return Reading(kind, _text(kind, config, where), "llama")
    known = ", ".join([*DEFAULTS, *LLAVA, *(name for name in ORIGINAL if name not in LLAVA)])
    raise ValueError(f"{where}: model_type is {kind!r}, expected one of {known}; convert the model to one of these")


def tower_name(config: Mapping[str, Any]) -> str | None:
    """The tower that an original LLaVA's config names and whose sizes only its own config.json says; else None."""
    name = config.get("mm_vision_tower")
    if not isinstance(name, str) or config.get("model_type") not in ORIGINAL or _basename(name) in TOWERS:
        return None
    return name


def tower_id(name: str) -> str | None:
    """The hub id of a tower that is known by the last part of its name; None for others."""
    known = _basename(name)
    return f"openai/{known}" if known in TOWERS else None


def stop_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> list[int]:
    """The ids that end an answer, by generation_config.json, else by config.json."""
    text = config.get("text_config")
    for said in (generation, text if isinstance(text, Mapping) else {}, config):
        value = said.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if found := [token for token in ids if type(token) is int and token >= 0]:
            return found
    return []


def _text(family: str, said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The decoder's fields."""
    if family not in DEFAULTS:
        expected = ", ".join(DEFAULTS)
        raise ValueError(f"{where}: its language model is a {family!r}, expected one of {expected}; convert the model")
    values = {**DEFAULTS[family], **said}
    _refuse_features(values, where)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{where}: rope_scaling is {rope!r}, expected an object; correct config.json")
    theta = values.get("rope_theta") or rope.get("rope_theta") or 10000.0
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    old = scaling.pop("type", "default")  # the name of rope_type before transformers 4.43
    if scaling.setdefault("rope_type", old) == "default":
        scaling = {}
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor is not 1, which is not computed here; use another model")
    heads, dim = values["num_attention_heads"], values["hidden_size"]
    width = values.get("head_dim")
    flat = {
        "dim": dim,
        "n_layers": values["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": values.get("num_key_value_heads") or heads,
        "vocab_size": values["vocab_size"],
        "hidden_dim": values["intermediate_size"],
        "norm_eps": values["rms_norm_eps"],
        "rope_theta": float(theta),
        "rope_scaling": scaling or None,
        "max_seq_len": values["max_position_embeddings"],
        "qkv_bias": family == "qwen2",
        "tied": bool(values.get("tie_word_embeddings")),
        "head_width": width if width and width * heads != dim else None,
        **_window(family, values, where),
    }
    return {key: value for key, value in flat.items() if value is not None}


def _window(family: str, values: Mapping[str, Any], where: str) -> dict[str, int]:
    """The sliding window of Mistral and Qwen, which only some layers may have."""
    window = values.get("sliding_window")
    slides = family == "mistral" or (family == "qwen2" and values.get("use_sliding_window"))
    if window is None or not slides:
        return {}
    layers, full = values["num_hidden_layers"], values["max_window_layers"] if family == "qwen2" else 0
    kinds = values.get("layer_types")
    if kinds:
        full = next((at for at, kind in enumerate(kinds) if kind != "full_attention"), layers)
        if list(kinds) != ["full_attention"] * full + ["sliding_attention"] * (layers - full):
            raise ValueError(f"{where}: layer_types alternate, which is not computed here; use another model")
    return {"sliding_window": window, "full_layers": full} if full < layers else {}


def _refuse_features(values: Mapping[str, Any], where: str) -> None:
    """ValueError for what the decoder does not compute, and for sizes that are none."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if type(values[name]) is not int or values[name] < 1:
            raise ValueError(f"{where}: {name} is {values[name]!r}, expected a positive number; correct config.json")
    if values["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"{where}: hidden_act is {values['hidden_act']!r}, expected silu; use another model")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise ValueError(f"{where}: {name} is true, which is not computed here; use a model without it")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor is not 1, which is not computed here; use another model")


def _refuse_quantised(config: Mapping[str, Any], where: str) -> None:
    """ValueError for a folder of quantised weights."""
    if said := config.get("quantization_config"):
        method = said.get("quant_method", "unknown") if isinstance(said, Mapping) else said
        raise ValueError(
            f"{where}: holds quantised weights (quant_method {method}), which this version does not read; give the"
            " original 16 bit folder, and quantization_bit 4 to store it in NF4"
        )


def _llava(kind: str, config: Mapping[str, Any], preprocessor: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The encoder of llava-hf's folders."""
    said = config.get("vision_config")
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ValueError(f"{where}: vision_feature_layer is {layer!r}, expected one number; use another model")
    if (act := config.get("projector_hidden_act", "gelu")) != "gelu":
        raise ValueError(f"{where}: projector_hidden_act is {act!r}, expected gelu; use another model")
    chosen = config.get("vision_feature_select_strategy", "default")
    vision = {
        **_clip(CLIP_LARGE if said is None else {**CLIP_DEFAULTS, **said}, where),
        **_colours(preprocessor),
        "select_layer": layer,
        "select_feature": "patch" if chosen == "default" else "cls_patch",
        "projector": "mlp2x_gelu",
        "projector_bias": bool(config.get("multimodal_projector_bias", True)),
        "compat": "hf",
    }
    if kind == "llava":
        return {**vision, "aspect": "pad" if preprocessor.get("do_pad") else "crop", "merge": "flat"}
    points = config.get("image_grid_pinpoints") or PINPOINTS
    tiles = preprocessor.get("image_grid_pinpoints")
    if tiles and tiles != points:
        raise ValueError(
            f"{where}: image_grid_pinpoints are {points}, in preprocessor_config.json {tiles}; make them equal"
        )
    return {**vision, "aspect": "anyres", "grid_pinpoints": points, "merge": "spatial_unpad"}


def _original(
    config: Mapping[str, Any], tower: Mapping[str, Any] | None, preprocessor: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The encoder of the original LLaVA's folders."""
    name = _basename(str(config["mm_vision_tower"]))
    sizes = TOWERS.get(name)
    if sizes is None:
        if tower is None or tower.get("model_type") not in CLIP:
            raise ValueError(f"{where}: mm_vision_tower is {name!r}, expected a CLIP such as {', '.join(TOWERS)}")
        sizes = {**CLIP_DEFAULTS, **(tower.get("vision_config", tower) or {})}
    if config.get("mm_use_im_start_end"):
        raise ValueError(f"{where}: mm_use_im_start_end is true, as only LLaVA 1.0 had it; use LLaVA 1.5 or later")
    aspect = {None: "crop", "square": "crop", "pad": "pad", "anyres": "anyres"}.get(config.get("image_aspect_ratio"))
    if aspect is None:
        asked = config.get("image_aspect_ratio")
        raise ValueError(f"{where}: image_aspect_ratio is {asked!r}, expected square, pad or anyres; use another model")
    vision = {
        **_clip(sizes, where),
        **_colours(preprocessor),
        "select_layer": config.get("mm_vision_select_layer", -2),
        "select_feature": config.get("mm_vision_select_feature") or "patch",
        "projector": config.get("mm_projector_type") or "linear",
        "aspect": aspect,
        "merge": config.get("mm_patch_merge_type") or "flat",
        "compat": "llava",
    }
    points = config.get("image_grid_pinpoints")
    if aspect == "anyres":
        vision["grid_pinpoints"] = _points(points, where) if points else PINPOINTS
    return vision


def _points(said: Any, where: str) -> list[list[int]]:
    """Pinpoints, which some configs hold as a string."""
    try:
        points = ast.literal_eval(said) if isinstance(said, str) else said
        return [[int(width), int(height)] for width, height in points]
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(
            f"{where}: image_grid_pinpoints are {said!r}, expected pairs of pixels; correct them"
        ) from error


def _clip(said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The tower's fields: a timm VisionTransformer of CLIP's form."""
    if said.get("model_type", CLIP[1]) not in CLIP:
        raise ValueError(f"{where}: its vision tower is a {said['model_type']!r}, expected a CLIP; use another model")
    acts = {"quick_gelu": "quick_gelu", "gelu": "gelu"}
    if said["hidden_act"] not in acts:
        raise ValueError(f"{where}: its tower's hidden_act is {said['hidden_act']!r}, expected {' or '.join(acts)}")
    args = {
        "patch_size": said["patch_size"],
        "embed_dim": said["hidden_size"],
        "depth": said["num_hidden_layers"],
        "num_heads": said["num_attention_heads"],
        "mlp_ratio": _ratio(said["hidden_size"], said["intermediate_size"]),
        "pre_norm": True,
        "act_layer": acts[said["hidden_act"]],
    }
    eps, size = float(said["layer_norm_eps"]), said["image_size"]
    return {"kind": "llava", "tower": "vit", "tower_args": args, "tower_eps": eps, "image_size": size}


def _ratio(width: int, inner: int) -> float:
    """What timm multiplies `width` by and rounds down, to get `inner`."""
    plain = inner / width
    return plain if int(width * plain) == inner else (inner + 0.5) / width


def _colours(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and deviation of the colours, where the folder says them."""
    names = {"image_mean": "mean", "image_std": "std"}
    return {ours: preprocessor[name] for name, ours in names.items() if preprocessor.get(name)}


def _basename(name: str) -> str:
    """The last part of a hub id or path."""
    return name.rstrip("/").rpartition("/")[2]
