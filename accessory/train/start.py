"""From settings to a model that can be trained: folders opened, parts chosen, PEFT added, weights read or drawn.

Must not know steps, batches or optimisers.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accessory.assemble import TINY, Spec, build, load, own_stop_ids, read_configs, read_spec, template_of, with_window
from accessory.checkpoint import Checkpoint, open_folders
from accessory.checkpoint.write import Papers
from accessory.data.tokenizer import Tokenizer, open_tokenizer
from accessory.dist import Ranks, default_dtype, dtype_from_name
from accessory.model import Llama
from accessory.model.llama import init_weights
from accessory.peft import PeftConfig, init_peft
from accessory.train.parts import Parts, choose_parts, peft_config
from accessory.train.settings import Settings

log = logging.getLogger(__name__)


@dataclass
class Start:
    """What a run begins with, before any weight is read."""

    spec: Spec
    checkpoint: Checkpoint | None
    tokenizer: Tokenizer
    dtype: torch.dtype
    """Of computation, and of frozen weights."""
    template: str
    model: Llama
    """This rank's slices, on the meta device until `make_model`."""

    @property
    def sources(self) -> list[str]:
        """The folders that the model came from."""
        return [] if self.checkpoint is None else [str(folder.path.resolve()) for folder in self.checkpoint.folders]

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that the folders' own generation config ends an answer with."""
        return frozenset() if self.checkpoint is None else own_stop_ids(self.checkpoint, self.tokenizer)

    @property
    def slots(self) -> int:
        """Feature rows that a picture takes in the sequence."""
        return 0 if self.spec.vision is None else self.model.vision.slots


def open_start(settings: Settings, ranks: Ranks) -> Start:
    """Read configs and headers, no weights.

    Raises ValueError or OSError, in one sentence, for folders, configs and settings that do not fit together.
    """
    paths: list[str | Path] = [*settings.model_name_or_path, *settings.adapter_name_or_path]
    if not paths and not settings.train_from_scratch:
        log.info("no model_name_or_path given: training the tiny model that ships with Accessory")
        paths = [TINY]
    checkpoint = open_folders(paths) if paths else None
    tokenizer = open_tokenizer(_tokenizer_path(settings, checkpoint))
    rows = None if checkpoint is None else checkpoint.config.get("vocab_size")
    spec = plan_spec(settings, checkpoint, tokenizer.size_for(rows))
    if settings.streaming and settings.stage == "sft" and spec.vision is not None and settings.train_projector is None:
        raise ValueError(
            "train_projector: missing, expected frozen, lora, full or projection, since a stream does not say before it"
            " is read whether it has pictures; give one"
        )
    stored = None if checkpoint is None else checkpoint.main_dtype()
    dtype = dtype_from_name(settings.precision) if settings.precision else default_dtype(ranks.device, stored)
    if dtype == torch.float16 and not settings.precision:
        dtype = torch.bfloat16  # fp16 is how old checkpoints are stored, not how anyone should train them unasked
    template = settings.template or template_of(checkpoint, spec)
    if template == "none" and not settings.template and spec.template is None:
        template = "alpaca"  # a base model is made for none; what is trained on it needs one
        log.info("template: alpaca, as the folder is for none; --template says another")
    model = build(spec, shard=ranks.shard, dtype=dtype)
    return Start(replace(spec, template=template), checkpoint, tokenizer, dtype, template, model)


def plan_spec(settings: Settings, checkpoint: Checkpoint | None, vocab_size: int | None) -> Spec:
    """The model that the folders and settings describe, PEFT's additions included."""
    config = {**({} if checkpoint is None else checkpoint.config), **read_configs(settings.llama_config)}
    if "dim" not in config:
        raise ValueError("llama_config: missing, and no folder says the model's sizes; give params.json")
    window = settings.max_seq_len or (None if config.get("max_seq_len") else settings.cutoff_len)
    if window:
        config = with_window(config, window)
    if settings.anyres_compat:
        seen = config.get("vision")
        if not isinstance(seen, dict) or seen.get("kind") != "llava":
            raise ValueError(f"anyres_compat: got {settings.anyres_compat}, expected a LLaVA to train with it; drop it")
        config["vision"] = {**seen, "compat": settings.anyres_compat}
    keys = _keys(checkpoint)
    named = settings.llama_type or (None if checkpoint is None else checkpoint.meta.get("llama_type"))
    before = read_spec(config, llama_type=named, keys=keys, vocab_size=vocab_size)
    spec = read_spec(
        {**config, **peft_config(settings, stored=before.peft, sees=before.vision is not None)},
        llama_type=_with_peft(before.llama_type, settings),
        keys=keys,
        vocab_size=vocab_size,
    )
    if settings.cutoff_len > spec.llama.max_seq_len and settings.cutoff_len == Settings.cutoff_len:
        settings.cutoff_len = spec.llama.max_seq_len
        log.info("cutoff_len: %d, the model's window", settings.cutoff_len)
    if settings.cutoff_len > spec.llama.max_seq_len:
        raise ValueError(
            f"cutoff_len: got {settings.cutoff_len}, expected at most the model's window of {spec.llama.max_seq_len};"
            " lower it, or raise max_seq_len"
        )
    return spec


