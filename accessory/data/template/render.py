"""The one renderer of a conversation for training, chat and serving.
Knows no tokenizer: control tokens go out by name, pictures by number, text as text.

What a user types, a tool is called or gives is never looked at: it cannot become a control token or a picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from accessory.data.template.forms import ROLES, SLOT, Control, Form, Part, Picture, Pictures, Template, Text, Turn
from accessory.data.template.names import get_template
from accessory.data.template.tools import called, described, filled


def render(template: Template | str, turns: Sequence[Turn], *, open_answer: bool = True) -> list[Part]:
    """Write a conversation as parts.

    open_answer: the last turn is the user's, or a tool's, and the parts end where the answer begins (inference); False:
    it is the assistant's, and all answers and calls are supervised (training). The parts of a prompt are the beginning
    of the parts of the same conversation answered. Raises ValueError for turns that no template can write in order, and
    for turns of tools that this one cannot.
    """
    form = get_template(template) if isinstance(template, str) else template
    head, turns = _check(form, turns, open_answer=open_answer)
    parts = _Parts()
    first, told = turns[0], head.told
    inside = [_inside(form, turn) for turn in turns]
    parts.pictures = first.pictures - len(inside[0])
    _begin(parts, form, head)
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            parts.add(form.answer, turn.text, supervised=True)
        elif turn.role == "function":
            assert form.tools is not None, "turns of tools were checked"
            calls = called(form.tools, turn.text, turn.preface)
            answer = form.answer if form.tools.answer is None else form.tools.answer
            parts.add(answer, "", supervised=True, before=calls)
        elif turn.role == "tool":
            if number + 1 == len(turns) or turns[number + 1].role != "tool":
                _results(parts, form, _run(turns, number))
        else:
            if number:
                parts.pictures = turn.pictures - len(inside[number])
                parts.add(form.between, "")
            chosen, text, second = _user(form, turn, after_system=told and number == 0)
            parts.add(chosen, text, second, places=inside[number], before=() if number else head.user)
            parts.add(form.opening, "")
            assert not parts.pictures, f"a form has no place for {parts.pictures} pictures: {form}"
    if not open_answer:
        parts.add(form.end, "")
    return parts.done


@dataclass(frozen=True)
class _Head:
    """What stands before the first question: the system text, and what tools put around it and before the question."""

    system: str
    start: list[Text | Control] | None
    before: list[Text | Control]
    after: list[Text | Control]
    user: list[Text | Control]

    @property
    def told(self) -> bool:
        """Whether there is a system turn."""
        return bool(self.system or self.before or self.after)


def _head(form: Template, system: str | None, listed: str | None, first: Turn) -> _Head:
    """system: None where there is no such turn; listed: the text of the turn of tools."""
    if system is None and form.system is not None:
        with_input = first.input and form.default_system_input is not None
        system = form.default_system_input if with_input else form.default_system
    tools = form.tools
    if tools is None or listed is None:
        return _Head(system or "", None, [], [], [])
    values = described(tools, listed)
    after = filled(tools.after_system, values)
    return _Head(
        system or "",
        None if tools.start is None else filled(tools.start, values),
        filled(tools.before_system, values),
        [Text(tools.joint), *after] if system and tools.joint and after else after,
        filled(tools.before_user, values),
    )


def _begin(parts: _Parts, form: Template, head: _Head) -> None:
    """Write start and system."""
    if head.start is None:
        parts.add(form.start, "")
    else:
        parts.write(head.start)
    if head.told:
        parts.add(form.system or (), head.system, before=head.before, after=head.after)
    else:
        parts.add(form.no_system, "")
    parts.add(form.first, "")


def _run(turns: Sequence[Turn], last: int) -> list[str]:
    """The texts of the results that end here."""
    begin = last
    while turns[begin - 1].role == "tool":
        begin -= 1
    return [turn.text for turn in turns[begin : last + 1]]


def _results(parts: _Parts, form: Template, texts: Sequence[str]) -> None:
    """Results of calls in a row, and the opening of the answer to them."""
    tools = form.tools
    assert tools is not None, "turns of tools were checked"
    if tools.result is None:
        parts.add(form.between, "")
        parts.add(form.user, "\n".join(texts))
    else:
        parts.add(tools.result_begins, "")
        for number, text in enumerate(texts):
            parts.add(tools.result_between if number else (), "")
            parts.add(tools.result, json.dumps(text, ensure_ascii=False) if tools.result_quoted else text)
        parts.add(tools.result_ends, "")
    parts.add(form.opening, "")


def _inside(form: Template, turn: Turn) -> tuple[int, ...]:
    """The places of pictures in a turn's text; none where the form takes pictures alone."""
    places = turn.places[-turn.pictures :] if turn.pictures else ()
    return tuple(min(place, len(turn.text)) for place in places) if _has_text(form.user) else ()


def _has_text(form: Form) -> bool:
    """Whether a form has a place for text."""
    return any(isinstance(item, str) and SLOT.search(item) for item in form)


def _user(form: Template, turn: Turn, *, after_system: bool) -> tuple[Form, str, str]:
    """The form of a user turn, its text and its input."""
    if turn.input and form.user_input is not None:
        return form.user_input, turn.text, turn.input
    text = f"{turn.text}\n{turn.input}" if turn.input else turn.text
    chosen = form.user_system if after_system and form.user_system is not None else form.user
    if text.strip() and not _has_text(chosen):
        raise ValueError(
            f"template: got the text {text[:40]!r}, expected pictures alone; choose another template for it"
        )
    return chosen, text, ""


