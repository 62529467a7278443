"""The Hugging Face folder that vLLM runs: a model's own, or one that is exported and proven once, and found again.

Must not import vLLM or torch before a folder has to be made, nor know requests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory.dialect.words import ModelWords

if TYPE_CHECKING:
    from accessory.checkpoint import Checkpoint

log = logging.getLogger(__name__)

SERVED = ("llama", "mistral", "qwen2", "llava", "llava_next")
"""Kinds of folders (model_type) that vLLM opens as they are."""
_FORM = 1  # of the folders that are kept; a higher one makes them anew


def need_vllm() -> None:
    """Raises ModuleNotFoundError, in one sentence, where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "infer_backend: got vllm, which this Python has not, expected the package; pip install vllm, or leave"
            " infer_backend out, and Accessory's own engine answers"
        )


def check_vllm(words: ModelWords) -> None:
    """ValueError for words that vLLM cannot follow, as it reads the model's folder by itself."""
    told = {
        "quantization_bit": (words.quantization_bit, "the folder is written in 16 or 32 bits"),
        "image_transform": (words.image_transform, "pictures are made as the folder says"),
        "anyres_compat": (words.anyres_compat, "pictures are made as the folder says"),
    }
    for name, (value, why) in told.items():
        if value is not None:
            raise ValueError(f"{name}: got {value} with infer_backend vllm, for which {why}; leave it out")
    if not 0 < words.vllm_gpu_util <= 1:
        raise ValueError(f"vllm_gpu_util: got {words.vllm_gpu_util}, expected a share above 0 and at most 1")


def folder_of(words: ModelWords, paths: Sequence[str]) -> Path:
    """The folder that vLLM opens. paths: what makes the model, adapters last; none for the tiny model.

    A Hugging Face folder by itself is its own. Everything else - adapters, deltas, Meta's form - is merged, exported
    and verified below $XDG_CACHE_HOME/accessory/vllm (~/.cache), under a hash of the names, sizes and times of all its
    files and of the words that count; the next start finds it there. Raises as `accessory export` does.
    """
    from accessory.assemble import TINY
    from accessory.checkpoint import open_folders

    checkpoint = open_folders(list(paths) or [TINY], merge=True)
    if _plain(checkpoint, words):
        return checkpoint.folders[0].path
    target = home() / _key(checkpoint, words)
    if target.is_dir():
        log.info("vLLM runs the folder that was exported before: %s", target)
        return target
    log.info("vLLM needs one Hugging Face folder: exporting to %s", target)
    _export([str(folder.path) for folder in checkpoint.folders], words, target)
    return target


def home() -> Path:
    """Where exported folders are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accessory" / "vllm"


def picture_token(folder: Path) -> int | None:
    """The id that stands for a picture in vLLM's prompts; None where the model does not see."""
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return next((told[name] for name in ("image_token_index", "image_token_id") if told.get(name) is not None), None)


def _plain(checkpoint: Checkpoint, words: ModelWords) -> bool:
    """Whether the model is one Hugging Face folder, with its own tokenizer, of a kind that vLLM knows."""
    if len(checkpoint.folders) > 1 or checkpoint.folders[0].form != "huggingface" or words.tokenizer_path:
        return False
    kind = checkpoint.told.get("config", {}).get("model_type")
    return kind in SERVED and not words.llama_config and checkpoint.folders[0].tokenizer is not None


def _key(checkpoint: Checkpoint, words: ModelWords) -> str:
    """The name of the exported folder."""
    places = [folder.path for folder in checkpoint.folders]
    places += [Path(place) for place in (words.tokenizer_path, *words.llama_config) if place]
    files: list[Any] = []
    for place in places:
        found = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
        for file in found:
            said = file.stat()
            files.append([str(file.relative_to(place)), said.st_size, said.st_mtime_ns])
        files.append(None)
    told = [_FORM, files, words.precision, words.template, words.llama_type, words.tokenizer_path]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:20]


def _export(paths: list[str], words: ModelWords, target: Path) -> None:
    """Write and prove the folder beside its place, then put it there: what lies there is whole and proven."""
    from accessory.export.run import run
    from accessory.export.settings import ExportSettings

    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.{os.getpid()}")
    settings = ExportSettings(
        model_name_or_path=paths,
        template=words.template,
        tokenizer_path=words.tokenizer_path,
        llama_type=words.llama_type,
        llama_config=words.llama_config,
        export_dir=str(beside),
        export_dtype=words.precision,
    )
    settings.check()
    try:
        run(settings)
        with contextlib.suppress(OSError):  # another process may have been quicker
            os.rename(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
