"""Rectangles of tensors in state files: written by any ranks, read by any others, and opened like a folder of weights.

Must not know a training loop.
"""

import json
import math

import folders
import pytest
import torch
from safetensors.torch import load_file

from accessory.checkpoint import manifest, open_folders
from accessory.checkpoint.boxes import Box, Piece, read_boxes, state_file
from accessory.checkpoint.operate import same_bits
from accessory.checkpoint.staging import Staging
from accessory.dist import Cut
from accessory.inspect import inspect, main

EVEN, WIDE = (33, 16), (8, 50)


def split(box, parts, dim):
    """A box cut into runs of ceil(n / parts) rows as FSDP does; the last ones may be short or empty."""
    step = -(-box.size[dim] // parts)
    return [box.rows(part * step, (part + 1) * step, dim=dim) for part in range(parts)]


def grid(shape, *cuts):
    """The boxes of a tensor cut on one dim after the other, each cut (dim, parts)."""
    boxes = [Box.whole(shape)]
    for dim, parts in cuts:
        boxes = [piece for box in boxes for piece in split(box, parts, dim)]
    return boxes


def write(folder, tensors, layout, **facts):
    """A checkpoint of as many ranks as the layout has boxes; layout(name, shape) gives each rank's."""
    folder.mkdir()
    boxes = {name: layout(name, tuple(tensor.shape)) for name, tensor in tensors.items()}
    world = len(next(iter(boxes.values())))
    for rank in range(world):
        held = {name: boxes[name][rank] for name in tensors if boxes[name][rank].numel}
        whole = {name: Box.whole(tensors[name].shape) for name in held}
        pieces = {name: Piece(box, tensors[name][box.inside(whole[name])]) for name, box in held.items()}
        staging = Staging()
        staging.fill(pieces)
        staging.write(folder / state_file(rank, world))
    (folder / "facts.json").write_text(json.dumps({"step": 7, **facts}))
    (folder / "config.json").write_text(json.dumps(folders.CONFIG))
    (folder / "meta.json").write_text(json.dumps({"llama_type": "llama", "writer": "accessory"}))
    names = [path.name for path in folder.iterdir()]
    manifest.write(folder, names, to=folder / manifest.NAME)
    return folder


def whole(name, shape):
    """One rank that holds everything."""
    return [Box.whole(shape)]


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "model/tok_embeddings.weight": torch.randn(EVEN, generator=generator),
        "model/layers.0.attention.wo.weight": torch.randn(WIDE, generator=generator),
        "optimizer/exp_avg/tok_embeddings.weight": torch.randn(EVEN, generator=generator).bfloat16(),
        "optimizer/codes": torch.randint(0, 256, EVEN, dtype=torch.uint8, generator=generator),
    }


# ---- boxes


def test_a_box_minus_another_is_every_other_element_once():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        shape = (5, 4, 3)
        bounds = [[sorted(torch.randint(0, n + 1, (2,), generator=generator).tolist()) for n in shape] for _ in "ab"]
        one, other = (Box(shape, *zip(*spans, strict=True)) for spans in bounds)
        count = torch.zeros(shape, dtype=torch.int64)
        for left in one.minus(other):
            count[left.inside(Box.whole(shape))] += 1
        wanted = torch.zeros(shape, dtype=torch.int64)
        wanted[one.inside(Box.whole(shape))] = 1
        wanted[other.inside(Box.whole(shape))] = 0
        assert torch.equal(count, wanted)


def test_a_cut_of_a_tensor_parallel_rank_is_a_box_without_padding():
    assert Box.of(Cut((33, 16), 0, 17, 33, pad=1)) == Box((33, 16), (17, 0), (33, 16))
    assert Box.of(Cut((33, 16))) == Box.whole((33, 16))


# ---- reading


LAYOUTS = {
    "one rank": whole,
    "tp 2 on each tensor's dim": lambda name, shape: grid(shape, (1 if "wo" in name else 0, 2)),
    "dp 4 on dim 0, uneven": lambda name, shape: grid(shape, (0, 4)),
    "tp 2 on dim 1 x dp 3 on dim 0": lambda name, shape: grid(shape, (1, 2), (0, 3)),
    "tp 3 then dp 5 on one dim, some empty": lambda name, shape: grid(shape, (0, 3), (0, 5)),
}