def _check(form: Template, turns: Sequence[Turn], *, open_answer: bool) -> tuple[_Head, list[Turn]]:
    """Split off system text and tools; the rest is user, assistant, user, ... in order, perhaps with calls between."""
    for turn in turns:
        _check_turn(form, turn)
    rest = list(turns)
    told: dict[str, str] = {}
    while rest and rest[0].role in ("system", "tools") and rest[0].role not in told:
        first = rest.pop(0)
        told[first.role] = first.text
    system = told.get("system")
    if system and form.system is None:
        raise ValueError(
            f"template: got the system text {system[:40]!r}, expected none, as this template has no place for it; "
            "put it into the user's text or choose another template"
        )
    before = ""
    for number, turn in enumerate(rest):
        expected = _FOLLOWS[before]
        if turn.role not in expected:
            hint = "give the result of the call" if before == "function" else "join or reorder the turns"
            if turn.role in ("system", "tools"):
                hint = f"a {turn.role} turn can only be the first one"
            raise ValueError(f"conversation: got {turn.role!r} as turn {number + 1}, expected {expected[0]!r}; {hint}")
        before = turn.role
    ends, hint = (("user", "tool"), "drop the last answer") if open_answer else (_SAID, "add the answer to learn")
    if not rest or rest[-1].role not in ends:
        got = f"an end by {rest[-1].role!r}" if rest else "no turns"
        hint = hint if rest else "add a user turn"
        raise ValueError(f"conversation: got {got}, expected an end by {ends[0]!r}; {hint}")
    return _head(form, system, told.get("tools"), rest[0]), rest


_SAID = ("assistant", "function")
_FOLLOWS = {
    "": ("user",),
    "user": _SAID,
    "assistant": ("user",),
    "function": ("tool",),
    "tool": (*_SAID, "tool"),
}
"""Who may speak after whom."""


def _check_turn(form: Template, turn: Turn) -> None:
    """A turn of its own: who speaks, and where its pictures are."""
    if turn.role not in ROLES:
        near = {"human": "user", "gpt": "assistant", "bot": "assistant"}.get(turn.role)
        guess = f"did you mean {near!r}?" if near else "rename it"
        raise ValueError(f"role: got {turn.role!r}, expected 'system', 'user' or 'assistant'; {guess}")
    if form.tools is None and turn.role in ("tools", "function", "tool"):
        raise ValueError(
            f"template: got a turn of {turn.role!r}, expected user, assistant or system, since this template has no "
            "way to write tools; choose another template, such as llama3 or chatml, or drop the tools"
        )
    if turn.pictures < 0 or (turn.pictures and turn.role != "user"):
        raise ValueError(
            f"pictures: got {turn.pictures} in a turn of the {turn.role}, expected 0 or more in user turns only; "
            "move them to a user turn"
        )
    if list(turn.places) != sorted(turn.places) or (turn.places and not 0 <= turn.places[0]):
        raise ValueError(f"places: got {turn.places}, expected characters of the text in order; sort them")
    if turn.pictures and len(turn.places) > turn.pictures:
        raise ValueError(
            f"places: got {len(turn.places)} for {turn.pictures} pictures, expected at most one for each; "
            "set the turn's `pictures` to all of them"
        )


class _Parts:
    """Parts written so far, and the pictures of the turn that still wait for a place."""

    def __init__(self) -> None:
        self.done: list[Part] = []
        self.pictures = 0
        self._placed = 0

    def add(
        self,
        form: Form,
        text: str,
        second: str = "",
        *,
        places: Sequence[int] = (),
        supervised: bool = False,
        before: Sequence[Text | Control] = (),
        after: Sequence[Text | Control] = (),
    ) -> None:
        """Write a form; before, after: what stands around the text, in its place."""
        for item in form:
            if isinstance(item, Pictures):
                for _ in range(self.pictures):
                    self._picture()
                    self._text(item.after, supervised=supervised)
                self.pictures = 0
            elif isinstance(item, Control):
                self.done.append(replace(item, supervised=supervised or item.supervised))
            else:
                at = 0
                for slot in SLOT.finditer(item):
                    self._text(item[at : slot.start()], supervised=supervised)
                    at = slot.end()
                    if slot[1] == "input":
                        self._text(second, supervised=supervised)
                    else:
                        self.write(before, supervised=supervised)
                        self._written(*_trimmed(text, places, slot[1]), supervised=supervised)
                        self.write(after, supervised=supervised)
                self._text(item[at:], supervised=supervised)

    def write(self, parts: Sequence[Text | Control], *, supervised: bool = False) -> None:
        """Write what is finished."""
        for part in parts:
            if isinstance(part, Text):
                self._text(part.text, supervised=supervised)
            else:
                self.done.append(replace(part, supervised=supervised or part.supervised))

    def _written(self, text: str, places: Sequence[int], *, supervised: bool) -> None:
        """A turn's text with the pictures that stand in it."""
        at = 0
        for place in places:
            self._text(text[at:place], supervised=supervised)
            self._picture()
            at = place
        self._text(text[at:], supervised=supervised)

    def _picture(self) -> None:
        """The next picture."""
        self.done.append(Picture(self._placed))
        self._placed += 1

    def _text(self, text: str, *, supervised: bool) -> None:
        """Append to the run, one part per stretch of equal supervision."""
        last = self.done[-1] if self.done else None
        if isinstance(last, Text) and last.supervised == supervised:
            self.done[-1] = Text(last.text + text, supervised)
        elif text:
            self.done.append(Text(text, supervised))


def _trimmed(text: str, places: Sequence[int], how: str) -> tuple[str, list[int]]:
    """A text without the blanks around it, as far as no picture stands among them, and its pictures' places."""
    left, right = 0, len(text)
    if how == "strip":
        left = min([len(text) - len(text.lstrip()), *places[:1]])
    if how in ("strip", "rstrip"):
        right = max([left, len(text.rstrip()), *places[-1:]])
    return text[left:right], [place - left for place in places]
