"""What is read and how: data files, folders of them, the reference's YAML with a META list, and all numbers beside it.

Must not open data files nor know what a row means.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from accessory.config import nearest
from accessory.data.template import get_template

KINDS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "txt",
    ".packed": "packed",
}
PREPROCESS = ("single_turn_llava", "caption")


@dataclass(frozen=True)
class Source:
    """A data file or a folder of them: an entry of META under the reference's names, or a plain path."""

    path: str
    type: str = "text"
    """The reference's name of a group of rows (text, image_text); rows of all groups are mixed here."""
    preprocess: str | None = None
    """single_turn_llava: the first exchange of LLaVA's rows; caption: a picture (url) and its caption, or one of a list
    drawn by the seed."""
    prompt_type: str | None = None
    """Template of these rows, in place of the run's."""
    root: str | None = None
    """Pictures are relative to this folder; none: to the data file's."""
    ratio: float = 1.0
    """Share of the rows that is used, drawn by the seed."""

    def __post_init__(self) -> None:
        if self.preprocess not in (None, *PREPROCESS):
            raise ValueError(
                f"{self.path}: preprocess: got {self.preprocess!r}, {nearest(str(self.preprocess), PREPROCESS)}"
            )
        if self.prompt_type is not None:
            get_template(self.prompt_type)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"{self.path}: ratio: got {self.ratio}, expected more than 0 and at most 1")


@dataclass(frozen=True)
class FeedConfig:
    """Everything that decides the numbers."""

    sources: tuple[Source, ...]
    stage: Literal["pt", "sft"] = "sft"
    """pt: plain text, every token is learned; sft: conversations, the answers are learned."""
    template: str = "alpaca"
    cutoff_len: int = 2048
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """Of conversations of more than cutoff_len positions; longer documents (pt) become several rows."""
    on_bad_row: Literal["error", "skip"] = "error"
    packing: bool = True
    share_pictures: bool = False
    """With packing: rows that begin alike with one picture share it in a sequence of their own."""
    max_samples: int | None = None
    """Only the first so many rows of each source."""
    seed: int = 0
    slots: int = 0
    """Feature rows of a picture in the sequence; 0: it takes no place there (an adapter's prompt has it)."""
    before_bos: bool = False
    pictures: bool = False
    """Whether the model sees."""
    image_transform: str | None = None
    """Name of a data.image transform; none: resized_center_crop."""
    image_size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    cache_dir: str | None = None
    """Where tokenised rows are kept; none: $XDG_CACHE_HOME/accessory/data, ~/.cache/accessory/data."""
    workers: int | None = None
    """Processes that tokenise; none: the cores of this host, at most 8."""
    column: str | None = None
    """pt: the field that holds the text; none: text or content."""

    def __post_init__(self) -> None:
        if self.cutoff_len < 2:
            raise ValueError(f"cutoff_len: got {self.cutoff_len}, expected at least 2 positions")


def read_sources(datasets: Sequence[str], *, root: str | None = None) -> list[Source]:
    """The sources that names stand for: a YAML with a META list, a data file, or a folder of data files.

    root: folder of pictures where META names none. `$NAME` and `~` are replaced; relative paths in a YAML hold from the
    working directory, else from the YAML's folder. Raises ValueError or FileNotFoundError for a YAML that is none, an
    unknown key or format, an unset variable. Whether the data is there is asked when it is opened.
    """
    found: list[Source] = []
    for name in datasets:
        if name.lower().endswith((".yaml", ".yml")):
            found += _read_meta(Path(_expand(name, "dataset")), root)
        else:
            found.append(Source(_expand(name, "dataset"), root=root and _expand(root, "media_dir")))
    return found


def files_of(source: Source) -> list[Path]:
    """The data files of a source, a folder's in the order of their paths, hidden ones left out.

    OSError or ValueError for none.
    """
    path = Path(source.path)
    if not path.exists():
        raise FileNotFoundError(f"dataset: {path}: no such file or folder; check the path, or set what it begins with")
    if not path.is_dir():
        kind_of(path)
        return [path]
    inside = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in KINDS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not inside:
        raise ValueError(f"dataset: {path}: holds no {' '.join(KINDS)} file; name another folder, or a file")
    return inside


def kind_of(path: Path) -> str:
    """The format of a data file, by its suffix."""
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(
            f"dataset: got {path}, expected a YAML with META, a folder, or a {' '.join(KINDS)} file; convert it"
        )
    return kind


def _read_meta(path: Path, root: str | None) -> Iterator[Source]:
    """The entries of a YAML's META list."""
    if not path.is_file():
        raise FileNotFoundError(f"dataset: {path}: no such file; check the path")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}; mend the YAML") from error
    entries = tree.get("META") if isinstance(tree, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: got no META, expected `META:` and a list of entries with a `path` each; add it")
    for number, entry in enumerate(entries, start=1):
        try:
            yield _read_entry(entry, path.parent, root)
        except ValueError as error:
            raise ValueError(f"{path}: entry {number} of META: {error}") from None


def _read_entry(entry: Any, folder: Path, root: str | None) -> Source:
    """One entry of META."""
    known = {field.name: field.type for field in fields(Source)}
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ValueError(f"got {entry!r}, expected a mapping with a `path`")
    given: dict[str, Any] = {} if root is None else {"root": _expand(root, "media_dir")}
    for key, value in entry.items():
        if key not in known:
            raise ValueError(f"unknown key {key!r}; {nearest(str(key), known)}")
        if key == "prompt_type" and value is None:
            value = "none"  # the reference writes None for a bare instruction
        if value is None:
            continue
        if not isinstance(value, (int, float) if key == "ratio" else str) or isinstance(value, bool):
            raise ValueError(f"{key}: got {value!r}, expected {'a number' if key == 'ratio' else 'text'}")
        given[key] = _beside(_expand(value, key), folder) if key in ("path", "root") else value
    return Source(**given)


def _expand(text: str, label: str) -> str:
    """A path with its variables and `~` replaced."""
    path = os.path.expanduser(os.path.expandvars(text))
    missing = re.search(r"\$(?:\{(\w+)\}|(\w+))", path)
    if missing:
        name = missing[1] or missing[2]
        raise ValueError(f"{label}: {text}: ${name} is not set; set it to the folder that holds the data")
    return path


def _beside(path: str, folder: Path) -> str:
    """A relative path from the working directory, else from a folder if it is there."""
    return str(folder / path) if not os.path.exists(path) and (folder / path).exists() else path
