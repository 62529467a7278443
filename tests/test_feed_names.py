"""Names of data sets: dataset_info.json, numbers of rows, commas, shipped sets, hubs, and what is refused by name.

Must not need a network.
"""

import json
import os
from pathlib import Path

import pytest
from feed_toys import alpaca, config, corpus, texts, tokenizer, write_jsonl

from accessory.data.feed import FeedConfig, Source, Stream, open_corpus, open_rows, read_sources
from accessory.data.feed.columns import Reading
from accessory.data.feed.registry import SHIPPED


def info(folder: Path, **entries) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return str(folder)


def read(tmp_path, names, folder, **more):
    """The corpus of some names."""
    sources = tuple(read_sources(names, dataset_dir=folder))
    made = FeedConfig(sources, cache_dir=str(tmp_path / "cache"), workers=0, **more)
    return open_corpus(made, tokenizer())


def test_a_name_stands_for_its_entry_and_several_stand_between_commas(tmp_path):
    folder = info(tmp_path / "data", one={"file_name": "a.jsonl"}, two={"file_name": "b.jsonl", "folder": "deep"})
    write_jsonl(tmp_path / "data/a.jsonl", [alpaca(1)])
    (tmp_path / "data/deep").mkdir()
    write_jsonl(tmp_path / "data/deep/b.jsonl", [alpaca(2), alpaca(3)])
    found = read(tmp_path, ["two, one"], folder)
    assert texts(found) == ["fox fox fox 2", "fox fox fox 3", "fox fox fox 1"]
    plain = write_jsonl(tmp_path / "c.jsonl", [alpaca(4)])
    assert texts(read(tmp_path, ["one", str(plain)], folder)) == ["fox fox fox 1", "fox fox fox 4"]
    assert texts(read(tmp_path, ["a.jsonl"], folder)) == ["fox fox fox 1"]  # a file beside dataset_info.json


def test_data_is_the_folder_where_none_is_named(tmp_path, monkeypatch):
    info(tmp_path / "data", one={"file_name": "a.jsonl"})
    write_jsonl(tmp_path / "data/a.jsonl", [alpaca(1)])
    monkeypatch.chdir(tmp_path)
    assert read_sources(["one"]) == [Source("data/a.jsonl", root="data", reading=Reading())]


def test_sets_of_this_package_are_found_from_anywhere_and_after_all_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = read(tmp_path, ["identity,alpaca_en_demo"], None)
    rows = json.loads((SHIPPED / "identity.json").read_text())
    assert len(found) == found.report["read"] == len(rows) + 62
    said = " ".join(row.label for row in open_rows(["identity"]))
    assert "I am Accessory, an AI assistant made by the Accessory authors." in said and "{{" not in said
    named = " ".join(row.label for row in open_rows(["identity"], fill={"name": "Ada", "author": "Us"}))
    assert "My name is Ada." in named and "Accessory" not in named
    info(tmp_path / "data", identity={"file_name": "mine.jsonl"})
    write_jsonl(tmp_path / "data/mine.jsonl", [alpaca(7)])
    assert texts(read(tmp_path, ["identity"], None)) == ["fox fox fox 7"]


def test_rows_of_the_shipped_sets_are_whole_and_no_question_comes_twice():
    for name in ("identity", "alpaca_en_demo"):
        rows = json.loads((SHIPPED / f"{name}.json").read_text())
        assert all(set(row) == {"instruction", "input", "output"} and row["output"].strip() for row in rows)
        assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows) >= 20


@pytest.mark.parametrize("kind", ["json", "jsonl", "folder"])
def test_a_number_behind_a_name_draws_rows_by_the_seed(tmp_path, kind):
    rows = [alpaca(number) for number in range(30)]
    path = tmp_path / "a.json" if kind == "json" else tmp_path / "a.jsonl"
    path.write_text(json.dumps(rows) if kind == "json" else "\n\n".join(json.dumps(row) for row in rows))
    if kind == "folder":
        path = tmp_path / "many"
        path.mkdir()
        for part in range(3):
            write_jsonl(path / f"{part}.jsonl", rows[part * 10 : part * 10 + 10])
    drawn = [texts(read(tmp_path, [f"{path}#7"], None, seed=seed)) for seed in (0, 0, 1)]
    assert len(set(drawn[0])) == 7 and drawn[0] == drawn[1] != drawn[2] and set(drawn[0]) <= set(map(answer, rows))
    assert sorted(texts(read(tmp_path, [f"{path}#30"], None))) == sorted(map(answer, rows))


