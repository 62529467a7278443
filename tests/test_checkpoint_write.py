"""Folders written: readable by everyone, sharded at will, whole or not at all.

Must not build a model.
"""

import hashlib
import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import folders
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from accessory.checkpoint import FolderWriter, Form, Spec, Stream, open_folders, write_folder
from accessory.checkpoint.operate import Job, rewrite, same_bits
from accessory.checkpoint.write import in_memory
from accessory.dist import Cut

ROOT = Path(__file__).parents[1]


def read(folder):
    opened = open_folders(folder)
    return dict(opened.tensors(opened.cuts()))


def equal(one, other):
    return set(one) == set(other) and all(same_bits(one[name], other[name]) for name in one)


@pytest.fixture
def tensors():
    return folders.state(dtype=torch.bfloat16)


# ---- what is written


def test_reshard_1_2_4_1_is_bitwise(tmp_path, tensors):
    tensors["norm.weight"] = torch.full((folders.DIM,), float("nan"), dtype=torch.bfloat16)
    path = folders.meta(tmp_path / "from", tensors)
    for step, (shards, fmt) in enumerate([(2, "safetensors"), (4, "pth"), (1, "safetensors")]):
        rewrite([path], Job(tmp_path / f"step{step}", shards=shards, fmt=fmt))
        path = tmp_path / f"step{step}"
        assert len(list(path.glob("consolidated.*"))) == shards
        assert equal(read(path), tensors)
    held = load_file(path / "consolidated.00-of-01.model.safetensors")
    assert equal({name.removeprefix("llma."): tensor for name, tensor in held.items()}, tensors)


def test_safetensors_own_reader_takes_our_files(tmp_path):
    tensors = {
        "a": torch.arange(3, dtype=torch.int64),
        "b": torch.randn(5, 7).bfloat16(),
        "vision.scale": torch.tensor(2.5),
        "d": torch.zeros(0, 4),
        "e": torch.tensor([True, False, True]),
        "f": torch.randn(3),
        "g": torch.randn(4, 6).t(),
    }
    write_folder(tmp_path / "m", tensors)
    file = tmp_path / "m" / "consolidated.00-of-01.model.safetensors"
    assert equal({name.removeprefix("llma."): t for name, t in load_file(file).items()}, tensors)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert (header + 8) % 64 == 0
    table = json.loads(file.read_bytes()[8 : 8 + header])
    sizes = {"I64": 8, "F32": 4, "BF16": 2, "BOOL": 1}
    assert all(t["data_offsets"][0] % sizes[t["dtype"]] == 0 for n, t in table.items() if n != "__metadata__")


def test_pth_is_in_the_reference_layout(tmp_path, tensors):
    write_folder(tmp_path / "m", tensors, shards=2, fmt="pth", config=folders.CONFIG, meta={"llama_type": "llama"})
    parts = folders.pieces(tensors, 2)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "consolidated.00-of-02.model.pth",
        "consolidated.01-of-02.model.pth",
        "manifest.json",
        "meta.json",
    ]
    for index, part in enumerate(parts):
        file = tmp_path / "m" / f"consolidated.{index:02d}-of-02.model.pth"
        held = torch.load(file, weights_only=True)
        assert list(held) == ["model"] and list(held["model"]) == [f"llma.{name}" for name in tensors]
        assert equal({name.removeprefix("llma."): t for name, t in held["model"].items()}, part)
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None


def test_pth_holds_what_torch_save_would_hold(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.zeros(0), "c": torch.tensor(1.5), "d": torch.randn(9).half()}
    write_folder(tmp_path / "m", tensors, fmt="pth")
    held = torch.load(tmp_path / "m" / "consolidated.00-of-01.model.pth", weights_only=True, mmap=True)["model"]
    assert equal({name.removeprefix("llma."): tensor for name, tensor in held.items()}, tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in held.values() if tensor.numel()}) == 3


def test_a_tied_embedding_is_cut_on_the_vocabulary(tmp_path, tensors):
    del tensors["output.weight"]
    write_folder(tmp_path / "m", tensors, shards=2, config={**folders.CONFIG, "tied": True})
    shapes = [
        load_file(tmp_path / "m" / f"consolidated.0{i}-of-02.model.safetensors")["llma.tok_embeddings.weight"].shape
        for i in range(2)
    ]
    assert shapes == [(17, folders.DIM), (16, folders.DIM)]
    assert equal(read(tmp_path / "m"), tensors)


