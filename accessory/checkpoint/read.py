"""Opens folders of weights and yields a rank's tensors, reading the bytes it needs and checking names and shapes first.

Must not know a model: what is wanted comes as cuts.
"""

from __future__ import annotations

import logging
import mmap
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint import delta, hub
from accessory.checkpoint.files import Folder, few, recognise
from accessory.checkpoint.headers import Spec
from accessory.checkpoint.huggingface.adapter import AdapterSource
from accessory.checkpoint.huggingface.source import HuggingFaceSource
from accessory.checkpoint.merge import LoraDelta, check_kin, lay, refuse_twice
from accessory.checkpoint.reshard import Join
from accessory.checkpoint.source import Source
from accessory.checkpoint.training import TrainingSource
from accessory.dist import Cut

log = logging.getLogger(__name__)

AnySource = Source | TrainingSource | HuggingFaceSource | AdapterSource | LoraDelta
Holder = tuple[AnySource, Join]


def open_folders(paths: Sequence[str | Path] | str | Path, *, merge: bool = False) -> Checkpoint:
    """Open a base folder, then delta or partial (PEFT) folders that add to it or replace its keys, in this order.

    A string may be a hub id; the tower that an original LLaVA's folder names and lacks is opened too, and so is the
    base of adapters that come alone. merge: what LoRA adds, adapters' and the folders' own, is summed into the weights
    as they are read (in fp32, cast once), and its factors are gone. Only headers are read. Raises ValueError, in one
    sentence naming the folder, for a folder that is not recognised, mixes forms, lacks shards, is damaged or
    unfinished, for a delta in the first place, and for an adapter of another base or one that is merged already;
    OSError where a hub id cannot be fetched.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise ValueError("no folder of weights was given; pass at least the base model's (--pretrained_path)")
    folders = [recognise(hub.find(path), state=False) for path in paths]
    folders = [*map(recognise, _bases_of(folders[0])), *folders]
    refuse_twice(folders)
    adapters = [folder for folder in folders if folder.form == "adapter"]
    first = folders.index(adapters[0]) if adapters else len(folders)
    sources = [open_source(folder) for folder in folders[:first]]
    behind = [open_source(folder) for folder in folders[first:] if folder.form != "adapter"]
    laid = AdapterSource(adapters, head_dim=_head_dim(sources)) if adapters else None
    _add_towers(sources, [*behind, *([] if laid is None else [laid])])
    if sources[0].folder.form == "delta":
        raise ValueError(
            f"{sources[0].folder.path}: holds delta weights, which mean nothing without their base; give the base"
            " folder first, then this one"
        )
    if laid is not None:
        check_kin(Checkpoint(sources), laid)
    return Checkpoint(lay(sources, laid, behind, merge=merge))


def open_source(folder: Folder) -> AnySource:
    """Open one recognised folder. Raises ValueError for damage, and for a folder of ours that is not complete."""
    if folder.form == "adapter":
        return AdapterSource([folder])
    kinds = {"training": TrainingSource, "huggingface": HuggingFaceSource}
    return kinds.get(folder.form, Source)(folder)


def _bases_of(first: Folder) -> list[Path]:
    """The folders before an adapter or a checkpoint of trained parts that comes alone, as it says itself.

    ValueError for an adapter that names no base.
    """
    named = first.facts.get("base", []) if first.form == "training" else []
    named = [name for name in named if all(Path(base).is_dir() for base in named)]
    if first.form == "adapter":
        named = [first.told["adapter"].get("base_model_name_or_path")]
        if not named[0]:
            raise ValueError(f"{first.path}: an adapter that names no base; give the base's folder before it")
    if named:
        log.info("%s holds no whole model: it goes on %s, as it says", first.path, ", ".join(named))
    return [hub.find(name) for name in named]


def _head_dim(sources: Sequence[AnySource]) -> int | None:
    """The width of an attention head, as the folders say it together."""
    config = {key: value for source in sources for key, value in source.folder.config.items() if value is not None}
    if "dim" not in config and "head_width" not in config:
        return None
    return config.get("head_width") or config["dim"] // config.get("n_heads", 32)


def _add_towers(sources: list[AnySource], above: Sequence[AnySource]) -> None:
    """Where LLaVA's folders hold no tower, put the one that they name behind the base."""
    every = [*sources, *above]
    named = [source.folder for source in every if "tower" in source.folder.told]
    tower = re.compile(r"vision\.tower\.(?!.+\.lora_[ab]\.weight)")
    if not named or any(tower.match(key) for source in every for key in source.stored):
        return
    path, name = named[-1].path, named[-1].told["tower"]
    if named[-1].told["config"].get("unfreeze_mm_vision_tower"):
        raise ValueError(f"{path}: its vision tower was trained with it, but is not there; fetch the folder again")
    try:
        found = open_source(recognise(hub.find(name)))
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{path}: its vision tower is not there, and {error}; or give its folder after it") from error
    log.info("the vision tower comes from %s, as the config says", found.folder.path)
    sources.insert(1, found)


