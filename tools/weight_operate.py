"""Add delta weights to a base model, or take the difference of a finetuned model and its base.

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

from accessory.checkpoint.operate import Job, apply, extract
from accessory.cli import guard
from accessory.config import parse
from accessory.dist import dtype_from_name, setup_logging


@dataclass
class Settings:
    """The flags."""

    pretrained_path: str
    """Folder of the base model, in Meta's or Accessory's form."""
    delta_path: str
    """apply: folder of the delta weights. extract: folder of the finetuned model. Its shard count may differ."""
    output_path: str = "./output"
    """Folder to write; files in it are never replaced."""
    operate_type: Literal["apply", "extract"] = "apply"
    """apply: output = base + delta. extract: output = finetuned - base."""
    delta_dtype: Literal["fp16", "fp32", "bf16"] = "fp16"
    """extract: how differences are stored; fp32 gives the finetuned model back bit by bit."""
    dtype: Literal["fp16", "fp32", "bf16"] | None = None
    """apply: how the result is stored; none: as the finetuned model was where the delta says so, else as the base."""
    format: Literal["safetensors", "pth"] = "safetensors"
    """pth: the layout of LLaMA2-Accessory."""
    shards: int | None = None
    """Files to cut the result into; none: as many as the base has (apply) or the finetuned model (extract)."""
    verify: bool = True
    """Open the result again and compare every tensor with what it should be."""
    dry_run: bool = False
    """Check the inputs, say what would be written, and stop."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    settings = parse(Settings, argv, prog="weight_operate.py", description=__doc__.splitlines()[0])
    setup_logging()
    applies = settings.operate_type == "apply"
    if not applies and settings.dtype is not None:
        raise ValueError("--dtype: is the result's with apply; with extract say --delta_dtype")
    dtype = settings.dtype if applies else settings.delta_dtype
    job = Job(
        settings.output_path,
        shards=settings.shards,
        fmt=settings.format,
        dtype=dtype_from_name(dtype) if dtype else None,
        verify=settings.verify,
        dry_run=settings.dry_run,
    )
    if applies:
        apply(settings.pretrained_path, settings.delta_path, job)
    else:
        extract(settings.pretrained_path, settings.delta_path, job)


if __name__ == "__main__":
    sys.exit(guard(main))
