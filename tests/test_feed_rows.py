"""Rows of every file format and of every shape, and what is said of those that make no sense.

Must not look at batches.
"""

import json

import numpy as np
import pytest
from feed_toys import alpaca, corpus, picture, texts, tokenizer, write_jsonl

from accessory.data.encode import encode
from accessory.data.feed import Source
from accessory.data.template import Turn, render

DIALOG = [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": "a fox"}]


def learned(turns: list[Turn], template: str = "alpaca") -> tuple[list[int], list[bool]]:
    found = encode(render(template, turns, open_answer=False), tokenizer())
    return found.ids, found.supervised


def write(path, kind: str, rows: list[dict[str, str]]):
    """Rows as a file of a format."""
    path = path.with_suffix(f".{kind}")
    if kind in ("jsonl", "lines.json"):
        return write_jsonl(path, rows)
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "lines.json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    rows = [alpaca(number) for number in range(5)]
    rows[2]["output"] = 'she said "hi, you",\n[then] {left} \\ \u4e2d'
    found = corpus(write(tmp_path / "data", kind, rows), cache=tmp_path / "cache")
    assert len(found) == 5 and found.report["read"] == 5
    for index, row in enumerate(rows):
        ids, supervised = learned([Turn("user", row["instruction"]), Turn("assistant", row["output"])])
        assert found.row(index).ids.tolist() == ids and found.row(index).supervised.tolist() == supervised


def test_labels_count_the_answer_and_the_stop_token_and_nothing_else(tmp_path):
    found = corpus(write_jsonl(tmp_path / "a.jsonl", [alpaca(1)]), cache=tmp_path / "cache")
    answer = tokenizer().encode("fox fox fox 1")
    assert found.targets.tolist() == [found.row(0).supervised.sum()]
    assert abs(int(found.targets[0]) - len(answer) - 1) <= 1  # the space before the first word may differ
    assert found.row(0).ids[-1] == tokenizer().eos_id and found.row(0).supervised[-1]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": DIALOG},
        {"messages": [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a fox"}]},
        {"conversations": [{"from": "user", "value": "what is it"}, {"from": "assistant", "value": "a fox"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is it"}]}, DIALOG[1]]},
        {"instruction": "what is it", "output": "a fox"},
        {"instruction": "what is it", "input": None, "output": "a fox"},
    ],
)
def test_every_shape_of_a_conversation_is_the_same_row(tmp_path, row):
    found = corpus(write_jsonl(tmp_path / "a.jsonl", [row]), cache=tmp_path / "cache")
    assert found.row(0).ids.tolist() == learned([Turn("user", "what is it"), Turn("assistant", "a fox")])[0]


def test_history_system_and_input_have_their_places(tmp_path):
    row = {"instruction": "three", "input": "four", "output": "five", "system": "be good", "history": [["one", "two"]]}
    found = corpus(write_jsonl(tmp_path / "a.jsonl", [row]), cache=tmp_path / "cache")
    turns = [Turn("system", "be good"), Turn("user", "one"), Turn("assistant", "two")]
    turns += [Turn("user", "three", input="four"), Turn("assistant", "five")]
    assert (found.row(0).ids.tolist(), found.row(0).supervised.tolist()) == learned(turns)


def test_a_prompt_type_overrides_the_template_of_its_rows_alone(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(1)])
    found = corpus(path, Source(str(path), prompt_type="qg"), cache=tmp_path / "cache", template="dialog")
    turns = [Turn("user", "question 1"), Turn("assistant", "fox fox fox 1")]
    assert found.row(0).ids.tolist() == learned(turns, "dialog")[0]
    assert found.row(1).ids.tolist() == learned(turns, "qg")[0]


def test_what_nobody_asked_or_answered_is_left_out_and_counted(tmp_path):
    said = [{"from": "gpt", "value": "hello"}, *DIALOG, {"from": "human", "value": "and then"}]
    found = corpus(write_jsonl(tmp_path / "a.jsonl", [{"conversations": said}]), cache=tmp_path / "cache")
    assert found.row(0).ids.tolist() == learned([Turn("user", "what is it"), Turn("assistant", "a fox")])[0]
    assert found.report["turns_left_out"] == 2


def test_pretraining_rows_are_bos_text_eos_and_all_is_learned(tmp_path):
    rows = [{"text": "hello world"}, {"content": "a quick fox", "other": 3}]
    found = corpus(write_jsonl(tmp_path / "a.jsonl", rows), cache=tmp_path / "cache", stage="pt")
    token = tokenizer()
    assert found.row(0).ids.tolist() == [token.bos_id, *token.encode("hello world"), token.eos_id]
    assert found.row(1).supervised.tolist() == [False] + [True] * (len(found.row(1).ids) - 1)


def test_a_txt_file_holds_documents_between_empty_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\r\nworld\r\n\r\n \r\n\na fox\n")
    found = corpus(tmp_path / "a.txt", cache=tmp_path / "cache", stage="pt")
    assert texts(found) == ["hello\nworld", "a fox"]
    assert [found.where(index).rsplit(":", 1)[1] for index in range(2)] == ["1", "6"]


def test_a_long_document_goes_on_in_further_rows_and_each_token_is_predicted_once(tmp_path):
    text = " ".join(f"word {number}" for number in range(40))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    found = corpus(path, cache=tmp_path / "cache", stage="pt", cutoff_len=16)
    rows = [found.row(index).ids.tolist() for index in range(len(found))]
    token = tokenizer()
    whole = [token.bos_id, *token.encode(text), token.eos_id]
    assert [token for row in rows for token in row[1:]] == whole[1:] and max(map(len, rows)) == 16
    assert all(before[-1] == after[0] for before, after in zip(rows, rows[1:], strict=False))
    assert found.targets.sum() == len(whole) - 1 and found.report["documents_cut"] == 1


BAD = {
    "no json": (b'{"instruction": \n', "is no JSON"),
    "no utf-8": (b'{"instruction": "\xff", "output": "x"}\n', "is no UTF-8"),
    "a number": (b"17\n", "got a int"),
    "a field is missing": (b'{"instruction": "x"}\n', "output: missing"),
    "a field of another type": (b'{"instruction": "x", "output": 7}\n', "output: got 7"),
    "an empty answer": (b'{"instruction": "x", "output": " "}\n', "empty answer"),
    "an unknown role": (b'{"conversations": [{"from": "humn", "value": "x"}]}\n', "did you mean 'human'"),
    "two questions in a row": (
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "x"},'
        b' {"role": "assistant", "content": "x"}]}\n',
        "expected 'assistant'",
    ),
    "plain text": (b'{"text": "x"}\n', "set stage to pt"),
    "a picture for the blind": (b'{"instruction": "x", "output": "y", "image": "p.png"}\n', "does not see"),
    "deep nesting": (b"[" * 100_000 + b"\n", "JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_stops_with_its_file_and_number_or_is_counted(tmp_path, name):
    bad, said = BAD[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + json.dumps(alpaca(1)).encode() + b"\r\n" + bad + json.dumps(alpaca(2)).encode())
    with pytest.raises(ValueError, match=r"a\.jsonl:3: ") as caught:
        corpus(path, cache=tmp_path / "cache")
    assert said in str(caught.value) and "on_bad_row skip" in str(caught.value)
    found = corpus(path, cache=tmp_path / "cache", on_bad_row="skip")
    assert (found.report["read"], found.report["used"], found.report["bad"]) == (3, 2, 1)
    assert [found.where(index).rsplit(":", 1)[1] for index in range(2)] == ["2", "4"]


def test_a_csv_record_of_another_length_is_bad_and_the_next_one_is_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfinstruction,output\r\na,b\r\nc\r\nd,\xff\r\ne,f\r\n")
    found = corpus(tmp_path / "a.csv", cache=tmp_path / "cache", on_bad_row="skip")
    assert texts(found) == ["b", "f"] and found.report["bad"] == 2


def test_a_json_list_that_is_cut_short_names_the_file_and_the_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([alpaca(1), alpaca(2)])[:-20])
    with pytest.raises(ValueError, match=r"a\.json: row 2: the list has no end"):
        corpus(tmp_path / "a.json", cache=tmp_path / "cache", on_bad_row="skip")


def test_a_row_of_ten_megabytes_is_a_row_like_any_other(tmp_path):
    rows = [alpaca(1), {"instruction": "x", "output": "y", "junk": "z" * 10_000_000}, alpaca(2)]
    assert len(corpus(write_jsonl(tmp_path / "a.jsonl", rows), cache=tmp_path / "cache")) == 3


def test_files_without_rows_are_an_error_that_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.json").write_text(" [ ]\n")
    with pytest.raises(ValueError, match="got 0 rows, expected at least one"):
        corpus(tmp_path / "a.jsonl", tmp_path / "b.json", cache=tmp_path / "cache")


def test_a_file_of_no_known_format_and_a_missing_one_are_one_sentence(tmp_path):
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(ValueError, match=r"got .*a\.doc, expected a YAML with META"):
        corpus(tmp_path / "a.doc", cache=tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        corpus(tmp_path / "gone.json", cache=tmp_path / "cache")


def test_a_row_whose_answer_leaves_no_token_is_counted_and_not_fed(tmp_path):
    rows = [{"text": ""}, {"text": "hello"}]
    found = corpus(write_jsonl(tmp_path / "a.jsonl", rows), cache=tmp_path / "cache", stage="pt")
    assert len(found) == 1 and found.report["without_labels"] == 1


def test_ratio_draws_by_the_seed_and_max_samples_takes_the_first(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(number) for number in range(40)])
    half = Source(str(path), ratio=0.5)
    first, again, other = (texts(corpus(half, cache=tmp_path / "cache", seed=seed)) for seed in (0, 0, 1))
    assert first == again != other and len(first) == len(other) == 20
    few = corpus(path, path, cache=tmp_path / "cache", max_samples=3)
    assert texts(few) == ["fox fox fox 0", "fox fox fox 1", "fox fox fox 2"] * 2


def test_a_folder_is_one_source_of_all_its_files(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", [alpaca(2), alpaca(3)])
    (folder / "a.json").write_text(json.dumps([alpaca(1)]))
    (folder / "readme.md").write_text("no data")
    found = corpus(folder, cache=tmp_path / "cache")
    assert texts(found) == ["fox fox fox 1", "fox fox fox 2", "fox fox fox 3"]
    assert len(corpus(folder, cache=tmp_path / "cache", max_samples=2)) == 2


def seeing(tmp_path, rows, **more):
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    source = Source(
        str(path), **{name: more.pop(name) for name in ("preprocess", "prompt_type", "root") if name in more}
    )
    return corpus(source, cache=tmp_path / "cache", pictures=True, slots=3, **more)


def test_pictures_stand_where_the_template_puts_them_and_fill_their_slots(tmp_path):
    names = [picture(tmp_path / f"{name}.png").name for name in "abc"]
    said = [
        {"from": "human", "value": "<image>\n<image>\nwhat is it"},
        {"from": "gpt", "value": "a fox"},
        {"from": "human", "value": "and <image>"},
        {"from": "gpt", "value": "red"},
    ]
    found = seeing(tmp_path, [{"image": names, "conversations": said}])
    turns = [
        Turn("user", "what is it", 2),
        Turn("assistant", "a fox"),
        Turn("user", "and", 1),
        Turn("assistant", "red"),
    ]
    wanted = encode(render("alpaca", turns, open_answer=False), tokenizer(), slots_per_picture=[3, 3, 3])
    row = found.row(0)
    assert row.ids.tolist() == wanted.ids and row.slots.tolist() == wanted.slots
    assert [path.rsplit("/", 1)[1] for path in row.pictures] == names and found.report["pictures"] == 3


def test_pictures_without_a_place_open_the_first_question(tmp_path):
    picture(tmp_path / "deep/a.png")
    row = alpaca(1) | {"image": "a.png"}
    found = seeing(tmp_path, [row], root=str(tmp_path / "deep"))
    assert found.row(0).slots.tolist()[:5] == [-1, 0, 1, 2, -1] and found.has_pictures


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"image": "a.png", "conversations": [{"from": "human", "value": "<image><image>"}, DIALOG[1]]},
            "1 pictures and 2",
        ),
        (alpaca(1) | {"image": "gone.png"}, "gone.png: no such file"),
        (alpaca(1) | {"image": 3}, "image: got 3"),
        (alpaca(1) | {"image": "s3://bucket/a.png"}, "fetch the picture"),
    ],
)
def test_pictures_that_do_not_fit_their_places_are_bad_rows(tmp_path, row, said):
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: ") as caught:
        seeing(tmp_path, [row])
    assert said in str(caught.value)


