"""Calls of tools in an answer's text, as it comes: what surely is none goes out at once, a call when it is whole.
Must not know templates by name, requests or how text is made.

A call that is not well-formed is text, to the letter; nothing is lost and nothing is raised. The blanks between calls,
and between a text and its calls, are the format's and go with the calls. However the text is cut into pieces, the same
comes out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from accessory.data.template.forms import Tools
from accessory.data.template.tools import read_calls

_ACTION = re.compile(r"(?:^|(?<=\n))[ \t]*Action:")
_NAMED = re.compile(r"[ \t]*Action:\s*(\S+)\s+Action Input:\s*(```(?:json)?\s*)?(?=\{)")
_BEFORE = " \t\n\r"
_ACTION_WORDS = "Action:", "Action Input:"
_FENCE = "```"
_PYTHON = "<|python_tag|>"


@dataclass(frozen=True)
class CallDelta:
    """What is new of a call; a call comes whole, in one."""

    index: int
    """Which call of the answer it is, from 0."""
    id: str | None
    """A name of the call's own, the same for the same salt and index."""
    name: str | None
    arguments: str
    """A JSON object."""


@dataclass(frozen=True)
class _Found:
    """Calls, as [{"name", "arguments"}], up to `end` in the text that is held."""

    end: int
    calls: list[dict[str, object]]


_Try = _Found | bool
"""What a place in the text is: calls; True: that needs more text; False: none."""


class CallReader:
    """Tells the calls of one answer from its text.

    names: the tools that there are; None: any. salt: what tells the ids of this answer's calls from those of others. As
    text comes, `push` gives what is settled, texts and calls in order, and `finish` what is left at the end.
    """

    def __init__(self, tools: Tools, *, names: Collection[str] | None = None, salt: str = "") -> None:
        self._tools, self._salt = tools, salt
        self._names = None if names is None else frozenset(names)
        self._held, self._final, self._count = "", False, 0
        self._start = True  # nothing but blanks came before what is held
        self._line = True  # what is held begins a line
        self._called = False  # a call came directly before what is held
        self._json = _Json()
        self._scan: Callable[[], list[str | CallDelta]] = {
            "action": self._actions,
            "tagged": self._tagged,
            "marked": self._tagged,
            "opening": self._opening,
        }[tools.kind]

    def push(self, text: str) -> list[str | CallDelta]:
        """What this text settles."""
        self._held += text
        return self._scan() if text else []

    def finish(self) -> list[str | CallDelta]:
        """What is left: a call that the answer's end closes, or text."""
        self._final = True
        out = self._scan()
        rest = "" if self._called and not self._held.strip() else self._held
        self._held = ""
        return out + ([rest] if rest else [])

    def _tagged(self) -> list[str | CallDelta]:
        """Calls behind a mark."""
        out: list[str | CallDelta] = []
        mark = self._tools.mark[0]
        tried = 0  # marks before it are text
        while True:
            at = self._held.find(mark, tried)
            if at < 0:
                return out + self._say(_unsettled(self._held, (mark,), tried))
            found = self._behind(at + len(mark))
            if found is True:
                return out + self._say(_blank(self._held, at))
            if found is False:
                tried = at + 1
                continue
            assert isinstance(found, _Found), f"a try is calls or a truth, not {found}"
            out += self._take(at, found)
            tried = 0

    def _behind(self, at: int) -> _Try:
        """The calls whose mark ends here."""
        found = self._value(at, "[{")
        closing = self._tools.mark[1]
        if not isinstance(found, _Found) or not closing:
            return found
        rest = self._held[found.end :].lstrip(_BEFORE)
        if rest.startswith(closing):
            return _Found(len(self._held) - len(rest) + len(closing), found.calls)
        if closing.startswith(rest):
            return _Found(len(self._held), found.calls) if self._final and not rest else not self._final
        return False

    def _actions(self) -> list[str | CallDelta]:
        """Calls by lines."""
        out: list[str | CallDelta] = []
        tried = 0
        while True:
            begins = _ACTION.search(self._held, tried)
            while begins and begins.start() == 0 and not self._line:
                begins = _ACTION.search(self._held, begins.end())
            if begins is None:
                return out + self._say(self._open_line(tried))
            found = self._action(begins.start())
            if found is True:
                return out + self._say(_blank(self._held, begins.start()))
            if found is False:
                tried = begins.end()
                continue
            assert isinstance(found, _Found), f"a try is calls or a truth, not {found}"
            out += self._take(begins.start(), found)
            tried = 0

    def _action(self, at: int) -> _Try:
        """The call whose first line begins here."""
        named = _NAMED.match(self._held, at)
        if named is None:
            return not self._final and _may_be_action(self._held[at:].lstrip(" \t"))
        if self._names is not None and named[1] not in self._names:
            return False
        closed = self._json.close(self._held, named.end())
        if closed is None:
            return not self._final
        end = closed
        if named[2]:
            rest = self._held[end:].lstrip(_BEFORE)
            if _FENCE.startswith(rest[:3]) and len(rest) < len(_FENCE) and not self._final:
                return True
            if rest.startswith(_FENCE):
                end = len(self._held) - len(rest) + len(_FENCE)
        try:
            arguments = json.loads(self._held[named.end() : closed])
        except (ValueError, RecursionError):
            return False
        calls = self._checked({"name": named[1], "arguments": arguments})
        return _Found(end, calls) if calls else False

    def _open_line(self, tried: int) -> int:
        """How much of the text can no longer become "Action:", or the blanks before it."""
        last = self._held.rfind("\n") + 1
        line = self._held[last:].lstrip(" \t")
        begins = (last or self._line) and _ACTION_WORDS[0].startswith(line) and last >= tried
        return _blank(self._held, last if begins else len(self._held))

    def _opening(self) -> list[str | CallDelta]:
        """Calls that open the answer."""
        out: list[str | CallDelta] = []
        while self._start or self._called:
            blank = " \t\n\r;," if self._called else _BEFORE
            text = self._held.lstrip(blank)
            at = len(self._held) - len(text)
            if not self._called and _PYTHON.startswith(text[: len(_PYTHON)]) and len(text) < len(_PYTHON):
                if text or not self._final:
                    break
            if not self._called and text.startswith(_PYTHON):
                at += len(_PYTHON)
            found: _Try = self._value(at, "{" if self._called else "[{")
            if found is True:
                break
            if found is False:
                if self._called and not text:
                    return out
                self._start = self._called = False
                return out + self._say(len(self._held))
            assert isinstance(found, _Found), f"a try is calls or a truth, not {found}"
            self._start = False
            out += self._take(at, found, dropped=True)
        if not self._start and not self._called:
            out += self._say(len(self._held))
        return out

    def _value(self, at: int, openings: str) -> _Try:
        """The calls of the JSON that begins here, after blanks."""
        while at < len(self._held) and self._held[at] in _BEFORE:
            at += 1
        if at == len(self._held):
            return not self._final
        if self._held[at] not in openings:
            return False
        end = self._json.close(self._held, at)
        if end is None:
            return not self._final
        try:
            value = json.loads(self._held[at:end])
        except (ValueError, RecursionError):
            return False
        calls = self._checked(value)
        return _Found(end, calls) if calls else False

    def _checked(self, value: object) -> list[dict[str, object]]:
        """Calls of this JSON; none where it is something else."""
        try:
            calls = json.loads(read_calls(value))
        except ValueError:
            return []
        listed = value if isinstance(value, list) else [value]
        if self._tools.kind == "opening" and not all(_explicit(each) for each in listed):
            return []
        if self._names is not None and not all(call["name"] in self._names for call in calls):
            return []
        return calls

    def _take(self, at: int, found: _Found, *, dropped: bool = False) -> list[str | CallDelta]:
        """Give out the text before calls, and the calls. dropped: what stands before them is the format's."""
        before = "" if dropped else self._held[:at].rstrip(_BEFORE)
        out: list[str | CallDelta] = [before] if before else []
        for call in found.calls:
            name = hashlib.sha256(f"{self._salt} {self._count}".encode()).hexdigest()[:24]
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            out.append(CallDelta(self._count, f"call_{name}", str(call["name"]), arguments))
            self._count += 1
        self._held, self._called, self._line, self._start = self._held[found.end :], True, False, False
        self._json = _Json()
        return out

    def _say(self, end: int) -> list[str | CallDelta]:
        """Give out the text up to here."""
        text, self._held = self._held[:end], self._held[end:]
        if not text:
            return []
        self._json = _Json()
        self._called, self._line = False, text.endswith("\n")
        self._start = self._start and not text.strip()
        return [text]


