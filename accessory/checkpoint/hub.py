"""Names of models to folders on this machine: a local folder, else the hub's cache, else fetched into it.

Must not know what the files hold beyond their names.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from accessory.checkpoint.fetch import is_of_network
from accessory.checkpoint.manifest import load_json

log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL = re.compile(r"[^/]+\.(json|txt|jinja|model)|[^/]+\.tiktoken")
_WEIGHTS = ("safetensors", "bin", "pth")
_OWN = re.compile(r"(model|pytorch_model|adapter_model|mm_projector|non_lora_trainables|consolidated)[^/]*")


def find(name: str | Path) -> Path:
    """Return the folder of a model: a path, or a hub id (`org/name`, also after hf://), from the cache where it is
    whole.

    A path that does not exist and cannot be a hub id is returned as it is. Raises OSError, in one sentence, where the
    hub is needed and cannot be reached, ValueError where it has no such model.
    """
    text = str(name)
    if Path(text).expanduser().exists():
        return Path(text).expanduser()
    repo = text.removeprefix("hf://")
    if isinstance(name, Path) or not _is_id(repo):
        return Path(text)
    if (found := cached(repo)) is not None:
        log.info("%s: taken from the hub's cache, %s", repo, found)
        return found
    return _fetched(repo)


def cached(name: str) -> Path | None:
    """The folder of a hub id that is whole in the cache, else None; nothing is asked of the network."""
    repo = name.removeprefix("hf://")
    found = _cached(repo) if _is_id(repo) else None
    return found if found is not None and _is_whole(found) else None


def wanted(files: Iterable[str]) -> list[str]:
    """Of a repository's files, those to fetch: small files, and weights: safetensors, else .bin, else .pth."""
    names = [name for name in files if "/" not in name]
    for kind in _WEIGHTS:
        weights = [name for name in names if name.endswith(f".{kind}") and _OWN.fullmatch(name)]
        if weights and any(not name.startswith("consolidated") for name in weights):
            weights = [name for name in weights if not name.startswith("consolidated")]
        if weights:
            break
    others = [name for name in names if name.endswith(".index.json") and f".{kind}" not in name]
    return sorted({*weights, *(name for name in names if _SMALL.fullmatch(name) and name not in others)})


def _is_id(repo: str) -> bool:
    """Whether a text can be a model's id."""
    return _ID.fullmatch(repo) is not None and "/" in repo and "--" not in repo and ".." not in repo


def _cached(repo: str) -> Path | None:
    """The snapshot in the cache, whole or not; nothing is asked of the network."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot has a config and all weights that it should have."""
    names = {entry.name for entry in folder.iterdir() if entry.exists()}
    if not names & {"config.json", "params.json", "adapter_config.json"}:
        return False
    for index in sorted(name for name in names if name.endswith(".index.json")):
        table = load_json(folder / index).get("weight_map")
        if isinstance(table, dict) and {*table.values()} <= names:
            return True
    numbered = any(re.search(r"-of-\d+\.", name) for name in names)
    return not numbered and any(name.endswith((".safetensors", ".bin", ".pth")) for name in names)


def _fetched(repo: str) -> Path:
    """Fetch a model into the cache; what is there already is not fetched again."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    here = f"{repo}: no such folder here, not whole in the hub's cache"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise OSError(f"{here}, and HF_HUB_OFFLINE forbids to fetch it; fetch it elsewhere, or give a local folder")
    try:
        files = huggingface_hub.HfApi().model_info(repo, timeout=30).siblings or []
        names = wanted(file.rfilename for file in files)
        log.info("%s: fetching %d files from the hub", repo, len(names))
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=names))
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{here}, and the hub has no such model (or none that you may see); correct the name, or set HF_TOKEN"
        ) from error
    except Exception as error:
        if not is_of_network(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{here}, and the hub cannot be reached ({reason}); connect, or give the folder of a copy"
        ) from error
