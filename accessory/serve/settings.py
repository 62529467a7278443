"""The flags of the demos.

Must not import torch: they are read before the first rank starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from accessory.serve.web.words import WebWords


@dataclass
class Settings(WebWords):
    """What a person may say when starting a demo; the names are those of LLaMA2-Accessory."""

    prompt: list[str] = field(default_factory=list)
    """Ask this, print the answer alone on stdout, and leave (in quotes). Without it questions are read one by one."""
    image: str | None = None
    """Picture to ask about: with --prompt, or the first one of a session."""
    pretrained_path: list[str] = field(default_factory=list)
    """Folder of the model, then folders of deltas or of trained parts, in order. Without it: the tiny model."""
    llama_type: str | None = None
    """llama, llama_peft, llama_adapter, llama_qformerv2 or llama_qformerv2_peft; needed where the folder is silent."""
    llama_config: list[str] = field(default_factory=list)
    """JSON files of model sizes (params.json), later ones override; needed where the folder has none."""
    tokenizer_path: str | None = None
    """Tokenizer file, or the folder that holds it; needed where the model's folder has none."""
    quant: bool = False
    """Store the weights of the layers in 4 bits (NF4)."""
    template: str = ""
    """How questions are written: alpaca, dialog, shortqa, caption, vicuna_v1, llama2, llama3, chatml, ...; none passes
    the prompt as it is, and an empty one continues from BOS. Without it: the model's own."""
    noinstruct: bool = False
    """The same as --template none."""
    max_gen_len: int = 512
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0: always the likeliest token, so that answers can be repeated; the reference's web demos use 0.1."""
    top_p: float = 1.0
    """With a temperature: choose among the likeliest tokens whose probabilities reach this sum; the reference: 0.75."""
    top_k: int = 0
    """With a temperature: choose among this many likeliest tokens; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were already said become less likely."""
    seed: int = 0
    """With a temperature: the same seed gives the same answer."""
    max_seq_len: int | None = None
    """Tokens of question, history and answer together; without it the model's, at most 4096."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of weights and computation. Without it: the checkpoint's on a GPU, what a CPU is fast in elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    n_gpus: int | None = None
    """Start this many tensor-parallel ranks, one per GPU, or on the CPU where there is none; torchrun does it too."""
    gpu_ids: list[int] = field(default_factory=list)
    """Start one rank on each of these GPUs."""
    image_transform: str | None = None
    """resized_center_crop or padded_resize; without it the model's own."""
    orientation: Literal["keep", "apply"] = "keep"
    """Photographs as they are stored (the reference's way), or turned as their EXIF says."""
    web: bool = False
    """Ask in a browser instead of here: serve a page, by default on this host alone."""

    def check(self) -> None:
        """ValueError for values that contradict each other."""
        self.check_web()
        if self.web and self.prompt:
            raise ValueError("--web: got it with --prompt, expected one of them; ask in the page, or drop --web")
        if len(self.prompt) > 1:
            raise ValueError(f"--prompt: got {len(self.prompt)} values, expected one text; put it in quotes")
        if self.noinstruct and self.template not in ("", "none"):
            raise ValueError(f"--template: got {self.template!r} with --noinstruct, expected one of them; drop one")
        if self.n_gpus is not None and self.n_gpus < 1:
            raise ValueError(f"--n_gpus: got {self.n_gpus}, expected at least 1 rank; leave it out for one")
        if self.n_gpus is not None and self.gpu_ids:
            raise ValueError("--gpu_ids: given together with --n_gpus, expected one of them; drop one")
        if len(set(self.gpu_ids)) != len(self.gpu_ids) or any(gpu < 0 for gpu in self.gpu_ids):
            raise ValueError(f"--gpu_ids: got {self.gpu_ids}, expected numbers of different GPUs, from 0 on")
        if self.max_gen_len < 1:
            raise ValueError(f"--max_gen_len: got {self.max_gen_len}, expected at least 1")
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise ValueError(f"--max_seq_len: got {self.max_seq_len}, expected at least 2 tokens")
