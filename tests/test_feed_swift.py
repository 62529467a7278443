"""Rows of ms-swift, OpenAI, LLaVA and sharegpt with pictures of every kind, and rows that are refused by name.

Must not need a network beyond loopback.
"""

import base64
import io
import json
import threading

import pytest
import torch
from feed_toys import alpaca, config, corpus, picture, texts, tokenizer, write_jsonl
from PIL import Image
from web import serve

from accessory.data.encode import encode
from accessory.data.feed import Feed, Source
from accessory.data.feed.records import to_sample
from accessory.data.fetch import Limits
from accessory.data.image import load_picture, transform
from accessory.data.template import Turn, render

SEES = {"pictures": True, "slots": 3, "image_size": 8, "image_transform": "resized_center_crop"}


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setattr("accessory.data.fetch.LIMITS", Limits(waits=()))
    with serve() as found:
        yield found


def png(colour: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 12), colour).save(out, "PNG")
    return out.getvalue()


def seen(path, tmp_path, **more):
    """The corpus of a file for a model that sees, and its config."""
    given = {**SEES, **more}
    return corpus(path, cache=tmp_path / "cache", **given), config(path, cache=tmp_path / "cache", **given)


def sample(row: dict, **more):
    return to_sample(row, Source("a.jsonl", **more), seed=0, number=1)


def test_a_row_of_ms_swift_has_query_response_history_and_system(tmp_path):
    row = {"query": "three", "response": "five", "system": "be good", "history": [["one", "two"]], "images": []}
    turns = [Turn("system", "be good"), Turn("user", "one"), Turn("assistant", "two")]
    turns += [Turn("user", "three"), Turn("assistant", "five")]
    found = corpus(write_jsonl(tmp_path / "a.jsonl", [row]), cache=tmp_path / "cache")
    assert found.row(0).ids.tolist() == encode(render("alpaca", turns, open_answer=False), tokenizer()).ids
    for text in (json.dumps(row["history"]), repr(row["history"])):  # a file of columns has them as text
        assert sample(row | {"history": text}).turns == turns
    assert sample({"query": "q", "response": "a", "history": "", "images": None}).turns[0] == Turn("user", "q")


def test_pictures_stand_where_the_row_has_their_marks():
    row = {
        "query": "<image>compare with <image>!",
        "response": "same",
        "history": [["see <image>", "a fox"]],
        "images": ["a.png", "b.png", "c.png"],
    }
    found = sample(row)
    assert found.turns[0] == Turn("user", "see ", pictures=1, places=(4,))
    assert found.turns[2] == Turn("user", "compare with !", pictures=2, places=(13,))
    assert found.pictures == ["a.png", "b.png", "c.png"] and found.said[2].text == row["query"]
    assert sample({"query": "q", "response": "a", "images": "a.png"}).turns[0] == Turn("user", "q", pictures=1)


def test_content_parts_keep_the_order_of_text_and_pictures():
    parts = [
        {"type": "image_url", "image_url": {"url": "https://host/a.png"}},
        {"type": "text", "text": "and "},
        {"type": "image", "image": "b.png"},
        {"type": "text", "text": "? <image>"},
    ]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]}
    found = sample(row)
    assert found.turns[0] == Turn("user", "and ? <image>", pictures=2, places=(4,))
    assert found.pictures == ["https://host/a.png", "b.png"]


def test_llava_rows_have_pictures_in_front_and_rows_without_image_are_text():
    said = [{"from": "human", "value": "what is it\n<image>"}, {"from": "gpt", "value": "a fox"}]
    found = sample({"id": "1", "image": "x/a.png", "conversations": said})
    assert found.turns[0] == Turn("user", "what is it", pictures=1) and found.pictures == ["x/a.png"]
    assert sample({"id": "2", "conversations": [{"from": "human", "value": "hi"}, said[1]]}).pictures == []


