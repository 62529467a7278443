"""Data files and configs for the tests of the feed.

Must not hold tests.
"""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from fixtures import toys
from PIL import Image

from accessory.data.feed import Corpus, FeedConfig, Source, open_corpus
from accessory.data.tokenizer import Tokenizer, open_tokenizer


@functools.cache
def tokenizer(kind: str = "sentencepiece") -> Tokenizer:
    """A toy tokenizer; its file stays, since workers open it again."""
    folder = Path(tempfile.mkdtemp(prefix="toys-"))
    if kind == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(toys.sentencepiece_model())
    elif kind == "llama3":
        (folder / "tokenizer.model").write_bytes(toys.rank_file())
    else:
        (folder / "tokenizer.json").write_text(json.dumps(toys.byte_level_json()))
    return open_tokenizer(folder / next(folder.iterdir()).name)


def alpaca(number: int, words: int = 3) -> dict[str, str]:
    """A row that is told from others by its number."""
    return {"instruction": f"question {number}", "input": "", "output": " ".join(["fox"] * words) + f" {number}"}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (20, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def config(*paths: Path | Source, cache: Path, **more: Any) -> FeedConfig:
    """A config over files; workers 0."""
    sources = tuple(path if isinstance(path, Source) else Source(str(path)) for path in paths)
    return FeedConfig(sources=sources, cache_dir=str(cache), **{"workers": 0, **more})


def corpus(*paths: Path | Source, cache: Path, kind: str = "sentencepiece", **more: Any) -> Corpus:
    return open_corpus(config(*paths, cache=cache, **more), tokenizer(kind))


def texts(found: Corpus, kind: str = "sentencepiece") -> list[str]:
    """What is learned of each row, decoded."""
    rows = [found.row(index) for index in range(len(found))]
    return [tokenizer(kind).decode(row.ids[row.supervised].tolist()) for row in rows]
