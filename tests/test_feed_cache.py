"""The cache of tokenised rows: made once, by any number of processes, damaged, shared, and never stale.

Must not look at what rows mean.
"""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from feed_toys import alpaca, config, corpus, picture, texts, tokenizer, write_jsonl

from accessory.data.feed import build, open_corpus, survey
from accessory.data.template import TEMPLATES


@pytest.fixture
def built(monkeypatch) -> list[Path]:
    """The caches that were built, not found."""
    made = []
    real = build._build
    monkeypatch.setattr(build, "_build", lambda path, *rest: (made.append(path), real(path, *rest)))
    return made


def same(one, other) -> bool:
    """Whether two corpora are equal bit by bit."""
    rows = zip((one.row(i) for i in range(len(one))), (other.row(i) for i in range(len(other))), strict=True)
    equal = all(
        np.array_equal(a.ids, b.ids) and np.array_equal(a.supervised, b.supervised) and a.where == b.where
        for a, b in rows
    )
    return equal and len(one) == len(other) and one.report == other.report and one.fingerprint == other.fingerprint


def test_the_second_opening_reads_the_cache(tmp_path, built):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(number) for number in range(5)])
    first = corpus(path, cache=tmp_path / "cache")
    assert same(first, corpus(path, cache=tmp_path / "cache")) and len(built) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"cutoff_len": 300},
        {"template": "dialog"},
        {"overlong": "drop"},
        {"on_bad_row": "skip"},
        {"max_samples": 2},
        {"kind": "llama3"},
        {"stage": "pt"},
    ],
)
def test_whatever_decides_the_numbers_names_another_cache(tmp_path, built, change):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(number) | {"text": "hello"} for number in range(5)])
    corpus(path, cache=tmp_path / "cache")
    corpus(path, cache=tmp_path / "cache", **change)
    assert len(set(built)) == 2


def test_what_does_not_decide_them_does_not(tmp_path, built):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(number) for number in range(5)])
    corpus(path, cache=tmp_path / "cache")
    corpus(path, cache=tmp_path / "cache", packing=False, seed=7, workers=3, image_size=99)
    moved = path.rename(tmp_path / "b.jsonl")
    found = corpus(moved, cache=tmp_path / "cache")
    assert len(built) == 1 and found.where(0) == f"{moved}:1"


def test_another_form_of_the_same_template_is_another_cache(tmp_path, built, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(1)])
    corpus(path, cache=tmp_path / "cache")
    monkeypatch.setitem(TEMPLATES, "alpaca", TEMPLATES["qg"])
    corpus(path, cache=tmp_path / "cache")
    assert len(set(built)) == 2


@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty", "header"])
def test_a_damaged_cache_is_made_again_with_a_word(tmp_path, built, caplog, damage):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(number) for number in range(50)])
    first = corpus(path, cache=tmp_path / "cache")
    wanted, report = texts(first), dict(first.report)
    data = bytearray(built[0].read_bytes())
    if damage == "one bit":
        data[-100] ^= 4
    elif damage == "header":
        data[12] ^= 255
    else:
        del data[len(data) // 2 if damage == "cut short" else 0 :]
    built[0].unlink()
    built[0].write_bytes(data)
    with caplog.at_level(logging.WARNING):
        again = corpus(path, cache=tmp_path / "cache")
    assert texts(again) == wanted and again.report == report and len(built) == 2 and "is damaged" in caplog.text


def test_a_changed_file_has_another_fingerprint_and_a_touched_one_the_same(tmp_path, built):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(1), alpaca(2)])
    first = corpus(path, cache=tmp_path / "cache").fingerprint
    path.touch()
    assert corpus(path, cache=tmp_path / "cache").fingerprint == first and len(built) == 1
    text = path.read_text()
    path.write_text(text.replace("question 2", "question 3"))  # same size, within the clock's resolution
    assert corpus(path, cache=tmp_path / "cache").fingerprint != first


def test_a_file_that_settled_is_not_read_again(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(1)])
    long_ago = time.time() - 100
    os.utime(path, (long_ago, long_ago))
    first = corpus(path, cache=tmp_path / "cache")
    monkeypatch.setattr(survey, "_SURVEYS", {})
    monkeypatch.setattr(survey, "_rows", None)
    assert same(first, corpus(path, cache=tmp_path / "cache"))


def test_a_look_that_cannot_be_remembered_is_a_look(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(1)])
    os.utime(path, (1, 1))
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert survey.survey(path, tmp_path / "cache" / "surveys").rows == 1
    assert "is not remembered" in caplog.text


def test_processes_give_the_same_cache_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ALONE", 0)
    rows = [alpaca(number, words=number % 40) for number in range(1500)]
    rows[1234]["output"] = ""
    paths = [write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "b.json"]
    paths[1].write_text(json.dumps(rows[:300]))
    wide = {"junk": "x" * 1500}
    write_jsonl(paths[0], [row | wide for row in rows])  # several stretches
    alone = corpus(*paths, cache=tmp_path / "one", on_bad_row="skip", workers=0)
    together = corpus(*paths, cache=tmp_path / "two", on_bad_row="skip", workers=2)
    assert same(alone, together) and alone.report["bad"] == 1


