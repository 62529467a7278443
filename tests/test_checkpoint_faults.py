"""Folders that must not open: each gives one clear sentence that names the file, the key and the remedy.

Must not build a model.
"""

import json
import logging
import os
import struct

import folders
import pytest
import torch
from safetensors.torch import save_file

from accessory.checkpoint import open_folders, write_folder
from accessory.checkpoint.headers import read_header
from accessory.dist import Cut


def whole(tensors):
    return {name: Cut(tuple(tensor.shape)) for name, tensor in tensors.items()}


def refusal(paths, cuts=None):
    """The sentence; with cuts, that of asking for tensors, where none may have been yielded."""
    with pytest.raises(ValueError) as caught:
        checkpoint = open_folders(paths)
        checkpoint.tensors(cuts)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def tensors():
    return folders.state()


# ---- names and shapes


def test_missing_unexpected_and_misshaped_keys_are_named_in_one_error(tmp_path, tensors):
    cuts = whole(tensors)
    folder = folders.meta(tmp_path / "m", {n: t for n, t in tensors.items() if n != "norm.weight"}, shards=2)
    cuts["layers.0.attention.wq.weight"] = Cut((folders.DIM, 99))
    del cuts["layers.1.feed_forward.w2.weight"]
    text = refusal([folder], cuts)
    assert "1 missing" in text and "norm.weight" in text and str(folder) in text
    assert "1 unexpected: layers.1.feed_forward.w2.weight in" in text and "consolidated.00.pth" in text
    assert "1 misshaped" in text and "layers.0.attention.wq.weight is (8, 16) in consolidated.00.pth" in text
    assert "(16, 99)" in text


def test_many_keys_are_counted_beyond_the_first_eight(tmp_path, tensors):
    folder = folders.meta(tmp_path / "m", tensors)
    text = refusal([folder], whole({f"vision.{i}": torch.ones(1) for i in range(30)}))
    assert "30 missing" in text and "and 22 more" in text


def test_rope_freqs_is_discarded_by_name_and_nothing_else_is(tmp_path, tensors):
    folder = folders.meta(tmp_path / "m", {**tensors, "rope.frequencies": torch.ones(2)})
    text = refusal([folder], whole(tensors))
    assert "rope.frequencies" in text and "rope.freqs" not in text


def test_a_key_that_one_shard_lacks_is_named_with_that_shard(tmp_path, tensors):
    folder = folders.meta(tmp_path / "m", tensors, shards=2)
    part = torch.load(folder / "consolidated.01.pth")
    del part["output.weight"]
    torch.save(part, folder / "consolidated.01.pth")
    assert "output.weight is missing in consolidated.01.pth" in refusal([folder], whole(tensors))


def test_a_transposed_tensor_is_misshaped(tmp_path, tensors):
    tensors["layers.0.feed_forward.w1.weight"] = tensors["layers.0.feed_forward.w1.weight"].t().contiguous()
    folder = folders.meta(tmp_path / "m", tensors)
    text = refusal([folder], whole(folders.state()))
    assert "layers.0.feed_forward.w1.weight is (16, 24) in consolidated.00.pth, expected (24, 16)" in text


def test_trained_tensors_without_their_base_say_so(tmp_path, tensors):
    peft = folders.accessory(tmp_path / "peft", {"norm.weight": tensors["norm.weight"]})
    assert "give its base folder before it" in refusal([peft], whole(tensors))


def test_one_name_twice_is_refused(tmp_path, tensors):
    folder = folders.meta(tmp_path / "m", {**tensors, "llma.norm.weight": tensors["norm.weight"]})
    assert "are both norm.weight" in refusal([folder])


# ---- folders


def test_a_delta_in_the_first_place_is_refused(tmp_path, tensors):
    delta = folders.accessory(tmp_path / "d", tensors, kind="model-diff")
    assert "give the base folder first" in refusal([delta])


def test_a_folder_that_mixes_forms_is_refused(tmp_path, tensors):
    folder = folders.meta(tmp_path / "m", tensors)
    torch.save({"model": {}}, folder / "consolidated.00-of-01.model.pth")
    text = refusal([folder])
    assert "mixes 2 sets" in text and "consolidated.00.pth" in text and "consolidated.00-of-01.model.pth" in text


