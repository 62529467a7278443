"""Folders of every form, joined and cut for any rank.

Must not build a model.
"""

import logging

import folders
import pytest
import torch
from safetensors.torch import save_file

from accessory.checkpoint import open_folders
from accessory.checkpoint.reshard import bounds, cut, join
from accessory.dist import Cut


def whole(tensors):
    return {name: Cut(tuple(tensor.shape)) for name, tensor in tensors.items()}


def rank_cuts(tensors, rank, size):
    """What rank `rank` of `size` holds: as a model would say it, the vocabulary padded, kv heads replicated."""
    cuts = {}
    for name, tensor in tensors.items():
        shape, layer = tuple(tensor.shape), name.split(".")[-2]
        dim = folders.CUT.get(layer)
        if dim is None:
            cuts[name] = Cut(shape)
        elif layer in ("wk", "wv"):
            replicas = max(1, size // folders.KV)
            rows = shape[0] // (size // replicas)
            start = rank // replicas * rows
            cuts[name] = Cut(shape, 0, start, start + rows, replicas=replicas)
        else:
            rows = -(-shape[dim] // size)
            start, stop = min(rank * rows, shape[dim]), min((rank + 1) * rows, shape[dim])
            cuts[name] = Cut(shape, dim, start, stop, pad=rows - (stop - start))
    return cuts


def equal(one, other):
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 2, 3, 4])
@pytest.mark.parametrize("form", ["meta", "pth", "safetensors"])
def test_any_number_of_shards_opens_on_any_number_of_ranks(tmp_path, form, shards, ranks):
    tensors = folders.state(dtype=torch.bfloat16)
    if form == "meta":
        folder = folders.meta(tmp_path / "m", tensors, shards=shards)
    else:
        folder = folders.accessory(tmp_path / "m", tensors, shards=shards, ext=form)
    every = [rank_cuts(tensors, rank, ranks) for rank in range(ranks)]
    locals_ = [dict(open_folders([folder]).tensors(cuts)) for cuts in every]
    for name, tensor in tensors.items():
        for cuts, local in zip(every, locals_, strict=True):
            assert torch.equal(local[name], cut(tensor, cuts[name])), name
            assert tuple(local[name].shape) == cuts[name].local_shape
        assert torch.equal(join([(c[name], x[name]) for c, x in zip(every, locals_, strict=True)]), tensor)


def test_an_embedding_cut_on_the_vocabulary_joins_as_well_as_one_cut_on_the_width(tmp_path):
    tensors = folders.state()
    for dim in (0, 1):
        folder = folders.meta(tmp_path / str(dim), tensors, shards=2, embedding=dim)
        opened = open_folders([folder])
        assert equal(dict(opened.tensors(whole(tensors))), tensors)
        assert equal(dict(opened.tensors(opened.cuts())), tensors)  # without a model to ask


def test_uneven_bounds_cover_all_rows():
    assert bounds(32001, 2) == [(0, 16001), (16001, 32001)]
    assert bounds(7, 3) == [(0, 3), (3, 5), (5, 7)]


def test_floats_are_converted_and_integers_are_not(tmp_path):
    tensors = {**folders.state(dtype=torch.float16), "vision.steps": torch.arange(3)}
    folder = folders.accessory(tmp_path / "m", tensors, ext="safetensors")
    got = dict(open_folders([folder]).tensors(whole(tensors), dtype=torch.bfloat16))
    assert got["norm.weight"].dtype == torch.bfloat16 and got["vision.steps"].dtype == torch.int64
    assert torch.equal(got["output.weight"], tensors["output.weight"].bfloat16())


def test_the_small_files_are_found_and_merged(tmp_path):
    base = folders.meta(tmp_path / "base", folders.state())
    lora = {"layers.0.attention.wq.lora_a.weight": torch.ones(2, folders.DIM)}
    peft = folders.accessory(tmp_path / "peft", lora, llama_type="llama_peft")
    opened = open_folders([base, peft])
    assert opened.config["vocab_size"] == folders.VOCAB and opened.meta == {"llama_type": "llama_peft"}
    assert opened.tokenizer == peft / "tokenizer.model"
    legacy = open_folders([folders.accessory(tmp_path / "legacy", folders.state(), legacy=True)])
    assert (legacy.config, legacy.meta, legacy.tokenizer) == ({}, {}, None)


