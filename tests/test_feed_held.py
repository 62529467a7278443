"""The rows that a run keeps for validation, found again from its settings alone, and rows as they are asked.

Must not train.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from feed_toys import alpaca, corpus, picture, texts, write_jsonl

from accessory.data.feed import Source, held_out, open_rows
from accessory.data.feed.split import drawn
from accessory.data.template import Turn


def test_a_draw_is_the_same_on_every_machine_and_in_every_version():
    assert held_out(20, 0.25, 42).tolist() == GOLDEN
    assert held_out(20, 5, 42).tolist() == GOLDEN and held_out(20, 5, 43).tolist() != GOLDEN
    assert drawn(5, 3, 0, 0).sum() == 3 and drawn(5, 12, 0, 0).sum() == 12 and drawn(5, 12, 0, 0).min() >= 1
    assert drawn(5, 3, 0, 0).tolist() == drawn(5, 3, 0, 0).tolist()


GOLDEN = [3, 4, 5, 14, 16]


def test_draws_are_even():
    counts = np.zeros(50)
    for seed in range(400):
        counts[held_out(50, 10, seed)] += 1
    assert counts.sum() == 4000 and abs(counts - 80).max() < 40


def test_a_share_is_at_least_one_row_and_never_all():
    assert len(held_out(20, 0.001, 0)) == 1 and len(held_out(20, 0.9, 0)) == 18
    for size, amount in ((1, 0.5), (20, 20), (20, 0), (20, -1), (0, 1)):
        with pytest.raises(ValueError, match="val_size: got .* expected at least 1 and fewer than all"):
            held_out(size, amount, 0)


@pytest.mark.parametrize("amount", [0.2, 9])
def test_rows_that_training_held_out_are_found_again_without_a_tokenizer(tmp_path, amount):
    first = write_jsonl(tmp_path / "a.jsonl", [alpaca(number) for number in range(25)])
    (tmp_path / "b.json").write_text(json.dumps([alpaca(number) for number in range(25, 45)]))
    lines = first.read_text().splitlines()
    first.write_text("\n\n".join(lines) + "\n")  # empty lines are no rows
    sources = [Source(str(first)), Source(str(tmp_path / "b.json"), samples=15)]
    train, held = corpus(*sources, cache=tmp_path / "cache", seed=3).split(amount, 3)
    rows = open_rows([str(first), f"{tmp_path / 'b.json'}#15"], seed=3, held=amount)
    assert [row.label for row in rows] == texts(held) and len(rows) == len(held) == (8 if amount < 1 else 9)
    assert not {row.label for row in rows} & set(texts(train))
    assert len({row.id for row in rows}) == len(rows) and rows.report["used"] == len(rows)
    assert [row.where for row in rows] == [held.where(index) for index in range(len(held))]


def test_rows_that_training_could_not_use_do_not_move_the_split(tmp_path):
    rows = [alpaca(number) for number in range(40)]
    for number in (0, 11, 12, 30):
        rows[number] = {"instruction": "x", "output": ""}
    rows[7], rows[19] = alpaca(7, words=900), alpaca(19, words=900)
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    more = {"cache": tmp_path / "cache", "on_bad_row": "skip", "overlong": "drop"}
    short = corpus(path, cutoff_len=300, **more).split(20, 0)[1]
    whole = corpus(path, cutoff_len=10_000, template="dialog", **more).split(20, 0)[1]
    lines = [{int(part.where(index).rsplit(":", 1)[1]) for index in range(len(part))} for part in (short, whole)]
    assert lines[0] == lines[1] - {8, 20} and len(lines[0]) > 9
    found = open_rows([str(path)], seed=0, held=20, on_bad_row="skip")
    assert {int(row.id.split(":")[1]) for row in found if row.label} == lines[1] and len(found) == 20


def test_a_split_of_which_one_side_is_empty_is_an_error(tmp_path):
    rows = [{"instruction": "x", "output": ""} for _ in range(9)] + [alpaca(1)]
    found = corpus(write_jsonl(tmp_path / "a.jsonl", rows), cache=tmp_path / "cache", on_bad_row="skip")
    with pytest.raises(ValueError, match="got 1 of 10 rows, of which only those for .* can be used"):
        found.split(1, 0)


def test_a_row_has_its_question_history_system_label_and_pictures(tmp_path):
    picture(tmp_path / "a.png")
    row = {
        "query": "and <image>?",
        "response": "red",
        "history": [["what is <image>", "a fox"]],
        "system": "be good",
        "images": ["a.png", "https://host/b.png"],
    }
    (found,) = open_rows([str(write_jsonl(tmp_path / "a.jsonl", [row]))])
    assert (found.id, found.where) == ("a.jsonl:1", f"{tmp_path / 'a.jsonl'}:1")
    assert (found.query, found.label, found.system) == (row["query"], "red", "be good")
    assert found.history == row["history"] and found.template is None
    assert found.pictures == (str(tmp_path / "a.png"), "https://host/b.png")
    assert found.turns == (
        Turn("system", "be good"),
        Turn("user", "what is ", pictures=1, places=(8,)),
        Turn("assistant", "a fox"),
        Turn("user", "and ?", pictures=1, places=(4,)),
    )


@pytest.mark.parametrize(
    "row",
    [
        {"query": "why"},
        {"instruction": "why"},
        {"instruction": "why", "output": ""},
        {"query": "why", "response": ""},
        {"messages": [{"role": "user", "content": "why"}]},
        {"conversations": [{"from": "human", "value": "why"}]},
    ],
)
def test_a_row_without_an_answer_can_be_asked(tmp_path, row):
    (found,) = open_rows([str(write_jsonl(tmp_path / "a.jsonl", [row]))])
    assert (found.query, found.label, found.history) == ("why", None, [])


def test_ids_name_folders_where_two_files_share_a_name(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", [alpaca(1)])
    paths = [str(tmp_path / name / "a.jsonl") for name in ("x", "y", "y")]
    assert [row.id for row in open_rows(paths)] == ["x/a.jsonl:1", "y/a.jsonl:1", "y/a.jsonl(2):1"]


def test_a_bad_row_stops_with_its_place_or_is_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(1), {"no": "row"}, alpaca(2)])
    with pytest.raises(ValueError, match=r"a\.jsonl:2: got the fields no, .*on_bad_row skip"):
        list(open_rows([str(path)]))
    rows = open_rows([str(path)], on_bad_row="skip")
    assert len(list(rows)) == 2 and rows.report["bad"] == 1 and "a.jsonl:2" in rows.refused[0] and len(rows) == 3


def test_reading_rows_needs_no_torch(tmp_path):
    code = "import sys; from accessory.data.feed import open_rows; r = list(open_rows(['identity'])); "
    code += "sys.exit(bool({'torch', 'sentencepiece', 'tokenizers'} & set(sys.modules)) or not r)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 0
