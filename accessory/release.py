"""A model as a Hugging Face folder: everything that lies there beside its tensors.

Must not know tensors, nor where the model comes from: its config, tokenizer and template are given.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accessory.checkpoint import Checkpoint
from accessory.checkpoint.huggingface import papers
from accessory.checkpoint.merge import MERGED
from accessory.data.chat_template import chat_template, writes_the_same
from accessory.data.encode import stop_ids
from accessory.data.template import get_template
from accessory.data.tokenizer import Tokenizer
from accessory.data.tokenizer_files import transformers_files

IMAGE = "<image>"
PROCESSOR = "processor_config.json"


@dataclass(frozen=True)
class Release:
    """The small files of a folder, for `HuggingFaceWriter.finish(**release.words())`."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    preprocessor: Mapping[str, Any] | None
    tokenizer: Path
    chat_template: str
    beside: Path | None
    """A folder whose processor files are taken over."""
    more: Mapping[str, str]
    """Further texts by name: the tokenizer's, for transformers."""

    def words(self) -> dict[str, Any]:
        """The fields by name."""
        return dict(vars(self))


@dataclass(frozen=True)
class Subject:
    """The model that is released."""

    flat: Mapping[str, Any]
    """Its config as plain values, sizes resolved; `vision` where it sees."""
    tokenizer: Tokenizer
    template: str
    stop_ids: Collection[int] = ()
    """Of the folder it came from, beside the template's and the tokenizer's."""
    checkpoint: Checkpoint | None = None
    """The folders that it came from, whose small files are kept where they still hold."""

    @property
    def told(self) -> Mapping[str, Any]:
        """What the folder that describes the model says."""
        return {} if self.checkpoint is None else self.checkpoint.told

    @property
    def home(self) -> Path | None:
        """That folder."""
        folders = () if self.checkpoint is None else reversed(self.checkpoint.folders)
        return next((folder.path for folder in folders if self.told and folder.told is self.told), None)


def release(
    subject: Subject, *, family: str, dtype: str, own_template: bool | None = None, merged: Any = None
) -> Release:
    """What lies beside the weights of a family in a dtype (float32, float16, bfloat16).

    own_template: whether the folder's chat template stays; None: where it writes what the model's template writes.
    merged: what is noted of adapters that are in the weights. Raises ValueError for what the family does not describe.
    """
    told, flat, tokens = subject.told, subject.flat, tokens_of(subject)
    config = papers.config_json(flat, family=family, dtype=dtype, tokens=tokens, told=told)
    if merged:
        config[MERGED] = merged
    text = _chat_template(subject, own=own_template)
    return Release(
        config=config,
        generation=papers.generation_json(tokens, told),
        preprocessor=papers.preprocessor_json(flat["vision"], family=family) if flat.get("vision") else None,
        tokenizer=subject.tokenizer.path,
        chat_template=text,
        beside=subject.home,
        more={**transformers_files(subject.tokenizer, chat_template=text), **_processor(subject, family)},
    )


def _processor(subject: Subject, family: str) -> dict[str, str]:
    """processor_config.json where the family has one and the folder that the model came from brings none."""
    vision, home = subject.flat.get("vision"), subject.home
    table = papers.processor_json(vision, family=family) if vision else None
    if table is None or (home is not None and (home / PROCESSOR).is_file()):
        return {}
    return {PROCESSOR: json.dumps(table, indent=2) + "\n"}


def tokenizer_texts(subject: Subject) -> dict[str, str]:
    """Files by which transformers tokenises and writes conversations as we do, by name, beside the tokenizer's own."""
    return transformers_files(subject.tokenizer, chat_template=_chat_template(subject))


def _chat_template(subject: Subject, *, own: bool | None = None) -> str:
    """The folder's chat template where it stays (none: where it writes the same), else that of the template."""
    form, text = get_template(subject.template), subject.told.get("chat_template")
    own = text is not None and writes_the_same(text, form) if own is None else own
    return text if own else chat_template(form)


def tokens_of(subject: Subject) -> dict[str, Any]:
    """The ids of bos, eos (all that end an answer), pad, and of a picture's place."""
    tokenizer = subject.tokenizer
    control = {name: tokenizer.control(name) if tokenizer.has(name) else None for name in ("bos", "eos")}
    ends = {*stop_ids(get_template(subject.template), tokenizer), *subject.stop_ids, control["eos"]} - {None}
    pad = subject.told.get("config", {}).get("pad_token_id")
    tokens: dict[str, Any] = {"bos": control["bos"], "eos": sorted(ends), "pad": pad}
    if len(ends) == 1:
        tokens["eos"] = next(iter(ends))
    if subject.flat.get("vision") and tokenizer.has(IMAGE):
        tokens["image"] = tokenizer.control(IMAGE)
    return tokens


def additions(keys: Collection[str], *, qkv_bias: bool) -> list[str]:
    """Tensors that a plain LLaMA has not: biases, LoRA factors and prompts that PEFT added."""
    bias = ("wq.bias", "wk.bias", "wv.bias") if qkv_bias else ()
    return [
        key
        for key in keys
        if key.startswith("prefix")
        or ".lora_" in key
        or (key.startswith("layers.") and key.endswith(".bias") and not key.endswith(bias))
    ]
