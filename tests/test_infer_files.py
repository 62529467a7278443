"""What `accessory infer` reads and writes without a model: notes of a run, the file of answers, whole words, places.

Must not import torch's models or start a rank.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml

from accessory.data.template import Turn
from accessory.serve import journal
from accessory.serve.asking import placed, spoken
from accessory.serve.infer_settings import InferSettings
from accessory.serve.journal import Journal
from accessory.serve.messages import read_messages
from accessory.serve.noted import take_over
from accessory.serve.opening import TINY
from accessory.serve.steady import safe_length


@pytest.mark.parametrize(
    ("text", "length"),
    [("", 0), ("word", 0), ("two wor", 4), ("two words ", 10), ("line\n", 5), ("a\nb", 0), ("x \u4e2d\u6587", 4)],
)
def test_only_whole_words_lines_and_han_characters_are_shown(text: str, length: int):
    assert safe_length(text) == length


# ---- the file of answers


def row(name: str, **more: object) -> dict[str, object]:
    return {"id": name, "query": f"ask {name}", **more}


def test_a_line_is_there_when_append_returns_and_a_torn_one_is_cut(tmp_path, caplog):
    path = journal.new_path(tmp_path / "results")
    file = Journal(path)
    file.append(row("a", response="\u00e9\ud800"))
    assert [line["id"] for line in journal.read_lines(path)] == ["a"]
    file.close()
    with path.open("ab") as torn:
        torn.write(b'{"id": "b", "que')
    assert [line["id"] for line in journal.read_lines(path)] == ["a"] and path.read_bytes()[-1:] != b"\n"
    with caplog.at_level(logging.INFO):
        journal.read_lines(path, mend=True)
    assert path.read_bytes()[-1:] == b"\n" and "cut short" in caplog.text


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "a"}\nnot json\n{"id": "c"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: is no JSON"):
        journal.read_lines(path)


def test_at_the_end_the_lines_of_all_ranks_stand_in_the_order_of_the_rows(tmp_path):
    path = tmp_path / "20260101-000000.jsonl"
    for rank, names in ((0, "ca"), (1, "db")):
        file = Journal(path, rank=rank)
        for name in names:
            file.append(row(name))
        file.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert [line["id"] for line in journal.finish(path, "abcd")] == list("abcd")
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == list("abcd")
    assert list(tmp_path.iterdir()) == [path]


def test_the_newest_results_of_the_same_settings_are_found(tmp_path):
    for stamp, top_k in (("20260101-000000", 1), ("20260102-000000", 1), ("20260103-000000", 2)):
        (tmp_path / f"{stamp}.jsonl").touch()
        (tmp_path / f"{stamp}.yaml").write_text(yaml.safe_dump({"top_k": top_k, "device": "cpu"}))
    found = journal.newest(tmp_path, {"top_k": 1})
    assert found is not None and found.name == "20260102-000000.jsonl"
    assert journal.newest(tmp_path, {"top_k": 3}) is None


# ---- checkpoints and what their runs noted


def checkpoint(folder: Path, *files: str, notes: dict | None = None, arguments: dict | None = None) -> str:
    """A folder with these (empty) files, its run's train.yaml beside it and its sft_args.json in it."""
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("{}")
    if notes is not None:
        (folder.parent / "train.yaml").write_text(yaml.safe_dump(notes))
    if arguments is not None:
        (folder / "sft_args.json").write_text(json.dumps(arguments))
    return str(folder)


def taken(folder: str, **words: object) -> InferSettings:
    return take_over(InferSettings(ckpt_dir=folder, **words))


def test_an_adapter_lies_on_the_base_that_its_run_noted(tmp_path):
    noted = {"model_id_or_path": "base", "template_type": "llava-yi-instruct", "system": "be brief", "dtype": "bf16"}
    folder = checkpoint(tmp_path / "v0-x" / "checkpoint-5", "adapter_config.json", arguments=noted)
    found = taken(folder)
    assert (found.model_name_or_path, found.adapter_name_or_path) == (["base"], [folder])
    assert (found.template, found.default_system, found.precision) == ("swift/llava-yi-instruct", "be brief", "bf16")
    assert taken(folder, model_name_or_path=["other"], template="chatml").template == "chatml"
    assert taken(folder, model_name_or_path=["other"]).model_name_or_path == ["other"]


def test_an_adapter_without_notes_names_its_base_itself(tmp_path):
    folder = checkpoint(tmp_path / "adapter")
    Path(folder, "adapter_config.json").write_text('{"base_model_name_or_path": "theirs"}')
    assert taken(folder).model_name_or_path == ["theirs"]
    Path(folder, "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say on which model it lies; give --model_name_or_path"):
        taken(folder)


def test_a_merged_or_whole_checkpoint_is_the_model(tmp_path):
    notes = {"model_name_or_path": ["base"], "only_save_trainable": True, "template": "chatml"}
    whole = checkpoint(tmp_path / "run" / "checkpoint-5-merged", "model-00001-of-00002.safetensors", notes=notes)
    found = taken(whole)
    assert (found.model_name_or_path, found.adapter_name_or_path, found.template) == ([whole], [], "chatml")


