"""Rows of every kind as conversations with pictures, or as plain text.

Must not know tokens, templates or files. A row that makes no sense is a ValueError that says why, without its place.
"""

from __future__ import annotations

import ast
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accessory.config import nearest
from accessory.data.feed.columns import filled, is_filled, refuse, renamed
from accessory.data.feed.sources import Source
from accessory.data.feed.talk import ROLES, calls_in, gathered, ordered, speaker
from accessory.data.picture import as_name
from accessory.data.template import PLACE, Turn, read_calls, read_tools, tagged

TEXTS = ("text", "content")


@dataclass
class Sample:
    """A conversation that ends with an answer, or with a question where that was asked for."""

    turns: list[Turn]
    pictures: list[str]
    """Paths as the row has them, http(s) URLs and data: URLs, in the order of their places."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was left out or passed over, by name, to be counted."""
    said: list[Turn] = field(default_factory=list)
    """The turns with the marks of pictures in their texts."""

    def begun(self, system: str | None, source: Source) -> Sample:
        """With a system text where the row has none; a caption, which is no conversation, as it is."""
        if not system or self.turns[0].role == "system" or source.preprocess == "caption":
            return self
        first = Turn("system", system)
        return replace(self, turns=[first, *self.turns], said=[first, *self.said])


def to_text(row: Any, column: str | None = None) -> str:
    """The text of a pretraining row: its column, else text or content. ValueError where there is none."""
    row = _mapping(row)
    names = TEXTS if column is None else (column,)
    name = next((name for name in names if name in row), None)
    if name is None:
        remedy = "name the column" if column else "name the field one of these, or set stage to sft"
        raise ValueError(f"got the fields {_fields(row)}, expected {' or '.join(names)}; {remedy}")
    return _text(row, name)


def to_sample(row: Any, source: Source, *, seed: int, number: int, answered: bool = True) -> Sample:
    """Read a row: alpaca, a conversation under any of its names, LLaVA's, ms-swift's, or a caption.

    seed, number: of the run and of the row, by which one of several captions is drawn. answered: False also takes a row
    whose last question has no answer. Definitions of tools are a turn of their own after the system text, calls and
    results turns where they stand. Raises ValueError for anything else, for an empty answer, an unknown role, a row of
    preferences, videos or audio, and places that do not match the pictures.
    """
    notes: Counter[str] = Counter()
    row = _mapping(row)
    row = filled(row, dict(source.fill)) if source.fill else row
    row = renamed(row, source.reading, notes) if source.reading else row
    refuse(row)
    pictures, inside = _pictures(row), source.reading is not None
    if source.preprocess == "caption":
        said, pictures = _caption(row, random.Random(f"{seed} {number}"))
    elif row.get("conversations") is not None or row.get("messages") is not None:
        inside = inside or row.get("conversations") is None
        said, listed = _dialog(row, notes, answered)
        if listed:
            pictures = _joined(listed, pictures)
    elif source.preprocess is not None:
        raise ValueError(f"got the fields {_fields(row)}, expected conversations for {source.preprocess}")
    elif row.get("response") is not None or ("query" in row and not answered):
        said, inside = _pair(row, "query", "response", answered), True
    elif row.get("instruction") is not None or row.get("output") is not None:
        said = _pair(row, "instruction", "output", answered)
    else:
        remedy = "set stage to pt for plain text" if set(TEXTS) & set(row) else "rename its fields"
        wanted = "instruction and output, query and response, or conversations"
        raise ValueError(f"got the fields {_fields(row)}, expected {wanted}; {remedy}")
    if is_filled(row.get("tools")):
        said.insert(int(said[0].role == "system"), Turn("tools", read_tools(row["tools"])))
    turns = _placed(said, pictures, notes, inside)
    if source.preprocess == "single_turn_llava":
        first = 2 + sum(turn.role in ("system", "tools") for turn in turns[:2])
        notes["turns_left_out"] += len(turns[first:])
        turns, said = turns[:first], said[:first]
        pictures = pictures[: sum(turn.pictures for turn in turns)]
    return Sample(turns, pictures, notes, said)


