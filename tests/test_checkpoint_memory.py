"""Loading on a rank takes the memory of what it keeps, writing that of a few tensors; counted by the kernel.

Must not build a model.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
SIZE, COUNT = 1024, 32  # 4 MiB a tensor, 128 MiB a folder

MEASURE = """
import gc, json, os, sys, torch
from accessory.checkpoint import Stream, open_folders, write_folder
from accessory.dist import Cut

def anonymous():
    gc.collect()
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def load(folders, dtype):
    checkpoint = open_folders(folders)
    cuts = {}
    for key, cut in checkpoint.cuts().items():
        cuts[key] = Cut(cut.shape, 0 if ".w1." in key or ".wq." in key else 1, 0, cut.shape[0] // 2)
    return [tensor for _, tensor in checkpoint.tensors(cuts, dtype=dtype)]

def case(work, *args):
    torch.zeros(4).copy_(torch.ones(4, dtype=torch.bfloat16))
    before = anonymous()
    kept = work(*args)
    return {"grown": anonymous() - before, "kept": sum(tensor.nbytes for tensor in kept)}

def peak(folders, target, fmt):
    # the largest growth while tensors pass by, from one folder into two shards
    before, seen = anonymous(), [0]
    checkpoint = open_folders(folders)
    def items():
        for key, tensor in checkpoint.tensors(checkpoint.cuts()):
            yield key, tensor
            seen.append(anonymous() - before)
    write_folder(target, Stream(checkpoint.specs(), items()), shards=2, fmt=fmt)
    return {"grown": max(seen), "kept": checkpoint.specs()["layers.0.feed_forward.w1.weight"].nbytes}

work = sys.argv[1]
jobs = {
    "pth": (case, load, [f"{work}/pth"], None),
    "safetensors": (case, load, [f"{work}/safetensors"], None),
    "pth to bf16": (case, load, [f"{work}/pth"], torch.bfloat16),
    "safetensors to bf16": (case, load, [f"{work}/safetensors"], torch.bfloat16),
    "two shards": (case, load, [f"{work}/pth2"], None),
    "hugging face": (case, load, [f"{work}/hf"], None),
    "base and delta": (case, load, [f"{work}/pth", f"{work}/delta"], None),
    "write safetensors": (peak, [f"{work}/pth"], f"{work}/out1", "safetensors"),
    "write pth": (peak, [f"{work}/pth"], f"{work}/out2", "pth"),
}
for name, (measure, *args) in jobs.items():
    if os.fork() == 0:  # its own process, with the imports of a fresh one
        os.write(1, (json.dumps({"name": name, **measure(*args)}) + chr(10)).encode())
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    work = tmp_path_factory.mktemp("memory")
    tensors = {
        f"llma.layers.{i // 2}.feed_forward.w{1 + i % 2}.weight": torch.full((SIZE, SIZE), float(i))
        for i in range(COUNT)
    }
    for name in ("pth", "pth2", "safetensors", "delta"):
        (work / name).mkdir()
    torch.save({"model": tensors}, work / "pth" / "consolidated.00-of-01.model.pth")
    for shard in range(2):
        part = {n: t.chunk(2, 0 if ".w1." in n else 1)[shard].clone() for n, t in tensors.items()}
        torch.save({"model": part}, work / "pth2" / f"consolidated.{shard:02d}-of-02.model.pth")
    save_file(tensors, work / "safetensors" / "consolidated.00-of-01.model.safetensors")
    (work / "hf").mkdir()
    parts = ("mlp.gate_proj", "self_attn.q_proj")
    save_file(
        {f"model.layers.{i // 2}.{parts[i % 2]}.weight": torch.full((SIZE, SIZE), float(i)) for i in range(COUNT)},
        work / "hf" / "model.safetensors",
    )
    config = {"model_type": "llama", "hidden_size": SIZE, "num_attention_heads": 8}
    (work / "hf" / "config.json").write_text(json.dumps(config))
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(halves, work / "delta" / "consolidated.00-of-01.model-diff.safetensors")
    command = [sys.executable, "-c", MEASURE, str(work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(
    "name", ["pth", "safetensors", "pth to bf16", "safetensors to bf16", "two shards", "hugging face"]
)
def test_loading_half_of_a_folder_takes_at_most_a_third_more_than_it_keeps(figures, name):
    figure = figures[name]
    wanted = SIZE * SIZE * COUNT // 2 * (2 if "bf16" in name else 4)
    assert figure["kept"] == wanted
    assert figure["grown"] <= 1.3 * wanted, f"{figure['grown'] / wanted:.3f} x"


def test_adding_a_delta_takes_no_more_in_the_end(figures):
    assert figures["base and delta"]["grown"] <= 1.3 * figures["base and delta"]["kept"]


@pytest.mark.parametrize("name", ["write safetensors", "write pth"])
def test_writing_takes_the_memory_of_a_few_tensors(figures, name):
    heap = 32 << 20  # what glibc keeps of freed tensors of this size; larger ones go back to the system at once
    assert figures[name]["grown"] <= heap + 3 * figures[name]["kept"] < SIZE * SIZE * COUNT * 4 / 2
