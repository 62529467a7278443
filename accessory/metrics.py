"""How near an answer comes to the expected one: exact match, BLEU-4 of characters, ROUGE-1, 2 and L of words.

Must not know models, files of rows or who asks. The definitions are those by which LLaMA-Factory's users know these
names: NLTK's sentence BLEU with the geometric smoothing of NIST's mteval, and rouge_chinese over the words of jieba.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

NAMES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
"""The scores of `score`, in percent."""

_ORDERS = 4
_NEVER_ZERO = 1e-8  # in the denominator of F1
# A sentence ends behind one of these marks (ideographic full stop, fullwidth ! and ?, ?) or six dots, unless a closing
# quotation mark follows.
_SENTENCE = re.compile("([\u3002\uff01\uff1f?]|[.]{6})([^\u201d\u2019])")


def exact_match(said: str, expected: str) -> bool:
    """Whether they are the same text, blanks around it aside."""
    return said.strip() == expected.strip()


def bleu4(said: str, expected: str) -> float:
    """BLEU of one text against one reference over characters, for every language: 0 to 1.

    The geometric mean of the precisions of 1 to 4 characters in a row (Papineni et al. 2002), counts clipped by the
    reference's, times exp(1 - reference / text) for a text that is shorter. Where no piece of some length matches, its
    precision is 1 / (2^k * pieces), k = 1, 2, ... over such lengths; without a common character the result is 0.
    """
    logs, halvings = [], 0
    for n in range(1, _ORDERS + 1):
        pieces, wanted = _pieces(said, n), _pieces(expected, n)
        matches: float = sum(min(count, wanted[piece]) for piece, count in pieces.items())
        if n == 1 and not matches:
            return 0.0
        if not matches:
            halvings += 1
            matches = 0.5**halvings
        logs.append(math.log(matches / max(1, len(said) - n + 1)) / _ORDERS)
    brevity = min(1.0, math.exp(1 - len(expected) / len(said)))
    return brevity * math.exp(math.fsum(logs))


def rouge(said: str, expected: str) -> tuple[float, float, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L over words, 0 to 1; 0 where one side has no word.

    1 and 2: of the sets of words and of pairs in a row, so that repetitions do not count; L: of the longest common
    subsequence of all words (Lin 2004). Raises ModuleNotFoundError without jieba.
    """
    mine, other = words(said), words(expected)
    if not any(mine) or not any(other):
        return 0.0, 0.0, 0.0
    pairs = set(zip(mine, mine[1:], strict=False)), set(zip(other, other[1:], strict=False))
    return (
        _f1(len(set(mine) & set(other)), len(set(mine)), len(set(other))),
        _f1(len(pairs[0] & pairs[1]), len(pairs[0]), len(pairs[1])),
        _f1(common(mine, other), len(mine), len(other)),
    )


def score(said: str, expected: str) -> dict[str, float]:
    """All scores of one answer by their NAMES: percent, four digits behind the point."""
    values = (*rouge(said, expected), bleu4(said, expected))
    return {name: round(100 * value, 4) for name, value in zip(NAMES, values, strict=True)}


def mean(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each score over answers; {} without answers."""
    if not scores:
        return {}
    return {name: math.fsum(one[name] for one in scores) / len(scores) for name in scores[0]}


def words(text: str) -> list[str]:
    """The words of a text as ROUGE counts them: jieba's, blanks dropped, but a line of blanks alone is one empty word.

    Raises ModuleNotFoundError without jieba.
    """
    spaced = " ".join(_cutter()(text))
    lines = _SENTENCE.sub(r"\1" "\n" r"\2", spaced).rstrip().split("\n")
    return [word for line in lines if line for word in line.split() or [""]]


def common(left: Sequence[str], right: Sequence[str]) -> int:
    """The length of the longest common subsequence: n * m / 64 steps for n and m words (Hyyro 2004).

    Bit i of a row is 0 where the table of the textbook grows by one at word i of `left`.
    """
    places: dict[str, int] = {}
    for number, word in enumerate(left):
        places[word] = places.get(word, 0) | 1 << number
    full = row = (1 << len(left)) - 1
    for word in right:
        here = places.get(word, 0) & row
        row = (row + here | row - here) & full
    return len(left) - bin(row).count("1")


def _pieces(text: str, n: int) -> Counter[str]:
    """How often each n characters in a row occur."""
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))


def _f1(common: int, mine: int, other: int) -> float:
    """Harmonic mean of precision and recall, nearly."""
    precision, recall = common / mine if mine else 0.0, common / other if other else 0.0
    return 2 * (precision * recall / (precision + recall + _NEVER_ZERO))


@functools.cache
def _cutter() -> Callable[[str], Iterable[str]]:
    """jieba's own segmentation with its own dictionary, which is read (a second) rather than taken from a cache in the
    folder of temporary files, where anybody may have written it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its patterns are not raw strings
            import jieba
    except ImportError:
        raise ModuleNotFoundError(
            "jieba: not installed, expected it for the words that ROUGE counts; pip install jieba"
        ) from None
    cutter = jieba.Tokenizer()
    cutter.FREQ, cutter.total = cutter.gen_pfdict(cutter.get_dict_file())
    cutter.initialized = True
    return cutter.cut
