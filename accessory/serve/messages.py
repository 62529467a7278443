"""Conversations as programs write them - text, messages, content parts, tools - to turns and pictures.

Must not know engines. What makes no sense is a ValueError that says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accessory.config import nearest
from accessory.serve.asking import placed

if TYPE_CHECKING:
    from accessory.data.template import Turn
    from accessory.engine.request import PictureSource

_KINDS = ("text", "image", "image_url")


def read_messages(
    asked: str | Sequence[Any],
    images: Sequence[PictureSource] = (),
    *,
    system: str | None = None,
    tools: Any = None,
) -> tuple[list[Turn], list[PictureSource]]:
    """Turns, and the pictures in the order of their places.

    asked: a question; or messages under role and content (or from and value), whose content is text or a list of parts
    of type text, image or image_url; or Turns. images: for `<image>` in the users' texts, in order, those without a
    place before the first question; and for parts that name no source. system: where the messages have none. tools:
    definitions as OpenAI has them.

    As OpenAI's clients write them: developer is system; an assistant may have tool_calls beside a content or none; tool
    is the result of the call of its tool_call_id, and results that name their calls stand in the order of the calls;
    name is passed over, as no template writes it. Messages of the system at the beginning, and of the user in a row,
    are one turn each, with a blank line between: most templates know one alone.
    """
    from accessory.data.feed.talk import ordered
    from accessory.data.template import Turn, read_tools

    images = _several(images)
    if isinstance(asked, str):
        asked = [Turn("user", asked)]
    if not isinstance(asked, Sequence) or not asked:
        raise ValueError(f"messages: got {asked!r:.60}, expected text or a list of messages")
    turns, found = list[Any](), list[Any]()
    for message in ordered(asked):
        turn, more = (message, []) if isinstance(message, Turn) else _turn(message)
        if turns and not isinstance(message, Turn) and _follows(turns, turn):
            turns[-1] = _joined(turns[-1], turn)
        else:
            turns.append(turn)
        found += more
    if system is not None and turns[0].role != "system":
        turns.insert(0, Turn("system", system))
    if tools:
        turns.insert(int(turns[0].role == "system"), Turn("tools", read_tools(tools)))
    if any(isinstance(message, Turn) and message.pictures for message in asked):
        return turns, images
    if not found:
        return placed(turns, len(images)), images
    open_ = sum(source is None for source in found)
    if open_ != len(images):
        raise ValueError(f"images: got {len(images)} for {open_} content parts without a source, expected as many")
    rest = iter(images)
    return turns, [next(rest) if source is None else source for source in found]


def _turn(message: Any) -> tuple[Turn, list[Any]]:
    """One message as a turn, and its pictures; None for a part that names none."""
    from accessory.data.feed.talk import ROLES, calls_in, speaker
    from accessory.data.template import Turn, read_calls

    if not isinstance(message, Mapping):
        raise ValueError(f"messages: got {message!r:.60}, expected a mapping with role and content")
    who, role, calls = message.get("role", message.get("from")), speaker(message), calls_in(message)
    if role is None:
        raise ValueError(f"messages: got a message of {who!r:.40}; {nearest(str(who), ROLES)}")
    content = message.get("content", message.get("value"))
    if calls is not None:
        if role != "assistant":
            raise ValueError(f"messages: got calls of tools by {who!r:.40}, expected them of the assistant; move them")
        said, pictures = _content("assistant", content or "")
        return Turn("function", calls[0], said.pictures, preface=said.text, places=said.places), pictures
    if role == "function":
        return Turn(role, read_calls(content)), []
    return _content(role, content)


def _content(role: str, content: Any) -> tuple[Turn, list[Any]]:
    """A content, text or parts, as a turn, and its pictures."""
    from accessory.data.template import Turn

    if isinstance(content, str):
        return Turn(role, content), []
    if not isinstance(content, Sequence):
        raise ValueError(f"messages: got the content {content!r:.40}, expected text or a list of parts")
    text, pictures, places = "", list[Any](), list[int]()
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _KINDS:
            raise ValueError(f"messages: got the part {part!r:.60}, expected one of type {', '.join(_KINDS)}")
        if kind == "text":
            said = part.get("text", "")
            if not isinstance(said, str):
                raise ValueError(f"messages: got the text {said!r:.40} in a part, expected text; mend it")
            text += said
            continue
        source = part.get(kind) or part.get("path") or part.get("url")
        pictures.append(source.get("url") if isinstance(source, Mapping) else source)
        places += [len(text)] * bool(text)  # those before all text stand where the template puts them
    return Turn(role, text, pictures=len(pictures), places=tuple(places)), pictures


def _follows(turns: Sequence[Turn], turn: Turn) -> bool:
    """Whether a turn goes on with the last one: the user's, and the system's at the beginning."""
    return turn.role == turns[-1].role and (turn.role == "user" or (turn.role == "system" and len(turns) == 1))


def _joined(one: Turn, other: Turn) -> Turn:
    """Two turns of one speaker as one."""
    start = f"{one.text}\n\n" if one.text else ""
    leading = other.pictures - len(other.places) if start else 0
    places = (*one.places, *[len(start)] * leading, *(len(start) + place for place in other.places))
    return replace(one, text=start + other.text, pictures=one.pictures + other.pictures, places=places)


def _several(images: Any) -> list[Any]:
    """A list of pictures; ValueError for a single text, whose characters are none."""
    if isinstance(images, (str, bytes)):
        raise ValueError(f"images: got {images!r:.60}, expected a list of pictures; write [...] around it")
    return list(images or ())
