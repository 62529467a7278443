"""Tiny models in training on any layout of ranks: their batches, steps, and what comes out, as whole tensors.

Must not know what a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from llava_toys import SHAPES, look_of
from meta import fill, whole_weights
from torch import Tensor

from accessory.assemble import build, read_spec
from accessory.dist import Ranks, Shard
from accessory.model import Llama
from accessory.quant import quantise
from accessory.train.optim import make_optimizer
from accessory.train.parts import Parts, choose_parts, peft_config
from accessory.train.settings import Settings
from accessory.train.trainee import Trainee, seed_step
from accessory.vision import VisionConfig

ONE = Ranks(0, 1, 0, Shard(), 0, 1, torch.device("cpu"))
SIZES: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96, "vocab_size": 67}
TOWER = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
SEES = {
    "vision": {
        "kind": "qformer",
        "image_size": 16,
        "tower_args": TOWER,
        "queries": 2,
        "hidden": 32,
        "layers": 1,
        "heads": 2,
        "intermediate": 64,
    }
}
PERCEIVES = {
    "vision": {
        "kind": "perceiver",
        "image_size": 16,
        "tower_args": TOWER,
        "tower_proj": 24,
        "queries": 3,
        "hidden": 24,
        "layers": 1,
        "heads": 2,
    }
}
LENGTH = 12


@dataclass(frozen=True)
class Case:
    """One way to train one toy. Everything is picklable, so that ranks can be told it."""

    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    pictures: bool = False
    packed: bool = False
    quant: bool = False
    dtype: torch.dtype = torch.float32
    trainee: dict[str, Any] = field(default_factory=dict)
    steps: int = 20
    accumulation: int = 1
    lr: float = 3e-4

    def but(self, **changes: Any) -> Case:
        """The same with changes."""
        return replace(self, **changes)

    def as_settings(self) -> Settings:
        """The settings of a run."""
        return Settings(**{"learning_rate": self.lr, "lora_rank": 4, "prefix_len": 3, **self.settings})


def toy(case: Case, shard: Shard) -> tuple[Llama, Parts]:
    """A random model with this rank's slices; equal weights for equal cases at any layout."""
    settings = case.as_settings()
    tunes = settings.finetuning_type in ("lora", "norm_bias", "norm_bias_lora", "bias")
    kind = "llama_adapter" if settings.finetuning_type == "adapter" else "llama_peft" if tunes else "llama"
    if case.config.get("vision", {}).get("kind") == "qformer":
        kind = kind.replace("llama", "llama_qformerv2", 1)
    if case.config.get("vision", {}).get("kind") == "llava":
        kind = kind.replace("llama", "llava", 1)
    spec = read_spec({**SIZES, "max_seq_len": 64, **case.config, **peft_config(settings)}, llama_type=kind)
    weights = whole_weights(build(spec), seed=3)
    for name, tensor in weights.items():
        if name.startswith("vision.") and tensor.dim() > 1:
            tensor *= 3  # so that pictures make a difference
    model = fill(build(spec, shard=shard), weights)
    if case.quant:
        for linear in model.linears().values():
            quantise(linear, linear.weight.detach())
    return model, choose_parts(model, settings, pictures=case.pictures)


