"""One export: the folders opened with everything merged, streamed tensor by tensor into a new folder, then proven.

Must not know how an adapter adds to a weight, nor how a form names its files.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from accessory.assemble import Spec as ModelSpec
from accessory.assemble import build, read_configs, read_spec, template_of
from accessory.checkpoint import Checkpoint, open_folders
from accessory.checkpoint.headers import Spec
from accessory.checkpoint.manifest import load_json
from accessory.checkpoint.merge import merged_before, record
from accessory.checkpoint.operate import check_range
from accessory.data.chat_template import writes_the_same
from accessory.data.template import get_template
from accessory.data.tokenizer import Tokenizer, open_tokenizer
from accessory.dist import Cut, dtype_from_name
from accessory.export import forms
from accessory.export.settings import ExportSettings
from accessory.export.verify import verify
from accessory.model import cuts_of

log = logging.getLogger(__name__)

FAILED, ARGUMENTS = ".failed", "sft_args.json"


@dataclass
class Job:
    """What is exported, before a tensor is read."""

    settings: ExportSettings
    checkpoint: Checkpoint
    """With everything merged."""
    spec: ModelSpec
    tokenizer: Tokenizer
    template: str
    own_template: bool
    """Whether the folder's own chat template stays."""
    dtype: torch.dtype
    merged: list[dict[str, Any]]
    """The adapters that are in the weights."""

    @property
    def paths(self) -> list[str]:
        """What the user named."""
        return [*self.settings.model_name_or_path, *self.settings.adapter_name_or_path]


def run(settings: ExportSettings) -> Path:
    """Write the folder and prove it; returns its path.

    Raises ValueError or OSError for folders that do not fit together, an adapter that changes nothing, a form that
    cannot hold the model, and a folder whose logits are too far from the model's, which is then renamed to *.failed.
    """
    target = Path(settings.export_dir).expanduser()
    _refuse_taken(target)
    job = prepare(settings)
    specs = {key: Spec(cut.shape, job.checkpoint.dtype_of(key)) for key, cut in cuts_of(build(job.spec)).items()}
    with forms.writer(job, target, specs) as writer:
        for key, tensor in _bar(_tensors(job, specs), specs, "writing"):
            writer.put(key, tensor)
        forms.finish(job, writer)
    _carry_arguments(job, target)
    log.info("%s: %d tensors in %s, %s form", target, len(specs), _name(job.dtype), settings.export_form)
    if not settings.export_verify:
        log.info("export_verify false: the folder was not opened again")
        return target
    try:
        verify(job, target)
    except ValueError:
        failed = _aside(target)
        log.error("the folder is not what the model is; it lies in %s", failed)
        raise
    return target


def prepare(settings: ExportSettings) -> Job:
    """Open folders, tokenizer and template; read headers only."""
    paths = [*settings.model_name_or_path, *settings.adapter_name_or_path]
    checkpoint = open_folders(paths, merge=True)
    place = settings.tokenizer_path or checkpoint.tokenizer
    if place is None:
        raise ValueError(f"{paths[0]}: no tokenizer in it, expected tokenizer.model or tokenizer.json; give its path")
    tokenizer = open_tokenizer(place)
    checkpoint.config |= read_configs(settings.llama_config)
    keys = {key for source in checkpoint.sources for key in source.stored}
    kind = settings.llama_type or checkpoint.meta.get("llama_type")
    spec = read_spec(
        checkpoint.config,
        llama_type=kind,
        keys=keys,
        vocab_size=tokenizer.size_for(checkpoint.config.get("vocab_size")),
    )
    explicit = settings.template or spec.template
    adapters = [folder for folder in checkpoint.folders[1:] if folder.form != "huggingface"]
    merged = record(adapters, merged_before(checkpoint.folders))
    stored = checkpoint.main_dtype()
    dtype = dtype_from_name(settings.export_dtype) if settings.export_dtype else stored
    if stored not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{paths[0]}: its weights are {stored}, expected 16 or 32 bit floats; give another model")
    template = settings.template or template_of(checkpoint, spec)
    get_template(template)
    told = checkpoint.told.get("chat_template")
    own = not explicit and told is not None and writes_the_same(told, template)
    return Job(settings, checkpoint, spec, tokenizer, template, own, dtype, merged)


def _tensors(job: Job, specs: dict[str, Spec]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the dtype of the result. ValueError, at the end, where merged LoRA changed no weight at all."""
    checkpoint = job.checkpoint
    deltas = {key for source in checkpoint.sources if source.is_delta for key in source.stored}
    cuts = {key: Cut(spec.shape) for key, spec in specs.items()}
    # fp16 is reached through fp32, where values that it cannot hold are still to be seen
    wide = torch.float32 if job.dtype == torch.float16 else job.dtype
    changed = 0
    for key, tensor in checkpoint.tensors(cuts, dtype=wide):
        check_range(key, tensor, job.dtype)
        if key in deltas:
            changed += not torch.equal(tensor, checkpoint.before_deltas(key, cuts[key], dtype=wide))
        yield key, tensor
    if deltas and not changed:
        raise ValueError(
            f"{', '.join(job.paths)}: what is merged changes none of the {len(deltas)} weights that it is for (it is"
            f" zero, or too small for {_name(job.dtype)}); export_dtype fp32 keeps more, or leave it out"
        )
    if deltas:
        log.info("merged: %d of %d weights changed", changed, len(deltas))


def _carry_arguments(job: Job, target: Path) -> None:
    """Take over what ms-swift's words of a run say about its data, so that a merged folder answers the same rows."""
    last = Path(job.paths[-1])
    noted = next((place / ARGUMENTS for place in (last, last.parent) if (place / ARGUMENTS).is_file()), None)
    if noted is not None:
        said = load_json(noted)
        merged = {"sft_type": "full", "quantization_bit": 0, "only_save_trainable": False}
        said |= {name: value for name, value in merged.items() if name in said or name == "sft_type"}
        (target / ARGUMENTS).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _refuse_taken(target: Path) -> None:
    """ValueError where something is in the way; nothing is ever replaced."""
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()  # so that the folder appears whole
    if os.path.lexists(target):
        raise ValueError(f"export_dir: got {target}, which exists, expected a new folder; choose another, or move it")


def _aside(target: Path) -> Path:
    """Rename a folder that failed."""
    number, failed = 1, target.with_name(target.name + FAILED)
    while os.path.lexists(failed):
        number += 1
        failed = target.with_name(f"{target.name}{FAILED}-{number}")
    os.rename(target, failed)
    return failed


def _bar(items: Iterator[tuple[str, Tensor]], specs: dict[str, Spec], what: str) -> Iterator[tuple[str, Tensor]]:
    """The items under a progress bar (stderr) that counts bytes."""
    total = sum(spec.nbytes for spec in specs.values())
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, mininterval=0.5) as bar:
        for key, tensor in items:
            yield key, tensor
            bar.update(specs[key].nbytes)


def _name(dtype: torch.dtype) -> str:
    """float32 of torch.float32."""
    return str(dtype).removeprefix("torch.")
