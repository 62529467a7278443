"""The words of verbs whose work is not part of this version: they are read, checked and shown by --dry_run.

Must not import torch, nor do what the words ask for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from accessory.dialect.words import GenerationWords, ModelWords


def _port() -> int:
    """API_PORT, else 8000. ValueError where it is none."""
    told = os.environ.get("API_PORT", "8000")
    if not told.isdecimal() or not 0 < int(told) < 65536:
        raise ValueError(f"API_PORT: got {told!r}, expected 1 to 65535; correct or unset it")
    return int(told)


@dataclass
class DryRun:
    """What every verb has."""

    dry_run: bool = False
    """Print the settings as they are understood, and stop."""


@dataclass
class EvalWords(DryRun, ModelWords):
    """Answer the questions of a benchmark with several choices."""

    task: str = "mmlu_test"
    """Name and split: mmlu_test, ceval_validation, cmmlu_test."""
    task_dir: str = "evaluation"
    """Folder of the tasks."""
    lang: Literal["en", "zh"] = "en"
    """Language of the prompt."""
    n_shot: int = 5
    """Examples before each question."""
    batch_size: int = 4
    """Questions at once on each data-parallel rank."""
    seed: int = 42
    """Of the examples."""
    save_dir: str | None = None
    """Folder of results.json and results.log."""


@dataclass
class ServeWords(DryRun, ModelWords, GenerationWords):
    """Serve a model to programs or to people in a browser."""

    host: str = field(default_factory=lambda: os.environ.get("API_HOST", "127.0.0.1"))
    """Address to listen at; API_HOST says it too."""
    port: int = field(default_factory=_port)
    """Port to listen at; API_PORT says it too."""


@dataclass
class BoardWords(DryRun):
    """Train, chat and export in a browser."""

    host: str = field(default_factory=lambda: os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    """Address to listen at; GRADIO_SERVER_NAME says it too."""


@dataclass
class QuantiseWords(DryRun, ModelWords):
    """Quantise a model after training and write it."""

    export_dir: str | None = None
    """Folder to write."""
    export_quantization_bit: Literal[2, 3, 4, 8] = 4
    """Bits of a weight."""
    export_quantization_method: str = "gptq"
    """How it is quantised."""
    export_quantization_dataset: list[str] = field(default_factory=list)
    """Texts to calibrate with: a file."""
    export_quantization_nsamples: int = 128
    """How many of them."""
    export_quantization_maxlen: int = 1024
    """Tokens of each."""
    export_size: int = 5
    """Largest file, in GB."""
    export_device: str = "cpu"
    """Where it is computed."""
    export_legacy_format: bool = False
    """Write .bin in place of safetensors."""
    export_form: Literal["hf", "meta", "accessory"] = "hf"
    """Whose folder is written."""
    export_dtype: Literal["bf16", "fp32", "fp16"] | None = None
    """Of what is not quantised; none: as it is stored."""


# verb: (its words, what is missing and what to do)
LATER: dict[str, tuple[type[DryRun], str]] = {
    "eval": (
        EvalWords,
        "MMLU, C-Eval and CMMLU are not part of this version; look at rows of your own with accessory infer --dataset",
    ),
    "webui": (
        BoardWords,
        "the pages are not part of this version; use accessory train, chat and export",
    ),
    "quantise": (
        QuantiseWords,
        "quantised export is not part of this version; leave the number of bits out to export 16 or 32 bits",
    ),
}