@pytest.mark.parametrize("saved", LAYOUTS)
def test_what_any_ranks_wrote_any_others_read_bitwise(tmp_path, tensors, saved):
    folder = write(tmp_path / "checkpoint-7", tensors, LAYOUTS[saved])
    for layout in LAYOUTS.values():
        boxes = {name: layout(name, tuple(tensor.shape)) for name, tensor in tensors.items()}
        for rank in range(len(boxes["optimizer/codes"])):
            wanted = {name: held[rank] for name, held in boxes.items()}
            got = dict(read_boxes(folder, wanted))
            assert list(got) == list(tensors)
            for name, tensor in got.items():
                full = tensors[name]
                assert same_bits(tensor, full[wanted[name].inside(Box.whole(full.shape))])


def test_numbers_without_dims_and_values_that_are_no_numbers_survive(tmp_path):
    tensors = {"optimizer/step": torch.tensor(3.0), "model/a": torch.tensor([math.nan, -0.0, math.inf])}
    folder = write(tmp_path / "c", tensors, whole)
    got = dict(read_boxes(folder, {name: Box.whole(tensor.shape) for name, tensor in tensors.items()}))
    assert all(same_bits(got[name], tensor) for name, tensor in tensors.items())


def test_a_box_that_two_files_hold_in_part_is_read_once_from_each(tmp_path, tensors):
    overlapping = [Box(EVEN, (0, 0), (20, 16)), Box(EVEN, (10, 0), (33, 16))]
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.shape == EVEN}
    folder = write(tmp_path / "c", tensors, lambda name, shape: overlapping)
    got = dict(read_boxes(folder, {name: Box.whole(EVEN) for name in tensors}))
    assert all(same_bits(got[name], tensor) for name, tensor in tensors.items())


def test_all_that_does_not_fit_is_one_sentence_before_the_first_tensor(tmp_path, tensors):
    folder = write(tmp_path / "c", tensors, lambda name, shape: [Box.whole(shape).rows(0, 30)])
    wanted = {
        "model/tok_embeddings.weight": Box.whole(EVEN).rows(28, 33),
        "model/norm.weight": Box.whole((16,)),
        "optimizer/codes": Box.whole((34, 16)),
        "optimizer/exp_avg/tok_embeddings.weight": Box.whole(EVEN).rows(0, 30),
    }
    with pytest.raises(ValueError) as caught:
        read_boxes(folder, wanted)
    text = str(caught.value)
    assert str(folder) in text and "\n" not in text
    assert "1 missing: model/norm.weight" in text
    assert "1 not covered by any file: model/tok_embeddings.weight [30:33, 0:16] of (33, 16)" in text
    assert "1 unexpected: model/layers.0.attention.wo.weight" in text
    assert "1 misshaped: optimizer/codes is (33, 16), expected (34, 16)" in text


def test_a_set_of_names_that_nobody_asks_for_is_left_alone(tmp_path, tensors):
    folder = write(tmp_path / "c", tensors, whole)
    wanted = {name: Box.whole(tensor.shape) for name, tensor in tensors.items() if name.startswith("model/")}
    assert len(dict(read_boxes(folder, wanted))) == 2


def test_an_empty_box_asks_for_nothing(tmp_path, tensors):
    folder = write(tmp_path / "c", tensors, whole)
    wanted = {name: Box.whole(tensor.shape).rows(40, 50) for name, tensor in tensors.items()}
    assert all(tensor.numel() == 0 for _, tensor in read_boxes(folder, wanted))


def test_weights_without_an_optimizer_are_no_checkpoint(tmp_path):
    folder = folders.accessory(tmp_path / "m", folders.state())
    with pytest.raises(ValueError, match="expected the checkpoint of a training run.*model_name_or_path"):
        read_boxes(folder, {})


# ---- damage


