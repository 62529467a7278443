"""Writes Hugging Face folders: shards up to a size with their index, the small files, the tokenizer; as a stream.

Must not know a model: tensors come in full under canonical names, and leave under Hugging Face's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.files import few
from accessory.checkpoint.headers import Spec
from accessory.checkpoint.huggingface import papers
from accessory.checkpoint.huggingface.names import in_file, transform_back
from accessory.checkpoint.stage import Stage
from accessory.checkpoint.streams import PthWriter, SafetensorsWriter
from accessory.checkpoint.write import tokenizer_files

BESIDE = ("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class HuggingFaceForm:
    """How weights lie in a Hugging Face folder."""

    family: str
    """llama, mistral, qwen2, llava, llava_next, or the original LLaVA's llava_llama, llava_mistral, llava_qwen."""
    head_dim: int
    """Width of an attention head, by which rows of q and k are put in Hugging Face's order."""
    dtype: torch.dtype | None = None
    """Floating-point tensors are stored in it; None: as they come."""
    max_shard_bytes: int = 5_000_000_000
    """A shard ends before the tensor that would make it larger; a larger tensor has a shard of its own."""
    legacy: bool = False
    """pytorch_model*.bin and not model*.safetensors."""

    def __post_init__(self) -> None:
        """Check the values a user can set."""
        if self.family not in papers.FAMILIES:
            raise ValueError(f"family: got {self.family!r}, expected one of {', '.join(papers.FAMILIES)}")
        if self.max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes: got {self.max_shard_bytes}, expected a positive number of bytes")

    @property
    def stem(self) -> str:
        return "pytorch_model" if self.legacy else "model"

    @property
    def ext(self) -> str:
        return "bin" if self.legacy else "safetensors"

    def name(self, shard: int, shards: int) -> str:
        """The name of a shard's file; shard counts from 0."""
        return f"{self.stem}.{self.ext}" if shards == 1 else f"{self.stem}-{shard + 1:05d}-of-{shards:05d}.{self.ext}"


