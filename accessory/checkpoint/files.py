"""Recognises a folder of weights: its form, its shards in order, and the small files beside them.

Must not know names or shapes of tensors; it looks at file names and JSON only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accessory.checkpoint import manifest
from accessory.checkpoint.huggingface import folder as huggingface

FORMS = {
    "meta": "Meta's (consolidated.NN.pth)",
    "accessory": "Accessory's (consolidated.NN-of-MM.model.*)",
    "old": "the oldest Accessory's (consolidated.NN-of-MM.pth)",
    "delta": "delta weights (consolidated.NN-of-MM.model-diff.*)",
    "training": "a training checkpoint's (state-NNNNN-of-MMMMM.safetensors)",
    "huggingface": "Hugging Face's (config.json with *.safetensors or *.bin)",
    "adapter": "a PEFT adapter's (adapter_config.json with adapter_model.*)",
}
_INDEX, _COUNT, _EXT = r"(?P<index>\d{2,})", r"(?P<count>\d{2,})", r"(?P<ext>pth|safetensors)"
_SHARDS = (
    ("meta", re.compile(rf"consolidated\.{_INDEX}\.{_EXT}")),
    ("meta", re.compile(rf"consolidated\.{_EXT}")),
    ("accessory", re.compile(rf"consolidated\.{_INDEX}-of-{_COUNT}\.model\.{_EXT}")),
    ("old", re.compile(rf"consolidated\.{_INDEX}-of-{_COUNT}\.(?P<ext>pth)")),
    ("delta", re.compile(rf"consolidated\.{_INDEX}-of-{_COUNT}\.model-diff\.{_EXT}")),
    ("training", re.compile(rf"state-{_INDEX}-of-{_COUNT}\.(?P<ext>safetensors)")),
)
# a training run's state beside its weights: never loaded here, but counted
_LEFTOVER = re.compile(r"consolidated\..*\.(optimizer|other)\.\w+|rank-specific-.*|(optimizer|trainer)[.-].*")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
# beside an adapter of ours: what PEFT's form has no place for, under canonical names; and which base it is for
_OWN = "accessory"
BESIDE, KIN = f"{_OWN}.safetensors", f"{_OWN}.json"
EXACT = "exact.safetensors"
FACTS = "facts.json"


@dataclass(frozen=True)
class Folder:
    """A recognised folder of weights; nothing of it but JSON has been read."""

    path: Path
    form: str
    """meta, accessory (the oldest too), delta, training, huggingface or adapter."""
    shards: tuple[Path, ...]
    config: dict[str, Any] = field(default_factory=dict)
    """config.json or params.json; empty where there is none (legacy folders)."""
    meta: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    exact: Path | None = None
    """What a delta of ours cannot say in its own dtype."""
    leftovers: int = 0
    """Files of a training run (optimiser, loader state) that were passed over."""
    told: dict[str, Any] = field(default_factory=dict)
    """Of Hugging Face's folders and adapters: their small files as they are (`huggingface.folder.Found.told`)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of a training checkpoint: its step, `base` (the folders that the run began with) and what else the run noted."""


def recognise(path: str | Path, *, state: bool = True) -> Folder:
    """Find out what a folder of weights is. Raises ValueError, in one sentence, when it is none that can be read.

    state: a checkpoint of a run that holds its weights in Hugging Face's or PEFT's form too is one; otherwise those
    count, since they name their base.
    """
    folder = Path(path)
    if str(path).startswith("hf://"):
        raise ValueError(f"{path}: is on the hub, expected a folder here; fetch it first (tools/download.py)")
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; check the path")
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder of weights; give {folder.parent}")
    listing = sorted(entry.name for entry in folder.iterdir())
    if manifest.UNFINISHED in listing:
        raise ValueError(
            f"{folder}: writing it was cut short ({manifest.UNFINISHED} lies in it); delete it and write it again"
        )
    ours = [form for name in listing for form, pattern in _SHARDS if pattern.fullmatch(name)]
    others = "adapter_config.json" in listing or holds_all(listing)
    if not ours or (not state and {*ours} == {"training"} and others):
        if "adapter_config.json" in listing:
            return _adapter(folder, listing)
        if huggingface.holds(listing):
            return _huggingface(folder, listing)
    form, found = _shards(folder, listing)
    exact = folder / EXACT if form == "delta" and EXACT in listing else None
    return Folder(
        path=folder,
        form="accessory" if form == "old" else form,
        shards=tuple(folder / name for name in found),
        config=_config(folder, listing, form),
        meta=manifest.load_json(folder / "meta.json") if "meta.json" in listing else {},
        tokenizer=_tokenizer(folder, form),
        exact=exact,
        leftovers=sum(1 for name in listing if _LEFTOVER.fullmatch(name)),
        facts=manifest.load_json(folder / FACTS) if form == "training" and FACTS in listing else {},
    )


def holds_all(listing: Iterable[str]) -> bool:
    """Whether a folder of these files has all weights of a model in Hugging Face's form."""
    names = {*listing}
    return "config.json" in names and huggingface.holds(names - {*huggingface.PARTIAL})


def check_written(folder: Folder, *, ours: bool) -> None:
    """Refuse a folder of ours that was not written to its end or lost files since: sizes and names, by its manifest.

    `ours`: its files say that this program wrote them; folders of others need no manifest.
    """
    entries = manifest.read(folder.path)
    if entries is None:
        if ours:
            raise ValueError(
                f"{folder.path}: has no {manifest.NAME}, which completes every folder of ours: writing or copying it"
                " was cut short; write it again, or copy all of its files"
            )
        return
    faults = manifest.faults(folder.path)
    faults += [f"{shard.name} is not in {manifest.NAME}" for shard in folder.shards if shard.name not in entries]
    if faults:
        raise ValueError(f"{folder.path}: damaged ({few(faults, ';')}); write it again, or copy all of its files")


