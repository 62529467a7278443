"""When a run's weights are written as a PEFT adapter, and everything that this form must be told about the base.

Must not know how an adapter lies in files.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from accessory.checkpoint import Checkpoint
from accessory.checkpoint.files import few
from accessory.checkpoint.huggingface.adapter import AdapterSource
from accessory.checkpoint.huggingface.adapter_writer import AdapterForm
from accessory.checkpoint.huggingface.papers import layout_of
from accessory.checkpoint.merge import LoraDelta, sample
from accessory.dist import dtype_from_name
from accessory.peft import lora_plan
from accessory.train.settings import Settings
from accessory.train.start import Start

log = logging.getLogger(__name__)


def adapter_form(start: Start, settings: Settings, trained: Collection[str]) -> AdapterForm | None:
    """How the trained tensors are written as an adapter; None where the weights have Accessory's form.

    save_adapter decides; without it, LoRA on a Hugging Face folder, or with save_format hf, is an adapter. Raises
    ValueError where an adapter that the run began with would be lost in part.
    """
    checkpoint = start.checkpoint
    bases = [] if checkpoint is None else [source for source in checkpoint.sources if not _is_adapter(source)]
    wanted = settings.save_adapter
    if wanted is None:
        hugging = {source.folder.form for source in bases} == {"huggingface"}
        asked = settings.save_format == "hf" or (hugging and settings.save_format is None)
        wanted = settings.finetuning_type == "lora" and asked and checkpoint is not None
    if not wanted:
        return None
    if checkpoint is None:
        raise ValueError("save_adapter: got true for a model from scratch, expected one with a base; set it false")
    brought = {key for source in checkpoint.sources if _is_adapter(source) for key in source.stored}
    if lost := sorted(brought - set(trained)):
        raise ValueError(
            f"adapter_name_or_path: brings {few(lost, most=2)} ({len(lost)} tensors), which this run does not train and"
            " its adapter would lack; merge it first (accessory export), or set save_adapter false"
        )
    spec, name = (
        start.spec,
        settings.model_name_or_path[0] if settings.model_name_or_path else str(bases[0].folder.path),
    )
    config: dict[str, Any] = {"template": start.template}
    if spec.peft.bias_tuning:
        config |= {"bias_tuning": True, "norm_tuning": spec.peft.norm_tuning, "llama_type": spec.llama_type}
    llava = spec.vision is not None and spec.vision.kind == "llava"
    return AdapterForm(
        layout=layout_of(checkpoint.told.get("family", "llava")) if llava else "plain",
        head_dim=spec.llama.head_dim,
        modules=lora_plan(start.model, spec.peft),
        keys=[key for key, _ in start.model.named_parameters() if ".lora_" not in key],
        base=str(Path(name).resolve()) if Path(name).exists() else name,
        sample=sample(Checkpoint(bases)),
        config=config,
        rslora=settings.use_rslora,
        dropout=settings.lora_dropout,
        dtype=dtype_from_name(settings.save_dtype) if settings.save_dtype else None,
    )


def _is_adapter(source: object) -> bool:
    """Whether a source is what an adapter brings."""
    return isinstance(source, AdapterSource | LoraDelta)