def test_a_folder_of_two_shard_counts_is_refused(tmp_path, tensors):
    folder = folders.accessory(tmp_path / "m", tensors, shards=2)
    torch.save({"model": {}}, folder / "consolidated.00-of-01.model.pth")
    assert "mixes 2 sets" in refusal([folder])


def test_a_missing_shard_is_named(tmp_path, tensors):
    folder = folders.accessory(tmp_path / "m", tensors, shards=4)
    (folder / "consolidated.02-of-04.model.pth").unlink()
    text = refusal([folder])
    assert "of 4 shards" in text and "missing 02" in text


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "it is empty"),
        (["notes.txt"], "it holds notes.txt"),
        (["consolidated.00-of-01.optimizer.pth"], "only a training run's state"),
        (["config.json", "model.safetensors"], "model_type is None"),
        (["pytorch_model-00001-of-00002.bin"], "not all of one set (of 2)"),
        (["adapter_config.json", "adapter_model.safetensors"], "names no base"),
        (["llama.gguf"], "llama.cpp"),
    ],
)
def test_a_folder_without_shards_says_what_it_is_instead(tmp_path, files, words):
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    assert words in refusal([tmp_path])


def test_weights_one_folder_further_down_are_pointed_at(tmp_path, tensors):
    folders.accessory(tmp_path / "run" / "epoch3", tensors)
    assert f"such as {tmp_path / 'run' / 'epoch3'}" in refusal([tmp_path / "run"])


def test_a_file_a_missing_folder_and_a_hub_address_are_told_apart(tmp_path, tensors):
    folder = folders.meta(tmp_path / "m", tensors)
    assert f"give {folder}" in refusal([folder / "consolidated.00.pth"])
    assert "no such folder" in refusal([tmp_path / "absent"])
    with pytest.raises(OSError, match="owner/repo: no such folder here"):
        open_folders(["hf://owner/repo"])


@pytest.mark.parametrize("text", ["{", "[1]", '{"dim": NaN}', '{"dim": 1e', "\udcff"])
def test_a_bad_params_json_is_named(tmp_path, tensors, text):
    folder = folders.meta(tmp_path / "m", tensors)
    (folder / "params.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "params.json" in refusal([folder])


def test_a_dangling_link_is_named(tmp_path, tensors):
    folder = folders.meta(tmp_path / "m", tensors)
    os.rename(folder / "consolidated.00.pth", tmp_path / "gone")
    (folder / "consolidated.00.pth").symlink_to(tmp_path / "nowhere")
    assert "consolidated.00.pth" in refusal([folder])


def test_a_link_to_a_shard_elsewhere_opens(tmp_path, tensors):
    folder = folders.meta(tmp_path / "m", tensors)
    os.rename(folder / "consolidated.00.pth", tmp_path / "blob.pth")
    (folder / "consolidated.00.pth").symlink_to(tmp_path / "blob.pth")
    assert dict(open_folders([folder]).tensors(whole(tensors))).keys() == tensors.keys()


# ---- files


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_a_pickled_payload_is_never_run_and_named(tmp_path, tensors):
    torch.save({**tensors, "extra": Payload(tmp_path / "ran")}, tmp_path / "consolidated.00.pth")
    text = refusal([tmp_path])
    assert "consolidated.00.pth" in text and "mkdir" in text and "safetensors" in text
    assert not (tmp_path / "ran").exists()


def test_an_old_form_pickled_payload_is_never_run_either(tmp_path, tensors):
    file = tmp_path / "consolidated.00.pth"
    torch.save({"extra": Payload(tmp_path / "ran")}, file, _use_new_zipfile_serialization=False)
    assert "never loaded" in refusal([tmp_path])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"model": {"step": 3}}, {"step": 3}, [torch.ones(2)], torch.ones(2)])
def test_a_torch_file_of_other_things_than_tensors_is_named(tmp_path, content):
    torch.save(content, tmp_path / "consolidated.00.pth")
    assert "consolidated.00.pth" in refusal([tmp_path])


@pytest.mark.parametrize("keep", [0, 3, 100, -2000, -1])
@pytest.mark.parametrize("ext", ["pth", "safetensors"])
def test_a_truncated_file_is_named(tmp_path, tensors, ext, keep):
    folder = folders.accessory(tmp_path / "m", tensors, ext=ext)
    file = folder / f"consolidated.00-of-01.model.{ext}"
    file.write_bytes(file.read_bytes()[:keep])
    assert str(file) in refusal([folder])


