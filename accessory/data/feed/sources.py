"""What is read and how: data files and folders of them, and all numbers beside it.

Must not open data files nor know what a row means.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from accessory.config import nearest
from accessory.data.feed.columns import Reading
from accessory.data.template import get_template

if TYPE_CHECKING:
    from accessory.data.tiles import Geometry

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
    samples: int | None = None
    """Use so many rows, drawn by the seed; where there are fewer, some come again."""
    only: tuple[str, ...] = ()
    """Of a folder, these files alone, by their paths in it."""
    reading: Reading | None = None
    """What fields and speakers are called; none: their usual names are recognised."""
    fill: tuple[tuple[str, str], ...] = ()
    """(name, text) that replaces {{name}} in texts."""

    def __post_init__(self) -> None:
        if self.preprocess not in (None, *PREPROCESS):
            raise ValueError(
                f"{self.path}: preprocess: got {self.preprocess!r}, {nearest(str(self.preprocess), PREPROCESS)}"
            )
        if self.prompt_type is not None:
            get_template(self.prompt_type)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"{self.path}: ratio: got {self.ratio}, expected more than 0 and at most 1")
        if self.samples is not None and (self.samples < 1 or self.ratio != 1):
            raise ValueError(f"{self.path}: got {self.samples} samples, expected at least 1, and no ratio beside it")


@dataclass(frozen=True)
class FeedConfig:
    """Everything that decides the numbers."""

    sources: tuple[Source, ...]
    stage: Literal["pt", "sft"] = "sft"
    """pt: plain text, every token is learned; sft: conversations, the answers are learned."""
    template: str = "alpaca"
    default_system: str | None = None
    """System text of conversations that bring none; none: the template's."""
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
    """Feature rows of a tile in the sequence; 0: a picture takes no place there (an adapter's prompt has it)."""
    tiles: Geometry | None = None
    """How pictures are cut into tiles and counted; none: one tile each, by image_transform."""
    orientation: Literal["keep", "apply"] = "keep"
    """Of pictures: as they are stored, or turned as their EXIF says."""
    before_bos: bool = False
    pictures: bool = False
    """Whether the model sees."""
    allow_private_urls: bool = False
    """Pictures are fetched also from hosts that are not public."""
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
        assert self.tiles is None or self.tiles.each == self.slots, (self.tiles, self.slots)

    @property
    def picture_cache(self) -> str | None:
        """Folder of fetched pictures; None: the usual one."""
        return None if self.cache_dir is None else str(Path(self.cache_dir) / "pictures")

    @cached_property
    def geometry(self) -> Geometry:
        """What becomes of pictures."""
        from accessory.data.tiles import Geometry

        name = self.image_transform or "resized_center_crop"
        return self.tiles or Geometry(self.slots, size=self.image_size, mean=self.mean, std=self.std, transform=name)


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
        and (not source.only or file.relative_to(path).as_posix() in source.only)
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