@pytest.mark.parametrize("shape", ["alpaca", "swift", "conversations", "messages"])
def test_images_are_kept_in_every_shape_of_row(shape):
    row = {
        "alpaca": alpaca(1),
        "swift": {"query": "q", "response": "a"},
        "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    }[shape]
    for images in (["a.png", "b.png"], [{"path": "a.png", "bytes": None}, {"path": "b.png"}], '["a.png", "b.png"]'):
        found = sample(row | {"images": images})
        assert found.pictures == ["a.png", "b.png"] and found.turns[0].pictures == 2


def test_coded_pictures_of_every_kind_are_the_picture():
    data = png()
    text = base64.b64encode(data).decode()
    kinds = [data, {"bytes": data, "path": "x.png"}, {"bytes": text}, text, f"data:image/png;base64,{text}"]
    for given in kinds:
        (name,) = sample({"query": "q", "response": "a", "images": [given]}).pictures
        assert name.startswith("data:") and load_picture(name).size == (20, 12)


def test_a_mark_that_a_person_typed_is_text_where_the_row_places_pictures_itself(tmp_path):
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "write <image> in html"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "<image>"}]}
    picture(tmp_path / "a.png")
    found, _ = seen(write_jsonl(tmp_path / "a.jsonl", [row]), tmp_path)
    assert found.report["pictures"] == 1 and (found.row(0).slots >= 0).sum() == 3
    assert "write <image> in html" in found.example(0, tokenizer())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "x", "chosen": "a", "rejected": "b"}, "preferences are not learned"),
        ({"query": "x", "response": "a", "rejected_response": "b"}, "preferences are not learned"),
        ({"query": "x", "response": "a", "tools": '[{"name": 3}]'}, "name: got 3, expected 1 to 128"),
        ({"query": "x", "response": "a", "videos": ["v.mp4"]}, "videos: got videos"),
        ({"query": "x", "response": "a", "audios": ["v.wav"]}, "audios: got audio"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "got no question with an answer"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "calls.name: got None"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "calls.name: got None"),
        ({"query": "x", "response": "a", "image": "a.png", "images": ["b.png"]}, "expected one of them"),
        ({"query": "x", "response": "a", "images": [3]}, "image: got 3"),
        ({"query": "x", "response": "a", "images": [{"bytes": "no base64"}]}, "expected base64"),
        ({"query": "x", "response": "a", "images": ["file:///etc/passwd"]}, "expected a path, an http"),
        ({"query": "x", "response": "a", "images": "[broken"}, "JSON list of paths"),
        ({"query": "<image>", "response": "a", "images": ["a.png", "b.png"]}, "2 pictures and 1 places"),
        ({"query": "x", "response": "a", "history": "[['q']]"}, "expected a question and an answer"),
        ({"query": "x", "response": "a", "history": "nonsense"}, "expected a list of pairs"),
        ({"response": "a"}, "query: missing"),
    ],
)
def test_rows_that_cannot_be_learned_whole_are_refused_by_name(row, said):
    with pytest.raises(ValueError, match=said):
        sample(row)


def test_empty_tools_and_preferences_are_none():
    row = {"query": "x", "response": "a", "tools": "[]", "videos": [], "rejected_response": "", "chosen": None}
    assert len(sample(row).turns) == 2


def test_pictures_in_a_parquet_file_are_read_from_it_and_batches_see_them(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    rows = [
        {"query": "q", "response": "a", "images": [{"bytes": png(colour), "path": None}]} for colour in ("red", "blue")
    ]
    path = tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)
    found, own = seen(path, tmp_path, packing=False)
    (batch,) = next(iter(Feed(found, own, batch=2, shuffle=False)))
    look = transform("resized_center_crop", size=8, mean=own.mean, std=own.std)
    for number, colour in enumerate(("red", "blue")):
        assert torch.equal(batch.pixels[number], look(load_picture(png(colour))))


