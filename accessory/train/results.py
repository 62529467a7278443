"""train_results.json, eval_results.json and their union all_results.json, as LLaMA-Factory names and writes them.

Must not know how the numbers were made.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal


def write_results(folder: Path, kind: Literal["train", "eval"], values: Mapping[str, float]) -> None:
    """Write `kind`_results.json, and take its values over into all_results.json. Raises OSError."""
    plain = {key: value if math.isfinite(value) else repr(value) for key, value in values.items()}
    _write(folder / f"{kind}_results.json", plain)
    everything = folder / "all_results.json"
    _write(everything, {**_read(everything), **plain})


def _read(path: Path) -> dict[str, Any]:
    """What stands in a file; nothing where it is absent or damaged, since it is about to be written again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(values, indent=4, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, path)