def make_model(start: Start, settings: Settings, ranks: Ranks, *, pictures: bool) -> tuple[Llama, Parts]:
    """The model on the device: trained tensors in fp32, frozen ones in the dtype of computation or NF4.

    pictures: whether the data has any. What no folder holds is drawn from the seed, equal at any tp size, and said.
    """
    model = start.model
    parts = choose_parts(model, settings, pictures=pictures)
    absent = {name for name, _ in model.named_parameters()} - _keys(start.checkpoint)
    if start.checkpoint is not None:
        _check_absent(absent, settings, start, blind=parts.names if pictures else None)
        load(
            model,
            start.checkpoint,
            device=ranks.device,
            dtype=start.dtype,
            quant=settings.quantization_bit == 4,
            optional=absent,
            wide=parts.names,
        )
    _draw(model, absent, parts.names, start, settings, ranks)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in parts.names)
    return model, parts


def papers(start: Start) -> Papers:
    """What lies beside the weights of what is trained: config, meta, tokenizer."""
    spec = start.spec
    config: dict[str, Any] = {**asdict(spec.llama), "template": start.template}
    if spec.vision is not None:
        config["vision"] = spec.vision.to_dict()
    if spec.llama_type.endswith(("_peft", "_adapter")):
        config |= asdict(spec.peft)
    elif spec.peft != PeftConfig():  # LoRA outside of the decoder
        config |= {key: value for key, value in asdict(spec.peft).items() if value != getattr(PeftConfig(), key)}
    config = {key: value for key, value in config.items() if value is not None}
    meta: dict[str, Any] = {"llama_type": spec.llama_type}
    if ids := sorted(start.stop_ids):
        meta["stop_ids"] = ids
    return Papers(config=config, meta=meta, tokenizer=start.tokenizer.path)


def _tokenizer_path(settings: Settings, checkpoint: Checkpoint | None) -> str | Path:
    """The tokenizer to open. ValueError where there is none."""
    if settings.tokenizer_path is not None:
        return settings.tokenizer_path
    if checkpoint is not None and checkpoint.tokenizer is not None:
        return checkpoint.tokenizer
    raise ValueError("tokenizer_path: missing, and no folder of model_name_or_path holds a tokenizer; give one")


def _keys(checkpoint: Checkpoint | None) -> set[str]:
    """The canonical names of all stored tensors."""
    return set() if checkpoint is None else {key for source in checkpoint.sources for key in source.stored}


def _with_peft(kind: str, settings: Settings) -> str:
    """The composition once finetuning_type has added its parameters."""
    if settings.finetuning_type == "adapter":
        if kind not in ("llama", "llama_peft", "llama_adapter"):
            raise ValueError(
                f"finetuning_type: got adapter for a model of type {kind}, expected llama; choose another method"
            )
        return "llama_adapter"
    if settings.finetuning_type in ("lora", "norm_bias", "norm_bias_lora", "bias") and not kind.endswith("_peft"):
        return kind if kind == "llama_adapter" else f"{kind}_peft"
    return kind


def _check_absent(absent: Collection[str], settings: Settings, start: Start, *, blind: Collection[str] | None) -> None:
    """ValueError where weights are missing that only training from scratch may draw.

    blind: what is trained, where there are pictures: a vision part that is drawn and stays frozen would see nothing.
    """
    if settings.train_from_scratch:
        return
    added = (".lora_a.", ".lora_b.", "prefix")
    plain = _own_names(start.model)  # of the base itself: biases of a model that has them are among these
    lost = sorted(
        name for name in absent if name in plain or not (any(mark in name for mark in added) or name.endswith(".bias"))
    )
    eyes = sorted(name for name in absent if name.startswith("vision."))
    lost = [name for name in lost if name not in eyes]
    if blind is not None and (random := [name for name in eyes if name not in blind]):
        raise ValueError(
            f"model_name_or_path: {', '.join(start.sources)} lack {len(random)} tensors of the vision part that are not"
            f" trained either ({random[0]} ...), expected a folder that holds them; give it too, train them, or set"
            " train_from_scratch true"
        )
    if lost:
        raise ValueError(
            f"model_name_or_path: {', '.join(start.sources)} lack {len(lost)} tensors of the model ({lost[0]} ...),"
            " expected all of the language model; give its base folder first, or train_from_scratch true"
        )


def _draw(
    model: Llama, absent: Collection[str], wide: Collection[str], start: Start, settings: Settings, ranks: Ranks
) -> None:
    """Allocate and draw what no folder held."""
    if not absent:
        return
    modules = dict(model.named_modules())
    for name in absent:
        owner, _, leaf = name.rpartition(".")
        meta = modules[owner]._parameters[leaf]
        dtype = torch.float32 if name in wide else start.dtype
        modules[owner]._parameters[leaf] = nn.Parameter(torch.empty(meta.shape, device=ranks.device, dtype=dtype))
    own = _own_names(model)
    init_weights(model, seed=settings.seed, names=set(absent))
    init_peft(model, seed=settings.seed, names=set(absent))
    eyes = sorted(name for name in absent if name.startswith("vision."))
    if eyes:
        _draw_vision(model, eyes, settings)
    scratch = len(own & set(absent))
    if scratch or eyes:
        log.warning(
            "drawn from seed %d: %d tensors of the decoder, %d of the vision part", settings.seed, scratch, len(eyes)
        )


def _own_names(model: Llama) -> set[str]:
    """The decoder's tensors without what PEFT added."""
    plain_model = Llama(model.config, model.shard)
    return {name for name, _ in plain_model.named_parameters()}


def _draw_vision(model: Llama, names: Collection[str], settings: Settings) -> None:
    """The vision room draws all of its own first weights; those that a folder held are put back."""
    kept = {name: p.detach().clone() for name, p in model.vision.named_parameters() if f"vision.{name}" not in names}
    model.vision.init_weights(torch.Generator().manual_seed(settings.seed))
    with torch.no_grad():
        for name, parameter in model.vision.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])
