"""What a second look at the feed found: files and rows that people have and that were refused, and silences.

Must not need a model.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from feed_toys import alpaca, config, corpus, picture, texts, tokenizer, write_jsonl

from accessory.data.feed import Feed, Source, Stream, files, open_corpus, store, survey
from accessory.data.feed.packed import PackJob, told, write_packed
from accessory.data.feed.records import to_sample
from accessory.data.template import Turn

ROWS = [alpaca(number) for number in range(6)]
SEEING = {"pictures": True, "slots": 2, "image_size": 8}


def sample(row: dict[str, Any], **source: Any) -> Any:
    return to_sample(row, Source("x.jsonl", **source), seed=0, number=1)


# ---- files


@pytest.mark.parametrize("indent", [None, 1])
def test_a_mapping_with_one_list_of_rows_is_its_rows(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps({"of": [1], "note": "[{", "data": ROWS, "n": {"a": [{}]}}, indent=indent))
    found = corpus(path, cache=tmp_path / "c")
    assert texts(found) == [row["output"] for row in ROWS] and found.row(3).where == f"{path}:4"
    assert [entry.turns[0].text for entry in found.conversations([4, 0])] == ["question 4", "question 0"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
    ],
)
def test_one_row_in_a_json_file_is_a_row_also_where_it_has_a_list(tmp_path, row):
    (tmp_path / "a.json").write_text(json.dumps(row))
    assert len(corpus(tmp_path / "a.json", cache=tmp_path / "c")) == 1


def test_what_follows_a_json_list_is_seen_also_behind_many_blanks(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS) + " " * 1000 + "x")
    with pytest.raises(ValueError, match=r"a\.json: goes on with b'x' behind its list"):
        corpus(tmp_path / "a.json", cache=tmp_path / "c")


def test_hidden_files_and_a_cache_inside_of_a_folder_are_no_data(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    write_jsonl(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.jsonl", ROWS)
    os.utime(tmp_path / "a.jsonl", (1e9, 1e9))
    for _ in range(2):
        assert len(corpus(tmp_path, cache=tmp_path / "cache")) == 6


def test_a_text_that_is_cut_since_it_has_no_empty_line_is_counted(tmp_path, monkeypatch):
    for module in (files, survey):
        monkeypatch.setattr(module, "LONGEST_TEXT", 20)
    (tmp_path / "a.txt").write_text("".join(f"line {number}\n" for number in range(8)))
    found = corpus(tmp_path / "a.txt", cache=tmp_path / "c", stage="pt")
    assert len(found) == 3 and found.report["documents_cut"] == 2


def test_a_line_of_many_blocks_is_one_row(tmp_path, monkeypatch):
    for module in (files, survey):
        monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(survey, "STRETCH", 64)
    rows = [ROWS[0], alpaca(1, words=200), *ROWS[2:]]
    found = corpus(write_jsonl(tmp_path / "a.jsonl", rows), cache=tmp_path / "c")
    assert texts(found) == [row["output"] for row in rows]


# ---- rows


def test_columns_without_a_value_are_no_columns(tmp_path):
    dialog = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a fox"}]
    rows = [
        {"instruction": "q", "output": "a dog", "conversations": None, "image": None},
        {"instruction": None, "output": None, "conversations": dialog, "image": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert texts(corpus(tmp_path / "a.parquet", cache=tmp_path / "c")) == ["a dog", "a fox"]


def test_content_parts_without_a_path_take_the_rows_pictures_in_order():
    def asked(*paths: str | None) -> dict[str, Any]:
        images = [{"type": "image", **({"image": path} if path else {})} for path in paths]
        return {"role": "user", "content": [*images, {"type": "text", "text": "q <image>"}]}

    answer = {"role": "assistant", "content": "a"}
    found = sample({"messages": [asked(None, "own.png"), answer, asked(None), answer], "images": ["1.png", "2.png"]})
    assert found.pictures == ["1.png", "own.png", "2.png"]
    assert found.turns[0] == Turn("user", "q <image>", 2) and found.turns[2].pictures == 1
    for images in ([], ["1.png", "2.png"]):
        with pytest.raises(ValueError, match=f"got {len(images)} pictures under image for 1 content parts"):
            sample({"messages": [asked(None), answer], "images": images})


def test_single_turn_llava_drops_the_pictures_of_later_exchanges():
    said = ["<image>a", "b", "<image><image>c", "d"]
    turns = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(said)]
    row = {"conversations": turns, "images": ["1.png", "2.png", "3.png"], "system": "S"}
    found = sample(row, preprocess="single_turn_llava")
    assert found.turns == [Turn("system", "S"), Turn("user", "a", 1), Turn("assistant", "b")]
    assert found.pictures == ["1.png"] and found.notes["turns_left_out"] == 2


# ---- what a fingerprint and a memory tell


def test_other_pictures_are_another_fingerprint_and_another_folder_of_them_is_not(tmp_path):
    found = []
    for folder, names in [("one", "ab"), ("two", "ab"), ("one", "ba")]:
        for name in "ab":
            picture(tmp_path / folder / f"{name}.png")
        rows = [{**ROWS[at], "image": f"{names[at]}.png"} for at in (0, 1)]
        source = Source(str(write_jsonl(tmp_path / "a.jsonl", rows)), root=str(tmp_path / folder))
        found.append(corpus(source, cache=tmp_path / "c", **SEEING).fingerprint)
    assert found[0] == found[1] != found[2]


def test_a_file_of_the_same_size_and_time_is_read_again_when_it_was_written_again(tmp_path):
    prints = []
    for number in (1, 7):
        path = write_jsonl(tmp_path / "a.jsonl", [alpaca(number)])
        os.utime(path, (1e9, 1e9))
        prints.append(corpus(path, cache=tmp_path / "c").fingerprint)
    assert prints[0] != prints[1]


def test_questions_of_a_file_that_changed_are_an_error_that_names_it(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    found = corpus(path, cache=tmp_path / "c")
    path.write_text("")
    with pytest.raises(ValueError, match=r"a\.jsonl: changed"):
        found.conversations([3])


# ---- what is said


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_whose_picture_cannot_be_read_are_named(tmp_path, caplog, streaming):
    path = write_jsonl(tmp_path / "a.jsonl", [{**ROWS[0], "image": str(picture(tmp_path / "a.png"))}])
    settings = config(path, cache=tmp_path / "c", on_bad_row="skip", **SEEING)
    found = open_corpus(settings, tokenizer())
    (tmp_path / "a.png").write_bytes(b"no picture")
    feed = Stream(settings, tokenizer(), batch=1) if streaming else Feed(found, settings, batch=1)
    for _ in zip(range(9), feed, strict=False):
        pass
    assert feed.skipped == 9 and caplog.text.count(f"{path}:1: picture") == 5


def test_pictures_read_in_the_runs_own_process_leave_it_its_threads(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{**ROWS[0], "image": str(picture(tmp_path / "a.png"))}])
    settings = config(path, cache=tmp_path / "c", **SEEING)
    feed, threads = Feed(open_corpus(settings, tokenizer()), settings, batch=1), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        feed.first()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_what_was_gathered_goes_also_where_the_disk_takes_no_last_bytes(tmp_path):
    writer = store.StoreWriter(tmp_path / "parts")
    for name in ("ids", "starts"):
        writer.append(name, np.zeros(1, np.int64))
        os.close(writer._files[name].fileno())  # flushing fails, as on a full disk
    writer.discard()
    assert not (tmp_path / "parts").exists()


def test_a_full_disk_names_the_setting_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a fox"}])
    monkeypatch.setattr(store.StoreWriter, "append", full)
    with pytest.raises(ValueError, match="cache_dir: .*/c: No space left on device; free space"):
        corpus(path, cache=tmp_path / "c", stage="pt")
    job = PackJob([str(path)], str(tokenizer().path), str(tmp_path / "out" / "a.packed"), workers=0)
    with pytest.raises(ValueError, match="output: .*/out: No space left on device; free space"):
        write_packed(job)
    assert not list((tmp_path / "out").iterdir()) and not list((tmp_path / "c").glob(".*"))


# ---- the packing tool


def test_uncut_documents_are_rows_of_their_own_and_cut_by_the_run(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the fox " * count} for count in (3, 40, 1, 25)])
    packed = tmp_path / "a.packed"
    counts = write_packed(PackJob([str(path)], str(tokenizer().path), str(packed), max_len=0, workers=0))
    assert counts["rows"] == 4 and "documents_cut" not in +counts
    assert list(told(counts, 0)) == [f"4 documents, {counts['positions']} tokens in 4 rows"]
    for cutoff in (20, 500):
        whole = corpus(path, cache=tmp_path / "c", stage="pt", cutoff_len=cutoff)
        found = corpus(packed, cache=tmp_path / "c", stage="pt", cutoff_len=cutoff)
        assert [found.row(at).ids.tolist() for at in range(len(found))] == [
            whole.row(at).ids.tolist() for at in range(len(whole))
        ]


@pytest.mark.parametrize("length", [1, -3])
def test_a_length_that_makes_no_sense_is_named_by_its_flag(tmp_path, length):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a fox"}])
    with pytest.raises(ValueError, match=f"max_len: got {length}, expected at least 2, or 0"):
        write_packed(PackJob([str(path)], str(tokenizer().path), str(tmp_path / "a.packed"), max_len=length))


def test_the_tool_takes_a_meta_list_and_variables(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"a fox {number}"} for number in range(5)])
    (tmp_path / "data.yaml").write_text("META:\n  - path: $PLACE/a.jsonl\n")
    monkeypatch.setenv("PLACE", str(tmp_path))
    for number, name in enumerate([str(tmp_path / "data.yaml"), "$PLACE/a.jsonl"]):
        job = PackJob([name], str(tokenizer().path), str(Path(tmp_path) / f"{number}.packed"), workers=0)
        assert write_packed(job)["read"] == 5
