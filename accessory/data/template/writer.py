"""What a chat template (jinja) and a template write of the same turns, as text that can be compared.
Must not know how a template is found.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accessory.data.template.forms import PLACE, Control, Form, Part, Template, Text, Turn
from accessory.data.template.render import render
from accessory.data.template.sandbox import BOS_MARK, EOS_MARK, Jinja
from accessory.data.template.tools import wrapped

TOKEN = re.compile(
    rf"{BOS_MARK}|{EOS_MARK}|<\|[^<>|\s]+\|>|\[/?[A-Z][A-Z_]*\]|<[a-z_]+_of_[a-z_]+>|</?s>|</?tool_(?:call|response)>"
)
SYSTEM, ASKED, SAID = "\ue010s\ue010", ("\ue011q\ue011", "\ue012r\ue012"), ("\ue013a\ue013", "\ue014b\ue014")
"""Texts that are found again in what is written."""


@dataclass(frozen=True)
class Writer:
    """A chat template that takes turns, whichever form of content it wants."""

    jinja: Jinja

    @functools.cached_property
    def parts(self) -> bool:
        """Whether contents must be lists of parts, as processors of pictures have them."""
        try:
            return ASKED[0] not in self.jinja([{"role": "user", "content": ASKED[0]}], opened=True)
        except ValueError:
            return True

    def __call__(self, turns: Sequence[Turn]) -> str:
        """What the chat template writes; open where the user or a tool spoke last. Raises ValueError."""
        given = next((turn.text for turn in turns if turn.role == "tools"), None)
        tools = None if given is None else [wrapped(tool) for tool in json.loads(given)]
        told = [self._message(turn) for turn in turns if turn.role != "tools"]
        return self.jinja(told, opened=turns[-1].role in ("user", "tool"), tools=tools)

    def _message(self, turn: Turn) -> dict[str, Any]:
        if turn.role == "function":
            calls = [{"type": "function", "function": call} for call in json.loads(turn.text)]
            return {"role": "assistant", "content": "", "tool_calls": calls}
        if turn.role == "tool" or (not self.parts and not turn.pictures):
            return {"role": turn.role, "content": turn.text}
        pictures = [{"type": "image"}] * turn.pictures
        return {"role": turn.role, "content": [*pictures, {"type": "text", "text": turn.text}]}


def written(template: Template, turns: Sequence[Turn]) -> str:
    """What a template writes, as text."""
    return joined(render(template, turns, open_answer=turns[-1].role in ("user", "tool")))


def joined(parts: Sequence[Part]) -> str:
    """Parts as text, control tokens by their names."""
    marks = {"bos": BOS_MARK, "eos": EOS_MARK}
    return "".join(
        part.text if isinstance(part, Text) else marks.get(part.name, part.name) if isinstance(part, Control) else PLACE
        for part in parts
    )


def as_form(text: str) -> Form:
    """A written text as a form: control tokens by name, where the tokenizer has them."""
    items: list[str | Control] = []
    at = 0
    for token in TOKEN.finditer(text):
        items += [text[at : token.start()]] if token.start() > at else []
        role = {BOS_MARK: "bos", EOS_MARK: "eos"}.get(token[0])
        items.append(Control(role) if role else Control(token[0], text=True))
        at = token.end()
    return (*items, text[at:]) if at < len(text) else tuple(items)