class HuggingFaceWriter:
    """Takes the tensors of a folder one by one and writes each at once to its place; the surface of `FolderWriter`."""

    def __init__(
        self, path: Path, specs: Mapping[str, Spec], *, form: HuggingFaceForm, stage: Stage | None = None
    ) -> None:
        """`specs`: every tensor to come, in full, under canonical names. ValueError where the form has no place.

        stage: of a folder in which other files appear too; whoever opened it commits it.
        """
        self.form = form
        layout = papers.layout_of(form.family)
        self._specs = {key: _cast(spec, form.dtype) for key, spec in specs.items()}
        self._names = {key: in_file(key, layout=layout) for key in specs}
        self._shards = self._pack()
        self._place = {name: number for number, shard in enumerate(self._shards) for name in shard}
        self._missing = set(specs)
        self._files: list[SafetensorsWriter | PthWriter] = []
        self.nbytes = sum(spec.nbytes for shard in self._shards for spec in shard.values())
        """Bytes of all tensors."""
        self.files = [form.name(number, len(self._shards)) for number in range(len(self._shards))]
        self._lent = stage is not None
        self._stage = stage or Stage(path, [*self.files, "config.json"], nbytes=self.nbytes)

    def put(self, key: str, tensor: Tensor) -> None:
        """Write one full tensor."""
        if key not in self._missing:
            raise ValueError(f"{key}: not among the tensors still to be written; each is put once, under its own name")
        self._missing.remove(key)
        spec = self._specs[key]
        assert tuple(tensor.shape) == spec.shape, f"{key}: put with shape {tuple(tensor.shape)}, announced {spec.shape}"
        names, transform = self._names[key]
        whole = transform_back(transform, tensor.to("cpu", spec.dtype), self.form.head_dim)
        parts = whole.chunk(len(names)) if len(names) > 1 else [whole]
        with self._stage.explained():
            for name, part in zip(names, parts, strict=True):
                self._files[self._place[name]].put(name, part)

    def finish(
        self,
        *,
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        preprocessor: Mapping[str, Any] | None = None,
        tokenizer: str | Path | None = None,
        chat_template: str | None = None,
        beside: str | Path | None = None,
        more: Mapping[str, str] | None = None,
    ) -> None:
        """Write the small files and let the folder appear. ValueError when tensors are missing.

        config, generation, preprocessor: as `papers` makes them. tokenizer: a file or folder, whose files are copied
        whole; beside: a folder whose processor files and chat template are copied too, unless given here.
        chat_template: jinja, written as chat_template.jinja. more: further text files by name.
        """
        if self._missing:
            absent = few(sorted(self._missing))
            raise ValueError(f"{self._stage.target}: {len(self._missing)} tensors were not put: {absent}; put them too")
        tables = {"config.json": config, "generation_config.json": generation, "preprocessor_config.json": preprocessor}
        texts = {name: _json(table) for name, table in tables.items() if table is not None}
        if len(self.files) > 1:
            texts[f"{self.form.stem}.{self.form.ext}.index.json"] = _json(self._index())
        if chat_template is not None:
            texts["chat_template.jinja"] = chat_template
        texts |= more or {}
        copies = tokenizer_files(tokenizer)
        if beside is not None:
            copies |= {name: Path(beside) / name for name in BESIDE if (Path(beside) / name).is_file()}
        if chat_template is not None:
            copies.pop("chat_template.json", None)
        with self._stage.explained():
            for file in self._files:
                file.close()
            for name, text in texts.items():
                self._stage.path(name).write_text(text, encoding="utf-8")
            for name, source in copies.items():
                if name not in texts:
                    shutil.copyfile(source, self._stage.path(name))
        if not self._lent:
            self._stage.commit()

    def __enter__(self) -> HuggingFaceWriter:
        """Create the files."""
        if not self._lent:
            self._stage.__enter__()
        try:
            with self._stage.explained():
                for name, plan in zip(self.files, self._shards, strict=True):
                    path = self._stage.path(name)
                    made = (
                        PthWriter(path, plan, flat=True) if self.form.legacy else SafetensorsWriter(path, plan, _MARK)
                    )
                    self._files.append(made)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove everything again unless `finish` came to its end."""
        for file in self._files:
            file.abandon()
        if not self._lent:
            self._stage.__exit__(kind, error, trace)

    def _pack(self) -> list[dict[str, Spec]]:
        """Names and specs of the tensors in each shard's file, in the order of the specs."""
        shards: list[dict[str, Spec]] = [{}]
        size = 0
        for key, spec in self._specs.items():
            names, transform = self._names[key]
            full = transform_back(transform, torch.empty(spec.shape, device="meta"), self.form.head_dim)
            for name, part in zip(names, full.chunk(len(names)) if len(names) > 1 else [full], strict=True):
                stored = Spec(tuple(part.shape), spec.dtype)
                if shards[-1] and size + stored.nbytes > self.form.max_shard_bytes:
                    shards.append({})
                    size = 0
                shards[-1][name] = stored
                size += stored.nbytes
        return shards

    def _index(self) -> dict[str, Any]:
        """The index that transformers reads: sizes, and the shard of every tensor."""
        numel = sum(spec.numel for shard in self._shards for spec in shard.values())
        table = {name: self.files[number] for name, number in sorted(self._place.items())}
        return {"metadata": {"total_parameters": numel, "total_size": self.nbytes}, "weight_map": table}


# no mark of ours: others add and edit files in such folders, whose shards are complete by their index and headers
_MARK = {"format": "pt"}


def _cast(spec: Spec, dtype: torch.dtype | None) -> Spec:
    """The spec after storing floats in `dtype`."""
    return Spec(spec.shape, dtype) if dtype is not None and spec.dtype.is_floating_point else spec


def _json(table: Mapping[str, Any]) -> str:
    """A JSON object as a file."""
    return json.dumps(dict(table), indent=2, ensure_ascii=False) + "\n"
