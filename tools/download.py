"""Fetch released LLaMA2-Accessory weights and configs from the hub; never asks a question.

Must not do the work: accessory.checkpoint.fetch does.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

if find_spec("accessory") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accessory.checkpoint.fetch import REPO, fetch, plan
from accessory.cli import guard
from accessory.config import parse
from accessory.dist import setup_logging


@dataclass
class Settings:
    """The flags."""

    train_type: Literal["finetune", "convert"] = "finetune"
    """Finetuned models, or other projects' models converted."""
    input_type: Literal["sg", "mm"] = "sg"
    """Text only (sg), or text and pictures (mm)."""
    model_size: Literal["7B", "13B", "34B", "70B", "180B"] = "7B"
    """Which params.json --down_config fetches."""
    model_name: str | None = None
    """A name from the release page, such as alpaca; none: weights are not fetched."""
    down_config: bool = False
    """Also fetch tokenizer.model and params.json."""
    down_diff: bool = False
    """Fetch the delta weights; otherwise full weights where they are released, else the delta."""
    down_internLM: bool = False
    """The config is InternLM's."""
    down_code: bool = False
    """The config is CodeLlama's."""
    output_path: str = "./"
    """Folder under which the repository's paths are created."""
    dry_run: bool = False
    """Say what would be fetched, and stop."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    settings = parse(Settings, argv, prog="download.py", description=__doc__.splitlines()[0])
    setup_logging()
    if settings.down_internLM and settings.down_code:
        raise ValueError("--down_internLM and --down_code: got both, expected one; each names another config")
    config = "internLM_" if settings.down_internLM else "code_" if settings.down_code else ""
    asked = settings.down_config or settings.down_internLM or settings.down_code
    wanted = plan(
        settings.model_name,
        group=f"{settings.train_type}/{settings.input_type}",
        config=config if asked else None,
        size=settings.model_size,
        delta=settings.down_diff,
    )
    if settings.dry_run:
        sys.stdout.write(f"would fetch {wanted} of {REPO} into {settings.output_path}\n")
        return
    for path in fetch(wanted, settings.output_path):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    sys.exit(guard(main))
