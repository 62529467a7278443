"""The plan of a run against the run: what tensors hold to the byte, what a step keeps within a stated factor."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_toys import ONE, opened, write_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_toys import train_on

from accessory.assemble import Spec, build, read_spec
from accessory.dist import Ranks
from accessory.model import Llama, LlamaConfig
from accessory.model.parallel import Column
from accessory.quant import quantise
from accessory.train.memory import Load, Place, activations, cache_bytes, held, nf4_bytes
from accessory.train.optim import make_optimizer
from accessory.train.plan import PEAK, DataFacts, place_of, plan, render, shape_spec
from accessory.train.settings import Settings
from accessory.train.start import plan_spec
from accessory.train.trainee import Trainee
from spawn import run_ranks

BF16 = torch.bfloat16


def planned(world: int = 1, data: DataFacts | None = None, device: Any = "cuda", **settings: Any):
    asked = Settings(dry_run=True, **settings)
    asked.check()
    return plan(asked, shape_spec(asked), world=world, data=data, device=device)


# ---- parameters


def test_llama_2_7b_with_lora_on_all_linears_trains_as_many_parameters_as_everywhere() -> None:
    seen = planned(shape="7b", finetuning_type="lora", lora_rank=8)
    assert (seen.parts.trained, seen.parts.llm.total) == (19_988_480, 6_758_404_096)
    assert "19,988,480" in render(seen)


@pytest.mark.parametrize(("shape", "size"), [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("70b", 68_976_648_192)])
def test_the_shapes_are_those_of_llama_2_at_any_tensor_parallel_size(shape: str, size: int) -> None:
    sizes = {planned(tp, shape=shape, tensor_parallel_size=tp).parts.trained for tp in (1, 2, 8)}
    assert sizes == {size}


def test_a_70b_on_512_ranks_is_planned_in_no_time_and_no_memory() -> None:
    began = time.monotonic()
    seen = planned(512, shape="70b", tensor_parallel_size=8, zero=3, activation_checkpointing="full")
    assert time.monotonic() - began < 20 and (seen.tp, seen.dp) == (8, 64)
    assert seen.device["masters, fp32"] == pytest.approx(4 * 68_976_648_192 / 512, rel=1e-3)
    assert seen.peak < 30e9


def test_a_seeing_shape_is_planned_with_its_vision_part() -> None:
    options = {"finetuning_type": "frozen", "train_projector": "full", "llama_type": "llama_qformerv2"}
    seen = planned(8, shape="13b", tensor_parallel_size=2, **options)
    assert seen.parts.trained == seen.parts.projector.trained == 109_120_000 and seen.parts.vision.total > 9e8
    assert seen.batch["pixels"] == (4, 3, 224, 224) and "projector  full" in render(seen)


def test_ranks_that_tensor_parallelism_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size: got 2 with 3"):
        planned(3, shape="7b", tensor_parallel_size=2)


# ---- tensors, to the byte


def nbytes(tensors: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def step_once(trainee: Trainee, settings: Settings) -> torch.optim.Optimizer:
    """One step on a few tokens."""
    ids = torch.arange(12).view(2, 6) + 3
    batch = {"ids": ids, "positions": torch.arange(6).expand(2, 6), "labels": ids}
    trainee.forward_backward({key: tensor.clone() for key, tensor in batch.items()}, scale=0.1, last=True)
    trainee.clip(1.0)
    optimizer = make_optimizer(trainee, settings)
    optimizer.step()
    return optimizer


def counted(trainee: Trainee, optimizer: torch.optim.Optimizer, settings: Settings) -> dict[str, int]:
    """The bytes that the tensors of a run hold, under the plan's names."""
    llama, masters = trainee.module.llama, trainee.masters
    states = {parameter: state for parameter, state in optimizer.state.items()}
    tensors = [
        tensor
        for state in states.values()
        for key, tensor in state.items()
        if isinstance(tensor, Tensor) and key not in ("step", "qmap1", "qmap2")
    ]
    names = {name for name, _ in llama.named_parameters()}
    copies = [llama.get_parameter(name) for name in names & set(masters)]
    own = {tensor.untyped_storage()._cdata for tensor in masters.values()}
    apart = [copy for copy in copies if copy.untyped_storage()._cdata not in own]
    local = [trainee._masters.local(name) for name in names - set(masters)]
    return {
        "frozen weights": sum(tensor.numel() * tensor.element_size() for tensor in local),
        "frozen weights, NF4": nbytes(llama.buffers()),
        "masters, fp32": sum(4 * tensor.numel() for tensor in masters.values()),
        "gradients, fp32": sum(4 * tensor.grad.numel() for tensor in masters.values()),
        f"optimizer state, {settings.optim}": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "copies to compute with": nbytes(apart) if trainee.ranks.dp_size == 1 else 0,
    }


