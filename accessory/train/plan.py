"""The plan of a run, made without weights and without GPUs: parts, memory of each rank by kind, tokens and steps.

Must not read weights or rows: of the data it is told numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal

import torch

from accessory.assemble import Spec, build
from accessory.dist import Shard, dtype_from_name
from accessory.train.evaluate import ROWS
from accessory.train.memory import Kinds, Load, Place, activations, cache_bytes, held
from accessory.train.meter import count_flops
from accessory.train.parts import Parts, choose_parts, table
from accessory.train.settings import Settings
from accessory.train.start import plan_spec
from accessory.vision import VisionConfig

# LLaMA 2 (arXiv 2307.09288), as Meta's params.json has them
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5},
    "13b": {"dim": 5120, "n_layers": 40, "n_heads": 40, "multiple_of": 256, "norm_eps": 1e-5},
    "70b": {
        "dim": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "n_kv_heads": 8,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-5,
    },
}
VOCABULARY, WINDOW = 32000, 4096
PEAK = "on top of them at the peak"
NOT_COUNTED = "CUDA's context (about 0.5 GB a GPU), NCCL's buffers, holes between tensors (up to a tenth)"


@dataclass(frozen=True)
class DataFacts:
    """What is known of the data."""

    rows: int
    steps_per_epoch: int | None
    """None for a stream."""
    tokens: int | None = None
    """Positions of one epoch that are no padding."""
    batch: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the first micro-batch's tensors."""
    pictures: float = 0.0
    """Tiles of the pictures of a row (of a sequence, where packed), on average."""
    length: float | None = None
    """Positions of a token's own row, on average: sum of squares of the lengths / their sum."""


@dataclass(frozen=True)
class Plan:
    """What a run would be; memory is that of the fullest rank, in bytes."""

    spec: Spec
    parts: Parts
    tp: int
    dp: int
    place: Place
    device: Kinds
    host: Kinds
    cache: int
    """Keys and values while validation answers questions; needed when activations are not."""
    rows: int
    """Of a step, over all ranks and micro-batches."""
    length: int
    accumulation: int
    batch: Mapping[str, tuple[int, ...]]
    steps: int | None
    epochs: float | None
    step_flops: float
    data: DataFacts | None

    @property
    def peak(self) -> int:
        """Bytes of the device's memory at the worst moment."""
        passing = self.device["activations"] + self.device[PEAK]
        return sum(self.device.values()) - passing + max(passing, self.cache)


@dataclass(frozen=True)
class _Shape:
    """What `plan_spec` reads of a checkpoint, for a model that is nowhere."""

    config: dict[str, Any]
    meta: dict[str, Any] = field(default_factory=dict)
    sources: tuple[Any, ...] = ()


def shape_spec(settings: Settings) -> Spec:
    """The model that `shape`, llama_type and llama_config describe: a LLaMA 2, which sees where its type or parts do.

    Raises ValueError for settings that do not fit together.
    """
    assert settings.shape is not None, "no shape is given"
    config = {**SHAPES[settings.shape], "vocab_size": VOCABULARY, "max_seq_len": max(WINDOW, settings.cutoff_len)}
    kind = settings.llama_type or "llama"
    if "qformerv2" in kind or settings.train_projector is not None or settings.train_vision != "frozen":
        vision = "qformer" if "qformerv2" in kind else "perceiver" if "adapter" in kind else "clip"
        config["vision"] = VisionConfig.reference(vision).to_dict()
    return plan_spec(settings, _Shape(config), VOCABULARY)


def plan(
    settings: Settings,
    spec: Spec,
    *,
    world: int,
    device: Literal["cuda", "cpu"] = "cuda",
    dtype: torch.dtype | None = None,
    data: DataFacts | None = None,
) -> Plan:
    """Plan a run of `spec` on `world` ranks; nothing is allocated. dtype: None for what the settings say, or bf16.

    Raises ValueError for ranks and parts that cannot be.
    """
    tp = settings.tensor_parallel_size
    if world < tp or world % tp:
        raise ValueError(
            f"tensor_parallel_size: got {tp} with {world} rank(s), expected a divisor of the number of ranks; set"
            " world_size"
        )
    if dtype is None:
        dtype = dtype_from_name(settings.precision) if settings.precision else torch.bfloat16
    dp, batch = world // tp, settings.per_device_train_batch_size
    place = place_of(settings, dp=dp, dtype=dtype, device=device)
    model = build(spec, shard=Shard(0, tp), dtype=dtype)
    pictures = spec.vision is not None and (data is None or data.pictures > 0)
    parts = choose_parts(model, settings, pictures=pictures)
    each = _tiles(spec) if data is None else data.pictures
    load = Load(batch, settings.cutoff_len, settings.packing, batch * each if pictures else 0.0)
    on_device, on_host = held(model, parts.names, place)
    on_device["activations"], on_device[PEAK] = activations(model, parts.names, place, load)
    rows = batch * settings.gradient_accumulation_steps * dp
    length = settings.cutoff_len if data is None or data.length is None else data.length
    flops = count_flops(model, parts.names, length=length)
    steps = _steps(settings, data)
    return Plan(
        spec=spec,
        parts=parts,
        tp=tp,
        dp=dp,
        place=place,
        device=on_device,
        host=on_host,
        cache=_cache(settings, model, place, spec),
        rows=rows,
        length=settings.cutoff_len,
        accumulation=settings.gradient_accumulation_steps,
        batch=_shapes(load, spec, model) if data is None or not data.batch else data.batch,
        steps=steps,
        epochs=steps / data.steps_per_epoch if steps and data is not None and data.steps_per_epoch else None,
        step_flops=rows * (settings.cutoff_len * flops.token + (each if pictures else 0.0) * flops.picture),
        data=data,
    )


