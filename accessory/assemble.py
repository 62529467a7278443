"""Joins the strangers: builds on meta, adds vision, then PEFT, then loads, quantising as tensors arrive, then fuses.

Must not know conversations or files' forms; the order of these steps is decided here and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from accessory.checkpoint import Checkpoint, open_folders
from accessory.checkpoint.manifest import load_json
from accessory.data.tiles import ANYRES, ASPECTS, Geometry
from accessory.data.tokenizer import Tokenizer, open_tokenizer
from accessory.dist import Ranks, Shard, default_dtype
from accessory.model import Linear, Llama, LlamaConfig, cuts_of
from accessory.native import available
from accessory.peft import PeftConfig, apply_peft
from accessory.vision import VisionConfig, build_vision

log = logging.getLogger(__name__)

TINY = Path(__file__).parent / "tiny"

# the reference's names for compositions: (kind of vision or None, what PEFT adds unless the config says otherwise)
TYPES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "llama": ("clip", {}),
    "llama_peft": ("clip", {"bias_tuning": True, "norm_tuning": True}),
    "llama_adapter": ("perceiver", {"bias_tuning": True, "norm_tuning": True, "prefix_len": 10}),
    "llama_qformerv2": ("qformer", {}),
    "llama_qformerv2_peft": ("qformer", {"bias_tuning": True, "norm_tuning": True}),
    "llava": ("llava", {}),
    "llava_peft": ("llava", {}),
}
# what configs carry and no part of the model reads
PASSED_OVER = {"max_batch_size", "trainable_mode", "load_pretrained_visual_encoder", "lora_args", "quantization_args"}
# what PEFT may add whatever the composition: LoRA outside the decoder, and what adapters bring
OUTSIDE = {"projector_lora_rank", "vision_lora_rank", "projector_lora_targets", "vision_lora_targets"}
OUTSIDE |= {"lora_alpha", "lora_rslora", "lora_dropout", "lora_modules"}
DEFAULT_WINDOW = 4096  # Llama 2's; Meta's params.json does not say
_NO_PATH = "no --pretrained_path given: using the tiny model that ships with Accessory (drawings and digits only)"


@dataclass(frozen=True)
class Spec:
    """All that decides which parameters a model has."""

    llama_type: str
    llama: LlamaConfig
    vision: VisionConfig | None = None
    peft: PeftConfig = PeftConfig()
    template: str | None = None


@dataclass
class Bundle:
    """A model that is ready to answer, and what belongs to it."""

    model: Llama
    tokenizer: Tokenizer
    config: LlamaConfig
    vision: VisionConfig | None
    template: str
    llama_type: str
    source: str
    dtype: torch.dtype
    stop_ids: frozenset[int] = frozenset()
    """Ids that the model's own generation_config ends an answer with; the template's and the tokenizer's come too."""


