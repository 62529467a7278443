"""Writes Accessory folders: weights in any number of shards, config, meta, tokenizer; as a stream, and atomically.

Must not know a model: tensors come under canonical names, and dims to cut on come from the table of names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint import names
from accessory.checkpoint.files import EXACT, few
from accessory.checkpoint.headers import Spec
from accessory.checkpoint.reshard import bounds
from accessory.checkpoint.stage import Stage
from accessory.checkpoint.streams import WRITER, GrowingWriter, PthWriter, SafetensorsWriter
from accessory.checkpoint.vision_names import transform_shape, transform_tensor

FORMATS = ("safetensors", "pth")
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Stream:
    """Tensors that come one by one: all specs beforehand, then (key, full tensor) pairs in any order."""

    specs: Mapping[str, Spec]
    items: Iterable[tuple[str, Tensor]]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """The pairs."""
        return iter(self.items)


@dataclass(frozen=True)
class Form:
    """How weights lie in files."""

    shards: int = 1
    fmt: str = "safetensors"
    """safetensors, or pth in the layout of LLaMA2-Accessory, its names of vision tensors included."""
    dtype: torch.dtype | None = None
    """Floating-point tensors are stored in it; None: as they come."""
    delta: bool = False
    tied: bool = False
    """Embedding and output are one matrix, cut on the vocabulary."""
    meta: bool = False
    """Meta's form: consolidated.NN.pth under canonical names, and params.json."""

    def __post_init__(self) -> None:
        """Check the values a user can set."""
        if self.fmt not in FORMATS:
            raise ValueError(f"format: got {self.fmt!r}, expected one of {', '.join(FORMATS)}")
        if not 1 <= self.shards <= 100:
            raise ValueError(f"shards: got {self.shards}, expected 1 to 100; most models use 1, 2, 4 or 8")
        assert not self.meta or self.fmt == "pth", "Meta's form is .pth"

    def name(self, shard: int) -> str:
        """The name of a shard's file."""
        if self.meta:
            return f"consolidated.{shard:02d}.pth"
        kind = "model-diff" if self.delta else "model"
        return f"consolidated.{shard:02d}-of-{self.shards:02d}.{kind}.{self.fmt}"


@dataclass(frozen=True)
class Papers:
    """What lies beside weights: the model's fields, at least its `llama_type`, and the tokenizer (a file or folder)."""

    config: Mapping[str, Any] | None = None
    meta: Mapping[str, Any] | None = None
    tokenizer: str | Path | None = None
    more: Mapping[str, str] = field(default_factory=dict)
    """Further texts by name, in place of the tokenizer's files of these names."""

    def write(self, place: Callable[[str], Path]) -> None:
        """Write config.json, meta.json and the tokenizer's files where `place` says for each name."""
        if self.config is not None:
            _write_json(place("config.json"), self.config)
        _write_json(place("meta.json"), {**(self.meta or {}), "writer": WRITER})
        for name, source in tokenizer_files(self.tokenizer).items():
            if name not in self.more:
                shutil.copyfile(source, place(name))
        for name, text in self.more.items():
            place(name).write_text(text, encoding="utf-8")


def write_folder(
    path: str | Path,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    config: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    shards: int = 1,
    fmt: str = "safetensors",
    dtype: torch.dtype | None = None,
) -> None:
    """Write full tensors under canonical names (vocabulary padding stripped) as an Accessory folder.

    tensors: a state dict, or a `Stream` when they should not all be in memory; any other iterable is collected first.
    config: the model's fields (config.json; its `tied` decides how the embedding is cut). meta: at least `llama_type`
    (meta.json). tokenizer: the file, or a folder with tokenizer files, to copy. dtype: to store floats in.
    The folder appears whole, with its manifest.json, or not at all. Raises ValueError for a form that cannot be and
    for files that are there already, OSError with the bytes needed and free when the disk is full.
    """
    if not isinstance(tensors, Stream):
        tensors = in_memory(tensors)
    form = Form(shards=shards, fmt=fmt, dtype=dtype, tied=bool((config or {}).get("tied")))
    with FolderWriter(Path(path), tensors.specs, form=form) as writer:
        for key, tensor in tensors:
            writer.put(key, tensor)
        writer.finish(config=config, meta=meta, tokenizer=tokenizer)


