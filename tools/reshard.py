"""Write a model, with deltas or trained parts on top of it, as one folder of any number of shards.

Must not do the work: accessory.checkpoint.operate does.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

if find_spec("accessory") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accessory.checkpoint.operate import Job, rewrite
from accessory.cli import guard
from accessory.config import parse
from accessory.dist import dtype_from_name, setup_logging


@dataclass
class Settings:
    """The flags."""

    pretrained_path: list[str]
    """Folder of the base model, then folders of deltas or of trained tensors (PEFT), in order."""
    output_path: str
    """Folder to write; files in it are never replaced."""
    shards: int | None = None
    """Files to cut the result into; none: as many as the base has."""
    format: Literal["safetensors", "pth"] = "safetensors"
    """pth: the layout of LLaMA2-Accessory."""
    dtype: Literal["fp16", "fp32", "bf16"] | None = None
    """How floating-point tensors are stored; none: as they are."""
    verify: bool = True
    """Open the result again and compare every tensor with what it should be."""
    dry_run: bool = False
    """Check the inputs, say what would be written, and stop."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    settings = parse(Settings, argv, prog="reshard.py", description=__doc__.splitlines()[0])
    setup_logging()
    job = Job(
        settings.output_path,
        shards=settings.shards,
        fmt=settings.format,
        dtype=dtype_from_name(settings.dtype) if settings.dtype else None,
        verify=settings.verify,
        dry_run=settings.dry_run,
    )
    rewrite(settings.pretrained_path, job)


if __name__ == "__main__":
    sys.exit(guard(main))