def test_a_row_may_name_a_url_which_is_fetched_once(tmp_path, web):
    web.pages["/a.png"] = png()
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"query": f"q {n}", "response": "a", "images": [web.url()]} for n in range(3)]
    )
    found, own = seen(path, tmp_path, allow_private_urls=True, packing=False)
    assert found.row(0).pictures == (web.url(),) and len(web.asked) == 1
    (batch,) = next(iter(Feed(found, own, batch=3, shuffle=False)))
    assert batch.pixels.shape == (3, 3, 8, 8) and len(web.asked) == 1
    assert (tmp_path / "cache/pictures").is_dir()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/gone.png", "answers 404"),
        ("/page", "got a web page"),
        ("/private", "which is not public; use a public host, or set allow_private_urls"),
        ("data:image/png;base64,AAAA", "got a file that is none of PNG"),
        ("data:image/png;base64,%%%", "its base64 is broken|empty"),
    ],
)
def test_a_bad_picture_from_elsewhere_follows_on_bad_row(tmp_path, web, name, said):
    web.pages |= {"/page": b"<html>none</html>", "/private": png(), "/a.png": png()}
    given = web.url(name) if name.startswith("/") else name
    allowed = name != "/private"
    good = png_url() if not allowed else web.url()
    rows = [{"query": "q", "response": f"a {at}", "images": [one]} for at, one in enumerate((good, given, good))]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: picture ") as caught:
        seen(path, tmp_path, allow_private_urls=allowed)
    assert said.split("|")[0] in str(caught.value) or said.split("|")[-1] in str(caught.value)
    found, _ = seen(path, tmp_path, allow_private_urls=allowed, on_bad_row="skip")
    assert texts(found) == ["a 0", "a 2"] and found.report["bad"] == 1


def png_url() -> str:
    return f"data:image/png;base64,{base64.b64encode(png()).decode()}"


def test_pictures_whose_host_gave_no_answer_are_asked_for_again_when_it_does(tmp_path, web):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"query": "q", "response": "a", "images": [web.url()]}, {"query": "q", "response": "b"}],
    )
    web.pages["/a.png"] = 503
    more = {"allow_private_urls": True, "on_bad_row": "skip"}
    assert texts(seen(path, tmp_path, **more)[0]) == ["b"]
    assert texts(seen(path, tmp_path, **more)[0]) == ["b"]
    web.pages["/a.png"] = png()
    assert texts(seen(path, tmp_path, **more)[0]) == ["a", "b"]


def test_other_pixels_in_a_row_are_another_corpus_and_long_names_are_not_shown(tmp_path):
    prints = []
    for colour in ("red", "blue"):
        row = {"query": "q", "response": "a", "images": [{"bytes": base64.b64encode(png(colour)).decode()}]}
        found, own = seen(write_jsonl(tmp_path / "a.jsonl", [row]), tmp_path)
        prints.append(found.fingerprint)
    assert prints[0] != prints[1]
    broken = {"query": "q", "response": "a", "images": ["data:image/png;base64," + "AAAA" * 1000]}
    with pytest.raises(ValueError) as caught:
        seen(write_jsonl(tmp_path / "b.jsonl", [broken]), tmp_path)
    assert len(str(caught.value)) < 500


def test_pictures_are_fetched_side_by_side_and_one_that_fails_is_asked_for_once(tmp_path, web):
    gate = threading.Barrier(4, timeout=20)

    def together(handler):
        gate.wait()
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(png())

    web.pages |= {f"/{number}": together for number in range(4)}
    names = [*(web.url(f"/{number}") for number in range(4)), *[web.url("/gone")] * 5]
    rows = [
        {"query": "see http://127.0.0.1/elsewhere", "response": f"a {at}", "images": [one]}
        for at, one in enumerate(names)
    ]
    found, _ = seen(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path, allow_private_urls=True, on_bad_row="skip")
    assert texts(found) == ["a 0", "a 1", "a 2", "a 3"] and found.report["bad"] == 5
    assert sorted(path for path, _ in web.asked) == ["/0", "/1", "/2", "/3", "/gone"]
