"""Rows that are longer than cutoff_len: what goes, what always stays, and that it is counted.

Must not look at files or batches.
"""

import pytest
from feed_toys import alpaca, corpus, picture, texts, tokenizer, write_jsonl

from accessory.data.feed import FeedConfig
from accessory.data.feed.fit import Fitter
from accessory.data.template import Turn, get_template

WORDS = "the quick brown fox jumps over lazy dog and then some human "


def fitted(turns: list[Turn], cutoff: int, template: str = "alpaca", **more):
    config = FeedConfig(sources=(), cutoff_len=cutoff, **more)
    return Fitter(config, tokenizer()).fit(turns, template)


def shown(ids: list[int]) -> str:
    return tokenizer().decode(ids)


def test_whole_exchanges_go_first_and_the_oldest_of_them():
    turns = []
    for number in range(6):
        turns += [Turn("user", f"question {number} {WORDS}"), Turn("assistant", f"answer {number} {WORDS}")]
    whole = len(fitted(turns, 10_000, "dialog").encoded.ids)
    for cutoff in (whole - 1, whole * 2 // 3, whole // 2):
        found = fitted(turns, cutoff, "dialog")
        text = shown(found.encoded.ids)
        kept = [number for number in range(6) if f"question {number}" in text]
        assert kept == list(range(kept[0], 6)) and kept[0] > 0 and found.positions == whole
        assert all(f"question {number} {WORDS}" in text and f"answer {number} {WORDS}" in text for number in kept)
        one_more = fitted(turns[2 * kept[0] - 2 :], 10_000, "dialog")
        assert len(found.encoded.ids) <= cutoff < len(one_more.encoded.ids)


def test_the_system_text_and_all_pictures_stay_when_exchanges_go():
    turns = [Turn("system", "be good"), Turn("user", "one " + WORDS, 2), Turn("assistant", "two " + WORDS)]
    turns += [Turn("user", "three", 1), Turn("assistant", "four")]
    found = fitted(turns, 60, slots=4, pictures=True).encoded
    assert max(found.slots) == 11 and sum(slot >= 0 for slot in found.slots) == 12
    text = shown([token for token, slot in zip(found.ids, found.slots, strict=True) if slot < 0])
    assert "be good" in text and "three" in text and "one" not in text


@pytest.mark.parametrize("template", ["alpaca", "dialog", "llama2", "vicuna_v1", "none"])
@pytest.mark.parametrize("longer", ["question", "answer", "both", "input"])
def test_one_exchange_keeps_bos_pictures_opening_and_stop(template, longer):
    question = WORDS * (40 if longer in ("question", "both") else 1)
    given = WORDS * 40 if longer == "input" else ""
    answer = WORDS * (40 if longer in ("answer", "both") else 1)
    turns = [Turn("user", question, 1, input=given), Turn("assistant", answer)]
    frame = [Turn("user", "", 1), Turn("assistant", "x")]
    cutoff = 260
    found = fitted(turns, cutoff, template, slots=5, pictures=True).encoded
    least = fitted(frame, cutoff, template, slots=5, pictures=True).encoded
    assert cutoff - 3 <= len(found.ids) <= cutoff
    assert found.ids[0] == tokenizer().bos_id and [slot for slot in found.slots if slot >= 0] == list(range(5))
    last = max(at for at, mark in enumerate(found.supervised) if mark)
    stop = max(at for at, mark in enumerate(least.supervised) if mark)
    assert found.ids[last] == least.ids[stop]
    first = found.supervised.index(True)
    opening = 4 if template == "none" else 8
    if template != "none":
        begin = least.supervised.index(True)
        assert found.ids[first - opening : first] == least.ids[begin - opening : begin]
    said = shown([token for token, mark in zip(found.ids, found.supervised, strict=True) if mark])
    if longer in ("question", "input"):
        assert " ".join(WORDS.split()) in said
    else:
        assert "the quick" in said and sum(found.supervised) >= 20


def test_the_prompt_keeps_half_of_the_room_before_the_answer_is_cut():
    turns = [Turn("user", WORDS * 20), Turn("assistant", WORDS * 20)]
    found = fitted(turns, 200, "none").encoded
    assert 95 <= sum(found.supervised) <= 103 and len(found.ids) >= 198


def test_a_frame_that_fills_cutoff_len_is_dropped_and_counted(tmp_path):
    picture(tmp_path / "a.png")
    rows = [alpaca(1), alpaca(2) | {"image": "a.png"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    found = corpus(path, cache=tmp_path / "cache", cutoff_len=150, pictures=True, slots=140)
    assert len(found) == 1 and found.report["dropped_overlong"] == 1 and found.report["truncated"] == 0


def test_truncated_rows_and_the_positions_they_lost_are_counted(tmp_path):
    rows = [alpaca(1), alpaca(2, words=500)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    found = corpus(path, cache=tmp_path / "cache", cutoff_len=200)
    whole = corpus(path, cache=tmp_path / "cache", cutoff_len=2000)
    assert found.report["truncated"] == 1
    assert found.report["truncated_positions"] == whole.lengths.sum() - found.lengths.sum()
    assert found.lengths.max() <= 200 and texts(found)[1].startswith("fox fox")


def test_overlong_drop_drops_and_error_names_the_row(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [alpaca(1), alpaca(2, words=500)])
    found = corpus(path, cache=tmp_path / "cache", cutoff_len=200, overlong="drop")
    assert len(found) == 1 and found.report["dropped_overlong"] == 1
    with pytest.raises(ValueError, match=r"a\.jsonl:2: has more than cutoff_len 200 positions; set overlong"):
        corpus(path, cache=tmp_path / "cache", cutoff_len=200, overlong="error")


def test_no_length_of_texts_and_cutoff_breaks_the_rule():
    form = get_template("alpaca")
    for cutoff in range(60, 120, 7):
        for question in (0, 3, 40):
            for answer in (1, 30):
                turns = [Turn("user", WORDS[:question], 1), Turn("assistant", WORDS[:answer])]
                found = fitted(turns, cutoff, "alpaca", slots=3, pictures=True)
                whole = Fitter(FeedConfig(sources=(), slots=3), tokenizer()).encode(turns, form)
                if found is None:
                    continue
                assert len(found.encoded.ids) <= cutoff and found.positions == len(whole.ids)
                assert found.encoded.ids[-1] == tokenizer().eos_id and found.encoded.supervised[-1]
