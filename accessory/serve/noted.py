"""What a training run noted beside a checkpoint: its base model, template and data, for whoever opens the checkpoint.

Must not open models or data; words that the user gave stay as they are.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from accessory.serve.infer_settings import InferSettings
from accessory.serve.opening import TINY

log = logging.getLogger(__name__)

_NOTES = ("train.yaml", "sft_args.json")  # the first says all, the second goes wherever the weights go
_WHOLE = re.compile(r"(model|pytorch_model).*\.(safetensors|bin)")
_OWN_CHOICE = ("AUTO", "auto")
# our words: where other tools' notes have them
_MODEL = {
    "model_name_or_path": ("model_name_or_path", "model_id_or_path", "model_cache_dir"),
    "model_type": ("model_type",),
    "template": ("template", "template_type"),
    "tokenizer_path": ("tokenizer_path",),
    "llama_type": ("llama_type",),
    "llama_config": ("llama_config",),
    "quantization_bit": ("quantization_bit",),
    "precision": ("precision", "dtype"),
    "image_transform": ("image_transform",),
    "anyres_compat": ("anyres_compat",),
    "default_system": ("default_system", "system"),
}
_DATA = {
    "dataset_dir": ("dataset_dir",),
    "media_dir": ("media_dir",),
    "max_samples": ("max_samples",),
}
# crops that are drawn by chance are for training alone
_TRAINING = {"image_transform": "random_resized_crop"}


def take_over(settings: InferSettings) -> InferSettings:
    """The settings with a ckpt_dir resolved: base, adapter, template, and the rows kept for validation.

    Raises ValueError or OSError for a folder that is not there, notes that cannot be read, and data that is not noted.
    """
    if settings.ckpt_dir is None:
        return settings
    folder = Path(settings.ckpt_dir)
    if not folder.is_dir():
        raise ValueError(f"ckpt_dir: got {folder}, expected a folder, such as output/NAME/checkpoint-N; check the path")
    path, notes = read_notes(folder) if settings.load_args_from_ckpt_dir else (None, {})
    if path is not None:
        log.info("%s: base, template and the like are taken from it, where they are not given", path)
    settings = _fill(settings, notes, _MODEL)
    settings = replace(settings, **_paths(settings, folder, notes))
    return _data(settings, folder, notes) if settings.load_dataset_config else settings


def read_notes(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The file beside a checkpoint in which its run noted its settings, and what it says; (None, {}) without one."""
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    for name in _NOTES:
        for place in places:
            file = place / name
            if file.is_file():
                return file, _mapping(file)
    return None, {}


def _mapping(file: Path) -> dict[str, Any]:
    """What a JSON or YAML file says."""
    text = file.read_text(encoding="utf-8")
    try:
        told = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}; mend or remove it") from error
    if not isinstance(told, dict):
        raise ValueError(f"{file}: got a {type(told).__name__}, expected a mapping of settings; mend it")
    return told


def _fill(settings: InferSettings, notes: dict[str, Any], table: dict[str, tuple[str, ...]]) -> InferSettings:
    """The settings with what is noted, where nobody gave it."""
    empty = InferSettings()
    taken: dict[str, Any] = {}
    for name, spellings in table.items():
        if getattr(settings, name) != getattr(empty, name):
            continue
        spelling = next((spelling for spelling in spellings if notes.get(spelling)), None)
        if spelling is None or notes[spelling] in (_TRAINING.get(name), *_OWN_CHOICE):
            continue
        value = notes[spelling]
        if spelling == "template_type" and "/" not in value and "{" not in value:
            value = f"swift/{value}"
        if name == "quantization_bit" and value != 4:
            raise ValueError(f"quantization_bit: the run noted {value}, expected 4 or nothing; merge its adapter first")
        taken[name] = [value] if isinstance(getattr(empty, name), list) and not isinstance(value, list) else value
    return replace(settings, **taken)


def _paths(settings: InferSettings, folder: Path, notes: dict[str, Any]) -> dict[str, Any]:
    """The folders to open: a checkpoint with all weights alone, others on top of their base."""
    names = {entry.name for entry in folder.iterdir()}
    if "adapter_config.json" in names:
        told = _mapping(folder / "adapter_config.json")
        base = settings.model_name_or_path or [told.get("base_model_name_or_path") or ""]
        if not base[0] and settings.model_type is None:
            raise ValueError(f"{folder}: does not say on which model it lies; give --model_name_or_path")
        adapters = [*settings.adapter_name_or_path, str(folder)]
        return {"model_name_or_path": [path for path in base if path], "adapter_name_or_path": adapters}
    whole = any(_WHOLE.fullmatch(name) for name in names)
    partial = bool(notes.get("only_save_trainable")) or any(name.startswith("state-") for name in names)
    if whole or not partial:
        return {"model_name_or_path": [str(folder)]}
    base = settings.model_name_or_path
    if not base and not notes.get("train_from_scratch"):
        if not notes:
            raise ValueError(
                f"{folder}: holds what was trained, and no train.yaml beside it says on which model; give"
                " --model_name_or_path"
            )
        base = [TINY]
    return {"model_name_or_path": [*base, str(folder)]}


def _data(settings: InferSettings, folder: Path, notes: dict[str, Any]) -> InferSettings:
    """The settings with the rows that the run kept for validation."""
    settings = _fill(settings, notes, _DATA)
    kept = _list(notes.get("eval_dataset")) or _list(notes.get("val_dataset"))
    trained = _list(notes.get("dataset"))
    share = notes.get("val_size") or notes.get("dataset_test_ratio") or 0.0
    if kept:
        return replace(settings, dataset=kept, val_size=0.0)
    if trained and share:
        told = (notes[name] for name in ("dataset_seed", "seed") if notes.get(name) is not None)
        seed = next(told, settings.dataset_seed)
        return replace(settings, dataset=trained, val_size=float(share), dataset_seed=int(seed))
    what = "a dataset without val_size or eval_dataset" if trained else "no dataset"
    raise ValueError(f"{folder}: its run noted {what}, expected rows kept for validation; give --dataset instead")


def _list(value: Any) -> list[str]:
    """One value or several as a list."""
    return [] if not value else [str(item) for item in value] if isinstance(value, list) else [str(value)]
