"""What LoRA adds to a weight, as a delta that is summed while the weight is read; and whether an adapter fits a base.

Must not know a model, nor how adapters lie in their files: factors come under canonical names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accessory.checkpoint import hub, manifest
from accessory.checkpoint.files import Folder, few, recognise
from accessory.checkpoint.huggingface.adapter import AdapterSource
from accessory.checkpoint.reshard import Join, Shape
from accessory.dist import Cut

if TYPE_CHECKING:
    from accessory.checkpoint.read import AnySource, Checkpoint

log = logging.getLogger(__name__)

A, B = ".lora_a.weight", ".lora_b.weight"
# the head and the embedding carry no factors in our model: what an adapter adds there is summed in any case
SUMMED = ("output", "tok_embeddings")
MERGED = "merged_adapters"
LAYERS = ("attention.wq", "attention.wo", "feed_forward.w1", "feed_forward.w2")
SAMPLES, ROW = 8, 5
# two roundings to bf16 of one number are this far apart at most; a finetuned model has weights that differ by more
NEAR, TINY = 2.0**-7, 1e-6


@dataclass(frozen=True)
class _Product:
    """The shape and dtype of what is added."""

    shape: Shape
    dtype: torch.dtype


class LoraDelta:
    """factor * B A of the factors that another source holds, with the surface of `Source`: adds to weights."""

    is_delta = True

    def __init__(self, source: AnySource, scales: Mapping[str, float]) -> None:
        """scales: linear -> factor. Its factors leave the source, and are read through it."""
        self._source, self._scales = source, dict(scales)
        self.folder = source.folder
        self.discarded: list[str] = []
        self.restores: dict[str, torch.dtype] = {}
        self._shapes: dict[str, tuple[Shape, Shape]] = {}
        self.stored: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}
        for name in scales:
            a, b = source.guess(name + A).shape, source.guess(name + B).shape
            self._shapes[name] = (a, b)
            self.stored[f"{name}.weight"] = _Product((b[0], a[1]), source.stored[name + B].dtype)
        for name in scales:
            self._kept |= {name + side: source.stored[name + side] for side in (A, B)}

    def hide(self) -> None:
        """Take the factors out of the source, so that nobody has to want them."""
        for key in self._kept:
            self._source.stored.pop(key, None)

    def only(self, names: Collection[str]) -> LoraDelta:
        """Itself, with what it adds to these linears alone."""
        self.stored = {f"{name}.weight": self.stored[f"{name}.weight"] for name in names}
        return self

    def find(self, key: str, full: Shape) -> Join | None:
        """How a tensor whose full shape is known is stored: as one; None where it has another shape."""
        return Join(full) if self.stored[key].shape == tuple(full) else None

    def guess(self, key: str) -> Join | None:
        """The tensor's full shape."""
        return Join(self.stored[key].shape)

    def read(self, key: str, join: Join, piece: Cut, *, out: Tensor) -> Tensor:
        """Fill `out` (the cut's local shape) with what `piece` holds of the product, computed in fp32."""
        name = key.removesuffix(".weight")
        shape_a, shape_b = self._shapes[name]
        kept = out
        if piece.dim is not None:
            kept = out.narrow(piece.dim, 0, piece.stop - piece.start)
            out.narrow(piece.dim, piece.stop - piece.start, piece.pad).zero_()
        cut_a = Cut(shape_a, 1, piece.start, piece.stop) if piece.dim == 1 else Cut(shape_a)
        cut_b = Cut(shape_b, 0, piece.start, piece.stop) if piece.dim == 0 else Cut(shape_b)
        kept.copy_((self._factor(name + B, cut_b) @ self._factor(name + A, cut_a)) * self._scales[name])
        return out

    def exceptions(self, key: str) -> Tensor | None:
        """The products have none."""
        return None

    def release(self) -> None:
        """Forget all mappings of files."""
        self._source.release()

    def where(self, key: str) -> str:
        """A tensor's shape, for an error message."""
        return f"what LoRA adds to {key} is {self.stored[key].shape}"

    def _factor(self, key: str, cut: Cut) -> Tensor:
        """A factor or its slice, in fp32."""
        hidden = key not in self._source.stored
        if hidden:
            self._source.stored[key] = self._kept[key]
        try:
            join = self._source.find(key, cut.shape)
            assert join is not None, f"{key} is not {cut.shape}"
            return self._source.read(key, join, cut, out=torch.empty(cut.local_shape))
        finally:
            if hidden:
                del self._source.stored[key]