def answer(row: dict[str, str]) -> str:
    return row["output"]


def test_where_there_are_fewer_rows_some_come_again_and_stay_on_one_side_of_a_split(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(number) for number in range(10)])
    found = read(tmp_path, [f"{path}#35"], None)
    assert len(found) == 35 and set(texts(found)) == {answer(alpaca(number)) for number in range(10)}
    assert (found.report["read"], found.report["used"]) == (10, 35)
    train, held = found.split(0.3, 0)
    assert len(set(texts(held))) == 3 and not set(texts(held)) & set(texts(train))
    few = read(tmp_path, [f"{path}#35"], None, max_samples=12)
    assert len(few) == 12


def test_num_samples_of_an_entry_draws_and_a_number_behind_its_name_overrides_it(tmp_path):
    folder = info(tmp_path / "data", one={"file_name": "a.jsonl", "num_samples": 4})
    write_jsonl(tmp_path / "data/a.jsonl", [alpaca(number) for number in range(9)])
    assert len(read(tmp_path, ["one"], folder)) == 4 and len(read(tmp_path, ["one#2"], folder)) == 2


def test_a_path_may_hold_a_number_sign_or_a_comma(tmp_path):
    for name in ("a#3", "a,b.jsonl"):
        path = tmp_path / name
        path = path if "." in name else path.with_name("a#3.jsonl")
        write_jsonl(path, [alpaca(number) for number in range(5)])
        assert len(read(tmp_path, [str(path)], None)) == 5


@pytest.mark.parametrize(
    ("row", "entry"),
    [
        (
            {"q": "what is it", "more": "there", "a": "a fox", "past": [["one", "two"]], "say": "be good"},
            {
                "columns": {"prompt": "q", "query": "more", "response": "a", "history": "past", "system": "say"},
            },
        ),
        (
            {
                "chat": [
                    {"who": "S", "text": "be good"},
                    {"who": "U", "text": "one"},
                    {"who": "A", "text": "two"},
                    {"who": "U", "text": "what is it\nthere"},
                    {"who": "A", "text": "a fox"},
                ]
            },
            {
                "formatting": "sharegpt",
                "columns": {"messages": "chat"},
                "tags": {
                    "role_tag": "who",
                    "content_tag": "text",
                    "user_tag": "U",
                    "assistant_tag": "A",
                    "system_tag": "S",
                },
            },
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "be good"},
                    {"role": "user", "content": "one"},
                    {"role": "assistant", "content": "two"},
                    {"role": "user", "content": "what is it\nthere"},
                    {"role": "assistant", "content": "a fox"},
                ]
            },
            {"formatting": "openai"},
        ),
    ],
)
def test_columns_and_tags_say_what_is_what(tmp_path, row, entry):
    folder = info(tmp_path / "data", one={"file_name": "a.jsonl", **entry})
    write_jsonl(tmp_path / "data/a.jsonl", [row])
    (found,) = open_rows(["one"], dataset_dir=folder)
    assert (found.query, found.label, found.system) == ("what is it\nthere", "a fox", "be good")
    assert found.history == [["one", "two"]]
    assert read(tmp_path, ["one"], folder).report["fields_not_listed"] == 0


