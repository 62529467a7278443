"""PEFT adapters as tensors under canonical names: LoRA's factors, and what is stored whole beside them.

Must not know a model. The base is known by the width of its heads alone, by which rows of q's and k's B are turned.

Several adapters on one linear, and q, k and v of a tower whose linear is one for the three, are one LoRA of joined
rank: A one above the other, B side by side (for q, k, v on the diagonal), each with its own factor where they differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint import hub, manifest
from accessory.checkpoint.files import Folder, few
from accessory.checkpoint.headers import Spec
from accessory.checkpoint.huggingface.adapter_config import AdapterConfig, read_adapter
from accessory.checkpoint.huggingface.config import read_config, tower_name
from accessory.checkpoint.huggingface.names import canonical, unpermute
from accessory.checkpoint.huggingface.source import HuggingFaceSource
from accessory.checkpoint.reshard import Join, Shape
from accessory.checkpoint.shards import ShardFile
from accessory.dist import Cut

PREFIX = "base_model.model."
A, B = ".lora_a.weight", ".lora_b.weight"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.[^.]+?)??(?P<leaf>\.weight|\.bias)?")
_OWN = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])\.weight")
_WRAPPED = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")
_ORIGINAL = ".original_module."  # the base's own, beside what was trained in its place


@dataclass(frozen=True)
class Factor:
    """A and B of one adapter on one linear, as its file has them."""

    file: ShardFile
    a: str
    b: str
    rank: int
    scale: float
    heads: bool = False
    """Rows of B come in halves, as Hugging Face turns q and k."""
    part: int = 0
    parts: int = 1
    flipped: bool = False
    """Of an embedding: its A is our B, transposed, and the other way round."""

    def shape(self) -> tuple[int, int]:
        """Rows and columns of the product."""
        a, b = self.file.specs[self.a].shape, self.file.specs[self.b].shape
        return (a[1], b[0]) if self.flipped else (b[0], a[1])

    def read_a(self) -> Tensor:
        """[rank, in]."""
        return self.file.rows(self.b).t() if self.flipped else self.file.rows(self.a)

    def read_b(self, start: int, stop: int, head_dim: int | None) -> Tensor:
        """[rows, rank]: rows [start, stop), of q and k in our order."""
        if self.flipped:
            return self.file.rows(self.a, dim=1, start=start, stop=stop).t()
        if not self.heads:
            return self.file.rows(self.b, dim=0, start=start, stop=stop)
        assert head_dim, "rows of q and k cannot be turned before the base is known"
        low, high = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        return unpermute(self.file.rows(self.b, dim=0, start=low, stop=high), head_dim)[start - low : stop - low]


@dataclass(frozen=True)
class Joined:
    """All factors on one linear, as one LoRA."""

    factors: tuple[Factor, ...]
    shape: Shape
    """Of the linear's weight."""

    @property
    def rank(self) -> int:
        return sum(factor.rank for factor in self.factors)

    @property
    def scale(self) -> float:
        """The factor on the product; 1 where the adapters' differ, and then it is in B."""
        scales = {factor.scale for factor in self.factors}
        return scales.pop() if len(scales) == 1 else 1.0

    @property
    def dtype(self) -> torch.dtype:
        return self.factors[0].file.specs[self.factors[0].b].dtype