def lay(
    before: Sequence[AnySource], laid: AdapterSource | None, behind: Sequence[AnySource] = (), *, merge: bool
) -> list[AnySource]:
    """The sources with adapters between them; merge: with what all LoRA adds summed into the weights, folders' own too.

    behind: folders after the adapters, whose tensors take the place of theirs. Raises ValueError for LoRA of adapters
    on linears that have LoRA of their own in a folder before, unless they are merged.
    """
    if laid is None:
        under = [*before, *behind]
        return [*under, *_own_deltas(under)] if merge else under
    replaced = [key for source in behind for key in source.stored if key.endswith(A) and key in laid.stored]
    for key in replaced:
        name = key.removesuffix(A)
        for table, entry in ((laid.stored, key), (laid.stored, name + B), (laid.modules, name)):
            del table[entry]
        laid.folder.config["lora_modules"].pop(name)
    deltas = _own_deltas([*before, *behind]) if merge else []
    own = {key.removesuffix(A) for source in (*before, *behind) for key in source.stored if key.endswith(A)}
    if both := sorted(own & laid.modules.keys()):
        raise ValueError(
            f"{laid.folder.path}: an adapter on {both[0]} ({len(both)} linears), which has LoRA of its own in"
            f" {few((str(source.folder.path) for source in before), most=2)}; merge that first (accessory export)"
        )
    summed = {name: module.scale for name, module in laid.modules.items() if merge or name in SUMMED}
    tied = any(source.folder.config.get("tied") for source in before)
    if tied and (ends := [name for name in SUMMED if name in summed]):
        raise ValueError(
            f"{laid.folder.path}: LoRA on {' and '.join(ends)} of a model that ties head and embedding, which would"
            " change both; train an adapter without it"
        )
    if summed:
        deltas.append(LoraDelta(laid, summed))
        deltas[-1].hide()
    for name in summed:
        del laid.folder.config["lora_modules"][name]
    if merge:
        for key in ("lora_modules", "lora_dropout"):
            laid.folder.config.pop(key)
    return [*before, laid, *behind, *deltas]


def _own_deltas(sources: Sequence[AnySource]) -> list[LoraDelta]:
    """What the folders' own LoRA adds; factors leave the sources, and their configs what describes them."""
    config = {key: value for one in sources for key, value in one.folder.config.items() if value is not None}
    last = {key.removesuffix(A): source for source in sources for key in source.stored if key.endswith(A)}
    deltas = []
    for source in sources:
        names = [key.removesuffix(A) for key in source.stored if key.endswith(A)]
        scales = {}
        for name in names:
            rank = source.guess(name + A).shape[0]
            alpha = config.get("lora_alpha")
            plain = 1.0 if alpha is None else alpha / (rank**0.5 if config.get("lora_rslora") else rank)
            scales[name] = config.get("lora_modules", {}).get(name, (rank, plain))[1]
        delta = LoraDelta(source, scales)
        delta.hide()
        kept = {name: scale for name, scale in scales.items() if last[name] is source}
        if kept:
            deltas.append(delta.only(kept))
    for one in sources:
        for key in [key for key in one.folder.config if "lora_" in key]:
            del one.folder.config[key]
    return deltas


# ---- is the adapter for this base?


def sample(base: Checkpoint) -> dict[str, list[float]]:
    """A few numbers of a model's weights, by which it is told from others in any form, dtype and layout."""
    specs = base.specs()
    layers = [
        int(key.split(".")[1]) for key in specs if key.startswith("layers.") and key.endswith("attention.wq.weight")
    ]
    if not layers:
        return {}
    chosen = sorted({0, max(layers) // 2, max(layers)})
    keys = ["norm.weight", *(f"layers.{number}.{name}.weight" for number in chosen for name in LAYERS)]
    cuts = {}
    for key in (key for key in keys if key in specs):
        shape = specs[key].shape
        row = min(ROW, shape[0] - 1)
        cuts[key] = Cut(shape) if len(shape) == 1 else Cut(shape, 0, row, row + 1)
    found = {}
    for key, tensor in base.some(cuts, dtype=torch.float32):
        flat = tensor.flatten()
        places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat))).long()
        found[key] = [float(f"{number:.7g}") for number in flat[places].tolist()]
    return found