def place_of(settings: Settings, *, dp: int, dtype: torch.dtype, device: Literal["cuda", "cpu"]) -> Place:
    """Where the settings put tensors."""
    return Place(
        dp=dp,
        zero=settings.zero,
        offload=settings.cpu_offload,
        dtype=dtype,
        device=device,
        quant=settings.quantization_bit == 4,
        optim=settings.optim,
        checkpointing=settings.activation_checkpointing,
    )


def render(plan: Plan) -> str:
    """The plan as text."""
    config, place = plan.spec.llama, plan.place
    name = str(place.dtype).removeprefix("torch.")
    lines = [
        f"model   {plan.spec.llama_type}: dim {config.dim}, {config.n_layers} layers, {config.n_heads} heads,"
        f" feed-forward {config.ffn_dim}, vocabulary {config.vocab_size}; computed in {name}",
        f"ranks   {plan.tp * plan.dp} on {place.device}: tensor parallel {plan.tp} x data parallel {plan.dp}"
        + (f", zero {place.zero}" if plan.dp > 1 else ""),
        "",
        *table(plan.parts),
        "",
        f"{'memory of the fullest rank, GB':<38} {'device':>9} {'host':>9}",
    ]
    for kind in dict.fromkeys([*plan.device, *plan.host]):
        lines.append(f"  {kind:<36} {_gb(plan.device.get(kind))} {_gb(plan.host.get(kind))}")
    if plan.cache > plan.device["activations"] + plan.device[PEAK]:
        lines.append(f"  {'or, in their place: validation':<36} {_gb(plan.cache)}")
    lines.append(f"  {'together, at the worst moment':<36} {_gb(plan.peak)} {_gb(sum(plan.host.values()) or None)}")
    lines += [f"  not counted: {NOT_COUNTED}", ""]
    lines.append(
        f"step    {plan.rows} rows of up to {plan.length} positions (data parallel {plan.dp} x micro-batches"
        f" {plan.accumulation} x rows {plan.rows // plan.dp // plan.accumulation}):"
        f" {plan.rows * plan.length:,} tokens, {plan.step_flops:.3g} floating-point operations"
    )
    lines.append(_steps_line(plan))
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in plan.batch.items())
    lines.append(f"batch   {shapes}")
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _steps_line(plan: Plan) -> str:
    """Steps, epochs and rows, as far as they are known."""
    data, steps = plan.data, "not known without data" if plan.steps is None else f"{plan.steps:,}"
    if data is None:
        return f"steps   {steps}"
    epochs = "" if plan.epochs is None else f", {plan.epochs:.4g} epochs of {data.steps_per_epoch:,} steps"
    tokens = "" if data.tokens is None else f", {data.tokens:,} tokens"
    return f"steps   {steps}{epochs}; {data.rows:,} rows{tokens} in an epoch"


def _steps(settings: Settings, data: DataFacts | None) -> int | None:
    """Steps of the run, where they are known."""
    if settings.max_steps > 0:
        return settings.max_steps
    if data is None or data.steps_per_epoch is None:
        return None
    return max(1, ceil(settings.num_train_epochs * data.steps_per_epoch))


def _shapes(load: Load, spec: Spec, model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors of a full micro-batch."""
    square = (load.rows, load.length)
    shapes: dict[str, tuple[int, ...]] = {"ids": square, "positions": square, "labels": square}
    if load.packed:
        shapes["segments"] = square
    if load.pictures and spec.vision is not None:
        side = spec.vision.image_size
        shapes |= {"slots": square, "pixels": (ceil(load.pictures), 3, side, side)}
    return shapes


def _tiles(spec: Spec) -> float:
    """The most tiles that a picture becomes."""
    vision = spec.vision
    if vision is None or vision.kind != "llava" or vision.aspect != "anyres":
        return 1.0
    return 1.0 + max(width * height for width, height in vision.grid_pinpoints) / vision.image_size**2


def _cache(settings: Settings, model: Any, place: Place, spec: Spec) -> int:
    """What answering validation's questions takes."""
    judged = settings.stage == "sft" and (settings.eval_dataset or settings.val_size)
    if not judged or not settings.eval_answers:
        return 0
    length = min(spec.llama.max_seq_len, settings.cutoff_len + settings.eval_max_new_tokens)
    return cache_bytes(model, place, rows=min(ROWS, settings.eval_answers), length=length)


def _gb(size: int | None) -> str:
    """Bytes in columns of GB (1e9)."""
    return f"{'':>9}" if size is None else f"{size / 1e9:>9.3f}"