def open_model(
    paths: Sequence[str | Path] = (),
    *,
    ranks: Ranks,
    llama_type: str | None = None,
    llama_config: Sequence[str | Path] = (),
    tokenizer_path: str | Path | None = None,
    dtype: torch.dtype | None = None,
    quant: bool = False,
    max_seq_len: int | None = None,
    anyres_compat: Literal["llava", "hf"] | None = None,
    weights: bool = True,
    answers: bool = False,
) -> Bundle:
    """Open folders of weights (base, then delta or PEFT folders in order) as this rank's model, for inference.

    Without paths: the tiny model that ships with the package. llama_type, llama_config (JSON files, later ones
    override) and tokenizer_path are for folders that do not say. dtype: of weights and computation, None for the
    device's default. quant: the layers' linears in NF4. max_seq_len: the window in tokens. anyres_compat: whose tiling
    a LLaVA follows, None for its folder's family. weights: False leaves it on meta. answers: it will do nothing else,
    and `quant.settle` follows; else weights that read one input share a buffer.
    Raises ValueError or OSError for anything that does not fit; then nothing is half loaded.
    """
    if not paths:
        log.info(_NO_PATH)
    checkpoint = open_folders(paths or [TINY])
    keys = {key for source in checkpoint.sources for key in source.stored}
    tokenizer = open_tokenizer(_tokenizer_path(checkpoint, tokenizer_path))
    config = {**checkpoint.config, **read_configs(llama_config)}
    if "dim" not in config:
        log.warning("no params.json or config.json says the model's sizes: taking LLaMA 7B's; give --llama_config")
    config = with_window(config, max_seq_len) if max_seq_len else config
    spec = read_spec(
        config,
        llama_type=llama_type or checkpoint.meta.get("llama_type"),
        keys=keys,
        vocab_size=tokenizer.size_for(config.get("vocab_size")),
    )
    spec = spec if anyres_compat is None else _with_compat(spec, anyres_compat)
    if spec.vision is None and (stray := sorted(key for key in keys if key.startswith("vision."))):
        log.warning("%d tensors of a vision part without its tower are left out: %s ...", len(stray), stray[0])
        checkpoint.leave_out(stray)
    dtype = default_dtype(ranks.device, checkpoint.main_dtype()) if dtype is None else dtype
    model = build(spec, shard=ranks.shard, dtype=dtype)
    if weights:
        load(model, checkpoint, device=ranks.device, dtype=dtype, quant=quant, packed=answers)
    model.eval().requires_grad_(False)
    if weights and not answers:
        model.fuse()
    return Bundle(
        model=model,
        tokenizer=tokenizer,
        config=spec.llama,
        vision=spec.vision,
        template=template_of(checkpoint, spec),
        llama_type=spec.llama_type,
        source=", ".join(str(folder.path) for folder in checkpoint.folders),
        dtype=dtype,
        stop_ids=own_stop_ids(checkpoint, tokenizer),
    )


def template_of(checkpoint: Checkpoint | None, spec: Spec) -> str:
    """The name of the template that folders were made for: what their config says, or a Hugging Face folder's files."""
    if spec.template is not None or checkpoint is None or "config" not in checkpoint.told:
        return spec.template or "alpaca"
    from accessory.data.chat_template import default_template  # and jinja, for such folders only

    told = checkpoint.told
    return default_template(told["config"], told.get("tokenizer_config"), told.get("chat_template"))


def own_stop_ids(checkpoint: Checkpoint, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that generation_config.json (or config.json) of a Hugging Face folder ends an answer with."""
    ids = checkpoint.meta.get("stop_ids", ())
    return frozenset(token for token in ids if 0 <= token < tokenizer.size)


def build(spec: Spec, *, shard: Shard | None = None, dtype: torch.dtype = torch.float32) -> Llama:
    """The whole model on the meta device: the decoder, `model.vision` where it sees, and what PEFT adds."""
    model = Llama(spec.llama, shard, device="meta", dtype=dtype)
    if spec.vision is not None:
        model.vision = build_vision(spec.vision, spec.llama.dim, device="meta", dtype=dtype, shard=shard)
    apply_peft(model, spec.peft, device="meta", dtype=dtype)
    return model


def geometry(vision: VisionConfig, slots: int, *, image_transform: str | None = None) -> Geometry:
    """What becomes of pictures before this encoder. slots: its own; image_transform: None for the model's own."""
    look = {"size": vision.image_size, "mean": vision.mean, "std": vision.std}
    if vision.kind != "llava":
        return Geometry(slots, transform=image_transform or vision.image_transform, **look)
    name = image_transform or vision.aspect
    return Geometry(
        slots,
        transform=ASPECTS.get(name, name),
        canvases=vision.canvases if vision.aspect == ANYRES else (),
        side=vision.side,
        unpad=vision.merge == "spatial_unpad",
        **look,
    )


def load(
    model: Llama,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    quant: bool = False,
    packed: bool = False,
    optional: Collection[str] = (),
    wide: Collection[str] = (),
) -> None:
    """Put this rank's slices of every tensor in place of the meta parameters, one at a time, strictly.

    quant: the weights of the layers' linears become NF4 as they arrive, so no more than one of them is whole at once;
    embedding, head, norms, vision and PEFT keep their dtype. optional: may be absent, and then stay on meta.
    wide: come in fp32 whatever `dtype` says. packed: weights are packed as they arrive where our kernels multiply, for
    a model that only answers.
    """
    from accessory.quant import Packer, quantise

    here = available() and dtype == torch.bfloat16 and torch.device(device).type == "cpu"
    packer = Packer(model) if packed and here and not quant else None
    modules = dict(model.named_modules())
    dtypes = {key: torch.float32 for key in wide}
    for key, tensor in checkpoint.tensors(cuts_of(model), dtype=dtype, optional=optional, dtypes=dtypes):
        owner, _, leaf = key.rpartition(".")
        module, tensor = modules[owner], tensor.to(device)
        if quant and leaf == "weight" and isinstance(module, Linear):
            quantise(module, tensor)
        elif packer is None or leaf != "weight" or not packer.take(module, tensor):
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta and name not in optional]
    left += [name for name, tensor in model.named_buffers() if tensor.is_meta]
    assert not left, f"nothing was loaded into {left[:5]}"


