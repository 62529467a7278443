"""Tokenise and pack text once, so that every pretraining run maps it as it is.

Must not do the work: accessory.data.feed.packed does.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

if find_spec("accessory") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accessory.cli import guard
from accessory.config import parse
from accessory.data.feed.packed import PackJob, told, write_packed
from accessory.dist import setup_logging

log = logging.getLogger("accessory.tools.generate_packed_data")


@dataclass
class Settings:
    """The flags."""

    input: list[str]
    """Text files (json, jsonl, csv, parquet, txt), folders of them, or YAML files with a META list, in order."""
    tokenizer_path: str
    """Tokenizer file, or the folder that holds it; training must name the same one."""
    output: str
    """Folder to write; nothing is ever replaced. A run names it under dataset, with stage pt."""
    max_len: int = 2048
    """Most tokens of a row; training's cutoff_len, or less. 0: no document is cut, and each is a row of its own."""
    column: str | None = None
    """Field of the text; none: text or content."""
    workers: int | None = None
    """Processes; none: the cores of this host, at most 8. What is written does not depend on it."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be read; skipped ones are counted and named."""
    file_tokens: int = 1 << 30
    """Begin another file after so many tokens."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    settings = parse(Settings, argv, prog="generate_packed_data.py", description=__doc__.splitlines()[0])
    setup_logging()
    counts = write_packed(
        PackJob(
            settings.input,
            settings.tokenizer_path,
            settings.output,
            max_len=settings.max_len,
            column=settings.column,
            workers=settings.workers,
            on_bad_row=settings.on_bad_row,
            file_tokens=settings.file_tokens,
        )
    )
    for line in told(counts, settings.max_len):
        log.info("%s", line)


if __name__ == "__main__":
    sys.exit(guard(main))