def _pair(row: Mapping[str, Any], asks: str, answers: str, answered: bool) -> list[Turn]:
    """A question with its input, and an answer; history: earlier pairs; system."""
    turns = _system(row)
    for pair in _history(row.get("history")):
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"history: got {pair!r:.60}, expected a question and an answer")
        turns += [Turn("user", pair[0]), Turn("assistant", _said(pair[1], "history"))]
    turns.append(Turn("user", _text(row, asks), input=_text(row, "input") if row.get("input") else ""))
    if not answered and (row.get(answers) is None or row[answers] == ""):
        return turns
    return [*turns, Turn("assistant", _said(_text(row, answers), answers))]


def _history(history: Any) -> Sequence[Any]:
    """Pairs, also where a file of columns has them as text."""
    if isinstance(history, str) and history.strip():
        try:
            history = json.loads(history)
        except ValueError:
            try:
                history = ast.literal_eval(history)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                pass
    if not isinstance(history or [], Sequence) or (isinstance(history, str) and history.strip()):
        raise ValueError(f"history: got {history!r:.60}, expected a list of pairs")
    return [] if isinstance(history, str) else history or []


def _dialog(row: Mapping[str, Any], notes: Counter[str], answered: bool) -> tuple[list[Turn], list[str | None]]:
    """Turns under from and value, or role and content, and pictures that stand inside of them; None: one of the row's.

    What cannot be learned is left out and counted: an answer before any question, a question without an answer.
    """
    key = "conversations" if row.get("conversations") is not None else "messages"
    said = row[key]
    if not isinstance(said, Sequence) or isinstance(said, str) or not said:
        raise ValueError(f"{key}: got {said!r:.60}, expected a list of turns")
    turns, pictures = _system(row), list[str | None]()
    for entry in ordered(said):
        turn, more = _turn(entry)
        if turn.role == "system" and turns and turns[0].role == "system" and len(turns) == 1:
            turns = []  # a conversation's own system text goes before the row's
        turns.append(turn)
        pictures += more
    turns = gathered(turns)
    opening = [turn for turn in turns[:1] if turn.role == "system"]
    rest = turns[len(opening) :]
    before = len(rest)
    while rest and rest[0].role in ("assistant", "function", "tool"):
        del rest[0]
    while answered and rest and rest[-1].role in ("user", "tool"):
        if rest[-1].pictures or (rest[-1].role == "user" and _marks(rest[-1]) and _pictures(row)):
            raise ValueError("conversations: got a picture in a last question, expected its answer; add it")
        del rest[-1]
    notes["turns_left_out"] += before - len(rest)
    if not rest:
        raise ValueError("conversations: got no question with an answer, expected at least one")
    for turn in rest:
        if turn.role == "assistant":
            _said(turn.text, "conversations")
    return [*opening, *rest], pictures


def _turn(entry: Any) -> tuple[Turn, list[str | None]]:
    """One turn and the pictures that its content lists."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"conversations: got the turn {entry!r:.60}, expected a mapping")
    who, role, calls = entry.get("from", entry.get("role")), speaker(entry), calls_in(entry)
    if role is None:
        raise ValueError(f"conversations: got a turn of {who!r:.40}; {nearest(str(who), ROLES)}")
    text = entry.get("value", entry.get("content"))
    pictures: list[str | None] = []
    places: list[int] = []
    if calls is not None:
        if role != "assistant" or not isinstance(text or "", str):
            raise ValueError(f"conversations: got calls of {who!r:.40} beside {text!r:.40}, expected the assistant's")
        return Turn("function", calls[0], preface=text or ""), []
    if role == "function":
        return Turn(role, read_calls(text)), []
    if role == "tool" and isinstance(text, Mapping):
        text = json.dumps(text, ensure_ascii=False)
    if isinstance(text, Sequence) and not isinstance(text, str):
        text, pictures, places = _parts(text)
    if not isinstance(text, str):
        raise ValueError(f"conversations: got {text!r:.40} as what {who} says, expected text")
    return Turn(role, text, pictures=len(pictures), places=tuple(place for place in places if place)), pictures


def _parts(parts: Sequence[Any]) -> tuple[str, list[str | None], list[int]]:
    """The text of OpenAI's list of content parts, the pictures' names (None where a part has none), and the places of
    the pictures in the text."""
    text, pictures, places = "", list[str | None](), list[int]()
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url"):
            name = part.get(kind) or part.get("path") or part.get("url")
            name = name["url"] if isinstance(name, Mapping) and "url" in name else name
            pictures.append(None if name is None else as_name(name))
            places.append(len(text))
        else:
            raise ValueError(f"content: got the part {part!r:.60}, expected one of type text or image")
    return text, pictures, places


def _joined(listed: list[str | None], given: list[str]) -> list[str]:
    """The pictures of content parts, those without a path from the row's list, in order."""
    open_ = listed.count(None)
    if open_ != len(given):
        raise ValueError(
            f"got {len(given)} pictures under image for {open_} content parts without a path, expected one for each"
        )
    rest = iter(given)
    return [next(rest) if path is None else path for path in listed]


