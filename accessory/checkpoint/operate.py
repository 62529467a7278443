"""Folders in, folders out: reshard, add deltas, take differences; streaming, with progress and a proof at the end.

Must not know a model, nor a command line.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from accessory.checkpoint import delta
from accessory.checkpoint.files import FORMS, few, recognise
from accessory.checkpoint.headers import CODES, Spec
from accessory.checkpoint.read import Checkpoint, open_folders
from accessory.checkpoint.write import FolderWriter, Form

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Where the result goes, in which form, and how much of it is done."""

    output_path: str | Path
    shards: int | None = None
    """None: as many as the (finetuned) input has."""
    fmt: str = "safetensors"
    dtype: torch.dtype | None = None
    """Of the result's floats; None: as stored (see Checkpoint.dtype_of). For extract: of the delta, fp16 when None."""
    verify: bool = True
    """Open the result again and compare every tensor with what it should be."""
    dry_run: bool = False
    """Check and say what would be written, and write nothing."""

    def form(self, source: Checkpoint, *, is_delta: bool = False) -> Form:
        """The form of the output."""
        base = source.folders[0]
        like = 1 if base.form == "huggingface" else len(base.shards)  # where shards are no cuts of tensors
        shards = like if self.shards is None else self.shards
        tied = bool(source.config.get("tied"))
        return Form(shards=shards, fmt=self.fmt, dtype=self.dtype, delta=is_delta, tied=tied)


def rewrite(paths: Sequence[str | Path], job: Job) -> None:
    """Write what a base folder, and deltas or partial folders on top of it, amount to: one whole Accessory folder.

    Raises ValueError for folders that do not fit together, and where fp16 cannot hold a value.
    """
    checkpoint = open_folders(paths)
    specs, cuts = checkpoint.specs(), checkpoint.cuts()
    form = job.form(checkpoint)
    if _announce(job, form, specs):
        return
    with FolderWriter(Path(job.output_path), specs, form=form) as writer:
        # fp16 is reached through fp32, where values that it cannot hold are still to be seen
        dtype = torch.float32 if job.dtype == torch.float16 else job.dtype
        for key, tensor in _bar(checkpoint.tensors(cuts, dtype=dtype), specs, "writing"):
            check_range(key, tensor, form.dtype)
            writer.put(key, tensor)
        writer.finish(config=checkpoint.config, meta=checkpoint.meta, tokenizer=checkpoint.tokenizer)
    if job.verify:
        written = open_folders(job.output_path)
        again = checkpoint.tensors(cuts, dtype=job.dtype)
        for (key, got), (_, wanted) in zip(_bar(written.tensors(cuts), specs, "verifying"), again, strict=True):
            if not same_bits(got, wanted):
                raise OSError(f"{job.output_path}: {key} was not written as computed; check the disk")
        log.info("verified: all %d tensors are in %s bit by bit", len(specs), job.output_path)


def apply(base_path: str | Path, delta_path: str | Path, job: Job) -> None:
    """Write base + delta. Raises ValueError where the second folder holds no delta, and as `rewrite` does."""
    form = recognise(delta_path).form
    if form != "delta":
        raise ValueError(
            f"{delta_path}: is in {FORMS[form]} form, expected delta weights (consolidated.NN-of-MM.model-diff.*);"
            " trained tensors are put on top of a base with tools/reshard.py"
        )
    rewrite([base_path, delta_path], job)


def extract(base_path: str | Path, tuned_path: str | Path, job: Job) -> None:
    """Write finetuned - base as a delta folder; with dtype fp32, base + delta is the finetuned model bit by bit.

    Tensors that the base lacks are stored as they are. Raises ValueError when the finetuned folder lacks tensors of the
    base, has other shapes or holds integers, and where a difference does not fit the delta's dtype.
    """
    base, tuned = open_folders(base_path), open_folders(tuned_path)
    job = job if job.dtype is not None else replace(job, dtype=torch.float16)
    specs, base_specs = tuned.specs(), base.specs()
    _check_pair(base, tuned, base_specs, specs)
    form = job.form(tuned, is_delta=True)
    if _announce(job, form, specs):
        return
    noted = 0
    with FolderWriter(Path(job.output_path), specs, form=form) as writer:
        for key, base_tensor, tensor in _pairs(base, tuned, "extracting"):
            try:
                stored = delta.difference(base_tensor, tensor, dtype=form.dtype)
            except ValueError as error:
                raise ValueError(f"{tuned_path}: {key}: {error}") from error
            writer.put(key, stored)
            if form.dtype == torch.float32:
                rows = delta.exceptions(base_tensor, tensor, stored)
                noted += len(rows)
                if len(rows):
                    writer.note(key, rows)
        meta = {**tuned.meta, "restores": _record(specs)}
        writer.finish(config=tuned.config, meta=meta, tokenizer=tuned.tokenizer)
    if noted:
        log.info("%d elements that no fp32 difference gives back are listed in exact.safetensors", noted)
    if job.verify:
        _verify_extract([base_path, job.output_path], base, tuned, form)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit by bit, NaN and -0.0 included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _verify_extract(paths: Sequence[str | Path], base: Checkpoint, tuned: Checkpoint, form: Form) -> None:
    """Add the written delta to the base and compare with the finetuned folder."""
    summed = open_folders(paths)
    worst = 0.0
    sums = summed.tensors(tuned.cuts())
    for (key, base_tensor, tensor), (_, got) in zip(_pairs(base, tuned, "verifying"), sums, strict=True):
        if form.dtype == torch.float32:
            right = same_bits(got, tensor)
        else:
            wanted, apart = delta.round_trip(base_tensor, tensor, dtype=form.dtype)
            right, worst = same_bits(got, wanted), max(worst, apart)
        if not right:
            raise OSError(f"{paths[-1]}: {key}: base + delta is not the finetuned tensor; check the disk")
    exact = "bit by bit" if form.dtype == torch.float32 else f"within rounding (at most {worst:.3g} apart)"
    log.info("verified: base + %s is %s %s", paths[-1], tuned.folders[0].path, exact)


