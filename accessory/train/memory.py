"""How much memory a rank of a run needs, by kind: counted from shapes, on the meta device.

Must not know data or files. What tensors hold is exact; what a step keeps for its backward pass is a formula over the
code of model/, train/masters.py and train/remember.py, and says what it leaves out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

import torch
from torch import Tensor

from accessory.model import Linear, Llama, cuts_of
from accessory.model.head import CHUNK, PIECE
from accessory.model.spelled import BLOCK

NF4_BLOCK, NF4_NESTED = 64, 256
EIGHT_BIT_LEAST, EIGHT_BIT_BLOCK = 4096, 256  # smaller tensors keep fp32 state; elements that share a scale


@dataclass(frozen=True)
class Place:
    """What decides where tensors lie and how wide they are."""

    dp: int = 1
    zero: int = 2
    offload: bool = False
    dtype: torch.dtype = torch.bfloat16
    device: Literal["cuda", "cpu"] = "cuda"
    quant: bool = False
    optim: str = "adamw"
    checkpointing: str = "none"

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return self.dtype.itemsize

    @property
    def apart(self) -> bool:
        """One data-parallel rank: whether masters are other tensors than those that are computed with."""
        return self.dtype != torch.float32 or (self.offload and self.device == "cuda")


@dataclass(frozen=True)
class Load:
    """One micro-batch of a rank."""

    rows: int
    length: int
    packed: bool = True
    """Whether rows have segments, and so a mask."""
    pictures: float = 0.0
    """Tiles of its pictures."""


Kinds = dict[str, int]
"""Bytes by kind."""


def held(model: Llama, trained: Collection[str], place: Place) -> tuple[Kinds, Kinds]:
    """What tensors hold between and during steps on the fullest rank, apart from activations: (device, host).

    model: the slices of one tensor-parallel rank. Host memory counts only what `offload` moves there.
    """
    device: Counter[str] = Counter()
    home: Counter[str] = Counter()
    whole, dealt = _elements(model, place)
    names = [name for name in trained if name in whole]
    for name, size in whole.items():
        if name in trained:
            continue
        if place.dp > 1 and place.zero == 3 and not name.startswith("vision."):
            home["frozen weights"] += place.width * dealt[name]
        else:
            device["frozen weights"] += place.width * size
    device["frozen weights, NF4"] = sum(nf4_bytes(model.linears()[name]) for name in _quantised(model, place))
    share = whole if place.dp == 1 else dealt
    home["masters, fp32"] = 4 * sum(share[name] for name in names)
    home["gradients, fp32"] = 4 * sum(share[name] for name in names)
    home[f"optimizer state, {place.optim}"] = sum(state_bytes(name, share[name], model, place.optim) for name in names)
    if place.dp > 1:
        device["gathered weights"] = _gathered(whole, trained, place)
        device["gradients on their way"] = _in_flight(whole, names, place)
    elif place.apart:
        device["copies to compute with"] = place.width * sum(whole[name] for name in names)
        device["gradients on their way"] = place.width * max((whole[name] for name in names), default=0)
    offloads = place.offload and place.device == "cuda"
    if not offloads:
        device.update(home)
    return _nonzero(device), _nonzero(home if offloads else Counter())


def nf4_bytes(linear: Linear) -> int:
    """Storage of a linear's local slice: codes, 8-bit scales of 64, their scales of 256, offset, both code books."""
    size = prod(linear.cuts["weight"].local_shape)
    blocks = ceil(size / NF4_BLOCK)
    return blocks * NF4_BLOCK // 2 + blocks + 4 * ceil(blocks / NF4_NESTED) + 4 + 4 * 16 + 4 * 256


