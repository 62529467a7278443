"""The tools of a chat template, by what it writes: a known format of calls, and the definitions where they stand.
Must not know names of templates. What none of our formats writes the same is no tools, never an approximation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from accessory.data.template.forms import Control, Form, Template, Tools, Turn
from accessory.data.template.tools import (
    LLAMA3,
    MISTRAL,
    QWEN,
    QWEN_DIRECT,
    QWEN_SYSTEM,
    read_calls,
    read_tools,
    wrapped,
)
from accessory.data.template.writer import ASKED, SAID, SYSTEM, TOKEN, Writer, as_form, joined, written

_FORMATS = (QWEN_SYSTEM, QWEN, QWEN_DIRECT, LLAMA3, replace(LLAMA3, result_quoted=True), MISTRAL)
_PLACE = "\ue015"
_SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}
_LISTED = [{"name": name, "description": f"Does {name}.", "parameters": _SCHEMA} for name in ("first_one", "other_one")]
_TOOLS = Turn("tools", read_tools(_LISTED))
_SYSTEM, _ASK = Turn("system", SYSTEM), Turn("user", ASKED[0])
_CALL = Turn("function", read_calls({"name": "first_one", "arguments": {"x": "y"}}))
_TALK = [_TOOLS, _ASK, _CALL, Turn("tool", "it is \u00e9"), Turn("assistant", SAID[0]), Turn("user", ASKED[1])]


def with_tools(writer: Writer, template: Template) -> Template:
    """The template with tools, where the chat template writes them as one of our formats does."""
    if not writes_tools(writer):
        return template
    for tools in _guesses(writer, template):
        made = replace(template, tools=tools)
        opening = _opening(writer, made)
        if opening is not None:
            made = replace(template, tools=replace(tools, result_ends=(*tools.result_ends, *opening)))
            if agrees_on_tools(writer, made):
                return made
    return template


def _opening(writer: Writer, template: Template) -> Form | None:
    """What opens an answer after a result, where the template has it in its form of questions. None: not the format."""
    try:
        theirs, ours = writer(_TALK[:4]), written(template, _TALK[:4])
    except ValueError:
        return None
    return as_form(theirs[len(ours) :]) if theirs.startswith(ours) else None


def writes_tools(writer: Writer) -> bool:
    """Whether a chat template writes tools that it is given."""
    try:
        return writer([_TOOLS, _ASK]) != writer([_ASK])
    except ValueError:
        return False


def agrees_on_tools(writer: Writer, template: Template) -> bool:
    """Whether a chat template and a template write the same conversations of tools, of one call at a time."""
    if template.tools is None:
        return False
    heads = [[], [_SYSTEM]] if template.system is not None else [[]]
    talks = [[*head, *_TALK[:length]] for head in heads for length in (2, 4, 5, 6)]
    try:
        return all(writer(talk) == written(template, talk) for talk in talks)
    except ValueError:
        return False


def _guesses(writer: Writer, template: Template) -> Iterator[Tools]:
    """Formats that may be the one, with the definitions where the chat template has them."""
    head = [_SYSTEM] if template.system is not None else []
    try:
        silent, told = writer([*head, _ASK]), writer([*head, _TOOLS, _ASK])
    except ValueError:
        return
    for kind in ("line", "indented"):
        found = _definitions(told, kind)
        places = found and _places(silent, found[0], template)
        if not found or places is None:
            continue
        start, before_system, after_system, before_user = places
        for made in _FORMATS:
            for joint in ("", "\n\n") if after_system.startswith("\n\n") else ("",):
                yield replace(
                    made,
                    tool=kind,
                    tool_between=found[1],
                    start=None if start is None else _slotted(start),
                    joint=joint,
                    before_system=_slotted(before_system),
                    after_system=_slotted(after_system.removeprefix(joint)),
                    before_user=_slotted(before_user),
                )


def _definitions(told: str, kind: Literal["line", "indented"]) -> tuple[str, str] | None:
    """What is written with a mark instead of the definitions, and what stands between two of them."""
    one, other = (
        json.dumps(wrapped(tool), ensure_ascii=False, indent=4 if kind == "indented" else None) for tool in _LISTED
    )
    begin, second = told.find(one), told.find(other)
    if begin < 0 or second < begin:
        return None
    return told[:begin] + _PLACE + told[second + len(other) :], told[begin + len(one) : second]


def _places(silent: str, told: str, template: Template) -> tuple[str | None, str, str, str] | None:
    """What tools add to a first question: the start, around the system text, before the question. None: elsewhere."""
    marks = [SYSTEM, ASKED[0]] if template.system is not None else [ASKED[0]]
    plain, given = _cut(silent, marks), _cut(told, marks)
    if plain is None or given is None or plain[-1] != given[-1]:
        return None
    start, before_system, after_system, before_user = None, "", "", ""
    if template.system is not None:
        added = _inserted(plain[0], given[0])
        length = len(joined([item for item in template.start if isinstance(item, Control)]))
        length += sum(len(item) for item in template.start if isinstance(item, str))
        if added is None or (added[1] and length < added[0] < len(plain[0])):
            return None
        if added[1] and added[0] <= length:
            start = plain[0][: added[0]] + added[1] + plain[0][added[0] : length]
        else:
            before_system = added[1]
    added = _inserted(plain[-2], given[-2])
    if added is None:
        return None
    if added[1] and added[0] == len(plain[-2]):
        before_user = added[1]
    elif added[1] and (added[0] or template.system is None):
        return None
    else:
        after_system = added[1]
    return start, before_system, after_system, before_user


def _cut(text: str, marks: list[str]) -> list[str] | None:
    """A text in pieces around these marks; None where they are not there once each, in order."""
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            return None
        before, _, text = text.partition(mark)
        pieces.append(before)
    return [*pieces, text]


def _inserted(old: str, new: str) -> tuple[int, str] | None:
    """Where and what was put into a text; None where it was changed otherwise."""
    at = next(
        (at for at, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), min(len(old), len(new))
    )
    at = next((token.start() for token in TOKEN.finditer(old) if token.start() < at < token.end()), at)
    if len(new) < len(old) or not new.endswith(old[at:]):
        return None
    return at, new[at : len(new) - len(old) + at]


def _slotted(text: str) -> Form:
    """A written text as a form, with its slot for the definitions."""
    return as_form(text.replace(_PLACE, "{tools}"))