def same_model(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> bool:
    """Whether two samples can be of one model, stored in whatever dtype."""
    if one.keys() != other.keys():
        return False
    pairs = [(a, b) for key in one for a, b in zip(one[key], other[key], strict=False)]
    sizes = all(len(one[key]) == len(other[key]) for key in one)
    return sizes and all(abs(a - b) <= NEAR * max(abs(a), abs(b)) + TINY for a, b in pairs)


def digest(adapter: Folder) -> str:
    """SHA-256 of an adapter's weights (of a checkpoint's, where an adapter lies in it), by which a merge is known."""
    written = adapter.path / "adapter_model.safetensors"
    return manifest.sha256(written if written.is_file() else adapter.shards[0])


def refuse_twice(folders: Sequence[Folder]) -> None:
    """ValueError for a folder on top of a base that says that it is merged into it, and for an adapter given twice."""
    adapters = [folder for folder in folders if folder.form == "adapter"]
    first: dict[str, Folder] = {}
    for folder in adapters if len(adapters) > 1 else ():
        if (other := first.setdefault(digest(folder), folder)) is not folder:
            raise ValueError(f"{folder.path}: this adapter is given already, as {other.path}; give it once")
    known = {entry.get("sha256") for entry in merged_before(folders)}
    for folder in folders[1:]:
        if known and digest(folder) in known:
            raise ValueError(
                f"{folder.path}: this adapter is merged into {folders[0].path} already; give one of them, or the base"
                " as it was"
            )


def merged_before(folders: Sequence[Folder]) -> list[dict[str, Any]]:
    """The adapters that folders say are merged into their weights."""
    said = [entry for folder in folders for entry in folder.meta.get(MERGED, ())]
    said += [entry for folder in folders for entry in folder.told.get("config", {}).get(MERGED, ())]
    return [entry for entry in said if isinstance(entry, dict)]


def check_kin(base: Checkpoint, laid: AdapterSource) -> None:
    """ValueError for an adapter of another base; a warning where only names differ, since folders are moved."""
    mine = sample(base) if any("accessory" in one.folder.told or one.words.base for one in laid.opened) else {}
    where = str(base.folders[0].path)
    specs = base.specs()
    for one in laid.opened:
        path = one.folder.path
        if lost := [name for name in _siblings(one.names, specs) if one.words.reaches(name)]:
            raise ValueError(
                f"{path}: lacks {lost[0]}, which target_modules of adapter_config.json reach ({len(lost)} linears in"
                " all); fetch or copy the adapter again"
            )
        kin = one.folder.told.get("accessory", {})
        theirs = kin.get("sample")
        name = kin.get("base") or one.words.base
        if theirs is None:
            theirs = _sample_of(name, base)
        if theirs and mine and not same_model(mine, theirs):
            raise ValueError(f"{path}: an adapter for {name}, got {where}, whose weights are others; give its own base")
        if not theirs and name and Path(name).name.lower() != base.folders[0].path.name.lower():
            log.warning("%s: says that it is for %s; it is put on %s", path, name, where)


def _siblings(names: Mapping[tuple[str, int], str], base: Collection[str]) -> list[str]:
    """The adapter's names of linears in other layers of the base than those that it has, one for one."""
    found = {}
    for (key, part), name in names.items():
        number = re.search(r"(?<=\.)\d+(?=\.)", key)
        if number is None:
            continue
        pattern = re.compile(re.escape(key[: number.start()]) + r"(\d+)" + re.escape(key[number.end() :]) + r"\.weight")
        for other in base:
            match = pattern.fullmatch(other)
            if match and (other.removesuffix(".weight"), part) not in names:
                found[other, part] = re.sub(rf"\.{number[0]}\.", f".{match[1]}.", name, count=1)
    return list(found.values())


def _sample_of(name: str | None, base: Checkpoint) -> dict[str, list[float]] | None:
    """The sample of a base that an adapter names, where another folder here, or the hub's cache, is it; else None."""
    folder = None if not name else Path(name) if Path(name).is_dir() else hub.cached(name)
    if folder is None or folder.resolve() == base.folders[0].path.resolve():
        return None
    from accessory.checkpoint.read import Checkpoint, open_source

    try:
        return sample(Checkpoint([open_source(recognise(folder, state=False))]))
    except ValueError as error:
        log.warning("the base %s that the adapter names cannot be read, so it is not compared: %s", name, error)
        return None


def record(adapters: Sequence[Folder], before: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a merged model notes: the adapters in it, by name and digest."""
    return [dict(entry) for entry in before] + [
        {"adapter": str(folder.path), "sha256": digest(folder)} for folder in adapters
    ]