def _pairs(base: Checkpoint, tuned: Checkpoint, what: str) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """(key, base tensor or None, finetuned tensor), one at a time."""
    cuts, base_cuts = tuned.cuts(), base.cuts()
    ordered = {key: base_cuts[key] for key in cuts if key in base_cuts}
    base_tensors = base.tensors(ordered)
    for key, tensor in _bar(tuned.tensors(cuts), tuned.specs(), what):
        yield key, next(base_tensors)[1] if key in ordered else None, tensor


def _check_pair(base: Checkpoint, tuned: Checkpoint, base_specs: dict[str, Spec], specs: dict[str, Spec]) -> None:
    """Raise ValueError unless the finetuned folder holds all of the base's tensors, in the same shapes, as floats."""
    base_path, path = base.folders[0].path, tuned.folders[0].path
    if absent := [key for key in base_specs if key not in specs]:
        raise ValueError(
            f"{path}: lacks {len(absent)} of the {len(base_specs)} tensors of {base_path} ({few(absent)}); a folder of"
            " trained tensors only needs no delta, load it after its base as it is"
        )
    other = [f"{key} {s.shape} and {specs[key].shape}" for key, s in base_specs.items() if s.shape != specs[key].shape]
    if other:
        raise ValueError(f"{base_path} and {path} differ in shape ({few(other, ';')}); give the model's own base")
    if whole := [key for key, spec in specs.items() if not spec.dtype.is_floating_point]:
        raise ValueError(f"{path}: {few(whole)}: not floating point, which a delta cannot hold; keep the folder whole")


def check_range(key: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    """Raise ValueError when finite values would become infinite."""
    if dtype != torch.float16 or tensor.dtype != torch.float32 or not tensor.numel():
        return
    largest = tensor.nan_to_num(0, 0, 0).abs().max()
    if largest.half().isinf():
        raise ValueError(f"{key}: holds {largest.item():g}, which fp16 cannot; use --dtype bf16 or fp32")


def _record(specs: dict[str, Spec]) -> dict[str, object]:
    """The finetuned dtypes, which adding the delta brings back: the most common one, and what differs from it."""
    codes = {key: CODES[spec.dtype] for key, spec in specs.items()}
    main = max(sorted(set(codes.values())), key=list(codes.values()).count)
    return {"dtype": main, "others": {key: code for key, code in codes.items() if code != main}}


def _announce(job: Job, form: Form, specs: dict[str, Spec]) -> bool:
    """Say what will be written; True when that is all that was asked for."""
    nbytes = sum(s.numel * (form.dtype or s.dtype).itemsize for s in specs.values())
    dtypes = {form.dtype} if form.dtype else {spec.dtype for spec in specs.values()}
    kinds = few(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    verb = "would write" if job.dry_run else "writing"
    log.info(
        "%s %s: %d tensors, %s bytes of %s in %d shard(s) (%s ...)",
        verb, job.output_path, len(specs), f"{nbytes:,}", kinds, form.shards, form.name(0),
    )  # fmt: skip
    return job.dry_run


def _bar(items: Iterator[tuple[str, Tensor]], specs: dict[str, Spec], what: str) -> Iterator[tuple[str, Tensor]]:
    """The items under a progress bar (stderr) that counts bytes."""
    total = sum(spec.nbytes for spec in specs.values())
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, mininterval=0.5) as bar:
        for key, tensor in items:
            yield key, tensor
            bar.update(specs[key].nbytes)
