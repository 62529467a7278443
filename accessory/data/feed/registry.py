"""dataset_info.json, in LLaMA-Factory's form: names of data sets, where they are, and what their fields are called.

Must not open data files. Of the hubs, only what huggingface_hub has fetched before is used; nothing is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from accessory.config import nearest
from accessory.data.feed.columns import COLUMNS, FORMATTINGS, TAGS, Reading
from accessory.data.feed.sources import KINDS, Source

INFO = "dataset_info.json"
SHIPPED = Path(__file__).resolve().parents[1] / "sets"
"""The sets of this package."""
KEYS = (
    "file_name",
    "formatting",
    "columns",
    "tags",
    "num_samples",
    "folder",
    "subset",
    "split",
    "ranking",
    "placeholders",
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "cloud_file_name",
)
ELSEWHERE = {"coco-en-2-mini": "modelscope/coco_2014_caption", "coco-en-2": "modelscope/coco_2014_caption"}
"""Names of ms-swift's that no hub here has."""
_HUB = re.compile(r"(HF|MS)::([\w.-]+/[\w.-]+)(?::([\w./-]+))?")
_PARTS = ("train", "test", "validation", "valid", "val", "dev")


def known(folder: Path) -> dict[str, Any]:
    """The entries of a folder's dataset_info.json; none where it has none. ValueError for a file that is no such."""
    path = folder / INFO
    return _entries(path, path.stat().st_mtime_ns) if path.is_file() else {}


def find(name: str, folder: Path, *, root: str | None, fill: Mapping[str, str]) -> Source | None:
    """The source of a name in a folder's dataset_info.json, or of HF::owner/name[:subset]; None where there is none.

    root: folder of pictures; none: `folder`. ValueError that names the entry for one that cannot be used.
    """
    hub = _HUB.fullmatch(name)
    entry = known(folder).get(name)
    if hub:
        entry = {"hf_hub_url" if hub[1] == "HF" else "ms_hub_url": hub[2], "subset": hub[3]}
    elif entry is None:
        if name in ELSEWHERE and folder == SHIPPED:
            raise ValueError(f"dataset: {name}: {_remote('ModelScope', ELSEWHERE[name])}")
        return None
    label = f"dataset {name}" if hub else f"{folder / INFO}: {name}"
    try:
        return _source(entry, folder, root, fill)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


@lru_cache(maxsize=16)
def _entries(path: Path, changed: int) -> dict[str, Any]:
    """The mapping in a dataset_info.json."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({' '.join(str(error).split())}); mend it") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: got a {type(tree).__name__}, expected a mapping of names to entries; mend it")
    return tree


def _source(entry: Any, folder: Path, root: str | None, fill: Mapping[str, str]) -> Source:
    """What an entry says."""
    if not isinstance(entry, dict):
        raise ValueError(f"got {entry!r:.60}, expected a mapping with a file_name")
    for key in entry:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}; {nearest(str(key), KEYS)}")
    columns = _names(entry, "columns", COLUMNS)
    if entry.get("ranking") or {"chosen", "rejected", "kto_tag"} & set(dict(columns or ())):
        raise ValueError("holds preferences, which are not learned here; name a set of answers")
    formatting = entry.get("formatting") or "alpaca"
    if formatting not in FORMATTINGS:
        raise ValueError(f"formatting: got {formatting!r}, {nearest(str(formatting), FORMATTINGS)}")
    samples = entry.get("num_samples")
    if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 1):
        raise ValueError(f"num_samples: got {samples!r}, expected a number of rows above 0")
    default = entry.get("placeholders") or {}
    if not isinstance(default, dict) or not all(isinstance(text, str) for text in default.values()):
        raise ValueError(f"placeholders: got {default!r:.60}, expected a mapping of names to texts")
    path, only = _place(entry, folder)
    told = {name: fill.get(name, text) for name, text in default.items()}
    return Source(
        str(path),
        root=root or (str(folder) if entry.get("file_name") else None),
        samples=samples,
        only=only,
        reading=Reading(formatting, columns, _names(entry, "tags", TAGS) or ()),
        fill=tuple(sorted(told.items())),
    )


def _names(entry: Mapping[str, Any], key: str, allowed: Mapping[str, Any]) -> tuple[tuple[str, str], ...] | None:
    """A mapping of known names to text; None where there is none."""
    given = entry.get(key)
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError(f"{key}: got {given!r:.60}, expected a mapping")
    for name, text in given.items():
        if name not in allowed:
            raise ValueError(f"{key}: unknown name {name!r}; {nearest(str(name), allowed)}")
        if not isinstance(text, str | None):
            raise ValueError(f"{key}: {name}: got {text!r:.60}, expected text")
    return tuple(sorted((name, text) for name, text in given.items() if text))


def _place(entry: Mapping[str, Any], folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Where an entry's files are: a file, or a folder and which of its files. A local file is taken before any hub."""
    file = entry.get("file_name")
    if file is not None:
        if not isinstance(file, str) or not file:
            raise ValueError(f"file_name: got {file!r:.60}, expected a path")
        path = folder / (entry.get("folder") or "") / Path(file).expanduser()
        if not path.exists():
            raise ValueError(f"file_name: {path}: no such file or folder; bring it, or correct the entry")
        return path, ()
    if entry.get("hf_hub_url"):
        return _cached(str(entry["hf_hub_url"]), entry)
    for key, where in (("ms_hub_url", "ModelScope"), ("om_hub_url", "OpenMind"), ("cloud_file_name", "the cloud")):
        if entry.get(key):
            raise ValueError(_remote(where, str(entry[key])))
    if entry.get("script_url"):
        raise ValueError(f"is read by a script ({entry['script_url']}), which is not run here; save its rows as jsonl")
    raise ValueError("got no file_name, expected one; add it")


def _remote(where: str, name: str) -> str:
    """Why a set is not read."""
    return f"lies at {where} ({name}), from where nothing is fetched here; save it as jsonl, and list it in {INFO}"


def _cached(name: str, entry: Mapping[str, Any]) -> tuple[Path, tuple[str, ...]]:
    """The data files of a hub's set that huggingface_hub has fetched before."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        home = Path(huggingface_hub.snapshot_download(name, repo_type="dataset", local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise ValueError(
            f"the hub's set {name} was not fetched before; run `hf download --repo-type dataset {name}` where there is"
            " a network, or save it as jsonl"
        ) from None
    files = [path.relative_to(home) for path in sorted(home.rglob("*")) if path.suffix.lower() in KINDS]
    for key in ("folder", "subset"):
        if entry.get(key):
            files = [path for path in files if entry[key] in (*path.parts[:-1], path.stem, path.parent.as_posix())]
    split = entry.get("split") or "train"
    told = [path for path in files if _part(path)]
    files = [path for path in told if _part(path) == split] if told else files
    if not files:
        raise ValueError(f"{home}: holds no {' '.join(KINDS)} file of the split {split}; see its folder and subset")
    return home, tuple(path.as_posix() for path in files)


def _part(path: Path) -> str | None:
    """The split that a file's name or folder says."""
    words = re.split(r"[^a-z]+", path.as_posix().lower())
    return next((word for word in words if word in _PARTS), None)