def compare(ranks: Ranks, folder: Path, options: dict[str, Any], dtype: torch.dtype) -> tuple[dict, dict]:
    """What a run holds on this rank after a step, and what the plan says of the fullest one."""
    settings = Settings(**options)
    trainee, _ = train_on(folder, ranks, settings, dtype=dtype, pictures=True)
    names = trainee.parts.names
    found = counted(trainee, step_once(trainee, settings), settings)
    meta = {name: parameter.shape for name, parameter in trainee.module.llama.named_parameters()}
    assert meta, "nothing to count"
    model = plain_of(folder, settings, ranks)
    said, host = held(model, names, place_of(settings, dp=ranks.dp_size, dtype=dtype, device="cpu"))
    assert not host
    return {kind: size for kind, size in found.items() if size}, said


def plain_of(folder: Path, settings: Settings, ranks: Ranks) -> Llama:
    """The same model on the meta device."""
    from accessory.checkpoint import open_folders
    from accessory.train.parts import peft_config

    checkpoint = open_folders([folder])
    added = peft_config(settings)
    kind = checkpoint.meta["llama_type"] + ("_peft" if added else "")
    return build(read_spec({**checkpoint.config, **added}, llama_type=kind), shard=ranks.shard)


RUNS = {
    "full bf16": ({}, BF16),
    "full fp32": ({}, torch.float32),
    "everything, the tower too": ({"train_projector": "full", "train_vision": "full"}, BF16),
    "lora": ({"finetuning_type": "lora"}, BF16),
    "norm_bias, sgd": ({"finetuning_type": "norm_bias", "optim": "sgd"}, BF16),
    "muon": ({"optim": "muon", "train_projector": "frozen"}, BF16),
    "8 bit": ({"optim": "adamw_8bit"}, torch.float32),
    "nf4": ({"finetuning_type": "lora", "quantization_bit": 4}, BF16),
}


