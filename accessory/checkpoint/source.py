"""One opened folder of weights: its tensors under canonical names, and slices of them read from its shards.

Must not know a model, nor the folders before or after it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from accessory.checkpoint import names
from accessory.checkpoint.files import Folder, check_written, few
from accessory.checkpoint.headers import DTYPES, Spec
from accessory.checkpoint.reshard import Join, Shape, find_join, guess_join, overlaps
from accessory.checkpoint.shards import ShardFile
from accessory.checkpoint.streams import WRITER
from accessory.checkpoint.vision_names import transform_shape, transform_tensor
from accessory.dist import Cut

log = logging.getLogger(__name__)

COMPARE = 1 << 16  # elements up to which copies of a tensor in several shards are compared when it is read


@dataclass(frozen=True)
class Stored:
    """One tensor as a folder holds it: its name and shape in each shard (None: not in that one), and its dtype."""

    key: str
    name: tuple[str | None, ...]
    shapes: tuple[Shape | None, ...]
    dtype: torch.dtype
    transform: str | None = None

    @property
    def whole(self) -> bool:
        """Whether every shard has it."""
        return None not in self.shapes


class Source:
    """One opened folder: its tensors under canonical names, and slices of them."""

    def __init__(self, folder: Folder) -> None:
        """Read the headers of all shards. Raises ValueError for damage and for names that come twice."""
        self.folder = folder
        self.files = [ShardFile(path) for path in folder.shards]
        self._exact = ShardFile(folder.exact) if folder.exact else None
        ours = folder.meta.get("writer") == WRITER or any(f.metadata.get("writer") == WRITER for f in self.files)
        check_written(folder, ours=ours)
        self.discarded: list[str] = []
        self.stored = self._gather()
        self.restores = _restores(folder)

    @property
    def is_delta(self) -> bool:
        """Whether tensors add to those of the folders before it."""
        return self.folder.form == "delta"

    def find(self, key: str, full: Shape) -> Join | None:
        """How the shards make up a tensor whose full shape is known; None where they cannot."""
        stored = self.stored[key]
        if not stored.whole:
            return None
        if stored.transform is not None:  # released vision tensors: every shard holds all of them
            same = len(set(stored.shapes)) == 1 and transform_shape(stored.transform, stored.shapes[0]) == full
            return Join(full) if same else None
        return find_join(stored.shapes, full)

    def guess(self, key: str) -> Join | None:
        """How the shards make up a tensor, by the table of names; None where they cannot."""
        stored = self.stored[key]
        if not stored.whole:
            return None
        if stored.transform is not None:
            return Join(transform_shape(stored.transform, stored.shapes[0])) if len(set(stored.shapes)) == 1 else None
        dim = names.cut_dim(key, tied=bool(self.folder.config.get("tied")))
        width = self.stored.get("norm.weight")
        width = width.shapes[0][0] if width and width.whole and width.shapes[0] else self.folder.config.get("dim")
        if key == "tok_embeddings.weight" and width and len(stored.shapes[0]) == 2:
            dim = 0 if stored.shapes[0][1] == width else 1  # whole rows: Llama 3 of Meta, and tied embeddings
        return guess_join(stored.shapes, dim)

    def read(self, key: str, join: Join, piece: Cut, *, out: Tensor) -> Tensor:
        """Fill `out` (the cut's local shape, any dtype) with what `piece` holds of a tensor; no other copy is made."""
        stored, kept = self.stored[key], out
        if piece.dim is not None:
            kept = out.narrow(piece.dim, 0, piece.stop - piece.start)
            out.narrow(piece.dim, piece.stop - piece.start, piece.pad).zero_()
        if join.dim is None:
            self._compare(stored)
            view = transform_tensor(stored.transform, self.files[0].rows(stored.name[0]))
            kept.copy_(view if piece.dim is None else view.narrow(piece.dim, piece.start, piece.stop - piece.start))
            return out
        sizes = [shape[join.dim] for shape in stored.shapes]
        first, last = (piece.start, piece.stop) if piece.dim == join.dim else (0, sum(sizes))
        for shard, start, stop, place in overlaps(sizes, first, last):
            view = self.files[shard].rows(stored.name[shard], dim=join.dim, start=start, stop=stop)
            if piece.dim is not None and piece.dim != join.dim:
                view = view.narrow(piece.dim, piece.start, piece.stop - piece.start)
            kept.narrow(join.dim, place, stop - start).copy_(view)
        return out

    def exceptions(self, key: str) -> Tensor | None:
        """Rows of (index, bits) that belong on top of this delta; None where there are none."""
        name = names.PREFIX + key
        return self._exact.rows(name) if self._exact and name in self._exact.specs else None

    def release(self) -> None:
        """Forget all mappings of files."""
        for file in (*self.files, *([self._exact] if self._exact else [])):
            file.release()

    def where(self, key: str) -> str:
        """A tensor's shapes and files, for an error message."""
        stored = self.stored[key]
        shards = list(zip(self.folder.shards, stored.shapes, strict=True))
        if not stored.whole:
            return f"{key} is missing in {few((path.name for path, shape in shards if shape is None), most=2)}"
        shapes = {str(shape): path.name for path, shape in reversed(shards)}
        return f"{key} is {few((f'{shape} in {name}' for shape, name in shapes.items()), most=2)}"

    def _gather(self) -> dict[str, Stored]:
        """The folder's tensors by canonical name."""
        found: dict[str, dict[int, tuple[str, Spec, str | None]]] = {}
        for shard, file in enumerate(self.files):
            for name, spec in file.specs.items():
                translated = names.canonical(name)
                if translated is None:
                    self.discarded.append(name)
                    continue
                key, transform = translated
                if shard in found.setdefault(key, {}):
                    raise ValueError(f"{file.path}: {name} and {found[key][shard][0]} are both {key}; keep one of them")
                found[key][shard] = (name, spec, transform)
        return {key: self._stored(key, held) for key, held in found.items()}

    def _stored(self, key: str, held: Mapping[int, tuple[str, Spec, str | None]]) -> Stored:
        """One tensor as its shards hold it."""
        shards = range(len(self.files))
        _, spec, transform = next(iter(held.values()))
        if len(dtypes := {str(spec.dtype) for _, spec, _ in held.values()}) > 1:
            raise ValueError(f"{self.folder.path}: {key} is {few(dtypes)} in different shards; fetch the folder again")
        return Stored(
            key=key,
            name=tuple(held[shard][0] if shard in held else None for shard in shards),
            shapes=tuple(held[shard][1].shape if shard in held else None for shard in shards),
            dtype=spec.dtype,
            transform=transform,
        )

    def _compare(self, stored: Stored) -> None:
        """Compare the copies of a replicated tensor: those of a name without a rule must be equal, others should be."""
        known = names.known(stored.key)
        if len(self.files) == 1 or (known and prod(stored.shapes[0]) > COMPARE):
            return
        first = self.files[0].rows(stored.name[0])
        for file, name in list(zip(self.files, stored.name, strict=True))[1:]:
            other = file.rows(name)
            if torch.equal(first, other):
                continue
            gap = (first.double() - other.double()).abs().max().item()
            where = f"{file.path}: {stored.key} differs from the copy in {self.files[0].path.name} by up to {gap:.3g}"
            if not known:
                raise ValueError(f"{where}, and no rule says how its shards are joined; load it in as many shards")
            log.warning("%s; the first copy is used", where)


def _restores(folder: Folder) -> dict[str, torch.dtype]:
    """What dtypes a delta of ours brings back: by key, and under "" the dtype of all others; empty if not recorded."""
    record = folder.meta.get("restores")
    if folder.form != "delta" or record is None:
        return {}
    others = record.get("others", {}) if isinstance(record, dict) else None
    table = {"": record.get("dtype"), **others} if isinstance(others, dict) else {}
    if not table or not all(isinstance(code, str) and code in DTYPES for code in table.values()):
        raise ValueError(f"{folder.path / 'meta.json'}: restores is {record!r}, expected dtypes; write the delta again")
    return {key: DTYPES[code] for key, code in table.items()}
