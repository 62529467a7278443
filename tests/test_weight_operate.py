"""tools/weight_operate.py and tools/reshard.py: differences and sums of whole folders.

Must not build a model.
"""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import folders
import pytest
import torch

from accessory.checkpoint import open_folders
from accessory.checkpoint.operate import same_bits
from accessory.checkpoint.reshard import cut
from accessory.dist import Cut

ROOT = Path(__file__).parents[1]


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


operate, reshard = tool("weight_operate"), tool("reshard")


def run(main, **flags):
    main([word for name, value in flags.items() for word in (f"--{name}", *map(str, listed(value)))])


def listed(value):
    return value if isinstance(value, list) else [value]


def read(*paths):
    opened = open_folders(paths)
    return dict(opened.tensors(opened.cuts()))


def hard_pair(base_dtype, tuned_dtype):
    """A base and a finetuned state with every kind of element that an fp32 difference cannot carry."""
    base, tuned = folders.state(0, dtype=base_dtype), folders.state(1, dtype=tuned_dtype)
    weight = tuned["layers.0.attention.wo.weight"]
    weight[0, :8] = torch.tensor([float("nan"), float("inf"), -0.0, 0.0, 1e-7, -1e-7, 3e-8, 2.0]).to(tuned_dtype)
    base["layers.0.attention.wo.weight"][0, :8] = torch.tensor([1.0, 2.0, 0.0, -0.0, 1000.0, 777.0, 1.0, float("nan")])
    weight[:, 9] *= 1e-6  # far below the base: the sum cannot reach it
    tuned["norm.weight"][:] = base["norm.weight"].to(tuned_dtype)
    tuned["layers.1.attention.wq.bias"] = torch.randn(folders.DIM).to(tuned_dtype)
    tuned["vision.start"] = torch.randn(folders.DIM).to(tuned_dtype)
    return base, tuned