def read_configs(paths: Sequence[str | Path]) -> dict[str, Any]:
    """The union of JSON files; later files override."""
    merged: dict[str, Any] = {}
    for path in paths:
        merged.update(load_json(Path(path)))
    return merged


def read_spec(
    config: Mapping[str, Any],
    *,
    llama_type: str | None = None,
    keys: Collection[str] = (),
    vocab_size: int | None = None,
) -> Spec:
    """Sort a flat config (config.json, params.json and overrides, as the reference's) into the parts of a model.

    keys: the checkpoint's canonical names, which decide what the config leaves open: whether the model sees, and its
    type where nobody named it. vocab_size: the tokenizer's, for configs that say -1 or nothing.
    Raises ValueError for unknown types and keys, and for a tokenizer that cannot be this model's.
    """
    config = {key: value for key, value in config.items() if key not in PASSED_OVER}
    sees = "vision" in config or any(key.startswith("vision.tower.") for key in keys)
    brought = tuple(f"{name}.lora_" for name in config.get("lora_modules") or ())
    kind = _type_of([key for key in keys if not key.startswith(brought)]) if llama_type is None else llama_type
    if kind not in TYPES:
        raise ValueError(f"llama_type: got {kind!r}, expected one of {', '.join(TYPES)}")
    vision_kind, peft_defaults = TYPES[kind]
    vision = config.pop("vision", None)
    if sees and vision is None:
        vision = VisionConfig.reference(vision_kind)
    if isinstance(vision, Mapping):
        vision = VisionConfig.from_dict(vision)
    if vision is not None and getattr(vision, "kind", None) != vision_kind:
        got = getattr(vision, "kind", vision)
        raise ValueError(f"vision: got kind {got!r}, expected {vision_kind!r} with llama_type {kind}; correct one")
    template = config.pop("template", None)
    given = {name: config.pop(name) for name in _names(PeftConfig) if name in config}
    peft = {**peft_defaults, **{name: value for name, value in given.items() if value is not None}}
    if kind == "llama_adapter" and not peft.get("prefix_layers"):
        peft["prefix_layers"] = config.get("n_layers", LlamaConfig.n_layers)
    _check_types(PeftConfig, peft)
    if kind in ("llama", "llama_qformerv2", "llava"):
        adds = {name: peft[name] for name in ("lora_rank", "bias_tuning", "prefix_layers") if (peft.get(name) or 0) > 0}
        if adds:
            raise ValueError(
                f"llama_type: got {kind} with {adds}, expected a _peft or _adapter type for these; correct one of them"
            )
        peft = {name: value for name, value in peft.items() if name in OUTSIDE}
    rows = peft.get("prefix_len", PeftConfig.prefix_len)
    if vision_kind == "perceiver" and vision is not None and vision.queries != rows:
        raise ValueError(f"vision: got {vision.queries} queries for prefix_len {rows}, expected as many; correct one")
    llama = _llama_config(config, vocab_size)
    return Spec(llama_type=kind, llama=llama, vision=vision, peft=PeftConfig(**peft), template=template)