def in_memory(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> Stream:
    """Make a Stream of tensors that are in memory."""
    held = dict(tensors)
    return Stream({key: Spec(tuple(tensor.shape), tensor.dtype) for key, tensor in held.items()}, held.items())


class FolderWriter:
    """Takes the tensors of a folder one by one, cuts each into its shards and writes them at once to their places."""

    def __init__(self, path: Path, specs: Mapping[str, Spec], *, form: Form) -> None:
        """`specs`: every tensor to come, in full, as it will be put."""
        self.form = form
        self._names = names.in_files(specs, reference=form.fmt == "pth" and not form.meta)
        if form.meta:
            self._names = {key: (key, None) for key in specs}
        self._specs = {key: _cast(spec, form.dtype) for key, spec in specs.items()}
        self._plans = [self._plan(shard) for shard in range(form.shards)]
        self._missing = set(specs)
        self._files: list[SafetensorsWriter | PthWriter | GrowingWriter] = []
        self._exact: GrowingWriter | None = None
        nbytes = sum(spec.nbytes for plan in self._plans for spec in plan.values())
        files = [form.name(shard) for shard in range(form.shards)]
        self._stage = Stage(path, [*files, *([] if form.meta else ["meta.json"])], nbytes=nbytes)

    def put(self, key: str, tensor: Tensor) -> None:
        """Write one full tensor."""
        if key not in self._missing:
            raise ValueError(f"{key}: not among the tensors still to be written; each is put once, under its own name")
        self._missing.remove(key)
        spec = self._specs[key]
        assert tuple(tensor.shape) == spec.shape, f"{key}: put with shape {tuple(tensor.shape)}, announced {spec.shape}"
        name, transform = self._names[key]
        with self._stage.explained():
            for shard, file in enumerate(self._files[: self.form.shards]):
                rows = transform_tensor(transform, self._rows(key, tensor, shard))
                file.put(name, rows.to("cpu", spec.dtype))

    def note(self, key: str, exceptions: Tensor) -> None:
        """Add to exact.safetensors what the delta of this tensor cannot say (see `delta.exceptions`)."""
        with self._stage.explained():
            if self._exact is None:
                room = 4096 + sum(256 + len(key) for key in self._specs)
                self._exact = GrowingWriter(self._stage.path(EXACT), room=room)
                self._files.append(self._exact)
            self._exact.put(names.PREFIX + key, exceptions)

    def finish(
        self,
        *,
        config: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
        tokenizer: str | Path | None = None,
    ) -> None:
        """Write the small files and let the folder appear. ValueError when tensors are missing."""
        if self._missing:
            absent = few(sorted(self._missing))
            raise ValueError(f"{self._stage.target}: {len(self._missing)} tensors were not put: {absent}; put them too")
        with self._stage.explained():
            for file in self._files:
                file.close()
            if self.form.meta:
                _write_json(self._stage.path("params.json"), config or {})
                for name, source in tokenizer_files(tokenizer).items():
                    shutil.copyfile(source, self._stage.path(name))
                if meta:
                    _write_json(self._stage.path("meta.json"), meta)
            else:
                Papers(config, meta, tokenizer).write(self._stage.path)
        self._stage.commit()

    def __enter__(self) -> FolderWriter:
        """Create the files."""
        self._stage.__enter__()
        make = SafetensorsWriter if self.form.fmt == "safetensors" else partial(PthWriter, flat=self.form.meta)
        try:
            with self._stage.explained():
                for shard, plan in enumerate(self._plans):
                    self._files.append(make(self._stage.path(self.form.name(shard)), plan))
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove everything again unless `finish` came to its end."""
        for file in self._files:
            file.abandon()
        self._stage.__exit__(kind, error, trace)

    def _plan(self, shard: int) -> dict[str, Spec]:
        """Names and specs of the tensors in one shard's file."""
        plan = {}
        for key, spec in self._specs.items():
            name, transform = self._names[key]
            shape = self._rows(key, torch.empty(spec.shape, device="meta"), shard).shape
            plan[name] = Spec(transform_shape(transform, shape), spec.dtype)
        return plan

    def _rows(self, key: str, tensor: Tensor, shard: int) -> Tensor:
        """The rows of a full tensor that one shard holds."""
        dim = names.cut_dim(key, tied=self.form.tied)
        if dim is None or self.form.shards == 1:
            return tensor
        if tensor.dim() <= dim or tensor.shape[dim] < self.form.shards:
            raise ValueError(
                f"{key}: shape {tuple(tensor.shape)} cannot be cut into {self.form.shards} shards on dim {dim};"
                " choose fewer shards"
            )
        start, stop = bounds(tensor.shape[dim], self.form.shards)[shard]
        return tensor.narrow(dim, start, stop - start)


def tokenizer_files(source: str | Path | None) -> dict[str, Path]:
    """The files of a tokenizer, by the names they get in a folder: for tokenizer.json its companions too."""
    if source is None:
        return {}
    source = Path(source)
    if source.is_file() and source.suffix == ".model":
        return {"tokenizer.model": source}
    folder = source if source.is_dir() else source.parent
    found = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if source.is_file() and source.suffix == ".json":
        found["tokenizer.json"] = source
    if not found or not source.exists():
        raise ValueError(f"{source}: no tokenizer there, expected tokenizer.model or tokenizer.json; give its path")
    return found


def _cast(spec: Spec, dtype: torch.dtype | None) -> Spec:
    """The spec after storing floats in `dtype`."""
    return Spec(spec.shape, dtype) if dtype is not None and spec.dtype.is_floating_point else spec


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(dict(table), indent=2) + "\n", encoding="utf-8")