class _Json:
    """Where a JSON object or list that begins at some place ends; text that was looked at is not looked at again."""

    def __init__(self) -> None:
        self._begin, self._at = -1, 0
        self._depth, self._quoted, self._escaped = 0, False, False

    def close(self, text: str, begin: int) -> int | None:
        """The place after its last bracket; None where that is not there yet."""
        if begin != self._begin:
            self._begin, self._at = begin, begin
            self._depth, self._quoted, self._escaped = 0, False, False
        elif not self._depth and self._at > begin:
            return self._at
        while self._at < len(text):
            character = text[self._at]
            self._at += 1
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return self._at
        return None


def _explicit(value: object) -> bool:
    """Whether JSON says itself that it is a call, by a name and arguments."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    return isinstance(value, dict) and ("parameters" in value or "arguments" in value)


def _blank(text: str, at: int) -> int:
    """The place before the blanks that end here."""
    return len(text[:at].rstrip(_BEFORE))


def _unsettled(text: str, marks: Collection[str], tried: int) -> int:
    """The place from which on a text may still become one of these marks, or the blanks before it."""
    at = len(text)
    for mark in marks:
        for size in range(min(len(mark) - 1, len(text) - tried), 0, -1):
            if text.endswith(mark[:size]):
                at = min(at, len(text) - size)
                break
    return _blank(text, at)


def _may_be_action(text: str) -> bool:
    """Whether a text that begins with "Action:" may become the two lines of a call."""
    rest = text.removeprefix(_ACTION_WORDS[0]).lstrip(_BEFORE)
    name = re.match(r"\S*", rest)
    assert name is not None, "a pattern of anything matches"
    rest = rest[name.end() :]
    if not rest:
        return True
    rest = rest.lstrip(_BEFORE)
    second = _ACTION_WORDS[1]
    if len(rest) <= len(second):
        return second.startswith(rest)
    if not rest.startswith(second):
        return False
    rest = rest.removeprefix(second).lstrip(_BEFORE)
    for fence in (_FENCE, f"{_FENCE}json"):
        if fence.startswith(rest):
            return True
    return rest.startswith(_FENCE) and not rest.removeprefix(_FENCE).removeprefix("json").strip()
