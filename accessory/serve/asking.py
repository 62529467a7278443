"""What people write to what an engine is asked: places for pictures, sources of pictures, and back to records.

Must not know engines, terminals or how an answer is made.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from accessory.data.image import Orientation
    from accessory.data.template import Turn
    from accessory.engine.request import PictureSource

PLACE = "<image>"


def question(text: str, *, places: bool) -> Turn:
    """A question as it was typed; places: `<image>` in it is where a picture stands, not text."""
    from accessory.data.template import Turn, tagged

    return tagged("user", text) if places else Turn("user", text)


def placed(turns: Sequence[Turn], pictures: int) -> list[Turn]:
    """Turns whose users' texts may have places, with these as numbers; pictures: how many there are in all.

    A picture stands where its place is, as in a row of ms-swift's or of messages; those without one open the first
    question, and without pictures a place is text. Raises ValueError for more places than pictures, and for pictures
    without a question.
    """
    if not pictures:
        return list(turns)
    marks = sum(turn.text.count(PLACE) for turn in turns if turn.role == "user")
    if marks > pictures:
        raise ValueError(
            f"images: got {pictures} for {marks} places {PLACE} in the conversation, expected as many; give them"
        )
    from accessory.data.template import tagged

    waiting, done = pictures - marks, list[Any]()
    for turn in turns:
        if turn.role == "user":
            told = tagged("user", turn.text)
            turn, waiting = replace(told, input=turn.input, pictures=told.pictures + waiting), 0
        done.append(turn)
    if waiting:
        raise ValueError(f"images: got {pictures} without a question, expected one; ask something")
    return done


def spoken(turns: Sequence[Turn]) -> dict[str, Any]:
    """`system`, `query` and `history` (pairs) of turns that end with a question, as a row of data that reads back.

    Places are written where the pictures would not all open the first question by themselves.
    """
    system = next((turn.text for turn in turns if turn.role == "system"), None)
    rest = [turn for turn in turns if turn.role != "system"]
    marked = any(turn.places for turn in rest) or any(turn.pictures for turn in rest[1:])
    said = []
    for turn in rest:
        text = _marked(turn) if marked else turn.text
        said.append(f"{text}\n{turn.input}" if turn.input else text)
    pairs = [list(pair) for pair in zip(said[:-1:2], said[1::2], strict=True)]
    return {"system": system, "query": said[-1], "history": pairs}


def _marked(turn: Turn) -> str:
    """A turn's text with the places of its pictures."""
    written, at = PLACE * (turn.pictures - len(turn.places)), 0
    for place in turn.places:
        written, at = written + turn.text[at:place] + PLACE, place
    return written + turn.text[at:]


def look(source: PictureSource, *, orientation: Orientation, allow_private_urls: bool = False) -> Image:
    """The picture of a path, URL, base64 text, bytes or PIL image, as it is to be shown to the model.

    It carries no EXIF, so that nobody turns it twice. Raises ValueError or OSError that names the source.
    """
    from accessory.data.image import load_picture

    if isinstance(source, str):
        source = source.strip()
        source = os.path.expanduser(source) if source.startswith("~") else source
    picture = load_picture(source, orientation=orientation, allow_private_urls=allow_private_urls)
    picture.info = {}
    return picture


def name_of(source: PictureSource) -> str:
    """A picture's source for a record: a path or a URL as it is, coded pixels and pictures in memory in words."""
    if isinstance(source, str):
        from accessory.data.picture import kind_of, shown

        return shown(source) if kind_of(source) in ("data", "base64") else source.strip()
    if isinstance(source, Path):
        return str(source)
    if isinstance(source, bytes):
        return f"({len(source)} bytes)"
    return getattr(source, "filename", "") or f"({source.width} x {source.height} pixels)"