def rewrite_boxes(folder, change):
    """Change what a state file says of its boxes, and make the manifest agree."""
    file = next(folder.glob("state-*"))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["boxes"] = change(header["__metadata__"]["boxes"])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    names = [path.name for path in folder.iterdir() if path.name != manifest.NAME]
    manifest.write(folder, names, to=folder / manifest.NAME)


@pytest.mark.parametrize(
    "change",
    [
        lambda boxes: "",
        lambda boxes: "[1]",
        lambda boxes: "{}",
        lambda boxes: "[" * 100_000,
        lambda boxes: boxes.replace("33", "32"),
        lambda boxes: boxes.replace("33", "-33"),
        lambda boxes: boxes.replace("33", "33.0"),
        lambda boxes: boxes.replace("33, 16", "33"),
        lambda boxes: boxes.replace("model/tok", "model/tik"),
        lambda boxes: boxes.replace("[0, 0]", "[1, 0]"),
    ],
)
def test_a_state_file_whose_metadata_is_wrong_is_named(tmp_path, tensors, change):
    folder = write(tmp_path / "c", tensors, whole)
    rewrite_boxes(folder, change)
    with pytest.raises(ValueError, match="state-00000-of-00001.safetensors: its metadata"):
        read_boxes(folder, {})


def test_files_of_two_checkpoints_do_not_mix(tmp_path, tensors):
    layout = LAYOUTS["dp 4 on dim 0, uneven"]
    folder = write(tmp_path / "c", tensors, layout)
    other = write(tmp_path / "d", {name: tensor.float() for name, tensor in tensors.items()}, layout)
    (folder / state_file(2, 4)).write_bytes((other / state_file(2, 4)).read_bytes())
    names = [path.name for path in folder.iterdir() if path.name != manifest.NAME]
    manifest.write(folder, names, to=folder / manifest.NAME)
    with pytest.raises(ValueError, match="state-00002-of-00004.safetensors: optimizer/.* in another file"):
        read_boxes(folder, {})


def test_a_missing_state_file_is_named(tmp_path, tensors):
    folder = write(tmp_path / "c", tensors, LAYOUTS["dp 4 on dim 0, uneven"])
    (folder / state_file(2, 4)).unlink()
    with pytest.raises(ValueError, match="of 4 shards .* it holds 3 .* missing 00002"):
        read_boxes(folder, {})


def test_a_checkpoint_without_its_manifest_does_not_open(tmp_path, tensors):
    folder = write(tmp_path / "c", tensors, whole)
    (folder / manifest.NAME).unlink()
    with pytest.raises(ValueError, match="has no manifest.json"):
        open_folders(folder)


# ---- as a folder of weights


def as_checkpoint(folder, state, **facts):
    """A checkpoint of two ranks that holds a model's tensors and a moment of each."""
    tensors = {f"model/{name}": tensor for name, tensor in state.items()}
    tensors |= {f"optimizer/exp_avg/{name}": tensor + 1 for name, tensor in state.items()}
    return write(folder, tensors, lambda name, shape: grid(shape, (0, 2)), **facts)


def test_a_checkpoint_opens_like_any_folder_of_weights(tmp_path):
    state = folders.state()
    opened = open_folders(as_checkpoint(tmp_path / "checkpoint-7", state))
    assert opened.config == folders.CONFIG and opened.meta == {"llama_type": "llama"}
    got = dict(opened.tensors(opened.cuts()))
    assert set(got) == set(state) and all(same_bits(got[name], tensor) for name, tensor in state.items())


def test_a_tensor_parallel_rank_reads_its_padded_part_of_a_checkpoint(tmp_path):
    state = folders.state()
    opened = open_folders(as_checkpoint(tmp_path / "checkpoint-7", state))
    cuts = {**opened.cuts(), "output.weight": Cut((33, 16), 0, 17, 33, pad=1)}
    cuts["layers.0.attention.wo.weight"] = Cut((16, 16), 1, 8, 16)
    got = dict(opened.tensors(cuts, dtype=torch.bfloat16))
    assert torch.equal(got["output.weight"][:16], state["output.weight"][17:].bfloat16())
    assert not got["output.weight"][16].any()
    assert torch.equal(got["layers.0.attention.wo.weight"], state["layers.0.attention.wo.weight"][:, 8:].bfloat16())


