"""Writes what was trained beside a frozen base in PEFT's form: adapter_config.json and adapter_model.safetensors.

Must not know a model: tensors come in full under canonical names. What PEFT has no place for lies beside it under its
canonical name, in accessory.safetensors, and accessory.json says which base it is for; both are read here only.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.files import BESIDE, KIN, few
from accessory.checkpoint.headers import Spec
from accessory.checkpoint.huggingface.names import in_file, permute, transform_back
from accessory.checkpoint.stage import Stage
from accessory.checkpoint.streams import SafetensorsWriter
from accessory.checkpoint.write import tokenizer_files

log = logging.getLogger(__name__)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])\.weight")
# llava-hf's names on disk -> its modules' names in memory, which adapters go by
_IN_MEMORY = (
    ("language_model.lm_head", "lm_head"),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
_LINEAR = re.compile(
    r"layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])"
    r"|vision\.(proj\.\d+|tower\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]))"
)
_PARTS = (".*language_model", ".*vision_tower", ".*multi_modal_projector")
_SAVED = re.compile(r"layers\.\d+\.(attention|ffn)_norm|norm|output|tok_embeddings|vision\.proj\.\d+")


@dataclass(frozen=True)
class AdapterForm:
    """What an adapter is for, and how it is written."""

    layout: str
    """Of the base's names: plain, llava or original (`names.LAYOUTS`)."""
    head_dim: int
    """Width of an attention head, by which rows of q's and k's B are put in Hugging Face's order."""
    modules: Mapping[str, tuple[int, float]]
    """Linear -> (rank, factor on the product)."""
    keys: Collection[str]
    """Canonical names of all tensors of the base."""
    base: str
    """Its folder or hub id."""
    sample: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """A few of its numbers (`merge.sample`)."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What else the base's config must say: bias_tuning, ...; with llama_type where it becomes another one."""
    rslora: bool = False
    dropout: float = 0.0
    dtype: torch.dtype | None = None
    """Floats are stored in it; None: as they come."""


