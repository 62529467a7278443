"""The proof of an export: the folder is opened again, and its logits are held against those of the model.

Must not write anything.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from accessory import dist
from accessory.assemble import open_model
from accessory.dist import Ranks
from accessory.engine import Engine, Request

if TYPE_CHECKING:
    from accessory.export.run import Job

log = logging.getLogger(__name__)

QUESTIONS = (
    "What is the capital of France, and which river flows through it?",
    "Write two lines about the sea.",
    "2 + 2 =",
)
SEEN = "What is in this picture?"
ROUNDING = 1e-4  # what the order of sums alone may change in fp32 logits
TIMES = 2.0
WINDOW = 4096


def verify(job: Job, folder: Path) -> float:
    """Compare the logits of a folder with those of the model in memory, and return the largest difference.

    The model in fp32 is what both are held against: the folder's weights may be off by TIMES what the model itself is
    off in their dtype (and by ROUNDING). Raises ValueError beyond that, with the numbers.
    """
    settings = job.settings
    ranks = dist.init(device=settings.export_device)
    named = {"llama_type": settings.llama_type, "tokenizer_path": settings.tokenizer_path}
    named["llama_config"] = settings.llama_config
    exact = logits(job, job.paths, ranks, torch.float32, **named)
    own = 0.0
    if job.dtype != torch.float32:
        own = apart(exact, logits(job, job.paths, ranks, job.dtype, **named))
    again = {} if settings.export_form == "hf" else {"tokenizer_path": str(job.tokenizer.path)}
    found = logits(job, [str(folder)], ranks, job.dtype, **again)
    worst, allowed = apart(exact, found), TIMES * own + ROUNDING
    name = str(job.dtype).removeprefix("torch.")
    log.info(
        "verified on %d prompts: the largest difference of logits to the model in fp32 is %.3g; the model's own in %s"
        " is %.3g, and %.3g is allowed", len(exact), worst, name, own, allowed,
    )  # fmt: skip
    if not worst <= allowed:
        raise ValueError(
            f"{folder}: its logits are {worst:.3g} away from the model's, expected at most {allowed:.3g} (twice what"
            f" {name} costs the model itself, {own:.3g}); the folder was renamed, do not use it"
        )
    return worst


def logits(job: Job, paths: Sequence[str], ranks: Ranks, dtype: torch.dtype, **named: object) -> list[Tensor]:
    """Logits of every position of a few prompts, fp32 [T, vocabulary] each; the model is gone afterwards."""
    bundle = open_model(paths, ranks=ranks, dtype=dtype, **named)
    window = min(bundle.config.max_seq_len, WINDOW)
    found = []
    with Engine(bundle, ranks, rows=1, window=window) as engine:
        room = [ask for ask in _requests(job) if engine.length(ask) < window]
        found = [engine.logits(ask) for ask in room]
    del bundle, engine
    gc.collect()
    if not found:
        raise ValueError(f"{paths[0]}: its window of {window} tokens holds no question; set export_verify false")
    return found


def apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference; infinite where some is not a number or the shapes differ."""
    if [a.shape for a in one] != [b.shape for b in other]:
        return float("inf")
    gaps = [(a - b).abs().max().item() for a, b in zip(one, other, strict=True)]
    return max(gap if gap == gap else float("inf") for gap in gaps)


def _requests(job: Job) -> list[Request]:
    """The questions, and one about a picture where the model sees."""
    asked = [Request(text, template=job.template, max_gen_len=1) for text in QUESTIONS]
    if job.spec.vision is not None:
        asked.append(Request(SEEN, pictures=[picture()], template=job.template, max_gen_len=1))
    return asked


def picture(width: int = 160, height: int = 96) -> Image.Image:
    """A picture in which every place has its own colour."""
    across = torch.linspace(0, 255, width).expand(height, width)
    down = torch.linspace(0, 255, height)[:, None].expand(height, width)
    rings = ((across * down / 64).sin() * 127 + 128).clamp(0, 255)
    return Image.fromarray(torch.stack([across, down, rings], dim=-1).to(torch.uint8).numpy())