def test_metas_tokenizer_is_found_one_folder_up(tmp_path):
    folder = folders.meta(tmp_path / "llama" / "7B", folders.state())
    (folder / "tokenizer.model").rename(tmp_path / "llama" / "tokenizer.model")
    assert open_folders([folder]).tokenizer == tmp_path / "llama" / "tokenizer.model"


def test_meta_names_in_safetensors_open(tmp_path):
    tensors = folders.state()
    for name, shards in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        for index, part in enumerate(folders.pieces(tensors, shards)):
            file = "consolidated.safetensors" if shards == 1 else f"consolidated.{index:02d}.safetensors"
            save_file(part, tmp_path / name / file)
        assert equal(dict(open_folders([tmp_path / name]).tensors(whole(tensors))), tensors)


def test_the_oldest_accessory_names_and_flat_dicts_open(tmp_path):
    tensors = folders.state()
    torch.save({f"llma.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "consolidated.00-of-01.pth")
    assert equal(dict(open_folders(tmp_path).tensors(whole(tensors))), tensors)


def test_a_file_of_torch_before_its_zip_form_opens_and_says_that_it_is_read_whole(tmp_path, caplog):
    tensors = folders.state()
    torch.save(tensors, tmp_path / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    with caplog.at_level(logging.WARNING):
        assert equal(dict(open_folders(tmp_path).tensors(whole(tensors))), tensors)
    assert "read whole into memory" in caplog.text


def test_partial_folders_add_and_replace_keys(tmp_path):
    tensors = folders.state(dtype=torch.bfloat16)
    trained = {
        "norm.weight": torch.full((folders.DIM,), 2.0),
        "layers.0.attention.wq.bias": torch.ones(folders.DIM),
        "layers.1.feed_forward.w2.lora_a.weight": torch.ones(2, folders.HIDDEN),
    }
    base = folders.meta(tmp_path / "base", tensors, shards=2)
    peft = folders.accessory(tmp_path / "peft", trained)
    wanted = {**tensors, **trained}
    assert equal(dict(open_folders([base, peft]).tensors(whole(wanted))), wanted)


def test_a_delta_is_added_in_fp32_whatever_the_shard_counts(tmp_path):
    base, delta = folders.state(0, dtype=torch.float16), folders.state(1, dtype=torch.float16, scale=1e-2)
    delta["vision.start"] = torch.ones(folders.DIM, dtype=torch.float16)
    paths = [
        folders.meta(tmp_path / "base", base, shards=2),
        folders.accessory(tmp_path / "delta", delta, shards=3, kind="model-diff", legacy=True),
    ]
    wanted = {name: (base[name].float() + delta[name].float()).half() for name in base}
    wanted["vision.start"] = delta["vision.start"]
    for rank in range(2):
        cuts = {**rank_cuts(base, rank, 2), "vision.start": Cut((folders.DIM,))}
        got = dict(open_folders(paths).tensors(cuts))
        assert equal(got, {name: cut(wanted[name], cuts[name]) for name in wanted})


def test_optional_keys_may_be_absent_and_are_then_not_yielded(tmp_path):
    tensors = folders.state()
    folder = folders.meta(tmp_path / "m", tensors)
    cuts = {**whole(tensors), "vision.start": Cut((folders.DIM,))}
    got = dict(open_folders([folder]).tensors(cuts, optional=["vision.start", "norm.weight"]))
    assert set(got) == set(tensors)


def test_copies_that_differ_are_reported_and_the_first_is_used(tmp_path, caplog):
    tensors = folders.state()
    folder = folders.meta(tmp_path / "m", tensors, shards=2)
    part = torch.load(folder / "consolidated.01.pth")
    part["norm.weight"] += 0.5
    torch.save(part, folder / "consolidated.01.pth")
    with caplog.at_level(logging.WARNING):
        got = dict(open_folders([folder]).tensors(whole(tensors)))
    assert torch.equal(got["norm.weight"], tensors["norm.weight"])
    assert "norm.weight differs" in caplog.text and "consolidated.01.pth" in caplog.text and "0.5" in caplog.text


def test_a_training_runs_other_files_are_passed_over_and_counted(tmp_path):
    folder = folders.accessory(tmp_path / "epoch0", folders.state(), shards=2)
    for name in ("consolidated.00-of-02.optimizer.pth", "consolidated.00-of-02.other.pth"):
        (folder / name).write_bytes(b"pickle")
    (folder / "rank-specific-00000-of-00008.pth").write_bytes(b"pickle")
    opened = open_folders([folder])
    assert opened.folders[0].leftovers == 3 and len(opened.folders[0].shards) == 2