class AdapterFiles:
    """The files of an adapter, wherever `place` puts them: tensors one by one, then the small files."""

    def __init__(self, place: Callable[[str], Path], specs: Mapping[str, Spec], *, form: AdapterForm) -> None:
        """`specs`: every tensor to come, in full. ValueError where a factor is of no known linear."""
        self.form, self._place = form, place
        self._specs = {key: Spec(spec.shape, form.dtype or spec.dtype) for key, spec in specs.items()}
        self._missing = set(specs)
        self._saved = _saved(specs, form)
        factors = {key: match for key in specs if (match := _FACTOR.fullmatch(key))}
        if lost := sorted(key for key, match in factors.items() if match["module"] not in form.modules):
            raise ValueError(f"{lost[0]}: no rank is known for it ({len(lost)} in all); write Accessory's form")
        self._names = {key: self._factor_names(match) for key, match in factors.items()}
        self._names |= {key: [f"base_model.model.{name}" for name in names] for key, names in self._saved.items()}
        self._beside = [key for key in specs if key not in self._names]
        self._files: list[SafetensorsWriter] = []

    @property
    def nbytes(self) -> int:
        """About what the files take."""
        return sum(spec.nbytes * max(1, len(self._names.get(key, ()))) for key, spec in self._specs.items())

    def open(self) -> None:
        """Create the files of weights."""
        plan = {}
        for key, names in self._names.items():
            shapes = self._split(key, torch.empty(self._specs[key].shape, device="meta"))
            plan |= {
                name: Spec(tuple(part.shape), self._specs[key].dtype) for name, part in zip(names, shapes, strict=True)
            }
        self._files.append(SafetensorsWriter(self._place(WEIGHTS), plan, {"format": "pt"}))
        if self._beside:
            self._files.append(SafetensorsWriter(self._place(BESIDE), {key: self._specs[key] for key in self._beside}))
            log.warning(
                "%d trained tensors have no place in PEFT's form (%s): they lie in %s, which only Accessory reads",
                len(self._beside), few(self._beside, most=3), BESIDE,
            )  # fmt: skip

    def put(self, key: str, tensor: Tensor) -> None:
        """Write one full tensor."""
        if key not in self._missing:
            raise ValueError(f"{key}: not among the tensors still to be written; each is put once, under its own name")
        self._missing.remove(key)
        spec = self._specs[key]
        assert tuple(tensor.shape) == spec.shape, f"{key}: put with shape {tuple(tensor.shape)}, announced {spec.shape}"
        tensor = tensor.to("cpu", spec.dtype)
        if key in self._beside:
            self._files[1].put(key, tensor)
            return
        for name, part in zip(self._names[key], self._split(key, tensor), strict=True):
            self._files[0].put(name, part)

    def close(self, *, tokenizer: str | Path | None = None, more: Mapping[str, str] | None = None) -> None:
        """Write the small files, `more` texts by name among them. ValueError when tensors are missing."""
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not put: {few(sorted(self._missing))}; put them too")
        for file in self._files:
            file.close()
        kin = {"base": self.form.base, "sample": self.form.sample, "config": self.form.config}
        for name, table in ((CONFIG, adapter_json(self._specs, self.form)), (KIN, kin)):
            self._place(name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        for name, text in (more or {}).items():
            self._place(name).write_text(text, encoding="utf-8")
        for name, source in tokenizer_files(tokenizer).items():
            if not self._place(name).exists():
                shutil.copyfile(source, self._place(name))

    def abandon(self) -> None:
        """Close the files as they are."""
        for file in self._files:
            file.abandon()

    def _factor_names(self, match: re.Match[str]) -> list[str]:
        """The names of a factor: of a tower's qkv there are three, and its A is that of each."""
        side = match["side"].upper()
        return [f"base_model.model.{name}.lora_{side}.weight" for name in theirs(match["module"], self.form.layout)]

    def _split(self, key: str, tensor: Tensor) -> list[Tensor]:
        """A tensor as its names hold it."""
        count, match = len(self._names[key]), _FACTOR.fullmatch(key)
        if match is None:
            _, transform = in_file(key, layout=self.form.layout)
            tensor = transform_back(transform, tensor, self.form.head_dim)
        elif match["side"] == "a":
            return [tensor] * count
        elif match["module"].endswith((".wq", ".wk")):
            tensor = permute(tensor, self.form.head_dim)
        return [*tensor.chunk(count)] if count > 1 else [tensor]


class AdapterWriter:
    """A folder of such files, which appears whole or not at all; the surface of `FolderWriter`."""

    def __init__(self, path: Path, specs: Mapping[str, Spec], *, form: AdapterForm) -> None:
        """`specs`: every tensor to come, in full, under canonical names."""
        self._stage = Stage(path, [WEIGHTS, CONFIG, KIN], nbytes=0)
        self._files = AdapterFiles(self._stage.path, specs, form=form)
        self._stage.nbytes = self._files.nbytes

    def put(self, key: str, tensor: Tensor) -> None:
        """Write one full tensor."""
        with self._stage.explained():
            self._files.put(key, tensor)

    def finish(
        self,
        *,
        config: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
        tokenizer: str | Path | None = None,
        more: Mapping[str, str] | None = None,
    ) -> None:
        """Write the small files and let the folder appear; what the model is, its base says, and not the adapter."""
        with self._stage.explained():
            self._files.close(tokenizer=tokenizer, more=more)
        self._stage.commit()

    def __enter__(self) -> AdapterWriter:
        """Create the files."""
        self._stage.__enter__()
        try:
            with self._stage.explained():
                self._files.open()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove everything again unless `finish` came to its end."""
        self._files.abandon()
        self._stage.__exit__(kind, error, trace)


def adapter_json(specs: Mapping[str, Spec], form: AdapterForm) -> dict[str, Any]:
    """adapter_config.json for these tensors: as few words as say exactly which linears have which rank and factor."""
    used = [match["module"] for key in specs if (match := _FACTOR.fullmatch(key)) and match["side"] == "a"]
    shapes = {name: form.modules[module] for module in used for name in theirs(module, form.layout)}
    alphas = {name: scale * (sqrt(rank) if form.rslora else rank) for name, (rank, scale) in shapes.items()}
    rank = Counter(rank for rank, _ in shapes.values()).most_common(1)[0][0] if shapes else 8
    alpha = Counter(alphas.values()).most_common(1)[0][0] if shapes else 8
    everything = [name for key in form.keys if (module := _linear(key)) for name in theirs(module, form.layout)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": form.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": form.dropout,
        "use_rslora": form.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": target_words(list(shapes), everything),
        "rank_pattern": {name: own for name, (own, _) in shapes.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "modules_to_save": _saved_words(_saved(specs, form), form) or None,
    }


def target_words(chosen: Sequence[str], everything: Sequence[str]) -> list[str] | str:
    """The shortest target_modules that reach the chosen linears and no others: last parts of names, an expression by
    parts of the model, or all names."""
    leaves = sorted({name.rpartition(".")[2] for name in chosen})
    if {name for name in everything if name.rpartition(".")[2] in leaves} <= {*chosen}:
        return leaves
    terms = []
    for part in _PARTS:
        inside = [name for name in chosen if re.match(rf"{part}\.", name)]
        if own := sorted({name.rpartition(".")[2] for name in inside}):
            terms.append(rf"{part}\.(.*\.)?({'|'.join(own)})")
    word = "|".join(terms)
    if terms and {name for name in everything if re.fullmatch(word, name)} == {*chosen}:
        return word
    return sorted(chosen)


def theirs(module: str, layout: str) -> list[str]:
    """Names of a canonical linear's or norm's module in transformers; a tower's qkv has three."""
    names, _ = in_file(f"{module}.weight", layout=layout)
    return [_in_memory(name.removesuffix(".weight")) for name in names]


def _in_memory(name: str) -> str:
    """A name on disk as transformers' module has it."""
    return next((new + name.removeprefix(old) for old, new in _IN_MEMORY if name.startswith(old)), name)


def _linear(key: str) -> str | None:
    """The linear whose weight this is; None for other tensors."""
    module = key.removesuffix(".weight")
    return module if module != key and _LINEAR.fullmatch(module) else None


def _saved(specs: Mapping[str, Spec], form: AdapterForm) -> dict[str, list[str]]:
    """Trained tensors that PEFT stores with their whole module -> their names there."""
    found = {}
    for key in specs:
        module = key.rpartition(".")[0]
        if form.layout == "plain" and key.startswith("vision."):
            continue
        whole = {name for name in form.keys if name.rpartition(".")[0] == module} if _SAVED.fullmatch(module) else ()
        if whole and whole <= specs.keys() and not any(f"{module}.lora_{side}.weight" in specs for side in "ab"):
            names, _ = in_file(key, layout=form.layout)
            found[key] = [_in_memory(name) for name in names]
    return found


def _saved_words(saved: Mapping[str, list[str]], form: AdapterForm) -> list[str]:
    """modules_to_save: norms of all layers by the last part of their name, other modules by the whole of it."""
    modules = {name.rpartition(".")[0] for names in saved.values() for name in names}
    words = []
    for leaf in ("input_layernorm", "post_attention_layernorm"):
        own = {name for name in modules if name.endswith(f".{leaf}")}
        ours = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}[leaf]
        if own and len(own) == sum(1 for key in form.keys if key.endswith(f".{ours}.weight")):
            words.append(leaf)
            modules -= own
    return words + sorted(modules)