@pytest.mark.parametrize(
    ("base_dtype", "tuned_dtype"),
    [
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_extract_then_apply_is_bitwise_with_fp32_deltas(tmp_path, base_dtype, tuned_dtype, form):
    base, tuned = hard_pair(base_dtype, tuned_dtype)
    folders.meta(tmp_path / "base", base, shards=2)
    folders.accessory(tmp_path / "tuned", tuned, shards=3)
    flags = {"pretrained_path": tmp_path / "base", "format": form}
    run(
        operate,
        **flags,
        delta_path=tmp_path / "tuned",
        output_path=tmp_path / "delta",
        operate_type="extract",
        delta_dtype="fp32",
        shards=4,
    )
    run(operate, **flags, delta_path=tmp_path / "delta", output_path=tmp_path / "out", shards=1)
    got = read(tmp_path / "out")
    assert set(got) == set(tuned)
    for name, tensor in tuned.items():
        assert same_bits(got[name], tensor), name


def test_the_exceptions_of_a_delta_reach_the_rank_that_holds_them(tmp_path):
    base, tuned = hard_pair(torch.float32, torch.float32)
    folders.meta(tmp_path / "base", base)
    folders.accessory(tmp_path / "tuned", tuned)
    run(
        operate,
        pretrained_path=tmp_path / "base",
        delta_path=tmp_path / "tuned",
        output_path=tmp_path / "delta",
        operate_type="extract",
        delta_dtype="fp32",
    )
    assert (tmp_path / "delta" / "exact.safetensors").exists()
    for rank in range(2):
        cuts = {name: Cut(tuple(tensor.shape)) for name, tensor in tuned.items()}
        cuts["layers.0.attention.wo.weight"] = Cut((16, 16), 1, 8 * rank, 8 * rank + 8)
        cuts["output.weight"] = Cut((33, 16), 0, 17 * rank, 17 + 16 * rank, pad=rank)
        got = dict(open_folders([tmp_path / "base", tmp_path / "delta"]).tensors(cuts))
        assert all(same_bits(got[name], cut(tuned[name], cuts[name])) for name in tuned)
        wide = dict(open_folders([tmp_path / "base", tmp_path / "delta"]).tensors(cuts, dtype=torch.bfloat16))
        assert all(same_bits(wide[name], cut(tuned[name], cuts[name]).bfloat16()) for name in tuned)


def ulp(tensor, dtype):
    """The distance of neighbouring numbers of `dtype` around each element."""
    info = torch.finfo(dtype)
    return torch.exp2((torch.frexp(tensor).exponent - 1).double()).clamp(min=info.smallest_normal) * info.eps


@pytest.mark.parametrize("delta_dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_delta_is_within_half_an_ulp_of_itself_and_one_of_the_result(tmp_path, dtype, delta_dtype):
    base, tuned = folders.state(0, dtype=dtype), folders.state(1, dtype=dtype)
    folders.meta(tmp_path / "base", base, shards=2)
    folders.accessory(tmp_path / "tuned", tuned)
    flags = {"pretrained_path": tmp_path / "base"}
    run(
        operate,
        **flags,
        delta_path=tmp_path / "tuned",
        output_path=tmp_path / "delta",
        operate_type="extract",
        delta_dtype=delta_dtype,
    )
    run(operate, **flags, delta_path=tmp_path / "delta", output_path=tmp_path / "out")
    got = read(tmp_path / "out")
    stored = {"fp16": torch.float16, "bf16": torch.bfloat16}[delta_dtype]
    for name, tensor in tuned.items():
        assert got[name].dtype == dtype
        gap = (got[name].double() - tensor.double()).abs()
        exact = tensor.double() - base[name].double()
        assert (gap <= ulp(exact, stored) / 2 + ulp(tensor.double(), dtype)).all(), name


def test_extract_writes_the_references_layout(tmp_path):
    base, tuned = folders.state(0, dtype=torch.float16), folders.state(1, dtype=torch.bfloat16)
    tuned["layers.0.attention.wq.bias"] = torch.ones(folders.DIM, dtype=torch.bfloat16)
    folders.meta(tmp_path / "base", base, shards=2)
    folders.accessory(tmp_path / "tuned", tuned, shards=2)
    run(
        operate,
        pretrained_path=tmp_path / "base",
        delta_path=tmp_path / "tuned",
        output_path=tmp_path / "delta",
        operate_type="extract",
        format="pth",
    )
    parts = zip(folders.pieces(base, 2), folders.pieces(tuned, 2), strict=True)
    for index, (base_part, tuned_part) in enumerate(parts):
        held = torch.load(tmp_path / "delta" / f"consolidated.{index:02d}-of-02.model-diff.pth", weights_only=True)
        assert set(held["model"]) == {f"llma.{name}" for name in tuned}
        for name, tensor in tuned_part.items():
            wanted = (tensor.float() - (base_part[name].float() if name in base_part else 0)).half()
            assert torch.equal(held["model"][f"llma.{name}"], wanted)


@pytest.mark.parametrize("dtype", [None, "bf16", "fp32"])
def test_apply_adds_a_released_delta_in_fp32(tmp_path, dtype):
    base, delta = folders.state(0, dtype=torch.bfloat16), folders.state(1, dtype=torch.float16, scale=0.01)
    delta["vision.start"] = torch.ones(folders.DIM).half()
    folders.accessory(tmp_path / "base", base, shards=2, ext="safetensors")
    folders.accessory(tmp_path / "delta", delta, kind="model-diff", legacy=True)
    flags = {"dtype": dtype} if dtype else {}
    run(
        operate,
        pretrained_path=tmp_path / "base",
        delta_path=tmp_path / "delta",
        output_path=tmp_path / "out",
        **flags,
    )
    got = read(tmp_path / "out")
    stored = torch.float32 if dtype == "fp32" else torch.bfloat16
    for name, tensor in delta.items():
        wanted = tensor.float() + base[name].float() if name in base else tensor.float()
        assert same_bits(got[name], wanted.to(stored)), name
    opened = open_folders(tmp_path / "out")
    assert opened.config == folders.CONFIG and opened.meta == {"llama_type": "llama"}
    assert opened.tokenizer is not None and len(opened.folders[0].shards) == 2


def test_reshard_joins_a_base_and_trained_tensors(tmp_path):
    base, trained = folders.state(0), {"norm.weight": torch.ones(folders.DIM)}
    folders.meta(tmp_path / "base", base, shards=2)
    folders.accessory(tmp_path / "peft", trained)
    run(reshard, pretrained_path=[tmp_path / "base", tmp_path / "peft"], output_path=tmp_path / "out", shards=4)
    got = read(tmp_path / "out")
    assert all(same_bits(got[name], tensor) for name, tensor in {**base, **trained}.items())


def refusal(main, **flags):
    with pytest.raises(ValueError) as caught:
        run(main, **flags)
    return str(caught.value)


def test_a_finetuned_folder_that_lacks_base_tensors_is_refused(tmp_path):
    base = folders.state()
    folders.meta(tmp_path / "base", base)
    folders.accessory(tmp_path / "tuned", {name: t for name, t in base.items() if "norm" not in name})
    text = refusal(
        operate,
        pretrained_path=tmp_path / "base",
        delta_path=tmp_path / "tuned",
        output_path=tmp_path / "out",
        operate_type="extract",
    )
    assert "lacks 5 of the 21 tensors" in text and "norm.weight" in text
    assert not (tmp_path / "out").exists()


def test_other_shapes_integers_and_overflow_are_refused(tmp_path):
    base, big = folders.state(), folders.state(1)
    big["norm.weight"] = torch.full((folders.DIM,), 1e5)
    tuned = {"other": {**base, "norm.weight": torch.ones(7)}, "whole": {**base, "vision.steps": torch.ones(2).int()}}
    folders.meta(tmp_path / "base", base)
    flags = {"pretrained_path": tmp_path / "base", "output_path": tmp_path / "out", "operate_type": "extract"}
    for name, tensors in {**tuned, "big": big}.items():
        folders.accessory(tmp_path / name, tensors, legacy=True)
    assert "norm.weight (16,) and (7,)" in refusal(operate, **flags, delta_path=tmp_path / "other")
    assert "vision.steps: not floating point" in refusal(operate, **flags, delta_path=tmp_path / "whole")
    assert "norm.weight: a difference of" in refusal(operate, **flags, delta_path=tmp_path / "big")
    assert not (tmp_path / "out").exists()


def test_apply_wants_a_delta(tmp_path):
    folders.meta(tmp_path / "base", folders.state())
    folders.accessory(tmp_path / "tuned", folders.state())
    flags = {"pretrained_path": tmp_path / "base", "output_path": tmp_path / "out"}
    assert "expected delta weights" in refusal(operate, **flags, delta_path=tmp_path / "tuned")
    assert "--delta_dtype" in refusal(operate, **flags, delta_path=tmp_path, operate_type="extract", dtype="fp16")


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(tmp_path, caplog):
    folders.meta(tmp_path / "base", folders.state())
    folders.accessory(tmp_path / "delta", folders.state(1), kind="model-diff")
    with caplog.at_level(logging.INFO):
        run(
            operate,
            pretrained_path=tmp_path / "base",
            delta_path=tmp_path / "delta",
            output_path=tmp_path / "out",
            shards=2,
            dry_run="true",
        )
    assert "would write" in caplog.text and "consolidated.00-of-02.model.safetensors" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["base", "delta"]


def test_the_seeds_command_runs_and_a_bad_folder_is_one_line_and_exit_code_1(tmp_path):
    folders.meta(tmp_path / "base", folders.state())
    folders.accessory(tmp_path / "delta", folders.state(1), kind="model-diff")
    command = [sys.executable, str(ROOT / "tools" / "weight_operate.py"), "--pretrained_path", str(tmp_path / "base")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    paths = ["--delta_path", str(tmp_path / "delta"), "--output_path", str(tmp_path / "out")]
    done = subprocess.run([*command, *paths], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "verified" in done.stderr and done.stdout == ""
    paths = ["--delta_path", str(tmp_path / "absent")]
    done = subprocess.run([*command, *paths], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "no such folder" in done.stderr and done.stderr.count("\n") == 1