class AdapterSource:
    """One or several opened adapters, with the surface of `Source`; `modules` says which linears they reach."""

    is_delta = False

    def __init__(self, folders: Sequence[Folder], *, head_dim: int | None = None) -> None:
        """Read the headers. ValueError for damage, features that we do not compute, and tensors that make no LoRA."""
        self.opened = [_Opened(folder, head_dim) for folder in folders]
        self._head_dim = head_dim
        self.modules = _join(self.opened)
        self.discarded = [name for one in self.opened for name in one.plain.discarded]
        self.restores: dict[str, torch.dtype] = {}
        self._plain = {key: one.plain for one in self.opened for key in one.plain.stored}
        self.stored: dict[str, Any] = {key: source.stored[key] for key, source in self._plain.items()}
        for name, module in self.modules.items():
            self.stored[name + A] = Spec((module.rank, module.shape[1]), module.dtype)
            self.stored[name + B] = Spec((module.shape[0], module.rank), module.dtype)
        self.folder = self._describe()

    def find(self, key: str, full: Shape) -> Join | None:
        """How a tensor whose full shape is known is stored: as one; None where it has another shape."""
        return Join(full) if tuple(self.stored[key].shape) == tuple(full) else None

    def guess(self, key: str) -> Join | None:
        """The tensor's full shape."""
        return Join(tuple(self.stored[key].shape))

    def read(self, key: str, join: Join, piece: Cut, *, out: Tensor) -> Tensor:
        """Fill `out` (the cut's local shape, any dtype) with what `piece` holds of a tensor."""
        if key in self._plain:
            return self._plain[key].read(key, join, piece, out=out)
        module = self.modules[_OWN.fullmatch(key)["module"]]
        out.zero_()
        size = (piece.stop - piece.start) if piece.dim is not None else 0
        if key.endswith(A):
            for first, factor in _offsets(module):
                rows = factor.read_a()
                rows = rows if piece.dim is None else rows.narrow(1, piece.start, size)
                out[first : first + factor.rank, : rows.shape[1]].copy_(rows)
            return out
        start, stop = (0, module.shape[0]) if piece.dim is None else (piece.start, piece.stop)
        for first, factor in _offsets(module):
            width = module.shape[0] // factor.parts
            low, high = max(start, factor.part * width), min(stop, (factor.part + 1) * width)
            if low >= high:
                continue
            rows = factor.read_b(low - factor.part * width, high - factor.part * width, self._head_dim)
            if factor.scale != module.scale:
                rows = rows.float() * (factor.scale / module.scale)
            out[low - start : high - start, first : first + factor.rank].copy_(rows)
        return out

    def exceptions(self, key: str) -> Tensor | None:
        """Only deltas have some."""
        return None

    def release(self) -> None:
        """Forget all mappings of files."""
        for one in self.opened:
            for file in one.files:
                file.release()

    def where(self, key: str) -> str:
        """A tensor's shape and files, for an error message."""
        if key in self._plain:
            return self._plain[key].where(key)
        paths = dict.fromkeys(str(f.file.path) for f in self.modules[_OWN.fullmatch(key)["module"]].factors)
        return f"{key} is {self.stored[key].shape} in {few(paths, most=2)}"

    def _describe(self) -> Folder:
        """The last folder, with what all of them add to a model's config."""
        last = self.opened[-1]
        config: dict[str, Any] = {key: value for one in self.opened for key, value in one.folder.config.items()}
        config["lora_modules"] = {name: [module.rank, module.scale] for name, module in self.modules.items()}
        config["lora_dropout"] = last.words.dropout
        return replace(last.folder, config=config)


class _Opened:
    """One adapter's files: factors by canonical linear, and a source of what is stored whole."""

    def __init__(self, folder: Folder, head_dim: int | None) -> None:
        self.words: AdapterConfig = read_adapter(folder.told["adapter"], where=str(folder.path / "adapter_config.json"))
        self.folder = _with_model(folder)
        self.files = [ShardFile(path) for path in folder.shards]
        sides: dict[tuple[str, str], dict[str, tuple[ShardFile, str]]] = {}
        plain: list[_Plain] = []
        for file in self.files:
            whole: dict[str, str] = {}
            for name in file.specs:
                match = _FACTOR.fullmatch(name)
                if match is None:
                    _refuse_others(file, name)
                    if (plainly := _WRAPPED.sub("", name)) in whole:
                        raise ValueError(f"{file.path}: {name} and {whole[plainly]} are both {plainly}; keep one")
                    if _ORIGINAL not in name:
                        whole[plainly] = name
                elif match["leaf"] == ".bias":
                    raise ValueError(f"{file.path}: {name}: a bias of LoRA's B, which is not computed here")
                else:
                    held = sides.setdefault((match["module"], match["kind"] or ""), {})
                    if match["side"] in held:
                        raise ValueError(f"{file.path}: {name} and {held[match['side']][1]} are one factor; keep one")
                    held[match["side"]] = (file, name)
            plain.append(_Plain(file, whole))
        self.factors: dict[str, list[Factor]] = {}
        self.names: dict[tuple[str, int], str] = {}
        """(linear, part of it) -> its name in the adapter."""
        if not sides and self.words.targets:
            raise ValueError(
                f"{folder.path}: holds no LoRA, which target_modules of adapter_config.json speak of; copy the files of"
                " one adapter together, or open trained norms and biases without adapter_config.json"
            )
        for (module, kind), held in sides.items():
            self._add(module, held, flipped=bool(kind))
        heads = {"head_width": head_dim} if head_dim else {}
        self.plain = HuggingFaceSource(replace(folder, config=heads, told={}), files=plain)

    def _add(self, module: str, held: dict[str, tuple[ShardFile, str]], *, flipped: bool) -> None:
        """Take up A and B of one linear. ValueError where they contradict the config or each other."""
        where, name = self.folder.path, module.removeprefix(PREFIX)
        if len(held) < 2:
            lost = "A" if "B" in held else "B"
            raise ValueError(f"{where}: {module} has no lora_{lost}; fetch or copy the adapter again")
        (file, a), (other, b) = held["A"], held["B"]
        rank, scale = self.words.shape(name)
        shapes = file.specs[a].shape, other.specs[b].shape
        if file is not other or any(len(shape) != 2 for shape in shapes) or (shapes[0][0], shapes[1][1]) != (rank,) * 2:
            raise ValueError(
                f"{where}: {name} has A {shapes[0]} and B {shapes[1]}, expected rank {rank} by adapter_config.json;"
                " copy the files of one adapter together"
            )
        if not flipped and not self.words.reaches(name):
            raise ValueError(
                f"{where}: holds LoRA on {name}, which target_modules of adapter_config.json do not reach; copy the"
                " files of one adapter together"
            )
        place = canonical(f"{module}.weight")
        key = (place.key if place else f"{module}.weight").removesuffix(".weight")
        self.names[key, place.part if place else 0] = name
        heads, part, parts = (place.transform == "heads", place.part, place.parts) if place else (False, 0, 1)
        self.factors.setdefault(key, []).append(Factor(file, a, b, rank, scale, heads, part, parts, flipped))