def batches(case: Case, step: int, micro: int) -> dict[str, Tensor | None]:
    """One ragged micro-batch of two rows; every other one has a picture where the case has pictures."""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    vocab = {**SIZES, **case.config}["vocab_size"]
    ids = torch.randint(0, vocab, (2, LENGTH), generator=generator)
    labels = ids.roll(-1, 1)
    labels[0, -1] = labels[1, 7 + micro % 2 :] = -100
    labels[0, :2] = -100
    positions = torch.arange(LENGTH).expand(2, -1).clone()
    batch: dict[str, Tensor | None] = {"ids": ids, "positions": positions, "labels": labels, "segments": None}
    if case.packed:
        batch["segments"] = torch.tensor([[1] * 5 + [2] * 7, [1] * 3 + [2] * 4 + [3] * 3 + [-1] * 2])
        batch["positions"] = torch.tensor([[*range(5), *range(7)], [*range(3), *range(4), *range(3), 0, 0]])
    if case.pictures and micro % 2 == 0 and case.config["vision"]["kind"] == "llava":
        look = look_of(VisionConfig.from_dict(case.config["vision"]))
        sizes = [SHAPES[(step + micro + number) % 3] for number in range(1 + step % 2)]
        tiles = sum(look.tiles(*size) for size in sizes)
        batch["pixels"] = torch.randn(tiles, 3, look.size, look.size, generator=generator)
        batch["order"] = torch.from_numpy(look.order(sizes))
        batch["slots"] = torch.full((2, LENGTH), -1)
        batch["slots"][0, 1:11] = torch.linspace(3, len(batch["order"]) - 1, 10).long()
    elif case.pictures and micro % 2 == 0:
        batch["pixels"] = torch.randn(1, 3, 16, 16, generator=generator)
        slots = torch.full((2, LENGTH), -1)
        if case.config["vision"]["kind"] == "perceiver":
            slots[1] = 0
        else:
            slots[0, 1:5] = torch.arange(4)
        batch["slots"] = slots
    return batch


@dataclass
class Trained:
    """What a rank saw: losses and norms by step, gradients of step one and last weights as boxes."""

    losses: list[float]
    norms: list[float]
    grads: dict[str, Any]
    weights: dict[str, Any]
    trainee: Any = None


def train(ranks: Ranks, case: Case, *, keep: bool = False) -> Trained:
    """Run the case on this rank: a global step is accumulation * dp_size micro-batches, dealt in turn."""
    model, parts = toy(case, ranks.shard)
    trainee = Trainee(model, parts, ranks, dtype=case.dtype, **case.trainee)
    optimizer = make_optimizer(trainee, case.as_settings())
    result = Trained([], [], {}, {})
    for step in range(case.steps):
        result.losses.append(one_step(trainee, optimizer, case, step, result))
    result.weights = boxed(trainee.pieces())
    result.trainee = (trainee, optimizer) if keep else None
    return result


def one_step(trainee: Trainee, optimizer: Any, case: Case, step: int, result: Trained | None = None) -> float:
    """One update; the loss per target over all ranks."""
    ranks, count = trainee.ranks, case.accumulation * trainee.ranks.dp_size
    everything = [batches(case, step, micro) for micro in range(count)]
    targets = sum(int((batch["labels"] != -100).sum()) for batch in everything)
    mine = everything[ranks.dp_rank :: ranks.dp_size]
    total = torch.zeros(())
    for micro, batch in enumerate(mine):
        seed_step(7, step, micro, ranks.dp_rank)
        total += trainee.forward_backward(batch, scale=1 / targets, last=micro == len(mine) - 1)
    norm = trainee.clip(0.0 if step == 0 else 1.0)
    if result is not None:
        result.norms.append(float(norm))
        if step == 0 and norm:
            grads = {name: leaf.grad for name, leaf in trainee.masters.items()}
            result.grads = boxed({name: trainee.piece(name, grad) for name, grad in grads.items()})
    optimizer.step()
    trainee.updated()
    if ranks.dp_size > 1:
        torch.distributed.all_reduce(total, group=ranks.dp_group)
    return float(total) / targets


def boxed(pieces: dict[str, Any]) -> dict[str, Any]:
    """Pieces as plain picklable values."""
    return {name: (piece.box, piece.tensor.clone(), piece.mine) for name, piece in pieces.items()}


def whole(of_ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Full tensors from the pieces that ranks write; all elements covered once, and held copies equal."""
    out: dict[str, Tensor] = {}
    for name in of_ranks[0]:
        full = torch.full(of_ranks[0][name][0].shape, float("nan"))
        for write in (True, False):
            for part, tensor, mine in (held[name] for held in of_ranks):
                place = tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
                if mine and write:
                    assert full[place].isnan().all(), f"{name}: written twice"
                    full[place] = tensor
                elif not write:
                    assert torch.equal(full[place], tensor), f"{name}: ranks differ"
        assert not full.isnan().any(), f"{name}: a part is in no piece"
        out[name] = full
    return out