def test_a_checkpoint_of_trained_parts_lies_on_top_of_its_base(tmp_path):
    state = folders.state()
    base = folders.meta(tmp_path / "base", state)
    trained = {"norm.weight": torch.full((16,), 5.0), "layers.0.attention.wq.lora_a.weight": torch.ones(2, 16)}
    opened = open_folders([base, as_checkpoint(tmp_path / "checkpoint-7", trained, base=[str(base)])])
    got = dict(opened.tensors(opened.cuts()))
    assert same_bits(got["norm.weight"], trained["norm.weight"])
    assert same_bits(got["output.weight"], state["output.weight"])
    assert "layers.0.attention.wq.lora_a.weight" in got


def test_a_checkpoint_of_trained_parts_alone_names_its_base(tmp_path):
    folder = as_checkpoint(tmp_path / "checkpoint-7", {"norm.weight": torch.ones(16)}, base=["/models/llama"])
    with pytest.raises(ValueError, match=r"holds only what was trained: give its base before it \(/models/llama\)"):
        open_folders(folder).tensors({name: Cut(tuple(t.shape)) for name, t in folders.state().items()})


def test_the_run_s_folder_points_at_its_checkpoint(tmp_path):
    as_checkpoint(tmp_path / "checkpoint-7", folders.state())
    with pytest.raises(ValueError, match=f"such as {tmp_path / 'checkpoint-7'}"):
        open_folders(tmp_path)


def test_inspect_reports_a_checkpoint(tmp_path, capsys):
    state = folders.state()
    folder = as_checkpoint(tmp_path / "checkpoint-7", state, base=["/models/llama"])
    report = inspect(folder, verify=True)
    numbers = sum(tensor.numel() for tensor in state.values())
    assert report.faults == [] and (report.form, report.step, report.partial) == ("training", 7, False)
    assert report.parameters == report.state == numbers and report.base == ["/models/llama"]
    assert main([str(folder)]) == 0
    assert f"step 7, {numbers:,} numbers of the optimiser's state" in capsys.readouterr().out


def test_inspect_verify_names_a_flipped_bit_of_a_checkpoint(tmp_path):
    folder = as_checkpoint(tmp_path / "checkpoint-7", folders.state())
    file = folder / state_file(1, 2)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert inspect(folder).faults == []
    assert f"{file.name} has another SHA-256" in inspect(folder, verify=True).faults[0]


# ---- in memory


def test_staged_tensors_may_change_as_soon_as_they_are_copied(tmp_path):
    tensor, staging = torch.arange(12.0).reshape(3, 4), Staging()
    staging.fill({"model/a": Piece(Box.whole((3, 4)), tensor.t().contiguous().t())})
    tensor.zero_()
    entry = staging.write(tmp_path / "state-00000-of-00001.safetensors")
    assert entry.sha256 == manifest.sha256(tmp_path / "state-00000-of-00001.safetensors")
    assert entry.size == staging.nbytes == (tmp_path / "state-00000-of-00001.safetensors").stat().st_size


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_staged_through_registered_memory(tmp_path):
    tensor, staging = torch.randn(1000, 1000, device="cuda"), Staging()
    wanted = tensor.cpu()
    staging.fill({"model/a": Piece(Box.whole((1000, 1000)), tensor), "model/b": Piece(Box.whole((1000,)), tensor[0])})
    tensor.zero_()
    assert staging._bytes.is_pinned()
    folder = tmp_path / "state-00000-of-00001.safetensors"
    staging.write(folder)
    assert torch.equal(load_file(folder)["model/a"], wanted) and torch.equal(load_file(folder)["model/b"], wanted[0])
    staging.free()
    assert staging.nbytes == 0


def test_staging_takes_its_memory_once():
    tensor, staging = torch.ones(1000), Staging()
    staging.fill({"model/a": Piece(Box.whole((1000,)), tensor)})
    before = staging._bytes.data_ptr()
    staging.fill({"model/a": Piece(Box.whole((1000,)), tensor + 1)})
    assert staging._bytes.data_ptr() == before
