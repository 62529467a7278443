"""The words that several verbs share, each with one meaning wherever it appears.

Must not import torch nor know what reads them: the verbs' settings take these fields over and add their own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class ModelWords:
    """Which model, how it is opened, and where."""

    dialect: Literal["accessory", "llamafactory", "swift"] | None = None
    """Whose words and defaults the settings are given in; none: told by the words."""
    model_name_or_path: list[str] = field(default_factory=list)
    """Folder or hub id of the model, then folders of deltas or trained parts, in order. Without it: the tiny model."""
    adapter_name_or_path: list[str] = field(default_factory=list)
    """Folders of adapters on top of the model, in order."""
    model_type: str | None = None
    """A name such as llava1d6-mistral-7b-instruct, which chooses hub id, architecture and template; not needed where
    model_name_or_path is a folder that says what it is."""
    template: str = ""
    """How conversations are written, perhaps with its dialect (swift/llava-yi-instruct); without it the model's own."""
    tokenizer_path: str | None = None
    """Tokenizer file, or the folder that holds it; needed where the model's folder has none."""
    llama_type: str | None = None
    """llama, llama_peft, llama_adapter, llama_qformerv2, llava, ...; needed where the folder is silent."""
    llama_config: list[str] = field(default_factory=list)
    """JSON files of model sizes (params.json), later ones override; needed where the folder has none."""
    quantization_bit: Literal[4] | None = None
    """4: the weights of the layers are stored as NF4."""
    precision: Literal["bf16", "fp32", "fp16"] | None = None
    """Of weights and computation. Without it: the checkpoint's on a GPU, what a CPU is fast in elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    tensor_parallel_size: int | None = None
    """Ranks that share each layer; none: all ranks. The others are data-parallel."""
    nproc_per_node: int | None = None
    """Start this many ranks on this host, as torchrun would; none: NPROC_PER_NODE, else one per visible GPU."""
    max_seq_len: int | None = None
    """Tokens of question, history and answer together; none: the model's, at most 4096."""
    image_transform: str | None = None
    """resized_center_crop or padded_resize; none: the model's own."""
    orientation: Literal["keep", "apply"] | None = None
    """Photographs as they are stored, or turned as their EXIF says; none: turned in a chat, as stored elsewhere."""
    anyres_compat: Literal["llava", "hf"] | None = None
    """Whose tiling and merging of large pictures is followed; none: that of the folder's family."""
    allow_private_urls: bool = False
    """Pictures may be fetched from this host and from private networks."""
    infer_backend: Literal["huggingface", "vllm"] = "huggingface"
    """Who computes the answers: Accessory's own engine (as LLaMA-Factory names its own), or vLLM where it is installed,
    from a Hugging Face folder that is exported and proven once."""
    vllm_gpu_util: float = 0.7
    """vLLM: share of each GPU's memory that it takes."""
    vllm_enforce_eager: bool = False
    """vLLM: compute without CUDA graphs, which start sooner and need less memory."""
    vllm_config: dict[str, Any] = field(default_factory=dict)
    """vLLM: further arguments of its engine (EngineArgs), which count before all others."""


@dataclass
class GenerationWords:
    """How an answer is chosen."""

    max_new_tokens: int = 512
    """Most tokens of an answer."""
    do_sample: bool | None = None
    """Whether tokens are drawn; none: where a temperature above 0 is given."""
    temperature: float = 0.0
    """The higher, the more even; 0: always the likeliest token."""
    top_p: float = 1.0
    """When drawing: choose among the likeliest tokens whose probabilities reach this sum."""
    top_k: int = 0
    """When drawing: choose among this many likeliest tokens; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were already said become less likely."""
    seed: int = 42
    """When drawing: the same seed gives the same answer."""
    stop_words: list[str] = field(default_factory=list)
    """Further strings that end an answer and are no part of it."""
    default_system: str | None = None
    """System text of conversations that bring none; without it the template's."""


@dataclass
class AheadWords:
    """Whether an engine looks ahead."""

    speculate: int = 0
    """Most tokens that each step tries beyond the next one, where the text so far went on with them before: what
    repeats comes faster, and the answers are the same but for rounding; 0: none."""

    def check_ahead(self) -> None:
        """ValueError for numbers that cannot be."""
        if self.speculate < 0:
            raise ValueError(f"speculate: got {self.speculate}, expected 0 or the most tokens to try in a step")


@dataclass
class ServingWords(AheadWords):
    """How many are answered at once, and what that may cost."""

    max_concurrent: int = field(default_factory=lambda: _count("MAX_CONCURRENT", 8))
    """Requests that are answered at once; further ones wait. MAX_CONCURRENT says it too."""
    queue: int = 256
    """Most requests that wait; beyond them one is refused, to be asked again later."""
    cache_gb: float | None = None
    """Budget of the keys and values of all requests at once, in GB; max_concurrent shrinks to fit. None: no budget."""
    prefill_chunk: int = 256
    """Most tokens of one prompt that are read in a step, between those of answers."""
    prefix_reuse: bool = True
    """A prompt that begins as an earlier one did is not read again, as far as its keys and values are still there."""
    deterministic: bool = False
    """An answer depends on its own request alone, never on which others are answered beside it; slower."""
    compile: bool = False
    """Compile the step that decodes; the first answers wait for it."""

    def check_serving(self) -> None:
        """ValueError for numbers that cannot be."""
        self.check_ahead()
        for name, least in (("max_concurrent", 1), ("queue", 1), ("prefill_chunk", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if self.cache_gb is not None and not 0 < self.cache_gb < float("inf"):
            raise ValueError(f"cache_gb: got {self.cache_gb}, expected more than 0 GB")


def _count(name: str, default: int) -> int:
    """A number of the environment. ValueError where it is none."""
    told = os.environ.get(name, "").strip() or str(default)
    if not (told.isascii() and told.isdecimal()) or not int(told):
        raise ValueError(f"{name}: got {told!r}, expected a whole number from 1 on; correct or unset it")
    return int(told)
