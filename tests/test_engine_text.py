"""The text of an answer as its tokens come: stop strings, whole characters, the template's blanks."""

from __future__ import annotations

import random

import pytest
from fixtures import toys

from accessory.data.tokenizer import Tokenizer, open_tokenizer
from accessory.engine.text import AnswerText


class Pieces:
    """A tokenizer whose token i is the i-th of some byte strings."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def piece_bytes(self, token: int, *, first: bool = False) -> bytes:
        return self.pieces[token]

    def still_first(self, token: int, piece: bytes) -> bool:
        return False


def pushed(pieces: list[bytes], *, complete: bool = True, **options) -> tuple[list[str], AnswerText]:
    """What each piece brings, then what the end brings."""
    text = AnswerText(Pieces(pieces), **options)
    shown = []
    for token in range(len(pieces)):
        shown.append(text.push(token))
        if text.stopped:
            return shown, text
    return [*shown, text.finish(complete=complete)], text


@pytest.fixture(scope="module")
def spm(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "spm.model"
    path.write_bytes(toys.sentencepiece_model())
    return open_tokenizer(path)


def test_without_stops_every_piece_is_shown_at_once():
    shown, text = pushed([b"a", b" b", b"c\n"])
    assert shown == ["a", " b", "c\n", ""] and not text.stopped


def test_a_stop_string_may_span_tokens():
    shown, text = pushed([b"yes\n", b"#", b"## Human"], stops=["\n###"])
    assert shown == ["yes", "", ""] and text.stopped


def test_what_might_have_become_a_stop_string_is_shown_once_it_cannot():
    shown, _ = pushed([b"a\n", b"##", b" b"], stops=["\n###"])
    assert shown == ["a", "", "\n## b", ""]


def test_a_begun_stop_string_is_shown_at_the_end():
    assert pushed([b"a\n#"], stops=["\n###"])[0] == ["a", "\n#"]
    assert pushed([b"a\n#"], stops=["\n###"], complete=False)[0] == ["a", "\n#"]


def test_a_stop_string_may_begin_inside_a_failed_one():
    assert "".join(pushed([b"aab", b"aac!"], stops=["aabaad", "abaac"])[0]) == "a"


def test_the_stop_that_is_complete_first_wins_wherever_tokens_are_cut():
    for pieces in ([b"xabcd"], [b"x", b"a", b"b", b"c", b"d"], [b"xab", b"cd"]):
        assert "".join(pushed(pieces, stops=["abcd", "bc"])[0]) == "xa"


def test_any_text_cut_anywhere_ends_before_the_first_complete_stop():
    dice = random.Random(0)
    for _ in range(300):
        text = "".join(dice.choice("ab") for _ in range(dice.randint(0, 30)))
        stops = ["".join(dice.choice("ab") for _ in range(dice.randint(1, 6))) for _ in range(dice.randint(1, 3))]
        pieces, at = [], 0
        while at < len(text):
            size = dice.randint(1, 5)
            pieces.append(text[at : at + size].encode())
            at += size
        ends = [(end, -len(stop)) for stop in stops for end in range(len(text) + 1) if text[:end].endswith(stop)]
        expected = text if not ends else text[: min(ends)[0] + min(ends)[1]]
        shown, answer = pushed(pieces, stops=stops)
        assert "".join(shown) == expected and answer.stopped == bool(ends), (text, stops, pieces)


def test_half_a_character_is_never_shown():
    face = "\U0001f600".encode()
    shown, _ = pushed([b"hi ", face[:1], face[1:3], face[3:], b"!"])
    assert shown == ["hi ", "", "", "\U0001f600", "!", ""]


def test_a_character_that_stays_broken_becomes_a_replacement_at_the_end():
    assert pushed([b"a", "\u4e2d".encode()[:2]])[0] == ["a", "", "\ufffd"]


def test_the_templates_blank_before_an_answer_is_no_part_of_it():
    assert "".join(pushed([b" ", b" a b"], lead=" ")[0]) == " a b"
    assert "".join(pushed([b" a", b" b"], lead=" ")[0]) == "a b"
    assert "".join(pushed([b"a b"], lead=" ")[0]) == "a b"
    assert "".join(pushed([b"\n"], lead="\n\n")[0]) == "\n"


def test_the_templates_blank_after_an_answer_is_dropped_only_where_the_model_ended_it():
    assert "".join(pushed([b"a ", b"b", b" "], tail=" ")[0]) == "a b"
    assert "".join(pushed([b"a ", b"b", b" "], tail=" ", complete=False)[0]) == "a b "


def test_a_stream_adds_up_to_what_decoding_all_gives(spm):
    for sample in toys.TEXTS:
        ids = spm.encode(sample)
        for opening in (True, False):
            text = AnswerText(spm, opening=opening)
            shown = "".join(text.push(token) for token in ids) + text.finish(complete=True)
            assert shown == spm.decode(ids, opening=opening)


def test_what_is_held_back_is_never_longer_than_a_stop_string():
    text = AnswerText(Pieces([b"ab"]), stops=["ababac"])
    said = sum(len(text.push(0)) for _ in range(1000))
    assert 2000 - said < 6
