"""YAML and JSON files as mappings: strict about keys that are named twice, one sentence where a file is malformed.

Must not know settings.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

SUFFIXES = (".yaml", ".yml", ".json")


def read(path: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; ValueError where it is malformed or names a key twice."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such config file")
    text = Path(path).read_text(encoding="utf-8-sig")
    try:
        tree = json.loads(text, object_pairs_hook=_unique) if path.endswith(".json") else yaml.load(text, Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ValueError(f"{path}: got a {type(tree).__name__}, expected a mapping of settings, `key: value`")
    return tree or {}


def from_text(text: str) -> Any:
    """The value that a flag's text means in YAML."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"got {text!r}, expected YAML ({' '.join(str(error).split())})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError when it names a key twice."""
    for at, (key, _) in enumerate(pairs):
        if any(key == earlier for earlier, _ in pairs[:at]):
            raise ValueError(f"key {key!r} given twice, expected once")
    return dict(pairs)


class Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key named twice, where YAML libraries keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"key {key!r} given twice (line {key_node.start_mark.line + 1}), expected once")
            seen.append(key)
        return super().construct_mapping(node, deep=deep)
