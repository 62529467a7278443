"""What a DeepSpeed configuration asks for: the ZeRO stage and offloading. All else in it is a hint without effect here.

Must not know how data-parallel ranks share what they hold; FSDP2 does that elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

# names that need no file: (stage, offload)
NAMED: dict[str, tuple[int, bool]] = {
    "default-zero0": (0, False),
    "default-zero1": (1, False),
    "default-zero2": (2, False),
    "zero2-offload": (2, True),
    "default-zero3": (3, False),
    "zero3-offload": (3, True),
}
# files of LLaMA-Factory's examples and of swift, whose content their name says
_FILE = re.compile(r"(?:ds_z|zero)(\d)(?:_|-)?(offload)?(?:_config)?\.(?:json|ya?ml)")


@dataclass(frozen=True)
class Zero:
    """What runs instead, as FSDP2."""

    stage: Literal[2, 3]
    """2: weights on every data-parallel rank, the rest shared; 3: weights shared too."""
    offload: bool
    note: str


def read_zero(given: Any) -> Zero:
    """The stage and offloading that a name, a file's path, JSON text or a mapping asks for.

    Raises ValueError or FileNotFoundError for anything else, in one sentence.
    """
    hints: list[str] = []
    source = given if isinstance(given, str) else "a mapping"
    if isinstance(given, str) and given.strip().lower() in NAMED:
        stage, offload = NAMED[given.strip().lower()]
    elif isinstance(given, str) and (known := _FILE.fullmatch(Path(given).name)) and not Path(given).exists():
        stage, offload = int(known[1]), known[2] is not None
        source = f"{given} is not there, and read by its name"
    else:
        tree = given if isinstance(given, Mapping) else _tree(str(given))
        stage, offload = _asked(tree)
        hints = [key for key in tree if key != "zero_optimization"]
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed: got ZeRO stage {stage}, expected 0 to 3")
    text = f"deepspeed ({source}): ZeRO {stage}{' with offload' if offload else ''} runs as FSDP2"
    if stage < 2:
        text += ", and gradients and optimizer state are shared too"
    if hints:
        text += f"; without effect: {', '.join(hints)}"
    return Zero(3 if stage == 3 else 2, offload, text)


def _tree(text: str) -> Mapping[str, Any]:
    """The mapping in JSON text or in a file."""
    inline = text.lstrip().startswith("{")
    if not inline and not Path(text).is_file():
        raise FileNotFoundError(f"deepspeed: {text}: no such file; give one, JSON, or one of {', '.join(NAMED)}")
    try:
        raw = text if inline else Path(text).read_text(encoding="utf-8-sig")
        tree = yaml.safe_load(raw) if text.endswith((".yaml", ".yml")) else json.loads(raw)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"deepspeed: {text}: {' '.join(str(error).split())}; mend it") from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"deepspeed: {text}: got a {type(tree).__name__}, expected a mapping; mend it")
    return tree


def _asked(tree: Mapping[str, Any]) -> tuple[Any, bool]:
    """Stage and offloading of a configuration; without zero_optimization there is none."""
    zero = tree.get("zero_optimization") or {}
    if not isinstance(zero, Mapping):
        raise ValueError(f"deepspeed: zero_optimization: got {zero!r}, expected a mapping; mend it")
    places = [zero.get(name) for name in ("offload_optimizer", "offload_param")]
    offload = any(isinstance(place, Mapping) and place.get("device", "none") not in ("none", None) for place in places)
    return zero.get("stage", 0), offload or bool(zero.get("cpu_offload"))