class _Plain:
    """A file without LoRA's factors, under names without PEFT's wrappers; the surface of ShardFile."""

    def __init__(self, file: ShardFile, names: dict[str, str]) -> None:
        self.path, self.metadata, self._file, self._names = file.path, file.metadata, file, names
        self.specs = {name: file.specs[stored] for name, stored in names.items()}

    def rows(self, name: str, *, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """As `ShardFile.rows`."""
        return self._file.rows(self._names[name], dim=dim, start=start, stop=stop)

    def release(self) -> None:
        """Forget the mapping."""
        self._file.release()


def _join(opened: Sequence[_Opened]) -> dict[str, Joined]:
    """All factors by linear. ValueError where adapters are for linears of different sizes."""
    found: dict[str, list[Factor]] = {}
    for one in opened:
        for key, factors in one.factors.items():
            found.setdefault(key, []).extend(sorted(factors, key=lambda factor: factor.part))
    modules = {}
    for key, factors in found.items():
        shapes = {(rows * factor.parts, columns) for factor in factors for rows, columns in [factor.shape()]}
        if len(shapes) > 1:
            paths = few(dict.fromkeys(str(factor.file.path) for factor in factors), most=3)
            raise ValueError(f"{paths}: are for a {key} of {few(map(str, shapes))}; give adapters of one base")
        modules[key] = Joined(tuple(factors), shapes.pop())
    return modules


def _offsets(module: Joined) -> list[tuple[int, Factor]]:
    """Where each adapter's rank begins in the joined one."""
    firsts, total = [], 0
    for factor in module.factors:
        firsts.append((total, factor))
        total += factor.rank
    return firsts


def _refuse_others(file: ShardFile, name: str) -> None:
    """ValueError for tensors of PEFT that are neither LoRA's factors nor stored whole."""
    if re.search(r"\.lora_|\.(prompt|ia3|hada|lokr|oft|boft|vera|ln_tuning)_|token_adapter", name):
        raise ValueError(
            f"{file.path}: {name}: no part of plain LoRA, which alone is computed here; merge it with peft"
        )


def _with_model(folder: Folder) -> Folder:
    """The folder; where the original LLaVA wrote it, with the vision model that its config.json describes."""
    kept = {name: folder.told[name] for name in ("adapter", "accessory") if name in folder.told}
    own = dict(kept.get("accessory", {}).get("config") or {})  # what our own training added to the model besides
    meta = {**folder.meta, **({"llama_type": kind} if (kind := own.pop("llama_type", None)) else {})}
    config = folder.told.get("config", {})
    if "mm_vision_tower" not in config:
        return replace(folder, config=own, meta=meta, told=kept)
    name, where = tower_name(config), str(folder.path / "config.json")
    sizes = manifest.load_json(hub.find(name) / "config.json") if name else None
    reading = read_config(config, where=where, preprocessor=folder.told.get("preprocessor"), tower=sizes)
    told = {**folder.told, **kept, "family": reading.family, "tower": reading.tower}
    return replace(folder, config=reading.flat, meta={**meta, "llama_type": reading.llama_type}, told=told)