def few(things: Iterable[str], mark: str = ",", *, most: int = 8) -> str:
    """Join the first few of many things, and count the others."""
    things = list(things)
    more = f"{mark} and {len(things) - most} more" if len(things) > most else ""
    return f"{mark} ".join(things[:most]) + more


def _shards(folder: Path, listing: list[str]) -> tuple[str, list[str]]:
    """The form of the folder and its shards in order."""
    groups: dict[tuple[str, str, str, int], dict[int, str]] = {}
    for name in listing:
        for form, pattern in _SHARDS:
            if match := pattern.fullmatch(name):
                parts = match.groupdict()
                index = parts.get("index") or ""
                group = groups.setdefault((form, parts["ext"], parts.get("count") or "", len(index)), {})
                group[int(index or 0)] = name
    if not groups:
        raise ValueError(_no_shards(folder, listing))
    if len(groups) > 1:
        heads = [f"{len(group)} x {min(group.values())}" for group in groups.values()]
        raise ValueError(
            f"{folder}: mixes {len(groups)} sets of weights ({few(heads)}), expected one; move the others into a folder"
            " of their own (tools/reshard.py writes another number of shards or format)"
        )
    (form, _, count, width), group = next(iter(groups.items()))
    wanted = int(count) if count else max(group) + 1
    missing = [str(index).zfill(width) for index in range(wanted) if index not in group]
    if missing or len(group) != wanted:
        raise ValueError(
            f"{folder}: of {wanted} shards in {FORMS[form]} form it holds {len(group)}"
            f" ({few(group.values())}), missing {few(missing) or 'none'}; fetch or copy the folder again"
        )
    return form, [group[index] for index in range(wanted)]


def _no_shards(folder: Path, listing: list[str]) -> str:
    """The sentence for a folder without consolidated.* files: what it is instead, and what to do."""
    if gguf := [name for name in listing if name.endswith(".gguf")]:
        return f"{folder}: weights of llama.cpp ({gguf[0]}), which are not read; give the original weights"
    holds = f"it holds {few(listing, most=5)}" if listing else "it is empty"
    what = "only a training run's state" if any(_LEFTOVER.fullmatch(name) for name in listing) else "no weights"
    hint = _hint(folder, listing)
    return (
        f"{folder}: {what} here, expected consolidated.* files or a Hugging Face folder's, and {holds};"
        f" give another folder{hint}"
    )


def _hint(folder: Path, listing: list[str]) -> str:
    """Names of folders inside that do hold weights."""
    inside = [
        name
        for name in listing
        if (folder / name).is_dir() and not name.startswith(".") and any(_holds_weights(folder / name))
    ]
    return f" such as {few((str(folder / name) for name in inside), ' or', most=3)}" if inside else ""


def _holds_weights(folder: Path) -> Iterator[Path]:
    """Files of weights in the forms that are read."""
    yield from folder.glob("consolidated.*")
    yield from folder.glob("state-*-of-*.safetensors")
    yield from (path for path in folder.iterdir() if huggingface.holds([path.name]) or path.name in _ADAPTER)


def _config(folder: Path, listing: list[str], form: str) -> dict[str, Any]:
    """The model's fields: params.json of Meta, config.json of Accessory; either may lie in either."""
    order = ("params.json", "config.json") if form == "meta" else ("config.json", "params.json")
    for name in order:
        if name in listing:
            config = manifest.load_json(folder / name)
            if "architectures" not in config:  # Hugging Face's, beside Meta's files
                return config
    return {}


def _tokenizer(folder: Path, form: str) -> Path | None:
    """The tokenizer file, or its folder where tokenizer_config.json says more; Meta's releases keep it one up."""
    places = [folder, folder.parent] if form == "meta" else [folder]
    found = (place / name for place in places for name in ("tokenizer.model", "tokenizer.json"))
    path = next((path for path in found if path.is_file()), None)
    return path.parent if path is not None and (path.parent / "tokenizer_config.json").is_file() else path


def _huggingface(folder: Path, listing: list[str]) -> Folder:
    """A Hugging Face folder; of a tower by itself, nothing but its tensors counts."""
    found = huggingface.look(folder, listing)
    named = {*found.shards, *huggingface.INDEXES}
    passed = [name for name in listing if huggingface.is_weights(name) or _LEFTOVER.fullmatch(name)]
    return Folder(
        path=folder,
        form="huggingface",
        shards=tuple(folder / name for name in found.shards),
        config=found.flat,
        meta=found.meta,
        tokenizer=_tokenizer(folder, "huggingface") if found.flat or "config" not in found.told else None,
        leftovers=sum(1 for name in passed if name not in named),
        told=found.told,
    )


def _adapter(folder: Path, listing: list[str]) -> Folder:
    """A PEFT adapter, and what LLaVA's training keeps beside it. ValueError where its weights are missing."""
    found = next((name for name in _ADAPTER if name in listing), None)
    if found is None:
        raise ValueError(
            f"{folder}: has adapter_config.json without {' or '.join(_ADAPTER)}; fetch or copy the folder again"
        )
    beside = [name for name in (*huggingface.PARTIAL, BESIDE) if name in listing]
    told = {"adapter": manifest.load_json(folder / "adapter_config.json"), **huggingface.papers(folder, listing)}
    if KIN in listing:
        told["accessory"] = manifest.load_json(folder / KIN)
    return Folder(
        path=folder,
        form="adapter",
        shards=tuple(folder / name for name in (found, *beside)),
        tokenizer=_tokenizer(folder, "adapter"),
        leftovers=sum(1 for name in listing if _LEFTOVER.fullmatch(name)),
        told=told,
    )