@pytest.mark.parametrize("run", RUNS)
def test_what_tensors_hold_is_planned_to_the_byte(run: str, tmp_path: Path) -> None:
    found, said = compare(ONE, write_model(tmp_path / "model"), *RUNS[run])
    assert found == {kind: size for kind, size in said.items() if kind != "gradients on their way"}


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize(("kind", "tp"), [("full", 1), ("lora", 2)])
def test_what_a_rank_of_several_holds_is_planned_to_the_byte(kind: str, tp: int, zero: int, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    options = {"zero": zero, "finetuning_type": kind, "tensor_parallel_size": tp}
    both = run_ranks(compare, 2 * tp, folder, options, BF16, tp=tp)
    found, said = both[0]
    moving = ("gathered weights", "gradients on their way")
    assert found == {kind: size for kind, size in said.items() if kind not in moving}
    assert all(other.get(kind, 0) <= size for other, _ in both for kind, size in found.items())


def test_gathered_weights_are_all_trained_ones_or_two_blocks_and_the_rest() -> None:
    model = Llama(LlamaConfig(dim=64, n_layers=5, n_heads=4, vocab_size=100, multiple_of=16))
    size = {name: parameter.numel() for name, parameter in model.named_parameters()}
    block = sum(count for name, count in size.items() if name.startswith("layers.0."))
    rest = sum(size.values()) - 5 * block
    gathered = {zero: held(model, set(size), Place(dp=4, zero=zero))[0]["gathered weights"] for zero in (2, 3)}
    assert gathered == {2: 2 * sum(size.values()), 3: 2 * (2 * block + rest)}


def test_offload_moves_masters_gradients_and_optimizer_state_to_the_host() -> None:
    there, here = (planned(2, shape="7b", cpu_offload=offload) for offload in (True, False))
    kinds = {"masters, fp32", "gradients, fp32", "optimizer state, adamw"}
    assert set(there.host) == kinds and not kinds & set(there.device) and not here.host
    assert here.peak - there.peak == sum(there.host.values()) == 16 * 6_738_415_616 // 2


def test_nf4_storage_takes_what_the_quantised_linear_holds() -> None:
    from accessory.dist import Shard

    for d_in, d_out in ((64, 96), (80, 48), (256, 520)):
        linear = Column(d_in, d_out, shard=Shard(), device="cpu", dtype=BF16)
        said = nf4_bytes(linear)
        quantise(linear, torch.randn(d_out, d_in).to(BF16))
        assert said == nbytes(linear.storage.buffers())
    wide = Column(4096, 11008, shard=Shard(), device="meta", dtype=BF16)
    assert 8 * nf4_bytes(wide) / (4096 * 11008) == pytest.approx(4.127, abs=1e-3)


def test_the_cache_of_validation_takes_what_the_engines_cache_holds(tmp_path: Path) -> None:
    model = opened(write_model(tmp_path / "model", "llama", sees=False)).model
    said = cache_bytes(model, Place(dtype=torch.float32), rows=3, length=40)
    assert said == model.new_cache(rows=3, size=40).nbytes


def test_the_cache_counts_where_it_is_larger_than_activations() -> None:
    options = {"shape": "7b", "finetuning_type": "lora", "cutoff_len": 128, "per_device_train_batch_size": 1}
    with_it = planned(eval_dataset=["x"], eval_max_new_tokens=3900, **options)
    passing = with_it.device["activations"] + with_it.device[PEAK]
    assert with_it.cache > passing and "in their place: validation" in render(with_it)
    assert with_it.peak - planned(**options).peak == with_it.cache - passing
    assert planned(eval_dataset=["x"], stage="pt", **options).cache == 0


# ---- activations, within a factor


class Live(TorchDispatchMode):
    """Bytes of the storages that ops made and somebody still holds: now, and at most so far."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own, self.peak = own, 0
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen = {key: entry for key, entry in self.seen.items() if not entry[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.own:
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    @property
    def now(self) -> int:
        return sum(size for held, size in self.seen.values() if not held.expired())


WIDE = {"dim": 128, "n_layers": 3, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 352, "max_seq_len": 512}


def measured(folder: Path, settings: Settings, dtype: torch.dtype, load: Load) -> tuple[float, float]:
    """What the plan says of what a step keeps after its forward, and of its peak, over what was measured."""
    trainee, _ = train_on(folder, ONE, settings, dtype=dtype, pictures=load.pictures > 0)
    ids = torch.randint(3, 60, (load.rows, load.length))
    batch = {"ids": ids, "positions": torch.arange(load.length).expand_as(ids), "labels": ids.clone()}
    if load.packed:
        batch["segments"] = torch.ones_like(ids)
    if load.pictures:
        count = trainee.module.llama.vision.slots
        batch["slots"] = torch.full_like(ids, -1)
        batch["slots"][:, :count] = torch.arange(load.rows * count).view(load.rows, count)
        batch["pixels"] = torch.rand(load.rows, 3, 16, 16)
    own = {p.untyped_storage()._cdata for p in [*trainee.module.parameters(), *trainee.masters.values()]}
    with Live(own) as live:
        total, _ = trainee.module(**batch)
        kept = live.now
        total.backward()
    meta = plain_of(folder, settings, ONE).to(dtype)
    said, top = activations(meta, trainee.parts.names, place_of(settings, dp=1, dtype=dtype, device="cpu"), load)
    return said / kept, (said + top) / live.peak


@pytest.mark.parametrize(("dtype", "packed"), [(torch.float32, False), (BF16, True)])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "kind", [{}, {"finetuning_type": "lora"}, {"finetuning_type": "norm_bias"}, {"finetuning_type": "freeze"}]
)
def test_activations_are_planned_within_a_tenth_and_their_peak_within_a_fifth(
    kind: dict[str, Any], checkpointing: Any, packed: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model", "llama", sees=False, **WIDE)
    settings = Settings(activation_checkpointing=checkpointing, **kind)
    kept, peak = measured(folder, settings, dtype, Load(2, 384, packed))
    assert 0.9 < kept < 1.1 and 0.8 < peak < 1.2, (kept, peak)


@pytest.mark.parametrize("parts", [("full", "frozen"), ("full", "full"), ("lora", "frozen")])
def test_activations_of_the_vision_part_are_planned_too(parts: tuple[Any, Any], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    settings = Settings(finetuning_type="frozen", train_projector=parts[0], train_vision=parts[1])
    kept, peak = measured(folder, settings, torch.float32, Load(16, 12, False, pictures=16))
    assert 0.9 < kept < 1.1 and 0.8 < peak < 1.2, (kept, peak)


# ---- steps and text


def test_without_data_the_plan_says_that_steps_are_not_known() -> None:
    seen = planned(shape="7b")
    assert seen.steps is None and seen.epochs is None and "steps   not known without data" in render(seen)
    assert planned(shape="7b", max_steps=50).steps == 50


def test_with_data_the_plan_says_steps_epochs_and_the_first_batch() -> None:
    data = DataFacts(rows=52002, steps_per_epoch=101, tokens=9_000_000, batch={"ids": (4, 2048)}, length=300.0)
    seen = planned(2, data, shape="7b", gradient_accumulation_steps=8, num_train_epochs=2.5)
    text = render(seen)
    assert (seen.steps, seen.rows, seen.epochs) == (253, 64, pytest.approx(2.505, abs=1e-3))
    assert "64 rows of up to 2048 positions" in text and "131,072 tokens" in text
    assert "253, 2.505 epochs of 101 steps; 52,002 rows, 9,000,000 tokens in an epoch" in text
    assert "ids [4, 2048]" in text
    longer = planned(2, shape="7b", gradient_accumulation_steps=8)
    assert seen.step_flops < longer.step_flops, "attention within short documents costs less"


def test_a_stream_has_steps_and_no_epochs() -> None:
    seen = planned(1, DataFacts(rows=0, steps_per_epoch=None), shape="7b", max_steps=9)
    assert (seen.steps, seen.epochs) == (9, None)


def test_data_without_pictures_plans_none() -> None:
    spec = Spec("llama_qformerv2", LlamaConfig(dim=64, n_layers=1, n_heads=4, vocab_size=99, multiple_of=16))
    seen = plan(Settings(), spec, world=1, data=DataFacts(rows=1, steps_per_epoch=1))
    assert "pixels" not in seen.batch


def test_the_text_of_a_plan_adds_up() -> None:
    seen = planned(4, shape="7b", finetuning_type="lora", quantization_bit=4, only_save_trainable=True)
    text = render(seen)
    numbers = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("  ") and "not" not in line]
    assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.01) and "NF4" in text


def test_a_wider_window_scales_dynamic_rotary_positions_from_the_one_the_model_was_trained_for(tmp_path):
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 50, "max_seq_len": 128}
    said = {**sizes, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    (tmp_path / "params.json").write_text(json.dumps(said))
    told = Settings(llama_config=[str(tmp_path / "params.json")], max_seq_len=512, cutoff_len=512)
    spec = plan_spec(told, None, 50)
    assert spec.llama.max_seq_len == 512 and spec.llama.rope_scaling["original_max_position_embeddings"] == 128