def test_bytes_after_the_end_of_a_safetensors_file_are_refused(tmp_path, tensors):
    folder = folders.accessory(tmp_path / "m", tensors, ext="safetensors")
    file = folder / "consolidated.00-of-01.model.safetensors"
    file.write_bytes(file.read_bytes() + b"xx")
    assert "2 bytes too long" in refusal([folder])


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "b: its byte range overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, "b: its byte range leaves 4 bytes unused"),
        ({"a": entry(4, 12)}, "leaves 4 bytes unused"),
        ({"a": entry(0, 16)}, "do not hold F32 of shape (2,)"),
        ({"a": entry(8, 0)}, "do not hold"),
        ({"a": entry(-8, 0)}, "expected whole numbers"),
        ({"a": entry(0, 8, (-1, -2))}, "expected whole numbers"),
        ({"a": entry(0, 8, (True, 2))}, "expected whole numbers"),
        ({"a": entry(0, 8, (1 << 70,))}, "expected whole numbers"),
        ({"a": entry(0, 8, dtype="Q4")}, "dtype 'Q4'"),
        ({"a": entry(0, 8, dtype=["F32"])}, "dtype ['F32']"),
        ({"a": 3}, "expected whole numbers"),
        ({"a": entry(0, 800)}, "do not hold"),
        ({"a": entry(0, 800, (200,))}, "780 bytes are missing"),
        ([1, 2], "is a list"),
        ({"__metadata__": {"a": 1}}, "not a map of strings"),
        ('{"a": 1, "a": 2}', "'a' comes twice"),
        ("{" * 100_000, "not valid"),
        ('{"a": ' + "[" * 100_000, "not valid"),
        ("\udcff", "not valid"),
    ],
)
def test_a_hostile_safetensors_header_is_refused(tmp_path, header, words):
    text = header if isinstance(header, str) else json.dumps(header)
    data = text.encode(errors="surrogateescape")
    file = tmp_path / "consolidated.safetensors"
    file.write_bytes(struct.pack("<Q", len(data)) + data + bytes(20))
    text = refusal([tmp_path])
    assert str(file) in text and words in text and len(text) < 1000


@pytest.mark.parametrize("length", [1 << 40, (1 << 64) - 1, 101 << 20])
def test_a_header_longer_than_its_file_or_the_format_allows_is_refused(tmp_path, length):
    file = tmp_path / "consolidated.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", length))
        stream.truncate(120 << 20)
    with pytest.raises(ValueError, match="truncated|claims"):
        read_header(file)


# ---- folders that we wrote


def test_a_folder_of_ours_without_its_manifest_is_refused(tmp_path, tensors):
    for fmt in ("safetensors", "pth"):
        write_folder(tmp_path / fmt, tensors, fmt=fmt)
        (tmp_path / fmt / "manifest.json").unlink()
        assert "manifest.json" in refusal([tmp_path / fmt])


def test_a_folder_of_ours_that_lost_or_changed_a_file_is_refused(tmp_path, tensors):
    write_folder(tmp_path / "m", tensors, shards=2, config=folders.CONFIG)
    (tmp_path / "m" / "config.json").write_text("{}")
    assert "config.json has 2 bytes instead of" in refusal([tmp_path / "m"])
    (tmp_path / "m" / "config.json").unlink()
    assert "config.json is missing" in refusal([tmp_path / "m"])


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "a\\b"])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path, tensors, name):
    write_folder(tmp_path / "m", tensors)
    table = {"version": 1, "files": {name: {"size": 1, "sha256": "0" * 64}}}
    (tmp_path / "m" / "manifest.json").write_text(json.dumps(table))
    assert "expected plain names" in refusal([tmp_path / "m"])


def test_a_shard_that_the_manifest_does_not_know_is_refused(tmp_path, tensors):
    write_folder(tmp_path / "m", tensors)
    manifest = tmp_path / "m" / "manifest.json"
    table = json.loads(manifest.read_text())
    del table["files"]["consolidated.00-of-01.model.safetensors"]
    manifest.write_text(json.dumps(table))
    assert "is not in manifest.json" in refusal([tmp_path / "m"])


def test_a_folder_of_others_needs_no_manifest(tmp_path, tensors, caplog):
    with caplog.at_level(logging.WARNING):
        save_file({f"llma.{n}": t for n, t in tensors.items()}, tmp_path / "consolidated.00-of-01.model.safetensors")
        open_folders(tmp_path)
    assert not caplog.text
