"""One opened Hugging Face folder: its tensors under canonical names, and slices of them read from its shards.

Must not know a model, nor the folders before or after it. Every tensor lies whole in one shard; q and k are turned to
Meta's order of rows, CLIP's q, k, v become timm's one tensor, as the bytes are copied.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.checkpoint import manifest
from accessory.checkpoint.files import Folder, few
from accessory.checkpoint.huggingface.config import CLIP
from accessory.checkpoint.huggingface.names import HEAD, Place, canonical, transform_shape, unpermute
from accessory.checkpoint.reshard import Join, Shape, overlaps
from accessory.checkpoint.shards import ShardFile
from accessory.dist import Cut

log = logging.getLogger(__name__)

EMBEDDING = "tok_embeddings.weight"
BLOCK = 1 << 22  # elements of two tensors that are compared at a time


@dataclass(frozen=True)
class Stored:
    """One canonical tensor as a folder holds it: its parts (file number, name, rows) on dim 0, full shape and dtype."""

    parts: tuple[tuple[int, str, int], ...]
    shape: Shape
    dtype: torch.dtype
    transform: str | None = None


class HuggingFaceSource:
    """An opened folder with the surface of `Source`."""

    is_delta = False

    def __init__(self, folder: Folder, *, files: Sequence[ShardFile] | None = None) -> None:
        """Read the headers. ValueError for damage, for names that come twice, and where index and files differ.

        files: views of the folder's files, where not all that they hold is this source's.
        """
        self.folder = folder
        self.files = [ShardFile(path) for path in folder.shards] if files is None else [*files]
        self.discarded: list[str] = []
        self.restores: dict[str, torch.dtype] = {}
        _check_manifest(folder)
        _check_index(folder, self.files)
        config = folder.config
        self._head_dim = config.get("head_width") or (config["dim"] // config["n_heads"] if "dim" in config else None)
        self.stored = self._gather()
        if config.get("tied"):
            self._settle_head()

    def find(self, key: str, full: Shape) -> Join | None:
        """How a tensor whose full shape is known is stored: as one; None where it has another shape."""
        return Join(full) if self.stored[key].shape == full else None

    def guess(self, key: str) -> Join | None:
        """The tensor's full shape."""
        return Join(self.stored[key].shape)

    def read(self, key: str, join: Join, piece: Cut, *, out: Tensor) -> Tensor:
        """Fill `out` (the cut's local shape, any dtype) with what `piece` holds of a tensor; no other copy is made."""
        stored, kept = self.stored[key], out
        if piece.dim is not None:
            kept = out.narrow(piece.dim, 0, piece.stop - piece.start)
            out.narrow(piece.dim, piece.stop - piece.start, piece.pad).zero_()
        if stored.transform == "heads":
            self._read_heads(stored, piece, kept)
        elif stored.transform is not None or not stored.shape:
            view = self._whole(stored).view(stored.shape)
            kept.copy_(view if piece.dim is None else view.narrow(piece.dim, piece.start, piece.stop - piece.start))
        else:
            first, last = (piece.start, piece.stop) if piece.dim == 0 else (0, stored.shape[0])
            for number, start, stop, place in overlaps([rows for _, _, rows in stored.parts], first, last):
                file, name, _ = stored.parts[number]
                view = self.files[file].rows(name, dim=0, start=start, stop=stop)
                if piece.dim:
                    view = view.narrow(piece.dim, piece.start, piece.stop - piece.start)
                kept.narrow(0, place, stop - start).copy_(view)
        return out

    def exceptions(self, key: str) -> Tensor | None:
        """Only deltas have some."""
        return None

    def release(self) -> None:
        """Forget all mappings of files."""
        for file in self.files:
            file.release()

    def where(self, key: str) -> str:
        """A tensor's shape and files, for an error message."""
        stored = self.stored[key]
        files = dict.fromkeys(self.files[file].path.name for file, _, _ in stored.parts)
        return f"{key} is {stored.shape} in {few(files, most=2)}"

    def _read_heads(self, stored: Stored, piece: Cut, kept: Tensor) -> None:
        """Fill `kept` with rows of q or k, turned from halves to pairs, reading no more than the heads they lie in."""
        (file, name, rows), width = stored.parts[0], self._head_dim
        first, last = (piece.start, piece.stop) if piece.dim == 0 else (0, rows)
        low, high = first // width * width, -(-last // width) * width
        view = self.files[file].rows(name, dim=0, start=low, stop=high)
        if piece.dim:
            view = view.narrow(piece.dim, piece.start, piece.stop - piece.start)
        if (low, high) == (first, last):
            halves = view.unflatten(0, (-1, 2, width // 2)).transpose(1, 2)
            kept.unflatten(0, (-1, width // 2, 2)).copy_(halves)
        else:
            kept.copy_(unpermute(view, width).narrow(0, first - low, last - first))

    def _whole(self, stored: Stored) -> Tensor:
        """A tensor that lies in one place, as its file has it."""
        file, name, _ = stored.parts[0]
        return self.files[file].rows(name)

    def _gather(self) -> dict[str, Stored]:
        """The folder's tensors by canonical name."""
        tower = self.folder.told.get("family") in CLIP
        found: dict[str, dict[int, tuple[int, str, Place]]] = {}
        for number, file in enumerate(self.files):
            for name in file.specs:
                place = canonical(name, tower=tower)
                if place is None:
                    self.discarded.append(name)
                    continue
                held = found.setdefault(place.key, {})
                if place.part in held:
                    other = held[place.part][1]
                    raise ValueError(f"{file.path}: {name} and {other} are both {place.key}; keep one of them")
                held[place.part] = (number, name, place)
        return {key: self._join(key, held) for key, held in found.items()}

    def _join(self, key: str, held: dict[int, tuple[int, str, Place]]) -> Stored:
        """One tensor of its parts."""
        place = next(iter(held.values()))[2]
        if len(held) != place.parts:
            there = few(name for _, name, _ in held.values())
            raise ValueError(
                f"{self.folder.path}: of the {place.parts} tensors that make up {key} it holds {there} only; fetch or"
                " copy the folder again"
            )
        ordered = [held[part] for part in range(place.parts)]
        specs = [self.files[number].specs[name] for number, name, _ in ordered]
        if len({(spec.shape[1:], spec.dtype) for spec in specs}) > 1 or (place.parts > 1 and not specs[0].shape):
            raise ValueError(f"{self.folder.path}: the parts of {key} differ in shape or dtype; fetch the folder again")
        rows = [spec.shape[0] if spec.shape else 1 for spec in specs]
        shape = specs[0].shape if place.parts == 1 else (sum(rows), *specs[0].shape[1:])
        if place.transform == "heads" and (not self._head_dim or sum(rows) % self._head_dim):
            raise ValueError(
                f"{self.folder.path}: {ordered[0][1]} has {sum(rows)} rows, expected heads of {self._head_dim}; give"
                " the config.json that belongs to these weights"
            )
        parts = tuple((number, name, size) for (number, name, _), size in zip(ordered, rows, strict=True))
        return Stored(parts, transform_shape(place.transform, shape), specs[0].dtype, place.transform)

    def _settle_head(self) -> None:
        """Where the config ties the head to the embedding and the folder holds both: equal, the copy goes; else not."""
        head, embedding = self.stored.get(HEAD), self.stored.get(EMBEDDING)
        if head is None or embedding is None:
            return
        if head.shape == embedding.shape and self._equal(head, embedding):
            self.discarded.append(head.parts[0][1])
            del self.stored[HEAD]
        else:
            log.warning(
                "%s: tie_word_embeddings is true, but lm_head is not the embedding: both are used as they are",
                self.folder.path,
            )
            self.folder.config["tied"] = False

    def _equal(self, one: Stored, other: Stored) -> bool:
        """Whether two tensors of one shape are equal; .bin files often hold one tensor under two names."""
        first, second = self._whole(one), self._whole(other)
        if first.data_ptr() == second.data_ptr():
            return True
        pairs = zip(first.reshape(-1).split(BLOCK), second.reshape(-1).split(BLOCK), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
        self.release()
        return same


def _check_manifest(folder: Folder) -> None:
    """Compare the weights with the manifest of a folder that we wrote; its small files are anyone's to edit."""
    entries = manifest.read(folder.path) or {}
    for shard in folder.shards:
        size = shard.stat().st_size
        if shard.name in entries and entries[shard.name].size != size:
            raise ValueError(
                f"{shard}: has {size} bytes instead of {entries[shard.name].size}; write it again, or copy all of it"
            )


def _check_index(folder: Folder, files: list[ShardFile]) -> None:
    """ValueError where the index and the shards contradict each other."""
    index = folder.told.get("index")
    if index is None:
        return
    held = {name: file.path.name for file in files for name in file.specs}
    absent = [f"{name} is not in {shard}" for name, shard in index.items() if held.get(name) != shard]
    extra = [f"{name} in {shard} is not in the index" for name, shard in held.items() if name not in index]
    twice = [file.path.name for file in files for name in file.specs if held[name] != file.path.name]
    if absent or extra or twice:
        faults = few([*absent, *extra, *(f"{shard} holds tensors of other shards" for shard in {*twice})], ";", most=4)
        raise ValueError(
            f"{folder.path}: its index and its shards contradict each other ({faults}); fetch or write it again"
        )
