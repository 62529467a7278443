"""The final weights: pieces of all ranks gathered tensor by tensor on rank 0 and streamed into a folder.

Must not know a model, nor which part of it was trained: what is given is written.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed import ProcessGroup

from accessory.checkpoint import FolderWriter, Form, Spec, manifest
from accessory.checkpoint.boxes import Box, Piece
from accessory.checkpoint.files import few
from accessory.checkpoint.huggingface.adapter_writer import AdapterForm, AdapterWriter
from accessory.checkpoint.huggingface.writer import HuggingFaceForm, HuggingFaceWriter
from accessory.checkpoint.operate import check_range
from accessory.checkpoint.read import Desk
from accessory.checkpoint.stage import flush
from accessory.checkpoint.write import Papers
from accessory.dist import Ranks
from accessory.release import Release
from accessory.train.agree import gather, share
from accessory.train.folder import set_aside

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Whole:
    """A tensor to come: its spec, and which rank sends which box."""

    spec: Spec
    parts: list[tuple[int, Box]]


def write_final(
    folder: str | Path,
    pieces: Mapping[str, Piece],
    *,
    form: Form | AdapterForm | HuggingFaceForm,
    papers: Papers | Release,
    ranks: Ranks,
    group: ProcessGroup | None = None,
) -> None:
    """Write the tensors that all ranks' pieces make up, by canonical names, as a folder; all ranks call it.

    Rank 0 has room for about two tensors. form: shards, safetensors or pth, dtype (floats are cast); that of an
    adapter, which holds the pieces in PEFT's form; or Hugging Face's, whose papers are a `Release`. group: a gloo
    group over all ranks, by default the job's. A folder that exists gets the files beside those that are there;
    earlier ones of the same names, and those of an earlier manifest, are moved to previous-N/ in it.
    Raises ValueError or OSError on every rank: for pieces that do not make up whole tensors, a form that cannot be, a
    value that fp16 cannot hold, a disk that is full.
    """
    group = ranks.host_group if group is None else group
    path = Path(folder)
    mine = {key: (p.box, p.tensor.dtype, p.mine and p.box.numel > 0) for key, p in pieces.items()}
    plan = _plan(gather(mine, group))
    arriving = _arriving(plan, pieces, ranks, group)
    error: Exception | None = None
    try:
        if ranks.rank == 0:
            _write(path, plan, arriving, form, papers)
    except (ValueError, OSError) as caught:
        error = caught
    for _ in arriving:  # on the other ranks all of it happens here; on rank 0 what senders still wait to be rid of
        pass
    error = share(error, group)
    if error is not None:
        raise error
    if ranks.rank == 0:
        log.info("%s: %d tensors, as %s", path, len(plan), _described(form))


def _plan(tables: list[dict[str, tuple[Box, torch.dtype, bool]]]) -> dict[str, _Whole]:
    """Who sends what, the same on every rank. ValueError where that is not every element of every tensor, once."""
    plan, faults = {}, []
    for key in dict.fromkeys(key for table in tables for key in table):
        held = [(rank, *table[key]) for rank, table in enumerate(tables) if key in table]
        spec = Spec(held[0][1].shape, held[0][2])
        parts = [(rank, box) for rank, box, _, mine in held if mine]
        gaps = [Box.whole(spec.shape)] if spec.numel else []
        for _, box in parts:
            gaps = [left for gap in gaps for left in gap.minus(box)]
        if gaps or any((box.shape, dtype) != (spec.shape, spec.dtype) for _, box, dtype, _ in held):
            faults.append(f"{key} {gaps[0] if gaps else 'in several shapes or dtypes'}")
        plan[key] = _Whole(spec, parts)
    if faults:
        raise ValueError(f"the ranks do not hold whole tensors: {few(faults, ';')}; go on from the last checkpoint")
    return plan


def _arriving(
    plan: Mapping[str, _Whole], pieces: Mapping[str, Piece], ranks: Ranks, group: ProcessGroup | None
) -> Iterator[tuple[str, Tensor]]:
    """On rank 0 (key, full tensor), each until the next one is asked for; the others send their parts in this order."""
    desk = Desk()
    for key, whole in plan.items():
        if ranks.rank:
            for _ in [box for rank, box in whole.parts if rank == ranks.rank]:
                torch_dist.send(_bytes(pieces[key].tensor), 0, group=group)
            continue
        if whole.parts == [(0, Box.whole(whole.spec.shape))]:
            yield key, pieces[key].tensor.detach().cpu()
            continue
        full = desk.sheet(0, whole.spec.shape, whole.spec.dtype)
        for rank, box in whole.parts:
            part = pieces[key].tensor.detach() if rank == 0 else desk.sheet(1, box.size, full.dtype)
            if rank:
                torch_dist.recv(_bytes(part), rank, group=group)
            full[box.inside(Box.whole(full.shape))].copy_(part)
        yield key, full


def _bytes(tensor: Tensor) -> Tensor:
    """A CPU tensor's bytes, which every backend can send; a view where it is contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _write(
    path: Path,
    plan: Mapping[str, _Whole],
    arriving: Iterator[tuple[str, Tensor]],
    form: Form | AdapterForm | HuggingFaceForm,
    papers: Papers | Release,
) -> None:
    """On rank 0: stream the tensors into a new folder, and put it in place."""
    built = path / ".final" if path.exists() else path
    if built != path:
        shutil.rmtree(built, ignore_errors=True)  # of a run that was killed here
    specs = {key: whole.spec for key, whole in plan.items()}
    kinds = {AdapterForm: AdapterWriter, HuggingFaceForm: HuggingFaceWriter}
    with kinds.get(type(form), FolderWriter)(built, specs, form=form) as writer:
        for key, tensor in arriving:
            check_range(key, tensor, form.dtype)
            writer.put(key, tensor)
        writer.finish(**_words(papers))
    if built != path:
        _install(built, path)


def _words(papers: Papers | Release) -> dict[str, Any]:
    """What a writer is told at the end."""
    if isinstance(papers, Release):
        return papers.words()
    words = {"config": papers.config, "meta": papers.meta, "tokenizer": papers.tokenizer}
    return {**words, "more": papers.more} if papers.more else words


def _described(form: Form | AdapterForm | HuggingFaceForm) -> str:
    """A form, for people."""
    if isinstance(form, AdapterForm):
        return "an adapter"
    return f"{form.family} in Hugging Face's form" if isinstance(form, HuggingFaceForm) else form.fmt


def _install(built: Path, path: Path) -> None:
    """Move a complete folder's files into one that exists, the manifest last; `.unfinished` lies there meanwhile.

    Where the same bytes are there already, as after going on with a run that had ended, nothing is moved.
    """
    new = [entry.name for entry in built.iterdir()]
    try:
        earlier = manifest.read(path) or {}
    except ValueError:
        earlier = {}
    if earlier == manifest.read(built) and not manifest.faults(path):
        log.info("%s: holds these very weights already", path)
        shutil.rmtree(built)
        return
    (path / manifest.UNFINISHED).touch()
    old = [path / name for name in {*new, *earlier, manifest.NAME} if os.path.lexists(path / name)]
    if old:
        log.info("%s: %d files of earlier weights were moved to %s", path, len(old), set_aside(path, old))
    for name in sorted(new, key=lambda name: name == manifest.NAME):
        os.rename(built / name, path / name)
    flush(path)
    built.rmdir()
    (path / manifest.UNFINISHED).unlink()
