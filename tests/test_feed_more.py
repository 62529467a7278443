"""The feed once more, by somebody else: peers are the one encoder and plain loops.

Must not need a model.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from feed_toys import alpaca, config, corpus, texts, tokenizer, write_jsonl
from PIL import Image

import accessory.data.feed.survey as feed_survey
from accessory.data.encode import encode, stop_ids
from accessory.data.feed import Batch, Feed, Stream, open_corpus
from accessory.data.feed.files import Bad, Raw, Span, parse, read_rows
from accessory.data.feed.pack import best_fit
from accessory.data.template import TEMPLATES, Turn, render

ROWS = [alpaca(number, words=1 + number % 4) for number in range(9)]


def write_all(folder: Path) -> dict[str, Path]:
    """The same rows in a file of every kind; a txt file holds other text."""
    lines = [json.dumps(row) for row in ROWS]
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=4)
    cells = [[*ROWS[0]], *([*row.values()] for row in ROWS)]
    files = {
        "a.json": "\ufeff [" + " ,\n".join(lines) + "]\n",
        "l.json": "\n".join(lines),
        "a.jsonl": "\ufeff" + "\r\n\r\n".join(lines),
        "a.csv": "\n".join(",".join(f'"{cell}"' for cell in record) for record in cells),
        "a.tsv": "\n".join("\t".join(record) for record in cells),
        "a.txt": "\ufeff" + "\n\n \n".join(f"some text {number}\nand more" for number in range(9)),
    }
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    return {name: folder / name for name in (*files, "a.parquet")}


KINDS = ["a.json", "l.json", "a.jsonl", "a.csv", "a.tsv", "a.txt", "a.parquet"]


def values(rows: Iterator[Raw]) -> list[tuple[int, int, Any]]:
    return [(raw.number, raw.place, parse(raw)) for raw in rows]


@pytest.mark.parametrize("name", KINDS)
def test_every_row_can_be_read_again_from_its_place(tmp_path, name):
    path = write_all(tmp_path)[name]
    rows = list(read_rows(path))
    found = values(iter(rows))
    assert len(rows) == 9 and not any(isinstance(value, Bad) for _, _, value in found)
    for at, row in enumerate(rows):
        assert values(read_rows(path, Span(row.place, row.number))) == found[at:]


def test_a_csv_file_is_read_in_stretches_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(feed_survey, "STRETCH", 64)
    rows = [{**row, "output": f'a "quoted",\r\nbroken line {number}\n\nend'} for number, row in enumerate(ROWS)]
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, [*ROWS[0]])
        writer.writeheader()
        writer.writerows(rows)
    found = feed_survey.survey(tmp_path / "a.csv", None)
    assert len(found.spans) > 3 and found.rows == 9
    read = [raw for span in found.spans for raw in read_rows(tmp_path / "a.csv", span)]
    assert [raw.value for raw in read] == rows and [raw.number for raw in read] == [*range(1, 10)]


@pytest.mark.parametrize("name", KINDS)
def test_a_stream_of_every_kind_of_file_goes_on_bit_by_bit(tmp_path, name):
    stage = "pt" if name == "a.txt" else "sft"
    config_ = config(write_all(tmp_path)[name], cache=tmp_path / "c", stage=stage, cutoff_len=200)

    def stream(state: dict[str, Any] | None = None) -> Stream:
        made = Stream(config_, tokenizer(), batch=1, buffer=4)
        if state is not None:
            made.restore(json.loads(json.dumps(state)))
        return made

    unbroken = take(stream(), 12)
    for done in (1, 4, 7):
        first = stream()
        take(first, done)
        assert plain(take(stream(first.state()), 12 - done)) == plain(unbroken[done:])


def take(feed: Feed | Stream, count: int) -> list[list[Batch]]:
    made = iter(feed)
    return [next(made) for _ in range(count)]


def plain(steps: list[list[Batch]]) -> list[Any]:
    """Steps as values that compare bit by bit."""
    names = ("ids", "positions", "labels", "segments", "slots", "pixels")
    return [
        [
            ([None if (value := getattr(batch, name)) is None else value.tolist() for name in names], batch.rows)
            for batch in step
        ]
        for step in steps
    ]


# ---- what is learned

DIALOG = [(who, f"{who} says {number}") for number in range(4) for who in ("user", "assistant")]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("caption", "plain")])
def test_rows_are_those_of_the_one_encoder_in_every_template(tmp_path, name):
    written = repr(TEMPLATES[name])
    kind = "llama3" if "eot_id" in written else "byte_level" if "im_start" in written else "sentencepiece"
    rows = [{"messages": [{"role": who, "content": text} for who, text in DIALOG]}]
    found = corpus(write_jsonl(tmp_path / "a.jsonl", rows), cache=tmp_path / "c", kind=kind, template=name).row(0)
    parts = render(name, [Turn(who, text) for who, text in DIALOG], open_answer=False)
    peer = encode(parts, tokenizer(kind))
    assert found.ids.tolist() == peer.ids and found.supervised.tolist()[1:] == peer.supervised[1:]
    learned = np.flatnonzero(found.supervised)
    ends = [at for at in learned if at + 1 == len(found.ids) or not found.supervised[at + 1]]
    assert len(ends) == 4
    if not TEMPLATES[name].stops:
        assert {int(found.ids[at]) for at in ends} <= stop_ids(TEMPLATES[name], tokenizer(kind))


@pytest.mark.parametrize("limit", [2, 3, 7, 20, 41])
@pytest.mark.parametrize("kind", ["sentencepiece", "llama3", "byte_level"])
def test_every_token_of_a_text_is_a_label_once_and_in_order(tmp_path, limit, kind):
    text, made = "hello world and then how many dogs jump over the lazy fox", tokenizer(kind)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    values = {"stage": "pt", "cutoff_len": limit, "packing": False}
    found = corpus(path, cache=tmp_path / "c", kind=kind, **values)
    batches = take(Feed(found, config(path, cache=tmp_path / "c", **values), batch=1, shuffle=False), len(found))
    labels = [label for [batch] in batches for label in batch.labels[0].tolist() if label != -100]
    bos, eos = ([] if token is None else [token] for token in (made.bos_id, made.eos_id))
    assert labels == [*bos, *made.encode(text), *eos][1:]
    assert sum(batch.targets for [batch] in batches) == len(labels) == int(found.targets.sum())


def test_no_label_leads_from_one_document_into_the_next(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"some text {number}"} for number in range(6)])
    found = corpus(path, cache=tmp_path / "c", stage="pt", cutoff_len=64)
    [[batch]] = take(Feed(found, config(path, cache=tmp_path / "c", stage="pt", cutoff_len=64), batch=8), 1)
    assert batch.segments is not None
    last = torch.ones_like(batch.segments, dtype=torch.bool)
    last[:, :-1] = batch.segments[:, 1:] != batch.segments[:, :-1]
    assert (batch.labels[last | (batch.segments < 0)] == -100).all()
    inside = ~last & (batch.segments > 0)
    assert torch.equal(batch.labels[inside], batch.ids.roll(-1, 1)[inside])
    assert (batch.positions[:, 1:][inside[:, :-1]] == batch.positions[:, :-1][inside[:, :-1]] + 1).all()


OPENINGS = {
    "alpaca": "### Response:",
    "vicuna_v1": " ASSISTANT:",
    "dialog": "\n### Assistant:",
    "llama2": " [/INST]",
    "tiny": "\nAssistant:",
}


@pytest.mark.parametrize(("asked", "said"), [(3, 300), (300, 3), (300, 300), (90, 60)])
@pytest.mark.parametrize("name", OPENINGS)
def test_of_one_long_exchange_the_answers_opening_beginning_and_stop_stay(tmp_path, name, asked, said):
    row = {"instruction": " ".join(["q0"] * asked), "output": "a0 " + " ".join(["so"] * said)}
    short = {"instruction": "q0", "output": "a0"}
    both = write_jsonl(tmp_path / "a.jsonl", [short, row])
    frame = len(corpus(both, cache=tmp_path / "c", template=name).row(0).ids)
    found = corpus(both, cache=tmp_path / "c", template=name, cutoff_len=frame + 100)
    row_, made = found.row(1), tokenizer()
    assert frame + 70 < len(row_.ids) <= frame + 100 and row_.ids[0] == made.bos_id
    first = int(np.flatnonzero(row_.supervised)[0])
    short_row = found.row(0)
    assert made.decode(row_.ids[:first].tolist()).endswith(OPENINGS[name])
    assert texts(found)[1].strip().startswith("a0")
    stop = [int(token) for token in row_.ids[row_.supervised][-1:]]
    assert stop == [int(token) for token in short_row.ids[short_row.supervised][-1:]]
    assert bool(row_.supervised[-1]) == bool(short_row.supervised[-1])


def test_packing_is_best_fit_decreasing():
    dice = random.Random(0)
    for _ in range(50):
        lengths = [dice.randint(1, 20) for _ in range(dice.randint(1, 30))]
        bins: list[list[int]] = []
        for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
            left = [20 - sum(lengths[other] for other in bin_) for bin_ in bins]
            fitting = [number for number in range(len(bins)) if left[number] >= lengths[at]]
            if fitting:
                bins[min(fitting, key=lambda number: left[number])].append(at)
            else:
                bins.append([at])
        found = best_fit(lengths, 20)
        assert sorted(at for bin_ in found for at in bin_) == list(range(len(lengths)))
        sums = [sorted(sum(lengths[at] for at in bin_) for bin_ in bins_) for bins_ in (found, bins)]
        assert sums[0] == sums[1]


# ---- pictures


def paint(path: Path, seed: int) -> str:
    """A picture of which no two parts are alike."""
    Image.frombytes("RGB", (64, 60), random.Random(seed).randbytes(3 * 64 * 60)).save(path)
    return str(path)


def seeing(tmp_path: Path, rows: list[dict[str, Any]], **more: Any) -> Any:
    values = {"pictures": True, "slots": 4, "image_size": 8, **more}
    return config(write_jsonl(tmp_path / "a.jsonl", rows), cache=tmp_path / "c", **values)


@pytest.mark.parametrize("packing", [False, True])
def test_crops_are_the_same_however_rows_are_dealt(tmp_path, packing):
    rows = [{**alpaca(number), "image": paint(tmp_path / f"{number}.png", number)} for number in range(7)]
    settings = seeing(tmp_path, rows, image_transform="random_resized_crop", packing=packing, cutoff_len=128)
    found = open_corpus(settings, tokenizer())

    def crops(dp: int, epoch: int) -> dict[str, Any]:
        looks = {}
        for rank in range(dp):
            feed = Feed(found, settings, batch=1, dp_rank=rank, dp_size=dp)
            feed.restore({"epoch": epoch, "taken": 0, "skipped": 0})
            for [batch] in take(feed, feed.steps_per_epoch):
                if batch.pixels is not None:
                    looks |= dict(zip(batch.rows, batch.pixels.tolist(), strict=True))
        return looks

    one = crops(1, 0)
    assert len(one) == 7 and one == crops(2, 0) == crops(3, 0)
    assert all(one[name] != look for name, look in crops(1, 1).items())


def test_an_example_knows_slots_from_ids_that_are_zero(tmp_path):
    row = {
        "instruction": "<image>what\x00is <image>",
        "output": "a fox <unk>",
        "images": [paint(tmp_path / "a.png", 0), paint(tmp_path / "b.png", 1)],
    }
    found = open_corpus(seeing(tmp_path, [row], template="tiny", slots=7), tokenizer())
    shown = found.example(0, tokenizer())
    assert shown == "<bos><picture 0><picture 1>Human: what\x00is\nAssistant:[[ a fox <unk><eos>]]"


def test_feature_rows_follow_the_pictures_over_the_whole_micro_batch(tmp_path):
    paths = [paint(tmp_path / f"{number}.png", number) for number in range(4)]
    rows = [{**alpaca(0), "images": paths[:2]}, alpaca(1), {**alpaca(2), "images": paths[2:]}]
    settings = seeing(tmp_path, rows, slots=3, packing=False)
    found = open_corpus(settings, tokenizer())
    [[batch]] = take(Feed(found, settings, batch=3, shuffle=False), 1)
    assert batch.slots is not None and batch.pixels is not None and len(batch.pixels) == 4
    assert batch.slots[batch.slots >= 0].tolist() == list(range(12)) and (batch.slots[1] == -1).all()
    assert (batch.ids[batch.slots >= 0] == 0).all()
