"""The one renderer of a conversation for training, chat and serving.
Knows no tokenizer: control tokens go out by name, pictures by number, text as text.

What a user types is never looked at: it cannot become a control token or a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from accessory.data.template.forms import SLOT, Control, Form, Part, Picture, Pictures, Template, Text, Turn
from accessory.data.template.names import get_template


def render(template: Template | str, turns: Sequence[Turn], *, open_answer: bool = True) -> list[Part]:
    """Write a conversation as parts.

    open_answer: the last turn is the user's and the parts end where the answer begins (inference); False: it is the
    assistant's and all answers are supervised (training). The parts of a prompt are the beginning of the parts of the
    same conversation answered. Raises ValueError for turns that no template can write in order.
    """
    form = get_template(template) if isinstance(template, str) else template
    system, turns = _check(form, turns, open_answer=open_answer)
    parts = _Parts()
    first = turns[0]
    if system is None and form.system is not None:
        with_input = first.input and form.default_system_input is not None
        system = form.default_system_input if with_input else form.default_system
    inside = [_inside(form, turn) for turn in turns]
    parts.pictures = first.pictures - len(inside[0])
    parts.add(form.start, "")
    parts.add((form.system or ()) if system else form.no_system, system or "")
    parts.add(form.first, "")
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            parts.add(form.answer, turn.text, supervised=True)
            continue
        if number:
            parts.pictures = turn.pictures - len(inside[number])
            parts.add(form.between, "")
        chosen, text, second = _user(form, turn, after_system=bool(system) and number == 0)
        parts.add(chosen, text, second, places=inside[number])
        parts.add(form.opening, "")
        assert not parts.pictures, f"a form has no place for {parts.pictures} pictures: {form}"
    if not open_answer:
        parts.add(form.end, "")
    return parts.done


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


def _check(form: Template, turns: Sequence[Turn], *, open_answer: bool) -> tuple[str | None, list[Turn]]:
    """Split off the system text (None: no system turn); the rest is user, assistant, user, ... in order."""
    for turn in turns:
        if turn.role not in ("system", "user", "assistant"):
            near = {"human": "user", "gpt": "assistant", "bot": "assistant"}.get(turn.role)
            guess = f"did you mean {near!r}?" if near else "rename it"
            raise ValueError(f"role: got {turn.role!r}, expected 'system', 'user' or 'assistant'; {guess}")
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
    rest = list(turns)
    system = rest.pop(0).text if rest and rest[0].role == "system" else None
    if system and form.system is None:
        raise ValueError(
            f"template: got the system text {system[:40]!r}, expected none, as this template has no place for it; "
            "put it into the user's text or choose another template"
        )
    for number, turn in enumerate(rest):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            hint = "a system turn can only be the first one" if turn.role == "system" else "join or reorder the turns"
            raise ValueError(f"conversation: got {turn.role!r} as turn {number + 1}, expected {expected!r}; {hint}")
    last, hint = ("user", "drop the last answer") if open_answer else ("assistant", "add the answer to learn")
    if not rest or rest[-1].role != last:
        got = f"an end by {rest[-1].role!r}" if rest else "no turns"
        hint = hint if rest else "add a user turn"
        raise ValueError(f"conversation: got {got}, expected an end by {last!r}; {hint}")
    return system, rest


class _Parts:
    """Parts written so far, and the pictures of the turn that still wait for a place."""

    def __init__(self) -> None:
        self.done: list[Part] = []
        self.pictures = 0
        self._placed = 0

    def add(
        self, form: Form, text: str, second: str = "", *, places: Sequence[int] = (), supervised: bool = False
    ) -> None:
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
                        self._written(*_trimmed(text, places, slot[1]), supervised=supervised)
                self._text(item[at:], supervised=supervised)

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
