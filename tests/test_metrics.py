"""Scores of answers: the numbers that LLaMA-Factory's users know, judged by nltk, rouge_chinese and jieba themselves.

Must not open models or data.
"""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from accessory import metrics

GOLDEN = [
    ("the cat sat on the mat", "the cat is on the mat", 80.0, 60.0, 83.3333, 78.392),
    ("hello", "hello", 100.0, 0.0, 100.0, 100.0),
    ("hi", "hello", 0.0, 0.0, 0.0, 6.6337),
    ("", "hello", 0.0, 0.0, 0.0, 0.0),
    (
        "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u73a9\u3002",
        "\u4eca\u5929\u5929\u6c14\u4e0d\u9519\uff0c\u6211\u4eec\u4e00\u8d77\u53bb\u516c\u56ed\u3002",
        *(70.5882, 26.6667, 70.5882, 31.3296),
    ),
    (
        "Paris is the capital of France. It is big.",
        "The capital of France is Paris.",
        *(75.0, 25.0, 55.5556, 60.4538),
    ),
    ("a b", "a b c d", 66.6667, 50.0, 66.6667, 22.1658),
]


@pytest.mark.parametrize(("said", "expected", "one", "two", "longest", "bleu"), GOLDEN)
def test_the_golden_numbers_come_out_to_all_digits(said, expected, one, two, longest, bleu):
    got = metrics.score(said, expected)
    assert got == {"rouge-1": one, "rouge-2": two, "rouge-l": longest, "bleu-4": bleu}
    assert tuple(got) == metrics.NAMES


@pytest.fixture(scope="module")
def peer() -> Callable[[str, str], dict[str, float]]:
    """The same by the libraries, put together as LLaMA-Factory does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jieba, rouge = importlib.import_module("jieba"), importlib.import_module("rouge_chinese")
        bleu = importlib.import_module("nltk.translate.bleu_score")

    def judge(said: str, expected: str) -> dict[str, float]:
        mine, other = " ".join(jieba.cut(said)), " ".join(jieba.cut(expected))
        parts: Any = {name: {"f": 0.0} for name in ("rouge-1", "rouge-2", "rouge-l")}
        if mine.split() and other.split():
            parts = rouge.Rouge().get_scores(mine, other)[0]
        method = bleu.SmoothingFunction().method3
        whole = bleu.sentence_bleu([list(expected)], list(said), smoothing_function=method)
        return {name: round(100 * part["f"], 4) for name, part in parts.items()} | {"bleu-4": round(100 * whole, 4)}

    jieba.setLogLevel(60)
    return judge


PIECES = [
    *"abc ?.!\n\t\u3002\uff01\uff1f\u201d\u2019\u2026",
    *("the", "cat", " ", "  ", "\n\n", "\n \n", "......", "........", "\r\n", "\u00a0", "\u3000", "1.5%", "C++"),
    *("\u4eca\u5929", "\u5929\u6c14", "\u5f88", "\u597d", "\u6211\u4eec", "\u516c\u56ed", "\u73a9", "\U0001f600"),
]


def test_texts_of_any_kind_score_as_the_libraries_say(peer):
    dice = random.Random(7)
    for _ in range(1500):
        said, expected = ("".join(dice.choices(PIECES, k=dice.randrange(16))) for _ in range(2))
        assert metrics.score(said, expected) == peer(said, expected), (said, expected)


def test_texts_that_share_much_score_as_the_libraries_say(peer):
    dice = random.Random(11)
    for _ in range(100):
        text = dice.choices(PIECES, k=60)
        other = [piece for piece in text if dice.random() < 0.8]
        pair = "".join(text), "".join(other)
        assert metrics.score(*pair) == peer(*pair) and metrics.score(*reversed(pair)) == peer(*reversed(pair)), pair


def test_the_longest_common_subsequence_is_that_of_the_textbook():
    def table(left: list[str], right: list[str]) -> int:
        row = [0] * (len(right) + 1)
        for word in left:
            before, row = row, [0]
            for number, other in enumerate(right):
                row.append(before[number] + 1 if word == other else max(before[number + 1], row[-1]))
        return row[-1]

    dice = random.Random(3)
    for _ in range(300):
        left, right = (dice.choices("abcdef", k=dice.randrange(90)) for _ in range(2))
        assert metrics.common(left, right) == table(left, right)


def test_long_answers_are_scored_at_once():
    dice = random.Random(5)
    said, expected = (" ".join(f"w{dice.randrange(500)}" for _ in range(4000)) for _ in range(2))
    metrics.score("warm", "warm")
    began = time.process_time()
    assert 0 < metrics.score(said, expected)["rouge-l"] < 100
    assert time.process_time() - began < 2


def test_an_exact_match_forgives_blanks_around_the_text_alone():
    assert metrics.exact_match(" yes\n", "yes") and metrics.exact_match("", " ")
    assert not metrics.exact_match("Yes", "yes") and not metrics.exact_match("a  b", "a b")


def test_the_mean_is_over_answers():
    scores = [metrics.score(said, expected) for said, expected, *_ in GOLDEN]
    assert metrics.mean(scores)["bleu-4"] == pytest.approx(sum(row[5] for row in GOLDEN) / len(GOLDEN), abs=1e-12)
    assert metrics.mean([]) == {}


def test_without_jieba_one_sentence_says_what_to_install(monkeypatch):
    metrics._cutter.cache_clear()
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ModuleNotFoundError, match="jieba: not installed.*pip install jieba"):
        metrics.rouge("a", "a")
    assert metrics.bleu4("abcd", "abcd") == 1.0


def test_neither_torch_nor_another_room_is_needed():
    code = "import sys, accessory.metrics as m; m.score('a', 'a'); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    rooms = {name for name in done.stdout.split() if name.startswith("accessory")}
    assert rooms == {"accessory", "accessory.metrics"} and "torch" not in done.stdout.split() and not done.stderr