def _llama_config(config: dict[str, Any], vocab_size: int | None) -> LlamaConfig:
    """Meta's params.json (or our config.json) as a LlamaConfig."""
    config = dict(config)
    if config.pop("use_scaled_rope", False):  # Llama 3.1 and later, as Meta writes it
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(config.pop("rope_scaling_factor", 8)),
            "low_freq_factor": float(config.pop("low_freq_factor", 1)),
            "high_freq_factor": float(config.pop("high_freq_factor", 4)),
            "original_max_position_embeddings": 8192,
        }
    if "head_dim" in config:  # Mistral's params.json
        config["head_width"] = config.pop("head_dim")
    unknown = sorted(set(config) - _names(LlamaConfig))
    if unknown:
        raise ValueError(
            f"config: got unknown {', '.join(unknown)}, expected fields of {', '.join(sorted(_names(LlamaConfig)))}"
        )
    if not config.get("max_seq_len"):
        config["max_seq_len"] = DEFAULT_WINDOW
        log.info("the config names no window: taking %d tokens, Llama 2's; --max_seq_len says another", DEFAULT_WINDOW)
    rows = config["vocab_size"] = config.get("vocab_size") or -1
    _check_types(LlamaConfig, config)
    if rows == -1:
        config["vocab_size"] = vocab_size
    elif vocab_size is not None and not vocab_size <= rows <= vocab_size * 1.05 + 256:
        raise ValueError(
            f"tokenizer: got {vocab_size} tokens for a model of {rows}, expected as many; give its own tokenizer"
            " with --tokenizer_path"
        )
    if config["vocab_size"] is None:
        raise ValueError("vocab_size: got none from config or tokenizer, expected a number; give --tokenizer_path")
    return LlamaConfig(**config)


def _type_of(keys: Collection[str]) -> str:
    """The composition that a folder without meta.json must be, by its tensors."""
    if any(key.startswith("prefix") for key in keys):
        return "llama_adapter"
    peft = any(key.startswith("layers.") and (key.endswith("wo.bias") or ".lora_" in key) for key in keys)
    kind = (
        "llama_qformerv2"
        if any(key.startswith(("vision.qformer.", "vision.query_tokens")) for key in keys)
        else "llava"
        if any(key.startswith(("vision.proj.2.", "vision.image_newline")) for key in keys)
        else "llama"
    )
    return f"{kind}_peft" if peft else kind


def with_window(config: Mapping[str, Any], max_seq_len: int) -> dict[str, Any]:
    """The config with another window; dynamic rotary scaling goes on from the window that the model was trained for."""
    scaling = config.get("rope_scaling")
    if isinstance(scaling, Mapping) and "dynamic" in (scaling.get("rope_type"), scaling.get("type")):
        trained = scaling.get("original_max_position_embeddings") or config.get("max_seq_len") or DEFAULT_WINDOW
        scaling = {**scaling, "original_max_position_embeddings": trained}
    return {**config, "rope_scaling": scaling, "max_seq_len": max_seq_len}


def _with_compat(spec: Spec, compat: Literal["llava", "hf"]) -> Spec:
    """The spec with another one's tiling. ValueError for a model that has no tiles."""
    if spec.vision is None or spec.vision.kind != "llava":
        raise ValueError(f"anyres_compat: got {compat} for a {spec.llama_type}, expected a LLaVA; drop it")
    return replace(spec, vision=replace(spec.vision, compat=compat))


def _check_types(config: type, values: Mapping[str, Any]) -> None:
    """ValueError where a JSON value is of another type than its field."""
    plain = {"int": int, "float": (int, float), "bool": bool, "None": type(None), "dict": dict, "tuple": (list, tuple)}
    for field in (field for field in fields(config) if field.name in values):
        value, words = values[field.name], field.type.split(" | ")
        fits = [word for word in words if isinstance(value, plain[word.partition("[")[0]])]
        if not fits or (isinstance(value, bool) and "bool" not in words):
            raise ValueError(f"config: got {field.name} {value!r}, expected {field.type}; correct params.json")


def _names(config: type) -> set[str]:
    """The fields of a config dataclass."""
    return {field.name for field in fields(config)}


def _tokenizer_path(checkpoint: Checkpoint, given: str | Path | None) -> str | Path:
    """The tokenizer to open. ValueError where there is none."""
    if given is not None:
        return given
    if checkpoint.tokenizer is None:
        where = ", ".join(str(folder.path) for folder in checkpoint.folders)
        raise ValueError(
            f"{where}: no tokenizer in it, expected tokenizer.model or tokenizer.json; give --tokenizer_path"
        )
    return checkpoint.tokenizer