def test_of_several_bad_rows_the_first_one_stops_whatever_process_is_faster(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ALONE", 0)
    rows = [alpaca(number) | {"junk": "x" * 1000} for number in range(4000)]
    rows[1500]["output"] = rows[3900]["output"] = ""
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"a\.jsonl:1501: output: got an empty answer"):
        corpus(path, cache=tmp_path / "cache", workers=2)
    assert not list((tmp_path / "cache").glob("*.rows")) and not list((tmp_path / "cache").glob(".*"))


def test_two_processes_may_make_the_same_cache_at_once(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(number) for number in range(500)])
    code = f"""
from accessory.data.feed import FeedConfig, Source, open_corpus
from accessory.data.tokenizer import open_tokenizer
config = FeedConfig(sources=(Source({str(path)!r}),), cache_dir={str(tmp_path / "cache")!r}, workers=0)
print(open_corpus(config, open_tokenizer({str(tokenizer().path)!r})).fingerprint)
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [process.communicate(timeout=60)[0].strip() for process in running]
    assert len(set(told)) == 1 and told[0] == corpus(path, cache=tmp_path / "cache").fingerprint


def test_a_picture_that_was_missing_and_came_is_seen(tmp_path, built):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(1), alpaca(2) | {"image": "a.png"}])
    seeing = {"pictures": True, "slots": 2, "on_bad_row": "skip"}
    assert len(corpus(path, cache=tmp_path / "cache", **seeing)) == 1
    assert len(corpus(path, cache=tmp_path / "cache", **seeing)) == 1 and len(built) == 1
    picture(tmp_path / "a.png")
    assert len(corpus(path, cache=tmp_path / "cache", **seeing)) == 2


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(1)])
    real = build.stretches

    def changing(*given):
        write_jsonl(path, [alpaca(2), alpaca(3)])
        yield from real(*given)

    monkeypatch.setattr(build, "stretches", changing)
    with pytest.raises(ValueError, match=r"a\.jsonl: changed while it was read"):
        corpus(path, cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(1)])
    (tmp_path / "cache").write_text("a file stands here")
    with pytest.raises((ValueError, OSError), match="cache"):
        corpus(path, cache=tmp_path / "cache")


def test_a_cache_that_nobody_opens_goes_when_the_next_one_is_made(tmp_path, built, caplog):
    path, home = write_jsonl(tmp_path / "a.jsonl", [alpaca(1)]), tmp_path / "cache"
    corpus(path, cache=home)
    corpus(path, cache=home, cutoff_len=300)
    for cache in built:
        os.utime(cache, (0, 0))
    corpus(path, cache=home, cutoff_len=300)  # opened
    with caplog.at_level(logging.INFO):
        corpus(path, cache=home, cutoff_len=310)
    assert [cache.exists() for cache in built] == [False, True, True] and "is removed" in caplog.text


def test_tokenising_does_not_need_torch(tmp_path):
    code = "import sys, accessory.data.feed.build, accessory.data.feed.corpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_split_is_drawn_by_the_seed_and_shares_no_row(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(number) for number in range(40)])
    whole = corpus(path, cache=tmp_path / "cache")
    for amount in (0.25, 10):
        train, held = whole.split(amount, 3)
        again = whole.split(amount, 3)
        assert len(held) == 10 and sorted(texts(train) + texts(held)) == sorted(texts(whole))
        assert texts(held) == texts(again[1]) and texts(held) != texts(whole.split(amount, 4)[1])
        assert train.fingerprint == again[0].fingerprint != held.fingerprint
        assert held.lengths.tolist() == [len(held.row(index).ids) for index in range(10)]
    with pytest.raises(ValueError, match="val_size: got 40 of 40 rows"):
        whole.split(40, 0)


def test_parts_of_one_document_fall_on_one_side_of_a_split(tmp_path):
    rows = [{"text": f"document {number} " + "fox " * 60} for number in range(12)]
    whole = corpus(write_jsonl(tmp_path / "a.jsonl", rows), cache=tmp_path / "cache", stage="pt", cutoff_len=16)
    train, held = whole.split(0.3, 0)
    sides = [{part.where(index) for index in range(len(part))} for part in (train, held)]
    assert not sides[0] & sides[1] and len(train) + len(held) == len(whole)


def test_the_memory_of_the_pass_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(3000):
            file.write(json.dumps(alpaca(number) | {"junk": "x" * 20_000}) + "\n")
    code = f"""
import resource, sys
from accessory.data.feed import FeedConfig, Source, open_corpus
from accessory.data.tokenizer import open_tokenizer
tokenizer = open_tokenizer({str(tokenizer().path)!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = FeedConfig(sources=(Source({str(path)!r}),), cache_dir={str(tmp_path / "cache")!r}, workers=0)
open_corpus(config, tokenizer)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(ended.stdout) < 40_000  # KiB, of a file of 60 MB


def test_open_corpus_takes_what_config_gives(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(1)])
    assert len(open_corpus(config(path, cache=tmp_path / "cache", workers=None), tokenizer())) == 1
