"""The three forms: who writes them, and the small files beside the weights.

Must not read a tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory.checkpoint import FolderWriter, Form
from accessory.checkpoint.files import few
from accessory.checkpoint.headers import Spec
from accessory.checkpoint.huggingface import papers
from accessory.checkpoint.huggingface.writer import HuggingFaceForm, HuggingFaceWriter
from accessory.checkpoint.manifest import load_json
from accessory.checkpoint.merge import MERGED
from accessory.dialect.swift import ARGUMENTS
from accessory.release import Subject, additions, release

if TYPE_CHECKING:
    from accessory.export.run import Job

GIGA = 1_000_000_000
_PLAIN = {"llama": "llama", "llama_peft": "llama", "llava": "llava", "llava_peft": "llava"}


def writer(job: Job, target: Path, specs: Mapping[str, Spec]) -> FolderWriter | HuggingFaceWriter:
    """What takes the tensors. ValueError where the form has no place for some of them, before anything is written."""
    settings = job.settings
    if settings.export_form == "accessory":
        fmt = "pth" if settings.export_legacy_format else "safetensors"
        form = Form(shards=settings.export_shards, fmt=fmt, dtype=job.dtype, tied=job.spec.llama.tied)
        return FolderWriter(target, specs, form=form)
    _refuse_additions(job, specs)
    if settings.export_form == "meta":
        params(job)
        form = Form(shards=settings.export_shards, fmt="pth", dtype=job.dtype, meta=True, tied=job.spec.llama.tied)
        return FolderWriter(target, specs, form=form)
    form = HuggingFaceForm(
        family=_family(job),
        head_dim=job.spec.llama.head_dim,
        dtype=job.dtype,
        max_shard_bytes=max(1, int(settings.export_size * GIGA)),
        legacy=settings.export_legacy_format,
    )
    return HuggingFaceWriter(target, specs, form=form)


def finish(job: Job, writing: FolderWriter | HuggingFaceWriter) -> None:
    """Write the small files, and let the folder appear."""
    place = job.tokenizer.path
    if isinstance(writing, HuggingFaceWriter):
        _finish_hf(job, writing)
        return
    kind = job.spec.llama_type
    meta: dict[str, Any] = {MERGED: job.merged} if job.merged else {}
    if job.settings.export_form == "meta":
        writing.finish(config=params(job), meta=meta, tokenizer=place)
        return
    spec, config = job.spec, {**asdict(job.spec.llama), "template": job.template}
    if spec.vision is not None:
        config["vision"] = spec.vision.to_dict()
    if spec.peft.bias_tuning or spec.peft.norm_tuning or spec.peft.prefix_layers:
        config |= {key: value for key, value in asdict(spec.peft).items() if "lora_" not in key}
    else:
        kind = _PLAIN.get(kind, kind.removesuffix("_peft"))
    if ids := job.checkpoint.meta.get("stop_ids"):
        meta["stop_ids"] = ids
    config = {key: value for key, value in config.items() if value is not None}
    writing.finish(config=config, meta={"llama_type": kind, **meta}, tokenizer=place)


def params(job: Job) -> dict[str, Any]:
    """params.json of Meta for the model. ValueError for what Meta's code does not compute."""
    llama = job.spec.llama
    lacks = {"qkv_bias": llama.qkv_bias, "sliding_window": llama.sliding_window, "head_width": llama.head_width}
    lacks |= {"vision": job.spec.vision, "tied": llama.tied}
    if told := [name for name, value in lacks.items() if value]:
        raise ValueError(f"export_form: got meta for a model with {', '.join(told)}, which Meta's has not; choose hf")
    table: dict[str, Any] = {
        "dim": llama.dim,
        "n_layers": llama.n_layers,
        "n_heads": llama.n_heads,
        "n_kv_heads": llama.kv_heads,
        "vocab_size": llama.vocab_size,
        "norm_eps": llama.norm_eps,
        "rope_theta": llama.rope_theta,
        **_width(llama.dim, llama.ffn_dim),
    }
    scaling = llama.rope_scaling
    if scaling is None:
        return table
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else scaling
    if kind != "llama3" or scaling.get("original_max_position_embeddings", 8192) != 8192:
        raise ValueError(
            f"export_form: got meta for a model with rope_scaling {kind}, expected Llama 3's over 8192; choose hf"
        )
    factors = {"factor": "rope_scaling_factor", "low_freq_factor": "low_freq_factor"}
    factors["high_freq_factor"] = "high_freq_factor"
    usual = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    said = {new: scaling[old] for old, new in factors.items() if float(scaling.get(old, usual[old])) != usual[old]}
    return {**table, "use_scaled_rope": True, **said}


def _width(dim: int, wanted: int) -> dict[str, Any]:
    """multiple_of and ffn_dim_multiplier by which Meta's formula gives this feed-forward width."""
    base = int(8 * dim / 3)
    for multiple in (256, 1024, 4096):
        if multiple * math.ceil(base / multiple) == wanted:
            return {"multiple_of": multiple}
    return {"multiple_of": wanted, **({"ffn_dim_multiplier": wanted / base} if base > wanted else {})}


def _family(job: Job) -> str:
    """The family of a Hugging Face folder."""
    chosen = job.settings.export_family
    if chosen is not None and chosen not in papers.FAMILIES:
        raise ValueError(f"export_family: got {chosen!r}, expected one of {', '.join(papers.FAMILIES)}")
    return chosen or papers.family_of(_flat(job), job.checkpoint.told)


def _flat(job: Job) -> dict[str, Any]:
    """The model's config as plain values, sizes resolved."""
    llama = job.spec.llama
    flat = {**asdict(llama), "hidden_dim": llama.ffn_dim, "n_kv_heads": llama.kv_heads}
    return flat if job.spec.vision is None else {**flat, "vision": job.spec.vision.to_dict()}


def _finish_hf(job: Job, writing: HuggingFaceWriter) -> None:
    """config.json, generation_config.json, preprocessor_config.json, tokenizer and chat template."""
    subject = Subject(_flat(job), job.tokenizer, job.template, job.checkpoint.meta.get("stop_ids", ()), job.checkpoint)
    found = release(
        subject,
        family=writing.form.family,
        dtype=str(job.dtype).removeprefix("torch."),
        own_template=job.own_template,
        merged=job.merged,
    )
    writing.finish(**{**found.words(), "more": {**found.more, **_noted(job)}})


def _noted(job: Job) -> dict[str, str]:
    """What ms-swift's words said of the run whose weights these are, by the file's name: now of a model by itself."""
    place = next((Path(path) for path in reversed(job.paths) if (Path(path) / ARGUMENTS).is_file()), None)
    if place is None:
        return {}
    told = {**load_json(place / ARGUMENTS), "sft_type": "full", "only_save_trainable": False}
    return {ARGUMENTS: json.dumps(told, indent=2, ensure_ascii=False) + "\n"}


def _refuse_additions(job: Job, specs: Mapping[str, Spec]) -> None:
    """ValueError for what a plain LLaMA has not: biases and prompts that PEFT added."""
    added = additions(specs, qkv_bias=job.spec.llama.qkv_bias)
    if added:
        raise ValueError(
            f"export_form: got {job.settings.export_form} for a model with {few(added, most=2)}, which plain LLaMA has"
            " not; choose accessory"
        )
