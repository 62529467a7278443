"""Makes the tiny model from nothing: data, tokenizer, warm-up of the eyes, joint training, an Accessory folder.
Must not read a clock for anything but its log: every schedule counts steps, so that a run repeats itself."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random

if find_spec("accessory") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pool as pools
import torch
import vocabulary
from muon import MuonAdamW
from rows import IGNORE, Rows
from scenes import draw_scene, paint
from torch import Tensor, nn
from warmup import DenseHeads

from accessory.checkpoint.write import write_folder
from accessory.data.template import get_template
from accessory.data.tokenizer import open_tokenizer
from accessory.model import Llama, LlamaConfig
from accessory.vision import VisionConfig, build_vision

log = logging.getLogger("tiny")

TEMPLATE = "tiny"
EXAMPLE = "example 8"  # seed of the picture that ships beside the model
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
    """Sizes of a run; the defaults are the shipped model's."""

    seed: int = 2
    scenes: int = 40_000
    digit_pictures: int = 20_000
    unknowns: int = 4_000
    empties: int = 300
    warm_steps: int = 1200
    warm_batch: int = 64
    steps: int = 2600
    separate: int = 22
    scene_talks: int = 4
    other_talks: int = 7
    more_digits: int = 12  # pictures per step that only the dense heads see
    row: int = 128
    lr: float = 3e-3
    dense: float = 0.3
    flat: float = 0.5


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


def optimiser(module: nn.Module, heads: nn.Module | None = None) -> MuonAdamW:
    """Muon for hidden matrices, AdamW for embeddings, patches, positions, norms, biases and the throw-away heads."""
    matrices, rest = [], list(heads.parameters()) if heads is not None else []
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

    def see(self, pool: pools.Pool, pictures: list[int]) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Feature rows [N, slots, dim], the dense loss, and scores of the dense heads."""
        pixels = torch.from_numpy(pool.pixels[pictures]).permute(0, 3, 1, 2).float()
        rows = self.vision(pixels.div_(127.5).sub_(1))
        names = ("classes", "patches", "cells", "places")
        labels = {name: torch.from_numpy(getattr(pool, name)[pictures]) for name in names}
        loss, scores = self.heads(self.tokens, rows[:, 1:-1], labels)
        return rows, loss, scores


def warm_up(plan: Plan, pool: pools.Pool, model: nn.Module, heads: DenseHeads) -> None:
    """The vision encoder alone, on dense labels."""
    rng, eyes, started = Random(f"{plan.seed} warm"), Eyes(model.vision, heads), time.time()
    optim = optimiser(model.vision, heads)
    groups = (pool.where(pools.SCENE), pool.where(*range(10)), pool.where(pools.UNKNOWN, pools.EMPTY))
    for step in range(plan.warm_steps):
        pictures = [rng.choice(rng.choices(groups, (50, 42, 8))[0]) for _ in range(plan.warm_batch)]
        _, loss, scores = eyes.see(pool, pictures)
        loss.backward()
        optim.step(schedule(step, plan.warm_steps, plan.lr, flat=0.6))
        if step % 100 == 99:
            shown = " ".join(f"{name} {100 * value:.0f}" for name, value in scores.items())
            log.info("warm-up %d: loss %.3f | %s | %.0f s", step + 1, loss.item(), shown, time.time() - started)


def train(plan: Plan, pool: pools.Pool, rows: Rows, model: nn.Module, heads: DenseHeads) -> None:
    """Everything together: answers, and a little of the dense labels still."""
    rng, eyes, started = Random(f"{plan.seed} joint"), Eyes(model.vision, heads), time.time()
    optim = optimiser(model, heads)
    mix = {"separate": plan.separate, "scene_talks": plan.scene_talks, "other_talks": plan.other_talks}
    mean, handwritten = 0.0, pool.where(*range(10))
    for step in range(plan.steps):
        inputs, pictures = rows.batch(rng, **mix)
        more = [rng.choice(handwritten) for _ in range(plan.more_digits)]
        features, dense, scores = eyes.see(pool, pictures + more)
        labels = inputs.pop("labels")
        hidden = model(**inputs, features=features.flatten(0, 1))
        total, count = model.output(hidden[labels != IGNORE], labels[labels != IGNORE])
        loss = total / count
        (loss + plan.dense * dense).backward()
        optim.step(schedule(step, plan.steps, plan.lr, flat=plan.flat))
        mean += 0.02 * (loss.item() - mean) if step else loss.item()
        if step % 100 == 99:
            shown = " ".join(f"{name} {100 * value:.0f}" for name, value in scores.items())
            log.info("step %d: loss %.4f | %s | %.0f s", step + 1, mean, shown, time.time() - started)
    eyes.hook.remove()


def build(plan: Plan, vocabulary_size: int) -> nn.Module:
    """The model with fresh weights in bf16."""
    generator = torch.Generator().manual_seed(plan.seed)
    model = Llama(LlamaConfig(vocab_size=vocabulary_size, **LLAMA), device="cpu", dtype=torch.bfloat16)
    model.vision = build_vision(VISION, LLAMA["dim"], device="cpu", dtype=torch.bfloat16, generator=generator)
    init_llama(model, generator)
    return model


def main() -> None:
    """Parse the few flags, and run everything in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--threads", type=int, default=2)
    for name, value in vars(Plan()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = vars(parser.parse_args())
    out, threads = args.pop("out"), args.pop("threads")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    plan, started = Plan(**args), time.time()
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out {out}: the folder is not empty; name another or remove it")
    with tempfile.TemporaryDirectory() as folder:
        run(plan, out, Path(folder) / "tokenizer.model")
    log.info("done in %.0f s", time.time() - started)


def run(plan: Plan, out: Path, tokenizer_file: Path) -> None:
    """Everything in order: tokenizer, pictures, warm-up, joint training, folder."""
    started = time.time()
    vocabulary.train_tokenizer(tokenizer_file, seed=plan.seed)
    tokenizer = open_tokenizer(tokenizer_file)
    log.info("tokenizer of %d pieces, %.0f s", tokenizer.size, time.time() - started)
    counts = {name: getattr(plan, name) for name in ("scenes", "digit_pictures", "unknowns", "empties")}
    pool = pools.build(plan.seed, **counts)
    log.info("%d pictures, %.0f s", len(pool.classes), time.time() - started)
    model, heads = build(plan, tokenizer.size), DenseHeads(128, LLAMA["dim"]).bfloat16()
    log.info("%d parameters", sum(p.numel() for p in model.parameters()))
    write = vocabulary.writer(get_template(TEMPLATE), tokenizer)
    rows = Rows(pool, write, bos=tokenizer.bos_id, picture_slots=model.vision.slots, limit=plan.row)
    warm_up(plan, pool, model, heads)
    train(plan, pool, rows, model, heads)
    save(out, model, tokenizer_file)


def save(out: Path, model: nn.Module, tokenizer: Path) -> None:
    """Write the weights and what describes them as an Accessory folder."""
    config = {**asdict(model.config), "vision": VISION.to_dict(), "template": TEMPLATE}
    config = {name: value for name, value in config.items() if value is not None}
    out.mkdir(parents=True, exist_ok=True)
    paint(draw_scene(Random(EXAMPLE), count=4)).save(out / "example.png")
    write_folder(out, model.state_dict(), config=config, meta={"llama_type": "llama_qformerv2"}, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
