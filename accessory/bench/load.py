"""Process start to first token: each side as a program of its own, from one Hugging Face folder of random weights.

Must not import the peer itself; its program does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from accessory.bench.shapes import SHAPES
from accessory.bench.sides import fill
from accessory.checkpoint.headers import Spec
from accessory.checkpoint.huggingface.papers import config_json
from accessory.checkpoint.huggingface.writer import HuggingFaceForm, HuggingFaceWriter
from accessory.dist import dtype_from_name
from accessory.model import Llama, LlamaConfig

OURS = """
import sys, torch
from accessory.assemble import build, load, read_spec
from accessory.checkpoint import open_folders
from accessory.quant import settle
folder, device, dtype = sys.argv[1], torch.device(sys.argv[2]), getattr(torch, sys.argv[3])
checkpoint = open_folders(folder)
model = build(read_spec(checkpoint.config, llama_type="llama"), dtype=dtype)
load(model, checkpoint, device=device, dtype=dtype, packed=True)
model.eval().requires_grad_(False)
settle(model, rows=1)
with torch.inference_mode():
    ids = torch.arange(1, 9, device=device).unsqueeze(0)
    cache = model.new_cache(rows=1, size=16)
    hidden = model(ids, ids - 1, cache=cache)
    print(int(model.output(hidden[:, -1]).argmax()), flush=True)
"""
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, device, dtype = sys.argv[1], torch.device(sys.argv[2]), getattr(torch, sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
with torch.inference_mode():
    ids = torch.arange(1, 9, device=device).unsqueeze(0)
    print(int(model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax()), flush=True)
"""


def start_times(shape: str, peer: str, dtype: str, device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds per round and side; the folder is written first, so that all rounds read from the page cache.

    Raises OSError when the disk cannot hold the folder, RuntimeError when a program fails.
    """
    programs = {"ours": OURS, **({"transformers": TRANSFORMERS} if peer == "transformers" else {})}
    kind = dtype_from_name(dtype)
    with tempfile.TemporaryDirectory(prefix="accessory-bench-") as place:
        folder = Path(place) / "model"
        write_folder(SHAPES[shape], folder, dtype=kind)
        times: dict[str, list[float]] = {name: [] for name in programs}
        for turn in range(rounds + 1):
            for name, program in programs.items():
                seconds = _first_token(program, folder, device, str(kind).removeprefix("torch."))
                if turn:  # the first turn fills the page cache and compiles bytecode
                    times[name].append(seconds)
    return times


def write_folder(
    config: LlamaConfig, folder: Path, *, dtype: torch.dtype, more: Mapping[str, str] | None = None
) -> None:
    """Random weights as the Hugging Face folder that both sides open. more: further text files by name.

    Raises OSError when the disk cannot hold it.
    """
    model = Llama(config, device="cpu", dtype=dtype)
    needed = sum(p.nbytes for p in model.parameters())
    free = shutil.disk_usage(folder.parent).free
    if free < needed * 1.05:
        raise OSError(f"{folder}: {free >> 20} MiB free, expected {needed >> 20} MiB for the weights; set TMPDIR")
    fill(model)
    tensors = model.state_dict()
    specs = {key: Spec(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    with HuggingFaceWriter(folder, specs, form=HuggingFaceForm("llama", config.head_dim)) as writer:
        for key, tensor in tensors.items():
            writer.put(key, tensor)
        told = config_json(asdict(config), family="llama", dtype=str(dtype).removeprefix("torch."))
        writer.finish(config=told, more=more)


def _first_token(program: str, folder: Path, device: str, dtype: str) -> float:
    """Seconds until a new process has printed its first token."""
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folder), device, dtype], env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None, "stdout was asked for as a pipe"
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
    if process.returncode or not line.strip():
        raise RuntimeError(f"bench load: the program exited with {process.returncode}: {json.dumps(line)}")
    return seconds
