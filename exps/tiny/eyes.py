"""Makes the base folder that training begins with: first weights, and a vision part that has learned to see.
The vision part learns dense labels alone, as a CLIP would come from elsewhere. Every schedule counts steps."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random

if find_spec("accessory") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pool as pools
import torch
from muon import MuonAdamW
from torch import Tensor, nn
from warmup import DenseHeads

from accessory.checkpoint.write import write_folder
from accessory.data.tokenizer import open_tokenizer
from accessory.model import Llama, LlamaConfig
from accessory.vision import VisionConfig, build_vision

log = logging.getLogger("tiny")

TEMPLATE = "tiny"
VISION = VisionConfig(
    kind="qformer",
    tower="vit",
    tower_args={"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "class_token": False},
    image_size=64,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    image_transform="resized_center_crop",
    queries=16,
    hidden=128,
    layers=4,
    heads=4,
    intermediate=512,
    cross_every=2,
    eps=1e-6,
    norm_first=True,
    key_positions=True,
    grid_queries=True,
)
LLAMA = {"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 352, "max_seq_len": 512}


@dataclass
class Plan:
    """Sizes of the warm-up; the defaults are the shipped model's."""

    seed: int = 2
    steps: int = 1100
    batch: int = 64
    lr: float = 3e-3
    flat: float = 0.6


def init_llama(model: nn.Module, generator: torch.Generator) -> None:
    """Normal weights: embeddings of unit size, matrices by their width, outputs into the stream smaller by depth."""
    depth = LLAMA["n_layers"]
    for name, p in model.named_parameters():
        if name.startswith("vision."):
            continue
        with torch.no_grad():
            if p.dim() == 1:
                p.fill_(1.0)
                continue
            std = 0.7 if name.startswith("tok_embeddings") else p.shape[1] ** -0.5
            std *= (2 * depth) ** -0.5 if name.endswith(("wo.weight", "w2.weight")) else 1.0
            std *= 0.3 if name.startswith("output") else 1.0
            p.copy_(torch.randn(p.shape, generator=generator) * std)


def optimiser(module: nn.Module, heads: nn.Module) -> MuonAdamW:
    """Muon for hidden matrices, AdamW for embeddings, patches, positions, norms, biases and the throw-away heads."""
    matrices, rest = [], list(heads.parameters())
    for name, p in module.named_parameters():
        hidden = p.dim() == 2 and not name.startswith(("tok_embeddings", "output", "vision.start", "vision.end"))
        if hidden:
            matrices.append((name, p))
        else:
            rest.append(p)
    return MuonAdamW(matrices, rest)


def schedule(step: int, steps: int, lr: float, *, flat: float) -> float:
    """Sixty steps up, flat until the share `flat` of all, then in a line to almost nothing."""
    up = min(1.0, (step + 1) / 60)
    down = min(1.0, (1 - step / steps) / (1 - flat))
    return lr * up * max(0.02, down)


class Eyes:
    """The vision encoder, with the tower's tokens kept for the dense heads."""

    def __init__(self, vision: nn.Module, heads: DenseHeads) -> None:
        self.vision, self.heads, self.tokens = vision, heads, torch.empty(0)
        self.hook = vision.qformer.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        self.tokens = inputs[1]

    def see(self, pool: pools.Pool, pictures: list[int]) -> tuple[Tensor, dict[str, float]]:
        """The dense loss, and scores of the dense heads."""
        pixels = torch.from_numpy(pool.pixels[pictures]).permute(0, 3, 1, 2).float()
        rows = self.vision(pixels.div_(127.5).sub_(1))
        names = ("classes", "patches", "cells", "places")
        labels = {name: torch.from_numpy(getattr(pool, name)[pictures]) for name in names}
        return self.heads(self.tokens, rows[:, 1:-1], labels)


def warm_up(plan: Plan, pool: pools.Pool, model: nn.Module, heads: DenseHeads) -> None:
    """The vision encoder alone, on dense labels."""
    rng, eyes, started = Random(f"{plan.seed} warm"), Eyes(model.vision, heads), time.time()
    optim = optimiser(model.vision, heads)
    groups = (pool.where(pools.SCENE), pool.where(*range(10)), pool.where(pools.UNKNOWN, pools.EMPTY))
    for step in range(plan.steps):
        pictures = [rng.choice(rng.choices(groups, (50, 42, 8))[0]) for _ in range(plan.batch)]
        loss, scores = eyes.see(pool, pictures)
        loss.backward()
        optim.step(schedule(step, plan.steps, plan.lr, flat=plan.flat))
        if step % 100 == 99:
            shown = " ".join(f"{name} {100 * value:.0f}" for name, value in scores.items())
            log.info("warm-up %d: loss %.3f | %s | %.0f s", step + 1, loss.item(), shown, time.time() - started)


def build(plan: Plan, vocabulary_size: int) -> nn.Module:
    """The model with fresh weights in bf16."""
    generator = torch.Generator().manual_seed(plan.seed)
    model = Llama(LlamaConfig(vocab_size=vocabulary_size, **LLAMA), device="cpu", dtype=torch.bfloat16)
    model.vision = build_vision(VISION, LLAMA["dim"], device="cpu", dtype=torch.bfloat16, generator=generator)
    init_llama(model, generator)
    return model


def main() -> None:
    """Parse the few flags; build, warm up, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--threads", type=int, default=2)
    for name, value in vars(Plan()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = vars(parser.parse_args())
    data, out, threads = args.pop("data"), args.pop("out"), args.pop("threads")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    plan = Plan(**args)
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out {out}: the folder is not empty; name another or remove it")
    tokenizer = data / "tokenizer.model"
    model, heads = build(plan, open_tokenizer(tokenizer).size), DenseHeads(128, LLAMA["dim"]).bfloat16()
    log.info("%d parameters", sum(p.numel() for p in model.parameters()))
    warm_up(plan, pools.Pool.load(data / "pool"), model, heads)
    config = {**asdict(model.config), "vision": VISION.to_dict(), "template": TEMPLATE}
    config = {name: value for name, value in config.items() if value is not None}
    out.mkdir(parents=True, exist_ok=True)
    write_folder(out, model.state_dict(), config=config, meta={"llama_type": "llama_qformerv2"}, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
