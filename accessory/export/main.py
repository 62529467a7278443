"""The verb: settings in, a verified folder out.

Must not import torch before the settings were read.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from accessory import dist
from accessory.config import dump, parse
from accessory.dialect.models import find_model
from accessory.dialect.translate import translator
from accessory.export.settings import ExportSettings

log = logging.getLogger(__name__)

TINY = str(Path(__file__).parents[1] / "tiny")


def main(argv: Sequence[str] | None = None) -> int:
    """Export; 0 when the folder is there and proven."""
    dist.setup_logging(0)
    settings = parse(
        ExportSettings,
        argv,
        prog="accessory export",
        description=ExportSettings.__doc__ or "",
        translate=translator("export"),
    )
    settings.check()
    if not settings.model_name_or_path and settings.model_type is not None:
        settings.model_name_or_path = [find_model(settings.model_type).hub]
    if not settings.model_name_or_path and not settings.adapter_name_or_path:
        log.info("no model_name_or_path given: exporting the tiny model that ships with Accessory")
        settings.model_name_or_path = [TINY]
    if settings.dry_run:
        sys.stdout.write(yaml.safe_dump(asdict(settings), sort_keys=False))
        return 0
    from accessory.export.run import run

    run(settings)
    dump(settings, Path(settings.export_dir) / "export.yaml")
    return 0
