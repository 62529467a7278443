"""Finds the files of a Hugging Face folder: its shards by index or by name, and what its small files say.

Must not know names or shapes of tensors; it looks at file names and JSON only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from accessory.checkpoint import hub, manifest
from accessory.checkpoint.huggingface.config import read_config, stop_ids, tower_id, tower_name

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
SHARD = re.compile(r"(?P<stem>model|pytorch_model)-(?P<index>\d{5})-of-(?P<count>\d{5})\.(?P<ext>safetensors|bin)")
# trained tensors of LLaVA alone, to be put on top of a base
PARTIAL = ("mm_projector.bin", "non_lora_trainables.bin")
PAPERS = {
    "config": "config.json",
    "generation": "generation_config.json",
    "preprocessor": "preprocessor_config.json",
    "tokenizer_config": "tokenizer_config.json",
}


@dataclass(frozen=True)
class Found:
    """A Hugging Face folder's files, and what they say."""

    shards: tuple[str, ...]
    told: dict[str, Any] = field(default_factory=dict)
    """The small files as they are: config, generation, preprocessor, tokenizer_config, chat_template, index (tensor ->
    shard); and `family` and `tower` as `read_config` says them."""
    flat: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


def holds(listing: Iterable[str]) -> bool:
    """Whether a folder of these files has weights in Hugging Face's form."""
    return any(name in INDEXES or is_weights(name) for name in listing)


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights in Hugging Face's form."""
    return name in (*SINGLES, *PARTIAL) or SHARD.fullmatch(name) is not None


def look(folder: Path, listing: list[str]) -> Found:
    """Say which files hold the weights, and what the small files mean.

    Raises ValueError for missing shards, an index that names files elsewhere, quantised weights, model types and
    features that are not read.
    """
    told = papers(folder, listing)
    shards, index = _shards(folder, listing)
    if index is not None:
        told["index"] = index
    if "config" not in told:
        if not {*shards} <= {*PARTIAL}:
            raise ValueError(f"{folder}: has no config.json, which says what its weights are; fetch it too")
        return Found(shards, told)
    config, where = told["config"], str(folder / "config.json")
    tower = tower_name(config)
    sizes = manifest.load_json(hub.find(tower) / "config.json") if tower else None
    reading = read_config(config, where=where, preprocessor=told.get("preprocessor"), tower=sizes)
    told["family"] = reading.family
    meta: dict[str, Any] = {} if reading.llama_type is None else {"llama_type": reading.llama_type}
    if reading.tower is not None:
        told["tower"] = _tower(reading.tower)
    if reading.flat and (ids := stop_ids(config, told.get("generation", {}))):
        meta["stop_ids"] = ids
    return Found(shards, told, reading.flat, meta)


def papers(folder: Path, listing: list[str]) -> dict[str, Any]:
    """The small files."""
    told: dict[str, Any] = {name: manifest.load_json(folder / file) for name, file in PAPERS.items() if file in listing}
    if "preprocessor" not in told and "processor_config.json" in listing:  # transformers 5 writes one file for both
        inside = manifest.load_json(folder / "processor_config.json").get("image_processor")
        told |= {"preprocessor": inside} if isinstance(inside, dict) else {}
    if "chat_template.jinja" in listing:
        told["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif "chat_template.json" in listing:
        told["chat_template"] = manifest.load_json(folder / "chat_template.json").get("chat_template")
    elif isinstance(said := told.get("tokenizer_config", {}).get("chat_template"), str):
        told["chat_template"] = said
    return told


def _tower(name: str) -> str:
    """Where the tower is: as the config says, or on the hub where that is a folder of another machine."""
    if Path(name).exists() or tower_id(name) is None:
        return name
    return tower_id(name)


def _shards(folder: Path, listing: list[str]) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """The files of weights, safetensors before .bin as transformers takes them, and the index if there is one."""
    for index, single in zip(INDEXES, SINGLES, strict=True):
        if index in listing:
            table = _index(folder / index)
            names = tuple(sorted({*table.values()}))
            if missing := [name for name in names if name not in listing]:
                raise ValueError(
                    f"{folder}: lacks {len(missing)} of the {len(names)} shards that {index} names"
                    f" ({', '.join(missing[:4])}); fetch or copy the folder again"
                )
            return names, table
        if single in listing:
            return (single,), None
        if numbered := _numbered(folder, listing, single):
            return numbered, None
    return tuple(name for name in PARTIAL if name in listing), None


def _index(path: Path) -> dict[str, str]:
    """The index: tensor -> file name. ValueError for anything but plain names of files beside it."""
    table = manifest.load_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path}: has no weight_map of tensors to files; fetch it again")
    for key, name in table.items():
        plain = isinstance(name, str) and PurePosixPath(name).name == name and "\\" not in name
        if not plain or name in ("", ".", "..") or not name.endswith((".safetensors", ".bin")):
            raise ValueError(f"{path}: {key} lies in {name!r}, expected a file of weights beside it; do not use it")
    return table


def _numbered(folder: Path, listing: list[str], single: str) -> tuple[str, ...]:
    """Shards 1 to n of n, without an index. ValueError where some are missing or counts differ."""
    stem, _, ext = single.partition(".")
    found = [match for name in listing if (match := SHARD.fullmatch(name)) and match["stem"] == stem]
    found = [match for match in found if match["ext"] == ext]
    if not found:
        return ()
    counts = {match["count"] for match in found}
    if len(counts) > 1 or len(found) != int(found[0]["count"]):
        raise ValueError(
            f"{folder}: has no {stem}.{ext}.index.json, and its {len(found)} shards are not all of one set"
            f" (of {', '.join(str(int(count)) for count in sorted(counts))}); fetch or copy the folder again"
        )
    return tuple(match[0] for match in found)