def _caption(row: Mapping[str, Any], dice: random.Random) -> tuple[list[Turn], list[str]]:
    """The reference's preprocess caption: url and caption, which may be a list."""
    captions = row.get("caption")
    if isinstance(captions, Sequence) and not isinstance(captions, str) and captions:
        captions = dice.choice(list(captions))
    if not isinstance(captions, str):
        raise ValueError(f"caption: got {captions!r:.60}, expected text, or a list of texts")
    given = row.get("url", row.get("image"))
    if not given:
        raise ValueError(f"url: got the fields {_fields(row)}, expected the path of a picture")
    return [Turn("user", ""), Turn("assistant", _said(captions, "caption"))], [as_name(given)]


def _placed(turns: list[Turn], pictures: list[str], notes: Counter[str], inside: bool) -> list[Turn]:
    """Marks in the users' texts become places of pictures; without marks all pictures open the first question.

    inside: a picture stands where in the text its mark stood; False: where the template has it, as LLaVA does. In a row
    without pictures a mark is text like any other, and counted.
    """
    if any(turn.pictures for turn in turns):  # content parts
        return turns
    marks = sum(_marks(turn) for turn in turns if turn.role == "user")
    if not pictures:
        notes["places_as_text"] += bool(marks)
        return turns
    if marks not in (0, len(pictures)):
        raise ValueError(f"got {len(pictures)} pictures and {marks} places {PLACE}, expected one for each, or no place")
    placed, waiting = [], 0 if marks else len(pictures)
    for turn in turns:
        if turn.role == "user":
            count = _marks(turn)
            if count and inside and PLACE not in turn.input:
                turn = replace(tagged("user", turn.text), input=turn.input)
            elif count:  # the mark goes, and blanks around the text with it
                text, more = (part.replace(PLACE, "").strip() for part in (turn.text, turn.input))
                turn = replace(turn, text=text, input=more, pictures=count)
            turn, waiting = replace(turn, pictures=turn.pictures + waiting), 0
        placed.append(turn)
    return placed


def _marks(turn: Turn) -> int:
    """Places for pictures in a turn."""
    return turn.text.count(PLACE) + turn.input.count(PLACE)


def _pictures(row: Mapping[str, Any]) -> list[str]:
    """What stands under image or images: one picture or a list of them, in a file of columns also as JSON."""
    given = row.get("images") or row.get("image")
    if row.get("images") and row.get("image") and row["images"] not in (row["image"], [row["image"]]):
        raise ValueError("image: got pictures under image and under images, expected one of them; join them")
    if isinstance(given, str) and given.lstrip().startswith("["):
        try:
            given = json.loads(given)
        except ValueError:
            raise ValueError(f"images: got {given!r:.60}, expected a path, or a JSON list of paths") from None
    if not given:
        return []
    several = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    return [as_name(one) for one in (given if several else [given])]


def _system(row: Mapping[str, Any]) -> list[Turn]:
    """The system text of a row that has one."""
    return [Turn("system", _text(row, "system"))] if row.get("system") else []


def _mapping(row: Any) -> Mapping[str, Any]:
    """A row that has fields."""
    if not isinstance(row, Mapping):
        raise ValueError(f"got a {type(row).__name__}, expected a mapping of fields")
    return row


def _text(row: Mapping[str, Any], name: str) -> str:
    """A field that must hold text."""
    if name not in row:
        raise ValueError(f"{name}: missing among the fields {_fields(row)}; add it")
    if not isinstance(row[name], str):
        raise ValueError(f"{name}: got {row[name]!r:.60}, expected text")
    return row[name]


def _said(text: str, name: str) -> str:
    """An answer that says something."""
    if not text.strip():
        raise ValueError(f"{name}: got an empty answer, expected text; add it, or drop the row")
    return text


def _fields(row: Mapping[str, Any]) -> str:
    """Names of a row's fields, for a sentence."""
    return ", ".join(str(name) for name in row)[:120] or "none"
