"""A conversation as numbers, within cutoff_len positions: what is given up where it is longer.

Must not know files or rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from accessory.data.encode import Encoded, encode
from accessory.data.feed.sources import FeedConfig
from accessory.data.template import Template, Turn, get_template, render
from accessory.data.tokenizer import Tokenizer

_TRIES = 8  # of cutting texts to measure; neighbouring texts share tokens, so that the first cut may miss by a few


@dataclass(frozen=True)
class Fitted:
    """A conversation as numbers, and how many positions it had before it was shortened."""

    encoded: Encoded
    positions: int


@dataclass(frozen=True)
class Fitter:
    """Encodes conversations for training and shortens those that are too long."""

    config: FeedConfig
    tokenizer: Tokenizer

    def encode(self, turns: Sequence[Turn], template: Template, counts: Sequence[int] | None = None) -> Encoded:
        """A whole conversation, its answers supervised. ValueError where the template cannot write it.

        counts: slots of each picture; None: all pictures have as many.
        """
        if not self.config.slots:
            turns, counts = [replace(turn, pictures=0) for turn in turns], ()
        if counts is None:
            counts = [self.config.geometry.slots(1, 1)] * sum(turn.pictures for turn in turns)
        parts = render(template, turns, open_answer=False)
        return encode(parts, self.tokenizer, slots_per_picture=counts, before_bos=self.config.before_bos)

    def fit(self, turns: Sequence[Turn], template: str, counts: Sequence[int] | None = None) -> Fitted | None:
        """A conversation in at most cutoff_len positions; None where that cannot be.

        What goes, in this order, and no more of it than needed: whole exchanges, the oldest first, calls of tools and
        their results with the question that they are for (the system text, the tools and all pictures stay; those of
        exchanges that go open the first question that stays); of the exchange that is left the end of its input, then
        the end of the question, then the end of the system text, while these three keep at least half of the room; then
        the end of the answer. What the template writes always stays, and with it BOS, the opening of the answer and the
        stop token; so do tools, calls and results, and a first token of the answer. counts: as for `encode`.
        """
        form = get_template(template)
        whole = self.encode(turns, form, counts)
        limit = self.config.cutoff_len
        if len(whole.ids) <= limit or self.config.overlong != "truncate":
            return Fitted(whole, len(whole.ids)) if len(whole.ids) <= limit else None
        head = [turn for turn in turns[:2] if turn.role in ("system", "tools")]
        rest = list(turns[len(head) :])
        starts = [at for at, turn in enumerate(rest) if turn.role == "user"]

        def fits(gone: int) -> bool:
            return len(self.encode(_later(head, rest, starts[gone]), form, counts).ids) <= limit

        gone = _least(len(starts) - 1, fits)
        kept = _later(head, rest, starts[-1 if gone is None else gone])
        fitted = self.encode(kept, form, counts) if gone is not None else self._cut(kept, form, counts)
        return None if fitted is None else Fitted(fitted, len(whole.ids))

    def _cut(self, turns: list[Turn], form: Template, counts: Sequence[int] | None) -> Encoded | None:
        """One exchange with its texts cut to measure."""
        limit = self.config.cutoff_len
        texts = _texts(turns)
        spans = [self.tokenizer.spans(text) for text in texts]
        said = turns[-1].role == "assistant"  # calls are never cut, and so no text
        frame = len(self.encode(_with(turns, ["", "", "", texts[3][:1]]), form, counts).ids)
        room = limit - frame + said
        for _ in range(_TRIES):
            if room < said:
                return None
            shares = _shares([len(span) for span in spans], room)
            if shares[3] < said:
                return None
            short = [_first(text, span, count) for text, span, count in zip(texts, spans, shares, strict=True)]
            if said and not short[3].strip():
                return None
            encoded = self.encode(_with(turns, short), form, counts)
            if len(encoded.ids) <= limit:
                return encoded
            room -= len(encoded.ids) - limit
        return None


def _least(top: int, fits: Callable[[int], bool]) -> int | None:
    """The smallest number from 1 to top that fits, by halving; None where top does not."""
    if top < 1 or not fits(top):
        return None
    low, high = 1, top
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def _later(head: list[Turn], rest: list[Turn], start: int) -> list[Turn]:
    """The conversation from a later question on, which the pictures of those before open."""
    pictures = sum(turn.pictures for turn in rest[:start])
    first = rest[start]
    return [*head, replace(first, pictures=first.pictures + pictures), *rest[start + 1 :]]


def _texts(turns: list[Turn]) -> list[str]:
    """Input, question, system and answer of one exchange; no answer where it ends with calls."""
    system = turns[0].text if turns[0].role == "system" else ""
    asked = next(turn for turn in turns if turn.role == "user")
    return [asked.input, asked.text, system, turns[-1].text if turns[-1].role == "assistant" else ""]


def _with(turns: list[Turn], texts: list[str]) -> list[Turn]:
    """One exchange with other texts."""
    new = {"system": {"text": texts[2]}, "user": {"input": texts[0], "text": texts[1]}, "assistant": {"text": texts[3]}}
    return [replace(turn, **new.get(turn.role, {})) for turn in turns]


def _shares(lengths: list[int], room: int) -> list[int]:
    """Tokens that input, question, system and answer keep."""
    answer = min(lengths[3], max(room - sum(lengths[:3]), room - room // 2))
    counts, left = [0, 0, 0, answer], room - answer
    for index in (2, 1, 0):
        counts[index] = max(0, min(lengths[index], left))
        left -= counts[index]
    return counts


def _first(text: str, spans: list[tuple[int, int, int]], count: int) -> str:
    """The text of its first tokens."""
    if count >= len(spans):
        return text
    return text[: spans[count][1]]