def test_a_training_checkpoint_lies_on_its_base_or_on_the_tiny_model(tmp_path):
    folder = checkpoint(tmp_path / "run" / "checkpoint-5", "state-00000-of-00001.safetensors", notes={"template": ""})
    assert taken(folder).model_name_or_path == [TINY, folder]
    (tmp_path / "run" / "train.yaml").write_text(yaml.safe_dump({"model_name_or_path": ["a", "b"]}))
    assert taken(folder).model_name_or_path == ["a", "b", folder]
    (tmp_path / "run" / "train.yaml").write_text(yaml.safe_dump({"train_from_scratch": True}))
    assert taken(folder).model_name_or_path == [folder]
    (tmp_path / "run" / "train.yaml").unlink()
    with pytest.raises(ValueError, match=r"no train\.yaml beside it"):
        taken(folder)


def test_the_rows_kept_for_validation_are_those_of_the_run(tmp_path):
    swift = {"dataset": ["d.jsonl#50"], "dataset_seed": 7, "dataset_test_ratio": 0.1, "model_type": "x"}
    folder = checkpoint(tmp_path / "a" / "checkpoint-1", "adapter_config.json", arguments=swift)
    found = taken(folder, load_dataset_config=True)
    assert (found.dataset, found.val_size, found.dataset_seed) == (["d.jsonl#50"], 0.1, 7) and not found.interactive
    ours = {"eval_dataset": ["v.json"], "dataset": ["t.json"], "media_dir": "pictures", "max_samples": 9}
    found = taken(checkpoint(tmp_path / "b" / "checkpoint-1", notes=ours), load_dataset_config=True)
    assert (found.dataset, found.val_size, found.media_dir, found.max_samples) == (["v.json"], 0.0, "pictures", 9)
    bare = checkpoint(tmp_path / "c" / "checkpoint-1", notes={"dataset": ["t.json"], "val_size": 0.0})
    with pytest.raises(ValueError, match="a dataset without val_size or eval_dataset"):
        taken(bare, load_dataset_config=True)


def test_crops_by_chance_are_not_taken_over_from_training(tmp_path):
    notes = {"image_transform": "random_resized_crop", "template": "AUTO"}
    found = taken(checkpoint(tmp_path / "r" / "checkpoint-1", notes=notes))
    assert found.image_transform is None and found.template == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"num_beams": 4}, "no beam search"),
        ({"infer_batch_size": 0}, "infer_batch_size: got 0"),
        ({"show_dataset_sample": 0}, "show_dataset_sample: got 0"),
        ({"load_dataset_config": True}, "without ckpt_dir"),
        ({"eval_human": True, "dataset": ["x"]}, "together with a dataset"),
        ({"eval_human": False}, "without a dataset"),
    ],
)
def test_settings_that_cannot_be_are_refused(words: dict, told: str):
    with pytest.raises(ValueError, match=told):
        InferSettings(**words).check()


# ---- places and messages


def test_pictures_go_where_their_places_are_and_the_rest_open_the_first_question():
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", " <image>c<image> ")]
    last = Turn("user", "c ", pictures=2, places=(1,))
    assert placed(turns, 2) == [*turns[:2], last]
    assert [turn.pictures for turn in placed(turns, 3)] == [1, 0, 2]
    assert placed(turns, 0) == turns
    with pytest.raises(ValueError, match="got 1 for 2 places"):
        placed(turns, 1)


def test_a_record_reads_back_as_the_same_turns():
    turns = [Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c", pictures=2)]
    record = spoken(turns)
    assert record == {"system": "s", "query": "<image><image>c", "history": [["a", "b"]]}
    assert spoken([Turn("user", "c", pictures=1)])["query"] == "c"
    inside = [Turn("user", "is a\nb?", pictures=3, places=(4, 6))]
    assert spoken(inside)["query"] == "<image>is a<image>\nb<image>?"
    assert placed([Turn("user", spoken(inside)["query"])], 3) == inside


def test_messages_with_parts_bring_their_pictures_in_order():
    parts = [{"type": "image_url", "image_url": {"url": "u"}}, {"type": "text", "text": "t"}, {"type": "image"}]
    turns, pictures = read_messages([{"role": "human", "content": parts}], ["p"], system="s")
    assert turns == [Turn("system", "s"), Turn("user", "t", pictures=2, places=(1,))] and pictures == ["u", "p"]
    assert read_messages("<image>q", ["p"]) == ([Turn("user", "q", pictures=1)], ["p"])
    later = [*parts, {"type": "text", "text": "?"}]
    assert read_messages([{"role": "user", "content": later}], ["p"])[0] == [
        Turn("user", "t?", pictures=2, places=(1,))
    ]


@pytest.mark.parametrize(
    ("asked", "images", "told"),
    [
        ([], (), "expected text or a list of messages"),
        ([{"role": "boss", "content": "x"}], (), "boss"),
        ([{"role": "user", "content": 3}], (), "expected text or a list of parts"),
        ([{"role": "user", "content": [{"type": "video"}]}], (), "expected one of type text"),
        ([{"role": "user", "content": [{"type": "image"}]}], (), "got 0 for 1 content parts"),
        ("x", "cat.png", "expected a list of pictures"),
    ],
)
def test_messages_that_make_no_sense_are_refused(asked: object, images: object, told: str):
    with pytest.raises(ValueError, match=told):
        read_messages(asked, images)