def test_fields_that_an_entry_does_not_list_are_counted(tmp_path):
    folder = info(
        tmp_path / "data", one={"file_name": "a.jsonl", "columns": {"prompt": "instruction", "response": "output"}}
    )
    write_jsonl(tmp_path / "data/a.jsonl", [alpaca(1) | {"input": "more", "system": "be good"}])
    found = read(tmp_path, ["one"], folder)
    assert found.report["fields_not_listed"] == 2 and found.conversation(0).turns[0].input == ""


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"file_name": "a.jsonl", "ranking": True}, "holds preferences"),
        ({"file_name": "a.jsonl", "columns": {"chosen": "good", "rejected": "bad"}}, "holds preferences"),
        ({"file_name": "a.jsonl", "colums": {}}, "did you mean 'columns'"),
        ({"file_name": "a.jsonl", "columns": {"promt": "x"}}, "did you mean 'prompt'"),
        ({"file_name": "a.jsonl", "tags": {"role": "x"}}, "did you mean 'role_tag'"),
        ({"file_name": "a.jsonl", "formatting": "sharegtp"}, "did you mean 'sharegpt'"),
        ({"file_name": "a.jsonl", "num_samples": 0}, "num_samples: got 0"),
        ({"file_name": "gone.jsonl"}, "gone.jsonl: no such file"),
        ({"ms_hub_url": "owner/name"}, "lies at ModelScope"),
        ({"cloud_file_name": "s3://x/y"}, "lies at the cloud"),
        ({"script_url": "x"}, "which is not run here"),
        ({}, "got no file_name"),
        ([1], "expected a mapping"),
    ],
)
def test_an_entry_that_cannot_be_used_is_one_sentence_with_its_name(tmp_path, entry, said):
    folder = info(tmp_path / "data", one=entry)
    write_jsonl(tmp_path / "data/a.jsonl", [alpaca(1)])
    with pytest.raises(ValueError, match=r"dataset_info\.json: one: ") as caught:
        read_sources(["one"], dataset_dir=folder)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("owner/set", "no such file or folder; .* HF::owner/set"),
        ("identiy", "neither a data file nor a name .* did you mean 'identity'"),
        ("alpaca_en_demo#0", "expected a number of rows above 0"),
        ("coco-en-2-mini#20", "lies at ModelScope"),
        ("MS::owner/name", "lies at ModelScope"),
        ("x.yaml#3", "behind single sets"),
    ],
)
def test_a_name_that_stands_for_nothing_is_one_sentence(tmp_path, name, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        read_sources([name], dataset_dir=str(tmp_path))


def test_a_set_of_the_hub_is_read_from_what_was_fetched_before(tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    home = tmp_path / "hub"
    for name in ("data/train-0.jsonl", "data/test-0.jsonl", "other/train-0.jsonl"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(home / name, [alpaca(len(name))])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(home))
    folder = info(tmp_path / "data", one={"hf_hub_url": "owner/name", "subset": "data"})
    assert texts(read(tmp_path, ["one"], folder)) == ["fox fox fox 18"]
    assert read_sources(["HF::owner/name:other"])[0].only == ("other/train-0.jsonl",)

    def nothing(*_, **__):
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing)
    with pytest.raises(ValueError, match="owner/name was not fetched before; run `hf download"):
        read_sources(["one"], dataset_dir=folder)


def test_a_number_of_rows_is_refused_where_rows_are_read_as_they_come(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(1)])
    with pytest.raises(ValueError, match="name#N.*set max_steps"):
        Stream(config(Source(str(path), samples=3), cache=tmp_path / "cache"), tokenizer(), batch=1)


def test_pictures_of_a_named_set_are_relative_to_its_dataset_info_or_to_the_working_directory(tmp_path, monkeypatch):
    folder = info(tmp_path / "data", one={"file_name": "deep/a.jsonl"})
    (tmp_path / "data/deep").mkdir()
    row = alpaca(1) | {"images": ["x.png", "y.png"]}
    write_jsonl(tmp_path / "data/deep/a.jsonl", [row])
    monkeypatch.chdir(tmp_path)
    Path("y.png").write_bytes(b"")
    (found,) = open_rows(["one"], dataset_dir=folder)
    assert found.pictures == (os.path.join(folder, "x.png"), "y.png")
    (found,) = open_rows(["one"], dataset_dir=folder, media_dir="/media")
    assert found.pictures == ("/media/x.png", "y.png")


def test_the_same_corpus_of_another_way_of_naming_is_cached_alike(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(1), alpaca(2)])
    one = corpus(path, cache=tmp_path / "cache")
    two = read(tmp_path, [f"{path},"], None)
    assert one.fingerprint == two.fingerprint and len(list((tmp_path / "cache").glob("*.rows"))) == 1