def state_bytes(name: str, elements: int, model: Llama, optim: str) -> int:
    """What an optimiser keeps for so many elements of one parameter."""
    if optim == "sgd":
        return 0
    if optim == "adamw_8bit" and elements >= EIGHT_BIT_LEAST:
        return 2 * elements + 2 * 4 * ceil(elements / EIGHT_BIT_BLOCK)
    outer = name.startswith(("tok_embeddings.", "output.", "prefix"))
    if optim == "muon" and name.endswith("weight") and not outer and len(cuts_of(model)[name].shape) == 2:
        return 4 * elements
    return 8 * elements


def activations(model: Llama, trained: Collection[str], place: Place, load: Load) -> tuple[int, int]:
    """Bytes that one micro-batch keeps from its forward for its backward pass, and the most that comes on top of them.

    With D = dim, Q and K = local widths of queries and of keys, F = local feed-forward width, H = local heads, T =
    length, c = bytes of a number, a token keeps in each layer that gradients reach:

      none       2 (c D + 4) for the norms, c D for each norm whose output a trained linear (or LoRA) reads, 2 c F for
                 SwiGLU, c F where w2 reads it for a gradient; c (2 Q + 2 K) + 4 H for fused attention, c T for its
                 mask; for LoRA c r a linear, with dropout its own masked input too. A CPU's attention keeps
                 c (Q + 2 K) and softmax(q k'), c H (T + 128) / 2 (less where documents are packed), and wo its input.
      selective  c D + c (Q + 2 K + 2 D + 2 F), fused attention's output, and what LoRA's two products give.
      full       c D.

    To these come the rotations, the mask, the last norm and the gradients of the head's input and weight, and what the
    vision part keeps, measured on the meta device. On top come the logits of a chunk, or the gradients that pass
    through a layer, c (F + D), with what checkpointing computes again of it, a weight that was NF4, and a block of a
    CPU's scores. Left out: what a kernel needs for itself, and torch.compile, which keeps less.
    """
    tokens, c, config = load.rows * load.length, place.width, model.config
    low = _lowest(model, trained)
    plain = {layer: _layer(model, layer, trained, place, load) for layer in range(low, config.n_layers)}
    layers = sum(plain.values())
    if place.checkpointing != "none":
        layers = sum(_kept(model, layer, place) for layer in plain)
    last = 2 * c * config.dim + 4 if low <= config.n_layers else 0
    kept = tokens * (layers + last + 4 * config.head_dim + 8) + _head_weight(model, trained, c)
    kept += load.rows * load.length**2 if load.packed else 0
    passing = _passing(model, place, load) + tokens * _again(model, plain, place) if plain else 0.0
    return round(kept + _seen(model, trained, load)), round(max(passing, _head(model, trained, place, tokens)))


def cache_bytes(model: Llama, place: Place, *, rows: int, length: int) -> int:
    """Keys and values of so many answers at once."""
    keys = model.layers[0].attention.wk.cuts["weight"].local_shape[0]
    return 2 * model.config.n_layers * rows * (length + 1) * keys * place.width


# ---- tensors


def _quantised(model: Llama, place: Place) -> list[str]:
    """Linears whose weight is stored as NF4."""
    return list(model.linears()) if place.quant else []


def _elements(model: Llama, place: Place) -> tuple[dict[str, int], dict[str, int]]:
    """Of every parameter that is no NF4 storage: local elements, and the most that one data-parallel rank is dealt."""
    gone = {f"{name}.weight" for name in _quantised(model, place)}
    shapes = {name: cut.local_shape for name, cut in cuts_of(model).items() if name not in gone}
    whole = {name: prod(shape) for name, shape in shapes.items()}
    return whole, {name: ceil(shape[0] / place.dp) * prod(shape[1:]) for name, shape in shapes.items()}


def _group(name: str) -> str:
    """What FSDP2 gathers together: a block of the decoder or of the tower, or the rest."""
    parts = name.split(".")
    if name.startswith("layers."):
        return ".".join(parts[:2])
    return ".".join(parts[:4]) if name.startswith("vision.tower.blocks.") else ""