def test_lora_bias_and_adapter_tensors_are_cut_as_the_format_says(tmp_path):
    layer = "layers.0."
    tensors = {
        layer + "attention.wq.lora_a.weight": torch.randn(2, 8),
        layer + "attention.wq.lora_b.weight": torch.randn(8, 2),
        layer + "attention.wo.lora_a.weight": torch.randn(2, 8),
        layer + "attention.wo.lora_b.weight": torch.randn(8, 2),
        layer + "attention.wq.bias": torch.randn(8),
        layer + "feed_forward.w2.bias": torch.randn(8),
        "prefix_gate": torch.randn(3, 4),
        "prefix": torch.randn(3, 1, 10, 8),
    }
    write_folder(tmp_path / "m", tensors, shards=2)
    first = load_file(tmp_path / "m" / "consolidated.00-of-02.model.safetensors")
    shapes = {name.rpartition("0.")[2].removeprefix("llma."): tuple(t.shape) for name, t in first.items()}
    assert shapes == {
        "attention.wq.lora_a.weight": (2, 8),
        "attention.wq.lora_b.weight": (4, 2),
        "attention.wo.lora_a.weight": (2, 4),
        "attention.wo.lora_b.weight": (8, 2),
        "attention.wq.bias": (4,),
        "feed_forward.w2.bias": (8,),
        "prefix_gate": (3, 2),
        "prefix": (3, 1, 10, 8),
    }
    assert equal(read(tmp_path / "m"), tensors)


def test_the_manifest_holds_sizes_and_hashes_of_every_other_file(tmp_path, tensors):
    spm = tmp_path / "some.model"
    spm.write_bytes(b"pieces")
    write_folder(tmp_path / "m", tensors, config=folders.CONFIG, meta={"llama_type": "llama"}, tokenizer=spm)
    files = json.loads((tmp_path / "m" / "manifest.json").read_text())["files"]
    assert set(files) == {path.name for path in (tmp_path / "m").iterdir()} - {"manifest.json"}
    for name, entry in files.items():
        content = (tmp_path / "m" / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == b"pieces"
    assert json.loads((tmp_path / "m" / "meta.json").read_text())["llama_type"] == "llama"


def test_a_stream_is_written_in_any_order_and_must_be_complete(tmp_path, tensors):
    specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_folder(tmp_path / "m", Stream(specs, reversed(tensors.items())))
    assert equal(read(tmp_path / "m"), tensors)
    with pytest.raises(ValueError, match="1 tensors were not put: norm.weight"):
        write_folder(tmp_path / "n", Stream(specs, [(n, t) for n, t in tensors.items() if n != "norm.weight"]))
    with pytest.raises(ValueError, match="norm.weight: not among the tensors still to be written"):
        write_folder(tmp_path / "n", Stream(specs, [("norm.weight", tensors["norm.weight"])] * 2))
    assert os.listdir(tmp_path) == ["m"]


def test_released_vision_names_are_written_to_pth_and_read_back(tmp_path):
    tensors = {"vision.query_tokens": torch.randn(1, 32, 8), "vision.start": torch.randn(8)}
    for fmt in ("pth", "safetensors"):
        write_folder(tmp_path / fmt, tensors, fmt=fmt, shards=2)
        assert equal(read(tmp_path / fmt), tensors)
    held = torch.load(tmp_path / "pth" / "consolidated.00-of-02.model.pth", weights_only=True)["model"]
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == {
        "llma.qformer.query_tokens": (1, 32, 8),
        "llma.start_img": (1, 1, 8),
    }


def test_a_form_that_cannot_be_is_refused(tmp_path, tensors):
    with pytest.raises(ValueError, match="cannot be cut into 64 shards"):
        write_folder(tmp_path / "m", tensors, shards=64)
    with pytest.raises(ValueError, match="shards: got 0"):
        write_folder(tmp_path / "m", tensors, shards=0)
    with pytest.raises(ValueError, match="format: got 'bin'"):
        write_folder(tmp_path / "m", tensors, fmt="bin")
    with pytest.raises(ValueError, match="no tokenizer there"):
        write_folder(tmp_path / "m", tensors, tokenizer=tmp_path / "absent")
    assert os.listdir(tmp_path) == []


# ---- whole or not at all


def test_files_that_are_there_are_never_replaced(tmp_path, tensors):
    write_folder(tmp_path, tensors)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="already holds"):
        write_folder(tmp_path, folders.state(1))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_other_files_can_be_written_to(tmp_path, tensors):
    (tmp_path / "log.txt").write_text("hello")
    write_folder(tmp_path, tensors)
    assert equal(read(tmp_path), tensors)
    assert (tmp_path / "log.txt").read_text() == "hello"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("fresh", [True, False])