def test_an_image_mark_in_a_row_without_pictures_is_text_and_counted(tmp_path):
    row = {"instruction": "write <image> in svg", "output": "<image>"}
    found = seeing(tmp_path, [row])
    assert found.report["places_as_text"] == 1 and texts(found) == ["<image>"]


def test_single_turn_llava_takes_the_first_exchange(tmp_path):
    picture(tmp_path / "a.png")
    said = [{"from": "human", "value": "what is it\n<image>"}, DIALOG[1], *DIALOG]
    found = seeing(tmp_path, [{"image": "a.png", "conversations": said}], preprocess="single_turn_llava")
    assert texts(found) == ["a fox"] and found.report["turns_left_out"] == 2


def test_a_caption_is_drawn_by_the_seed_and_has_no_question(tmp_path):
    picture(tmp_path / "a.png")
    rows = [{"url": "a.png", "caption": [f"a fox {number}" for number in range(9)]} for _ in range(9)]
    drawn = [texts(seeing(tmp_path, rows, preprocess="caption", seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 1
    found = seeing(tmp_path, rows[:1], preprocess="caption")
    wanted = encode(
        render("caption", [Turn("user", "", 1), Turn("assistant", texts(found)[0])], open_answer=False),
        tokenizer(),
        slots_per_picture=[3],
    )
    assert found.row(0).ids.tolist() == wanted.ids


def test_pictures_before_bos_stand_before_bos(tmp_path):
    picture(tmp_path / "a.png")
    found = seeing(tmp_path, [alpaca(1) | {"image": "a.png"}], before_bos=True)
    assert found.row(0).slots.tolist()[:4] == [0, 1, 2, -1] and found.row(0).ids[3] == tokenizer().bos_id


def test_an_example_shows_controls_pictures_and_what_is_learned(tmp_path):
    picture(tmp_path / "a.png")
    shown = seeing(tmp_path, [alpaca(1) | {"image": "a.png"}]).example(0, tokenizer())
    assert shown.startswith("<bos><picture 0>Below is an instruction")
    assert shown.endswith("### Response:[[fox fox fox 1<eos>]]")


def test_a_row_is_found_again_as_a_conversation(tmp_path):
    picture(tmp_path / "a.png")
    rows = [alpaca(number) | {"image": "a.png"} for number in range(3)]
    found = seeing(tmp_path, rows, prompt_type="shortqa").conversation(2)
    assert found.turns == (Turn("user", "question 2", 1), Turn("assistant", "fox fox fox 2"))
    assert found.pictures == (str(tmp_path / "a.png"),) and found.template == "shortqa"
    assert found.where.endswith("a.jsonl:3")


def test_arrays_of_a_row_are_the_callers_own(tmp_path):
    found = corpus(write_jsonl(tmp_path / "a.jsonl", [alpaca(1)]), cache=tmp_path / "cache")
    found.row(0).ids[:] = 0
    assert np.any(found.row(0).ids)