def _gathered(whole: dict[str, int], trained: Collection[str], place: Place) -> int:
    """Weights that are whole at once: zero 2 all trained ones; zero 3 two blocks and what is in no block."""
    managed = [name for name in whole if name in trained or (place.zero == 3 and not name.startswith("vision."))]
    if place.zero == 2:
        return place.width * sum(whole[name] for name in managed)
    groups = _summed(whole, managed)
    rest = groups.pop("", 0)
    return place.width * (rest + sum(sorted(groups.values())[-2:]))


def _in_flight(whole: dict[str, int], names: list[str], place: Place) -> int:
    """Gradients of the largest group, as computed and as they are summed over the ranks in fp32."""
    return (place.width + 4) * max(_summed(whole, names).values(), default=0)


def _summed(whole: dict[str, int], names: Collection[str]) -> dict[str, int]:
    """Elements by group."""
    groups: Counter[str] = Counter()
    for name in names:
        groups[_group(name)] += whole[name]
    return dict(groups)


def _nonzero(kinds: Counter[str]) -> Kinds:
    return {kind: size for kind, size in kinds.items() if size}


# ---- activations


def _lowest(model: Llama, trained: Collection[str]) -> int:
    """The first layer that gradients reach; n_layers + 1 where they stop at the head."""
    layers = [int(name.split(".")[1]) for name in trained if name.startswith("layers.")]
    if any(name.startswith(("vision.", "tok_embeddings.")) for name in trained):
        return 0
    if any(name.startswith("prefix") for name in trained):
        layers.append(model.prompt.first)
    return min(layers, default=model.config.n_layers + ("norm.weight" not in trained))


def _layer(model: Llama, layer: int, trained: Collection[str], place: Place, load: Load) -> float:
    """Bytes that a layer keeps for one token without checkpointing."""
    c, dim = place.width, model.config.dim
    linears = dict(_linears(model, layer))
    reads = {name: _reads(linear, f"{prefix}.{name}", trained) for name, (prefix, linear) in linears.items()}
    total = 0.0
    for readers in (("wq", "wk", "wv"), ("w1", "w3")):
        total += c * dim + 4 + c * dim * any(reads[name] for name in readers)
    total += _attention(model, layer, place, load) + (place.device == "cpu") * reads["wo"] * c * _width(linears["wq"])
    hidden = _width(linears["w1"])
    total += c * hidden * (2 + reads["w2"])
    for name, (prefix, linear) in linears.items():
        if f"{prefix}.{name}.lora_a.weight" in trained:
            rank, wide = linear.lora_a.cuts["weight"].local_shape
            dropped = linear.adapter.dropout > 0
            total += c * rank + dropped * wide * (c + (1 if place.device == "cuda" else c))
    return total


def _kept(model: Llama, layer: int, place: Place) -> float:
    """Bytes that a layer keeps for one token under selective or full checkpointing."""
    c, dim = place.width, model.config.dim
    if place.checkpointing == "full":
        return c * dim
    total = float(c * dim)
    for _, entry in _linears(model, layer):
        total += c * _width(entry)
        if hasattr(entry[1], "lora_a"):
            total += c * (entry[1].lora_a.cuts["weight"].local_shape[0] + _width(entry))
    if place.device == "cuda":
        heads = _width(dict(_linears(model, layer))["wq"]) // model.config.head_dim
        total += c * heads * model.config.head_dim + 4 * heads
    return total


def _passing(model: Llama, place: Place, load: Load) -> float:
    """Bytes of the gradients that pass through a layer at once."""
    linears = dict(_linears(model, 0))
    through = load.length * place.width * (_width(linears["w1"]) + model.config.dim)
    scores = 0
    if place.device == "cpu":
        heads = _width(linears["wq"]) // model.config.head_dim
        scores = place.width * heads * min(BLOCK, load.length) * load.length
    largest = max(prod(linear.cuts["weight"].local_shape) for _, linear in linears.values())
    return load.rows * (through + scores) + place.quant * place.width * largest