class Checkpoint:
    """A base folder and what lies on top of it, as one set of tensors under canonical names.

    config: the model's fields (params.json or config.json, {} where there is none); meta: `llama_type` and what else
    meta.json says; later folders override what they set. tokenizer: the last folder's that has one. folders: each
    folder's form, shards and path.
    """

    def __init__(self, sources: Sequence[AnySource]) -> None:
        """Merge the small files: later folders override fields that they set."""
        self.sources = tuple(sources)
        self.folders = tuple({source.folder.path: source.folder for source in sources}.values())
        self.config: dict[str, Any] = {}
        self.meta: dict[str, Any] = {}
        for folder in self.folders:
            for merged, own in ((self.config, folder.config), (self.meta, folder.meta)):
                merged.update({key: value for key, value in own.items() if value is not None or key not in merged})
        self.told: dict[str, Any] = next(
            (f.told for f in reversed(self.folders) if "config" in f.told and f.config), {}
        )
        """The small files of the last Hugging Face folder that describes a model, as they are."""
        for private in ("writer", "restores"):
            self.meta.pop(private, None)
        self.tokenizer: Path | None = next((f.tokenizer for f in reversed(self.folders) if f.tokenizer), None)

    def specs(self) -> dict[str, Spec]:
        """Full shape and result dtype of every tensor, by the format's table: for tools, which have no model.

        Raises ValueError naming tensors whose shards do not fit together.
        """
        joins, faults = {}, []
        for source in self.sources:
            for key in source.stored:
                join = source.guess(key)
                known = joins.setdefault(key, join)
                if join is None:
                    faults.append(f"{source.folder.path}: {source.where(key)}, which cannot be joined")
                elif known is not None and known.shape != join.shape:
                    faults.append(f"{source.folder.path}: {source.where(key)}, expected {known.shape} in all")
        if faults:
            raise ValueError(f"{few(faults, ';')}; give folders of the same model")
        return {key: Spec(join.shape, self.dtype_of(key)) for key, join in joins.items()}

    def cuts(self) -> dict[str, Cut]:
        """A cut per tensor that holds all of it."""
        return {key: Cut(spec.shape) for key, spec in self.specs().items()}

    def dtype_of(self, key: str) -> torch.dtype:
        """The dtype of a tensor: as stored; a sum's is its base's, unless the delta recorded the finetuned one's."""
        holders = [source for source in self.sources if key in source.stored]
        plain = [source for source in holders if not source.is_delta]
        restored = holders[-1].restores.get(key, holders[-1].restores.get(""))
        if restored is not None:
            return restored
        if plain:
            return plain[-1].stored[key].dtype
        stored = holders[0].stored[key].dtype
        return self.main_dtype() if stored.is_floating_point else stored

    def main_dtype(self) -> torch.dtype:
        """The dtype of most of the base folder's tensors."""
        counts: dict[torch.dtype, int] = {}
        for stored in self.sources[0].stored.values():
            counts[stored.dtype] = counts.get(stored.dtype, 0) + 1
        return max(counts, key=counts.__getitem__, default=torch.float32)

    def leave_out(self, keys: Collection[str]) -> None:
        """Forget tensors, so that nobody has to want them; the caller says so to the user."""
        for source in self.sources:
            for key in keys:
                source.stored.pop(key, None)

    def tensors(
        self,
        cuts: Mapping[str, Cut],
        *,
        dtype: torch.dtype | None = None,
        optional: Collection[str] = (),
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Check all names and shapes, then yield (key, local tensor, padded as its cut says) in the order of `cuts`.

        One tensor is read at a time, and of it only the bytes that the cut needs. dtype: of floating-point results,
        None as stored; dtypes: of single keys instead. optional: keys that may be absent, which are then not yielded.
        Raises ValueError, before the first tensor, naming every key (the first ones, then their number) that is
        missing, unexpected or misshaped.
        """
        plan = self._plan(cuts, optional)
        return self._read(plan, cuts, dtype, dtypes or {})

    def some(self, cuts: Mapping[str, Cut], *, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield slices of a few tensors that are there, whatever else the folders hold."""
        held = {key: [(s, s.guess(key)) for s in self.sources if key in s.stored] for key in cuts}
        return self._read(list(held.items()), cuts, dtype, {})

    def before_deltas(self, key: str, cut: Cut, *, dtype: torch.dtype) -> Tensor:
        """A tensor as it is before deltas and merged LoRA are added to it."""
        held = [(source, source.guess(key)) for source in self.sources if key in source.stored]
        plain = [(source, join) for source, join in held if not source.is_delta]
        return next(self._read([(key, plain)], {key: cut}, dtype, {}))[1]

    def _read(
        self,
        plan: list[tuple[str, list[Holder]]],
        cuts: Mapping[str, Cut],
        dtype: torch.dtype | None,
        dtypes: Mapping[str, torch.dtype],
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the planned tensors."""
        desk = Desk()
        try:
            for key, holders in plan:
                result, asked = self.dtype_of(key), dtypes.get(key, dtype)
                wanted = result if asked is None or not result.is_floating_point else asked
                start = max((i for i, (source, _) in enumerate(holders) if not source.is_delta), default=0)
                out = torch.empty(cuts[key].local_shape, dtype=wanted)
                if start == len(holders) - 1 and not holders[start][0].restores:
                    yield key, holders[start][0].read(key, holders[start][1], cuts[key], out=out)
                else:
                    yield key, out.copy_(_sum(key, holders[start:], cuts[key], desk))
        finally:
            for source in self.sources:
                source.release()

    def _plan(self, cuts: Mapping[str, Cut], optional: Collection[str]) -> list[tuple[str, list[Holder]]]:
        """Who holds each wanted tensor, and how. ValueError for what is missing, unexpected or misshaped."""
        plan, missing, misshaped = [], [], []
        for key, piece in cuts.items():
            holders = []
            for source in self.sources:
                if key in source.stored:
                    join = source.find(key, piece.shape)
                    if join is None:
                        misshaped.append(f"{source.folder.path}: {source.where(key)}, expected {piece.shape} in all")
                    holders.append((source, join))
            if holders:
                plan.append((key, holders))
            elif key not in optional:
                missing.append(key)
        unexpected = [
            f"{key} in {source.folder.path / source.folder.shards[0].name}"
            for source in self.sources
            for key in source.stored
            if key not in cuts
        ]
        self._refuse(missing, unexpected, misshaped)
        return plan

    def _refuse(self, missing: list[str], unexpected: list[str], misshaped: list[str]) -> None:
        """Raise one ValueError for all that does not fit."""
        faults = []
        if missing:
            base = self.sources[0]
            files = few((path.name for path in base.folder.shards), most=2)
            faults.append(f"{len(missing)} missing in {_paths(self.folders)} ({files}): {few(missing)}")
        if unexpected:
            faults.append(f"{len(unexpected)} unexpected: {few(unexpected)}")
        if misshaped:
            faults.append(f"{len(misshaped)} misshaped: {few(misshaped, ';')}")
        if not faults:
            return
        remedy = "give the config that belongs to these weights"
        if missing and "tok_embeddings.weight" in missing and len(self.sources) == 1:
            remedy = "this folder holds only some tensors (a PEFT or partial one?): give its base folder before it"
        if missing and (base := self.sources[0].folder.facts.get("base")):
            remedy = f"this checkpoint holds only what was trained: give its base before it ({' '.join(base)})"
        raise ValueError(f"weights do not fit the model: {'; '.join(faults)}; {remedy}")


def _paths(folders: Sequence[Folder]) -> str:
    """The folders' paths."""
    return ", ".join(str(folder.path) for folder in folders)


def _sum(key: str, holders: list[Holder], piece: Cut, desk: Desk) -> Tensor:
    """The last plain tensor and the deltas after it, added in fp32 on the desk."""
    total, term = (desk.sheet(number, piece.local_shape) for number in range(2))
    for place, (source, join) in enumerate(holders):
        if place:
            total.add_(source.read(key, join, piece, out=term))
        else:
            source.read(key, join, piece, out=total)
        if source.restores:  # a delta of ours: what it gives has the finetuned dtype, and the exceptions in place
            given = desk.sheet(2, piece.local_shape, source.restores.get(key, source.restores[""])).copy_(total)
            if (rows := source.exceptions(key)) is not None:
                delta.set_exceptions(given, rows, piece)
            if place == len(holders) - 1:
                return given
            total.copy_(given)
    return total


class Desk:
    """Room for sums, used again for every tensor and given back to the system at the end.

    Tensors allocated and freed between ones that are kept would leave holes: glibc takes those of up to 32 MB from its
    heap, and memory grew to 2.5 times what was kept.
    """

    def __init__(self) -> None:
        self._sheets: dict[int, Tensor] = {}

    def sheet(self, number: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor; it shares its memory with the earlier ones of that number."""
        nbytes = max(1, prod(shape) * dtype.itemsize)
        if number not in self._sheets or self._sheets[number].nbytes < nbytes:
            self._sheets[number] = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
        return self._sheets[number][: prod(shape) * dtype.itemsize].view(dtype).view(shape)