def test_an_error_while_writing_leaves_nothing_behind(tmp_path, tensors, fresh):
    target = tmp_path / "m"
    if not fresh:
        target.mkdir()
        (target / "log.txt").write_text("hello")

    def items():
        yield from list(tensors.items())[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(target, Stream(in_memory(tensors).specs, items()))
    assert os.listdir(tmp_path) == ([] if fresh else ["m"])
    assert fresh or os.listdir(target) == ["log.txt"]


CRASH = """
import os, sys, torch
from accessory.checkpoint import Spec, Stream, manifest, write_folder
def die(*args, **kwargs):
    os.kill(os.getpid(), 9)
def items():
    yield "norm.weight", torch.ones(4)
    if target.endswith("tensors"):
        die()
real = manifest.write
def write(*args, **kwargs):
    if target.endswith("manifest"):
        die()
    real(*args, **kwargs)
    die()
manifest.write = write
for target in sys.argv[1:]:
    if os.fork() == 0:
        write_folder(target, Stream({"norm.weight": Spec((4,), torch.float32)}, items()))
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -9
"""


def test_a_write_killed_at_any_point_is_never_loaded(tmp_path):
    stops = ("tensors", "manifest", "rename")  # between two tensors, before the manifest is hashed, before it appears
    for kind in ("fresh", "used"):
        (tmp_path / kind).mkdir()
    for stop in stops:
        (tmp_path / "used" / stop).mkdir()
        (tmp_path / "used" / stop / "log.txt").write_text("hello")
    targets = [tmp_path / kind / stop for kind in ("fresh", "used") for stop in stops]
    subprocess.run([sys.executable, "-c", CRASH, *map(str, targets)], cwd=ROOT, check=True)
    for target in targets[:3]:
        with pytest.raises(ValueError, match="no such folder"):
            open_folders(target)
        hidden = [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}.")]
        assert len(hidden) == 1
        if target.name != "rename":  # there it is whole; still nobody asks for a hidden folder
            with pytest.raises(ValueError, match="manifest.json|truncated"):
                open_folders(hidden[0])
        write_folder(target, {"norm.weight": torch.ones(4)})  # what was left does not stand in the way
        open_folders(target)
    for target in targets[3:]:
        with pytest.raises(ValueError, match="cut short"):
            open_folders(target)
        with pytest.raises(ValueError, match="another process is writing here or was killed"):
            write_folder(target, {"norm.weight": torch.ones(4)})
        assert (target / "log.txt").read_text() == "hello"


@pytest.mark.parametrize("fmt", ["safetensors", "pth"])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_full_disk_is_one_sentence_with_bytes_and_leaves_nothing(tmp_path, fmt, fresh):
    target = tmp_path / "m"
    if not fresh:
        target.mkdir()
        (target / "log.txt").write_text("hello")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_folder(target, {"vision.a": torch.ones(50_000), "norm.weight": torch.ones(4)}, fmt=fmt)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    text = str(caught.value)
    assert "the disk is full" in text and "200,016 bytes needed" in text and "free" in text and "\n" not in text
    assert os.listdir(tmp_path) == ([] if fresh else ["m"])
    assert fresh or os.listdir(target) == ["log.txt"]


def test_more_than_the_disk_has_is_refused_before_a_byte_is_written(tmp_path):
    writer = FolderWriter(tmp_path / "m", {"norm.weight": Spec((1 << 50,), torch.float32)}, form=Form())
    with pytest.raises(OSError, match="4,503,599,627,370,496 bytes needed"), writer:
        pass
    assert os.listdir(tmp_path) == []


def test_a_folder_that_may_not_be_written_to_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        write_folder(tmp_path / "file" / "m", {"norm.weight": torch.ones(4)})
    with pytest.raises(ValueError, match="is a file"):
        write_folder(tmp_path / "file", {"norm.weight": torch.ones(4)})


def test_fp16_that_cannot_hold_a_value_is_refused(tmp_path, tensors):
    tensors["norm.weight"] = torch.full((folders.DIM,), 1e5, dtype=torch.bfloat16)
    folder = folders.meta(tmp_path / "m", tensors)
    with pytest.raises(ValueError, match="norm.weight: holds .* which fp16 cannot"):
        rewrite([folder], Job(tmp_path / "out", dtype=torch.float16))
    assert not (tmp_path / "out").exists()


def test_a_rank_reads_what_was_written(tmp_path, tensors):
    write_folder(tmp_path / "m", tensors, shards=4)
    name = "layers.0.attention.wo.weight"
    cuts = {key: Cut(tuple(t.shape)) for key, t in tensors.items()}
    cuts[name] = Cut((folders.DIM, folders.DIM), 1, 6, 14)
    assert torch.equal(dict(open_folders(tmp_path / "m").tensors(cuts))[name], tensors[name][:, 6:14])