def _again(model: Llama, plain: dict[int, float], place: Place) -> float:
    """Bytes for one token of a layer that is computed again, without what selective checkpointing has kept of it."""
    if place.checkpointing == "none":
        return 0.0
    linears = dict(_linears(model, 0))
    there = 2 * _width(linears["w1"]) + _width(linears["wv"]) if place.checkpointing == "selective" else 0
    return max(plain.values()) - place.width * there


def _linears(model: Llama, layer: int) -> Iterator[tuple[str, tuple[str, Linear]]]:
    """(last name, (prefix, module)) of a layer's linears."""
    for name, linear in model.layers[layer].named_modules():
        if isinstance(linear, Linear):
            prefix, _, last = name.rpartition(".")
            yield last, (f"layers.{layer}.{prefix}", linear)


def _width(entry: tuple[str, Linear]) -> int:
    """Local output width of a linear."""
    return entry[1].cuts["weight"].local_shape[0]


def _reads(linear: Linear, name: str, trained: Collection[str]) -> bool:
    """Whether its input is kept, for the gradient of its weight or of LoRA without dropout."""
    lora = f"{name}.lora_a.weight" in trained and linear.adapter.dropout == 0
    return f"{name}.weight" in trained or lora


def _attention(model: Llama, layer: int, place: Place, load: Load) -> float:
    """Bytes that attention keeps for one token."""
    c, config = place.width, model.config
    linears = dict(_linears(model, layer))
    queries, keys = _width(linears["wq"]), _width(linears["wk"])
    heads, length = queries // config.head_dim, load.length
    total = 0.0
    if model.prompt is not None and layer >= model.prompt.first:
        total += c * (queries + heads * model.prefix.shape[2])
    if place.device == "cuda":
        return total + c * (2 * queries + 2 * keys) + 4 * heads + load.packed * c * length
    return total + c * (queries + 2 * keys) + c * heads * (length + min(BLOCK, length)) / 2


def _head_weight(model: Llama, trained: Collection[str], width: int) -> int:
    """The gradient of the head's weight, which is computed along with the loss."""
    name = "tok_embeddings.weight" if model.config.tied else "output.weight"
    return width * prod(model.output.slice.local_shape) * (name in trained)


def _head(model: Llama, trained: Collection[str], place: Place, tokens: int) -> int:
    """What the head needs while it works: logits of one chunk, some in fp32 too, and the sum of its weight's gradients.

    A CPU leaves out the positions without a target, so that it needs less.
    """
    rows, dim = model.output.slice.local_shape
    chunk = min(tokens, max(1, CHUNK // rows))
    apart = place.device == "cpu" and model.shard.size == 1
    wide = 0 if place.width == 4 else 4 * (min(PIECE, chunk * rows) if apart else chunk * rows)
    name = "tok_embeddings.weight" if model.config.tied else "output.weight"
    return chunk * rows * place.width + wide + 4 * rows * dim * (name in trained and chunk < tokens)


def _seen(model: Llama, trained: Collection[str], load: Load) -> float:
    """What the vision part keeps for the pictures of a micro-batch: its forward is run on the meta device."""
    vision = getattr(model, "vision", None)
    if vision is None or not load.pictures:
        return 0.0
    config = vision.config
    pixels = torch.empty(1, 3, config.image_size, config.image_size, device="meta")
    own = {parameter.untyped_storage()._cdata for parameter in vision.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    flags = {name: parameter.requires_grad for name, parameter in vision.named_parameters()}
    for name, parameter in vision.named_parameters():
        parameter.requires_grad_(f"vision.{name}" in trained)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        rows = vision(pixels)
    for name, parameter in vision.named_parameters():
        parameter.requires_grad_(flags[name])
    saved = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    mine = load.pictures if not vision.partial else max(1, ceil(load.pictures / model.shard.size))
    return mine * saved + load.pictures * rows.numel() * rows.element_size()
