"""A template read off a chat template by what it writes: probes are taken apart, and the result is put to proof.
Must not know names of templates. What cannot be written the same by a `Template` is refused, never approximated.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from accessory.data.template.derive_tools import with_tools
from accessory.data.template.forms import PLACE, Control, Form, Pictures, Template, Turn
from accessory.data.template.render import render
from accessory.data.template.sandbox import BOS_MARK, EOS_MARK, Jinja
from accessory.data.template.writer import ASKED, SAID, SYSTEM, TOKEN, Writer, as_form, joined, written

_UNIT = re.compile(rf"{TOKEN.pattern}|.", re.DOTALL)
_TALK = [
    Turn("user", ASKED[0]),
    Turn("assistant", SAID[0]),
    Turn("user", ASKED[1]),
    Turn("assistant", SAID[1]),
]
_SYSTEM = Turn("system", SYSTEM)


@functools.lru_cache(maxsize=64)
def from_jinja(text: str) -> Template:
    """The template that writes what a chat template writes; ValueError where there is none."""
    writer = Writer(Jinja(text))
    for template in _guesses(writer):
        if agrees(writer, template) and _whole(template):
            return with_tools(writer, template)
    raise ValueError(
        "chat template: got one whose text does not follow from its turns alone, expected start, system and exchanges; "
        "name a template"
    )


def agrees(writer: Writer, template: Template, *, opening: bool = False) -> bool:
    """Whether a chat template and a template write the same; opening: of a first question alone, BOS aside."""
    try:
        if opening:
            talks = [_TALK[:1], *([[replace(_TALK[0], pictures=1)]] if takes_pictures(writer) else [])]
            pairs = [(writer(talk).removeprefix(BOS_MARK), written(template, talk)) for talk in talks]
            return all(theirs == ours.removeprefix(BOS_MARK) for theirs, ours in pairs)
        return all(writer(talk) == written(template, talk) for talk in _probes(writer, template))
    except ValueError:
        return False


def _probes(writer: Writer, template: Template) -> Iterator[list[Turn]]:
    """Conversations of any length, with blanks around the texts or without, with a system text and pictures."""
    systems = [[], [_SYSTEM]] if template.system is not None else [[]]
    for system, blank, length in product(systems, ("", " \n"), range(1, 5)):
        yield [replace(turn, text=f"{blank}{turn.text}{blank}") for turn in (*system, *_TALK[:length])]
    if takes_pictures(writer):
        yield [replace(_TALK[0], pictures=2), _TALK[1], replace(_TALK[2], pictures=1)]


def takes_pictures(writer: Writer) -> bool:
    """Whether a picture changes what is written."""
    try:
        return writer.parts and writer([replace(_TALK[0], pictures=1)]) != writer(_TALK[:1])
    except ValueError:
        return False


def _guesses(writer: Writer) -> Iterator[Template]:
    """Templates that may be the one: the probes' texts taken apart, in each way of trimming."""
    try:
        first = writer(_TALK[:1])
        second, third, fourth = (writer(_TALK[:length]) for length in (2, 3, 4))
        before, after = _split(first, ASKED[0])
        lead, final = _split(_rest(second, first), SAID[0])
        middle, later = _split(_rest(third, first + lead + SAID[0]), ASKED[1])
    except LookupError:
        return
    if later != after or not fourth.startswith(third):
        return
    tail = _tail(_shared(final, middle))
    between, end = middle[len(tail) :], final[len(tail) :]
    start, system, silent, opening, default = _heads(writer, before)
    pictures, cut = _pictures(writer, first, before, between)
    for asked, said, told in product(("text", "strip"), ("text", "strip"), ("text", "strip")):
        user = (*pictures, *as_form(cut), f"{{{asked}}}", *as_form(after))
        begun, opened = (start, opening) if not cut else _shortened(start, opening, cut)
        made = Template(
            start=as_form(begun),
            first=as_form(opened),
            user=user,
            answer=(*as_form(lead), f"{{{said}}}", *as_form(tail)),
            between=as_form(between[: len(between) - len(cut)]),
            end=as_form(end),
            system=None if system is None else (*as_form(system[0]), f"{{{told}}}", *as_form(system[1])),
            no_system=as_form(silent),
            default_system=default,
            stop_controls=_stops(tail),
        )
        yield made
        if system is not None:
            yield replace(made, user_system=tuple("{rstrip}" if item == f"{{{asked}}}" else item for item in user))


def _heads(writer: Writer, before: str) -> tuple[str, tuple[str, str] | None, str, str, str]:
    """What stands before the first question: start, around a system text, where there is none, the rest, a default."""
    try:
        head, rest = _split(writer([_SYSTEM, _TALK[0]]), SYSTEM)
        follows, _ = _split(rest, ASKED[0])
    except (ValueError, LookupError):
        return before, None, "", "", ""
    opening = _shared(follows, before, end=True)
    start = _shared(head, before[: len(before) - len(opening)])
    silent = before[len(start) : len(before) - len(opening)]
    system = head[len(start) :], follows[: len(follows) - len(opening)]
    if not silent:
        return start, system, "", opening, ""
    default = silent.removeprefix(system[0]).removesuffix(system[1])
    if default and system[0] + default + system[1] == silent:
        return start, system, "", opening, default
    return start, system, silent, opening, ""


def _pictures(writer: Writer, first: str, before: str, between: str) -> tuple[Form, str]:
    """The place of pictures in a question, and what stands between them and its text."""
    if not takes_pictures(writer):
        return (), ""
    seen = writer([replace(_TALK[0], pictures=1)])
    at = len(_shared(seen, first))
    shown = seen[at : at + len(seen) - len(first)]
    while at and not shown.startswith(PLACE) and seen[at - 1] == shown[-1]:  # the same text may begin both
        at -= 1
        shown = seen[at : at + len(shown)]
    cut = before[at:]
    if not shown.startswith(PLACE) or not between.endswith(cut):
        return (), ""
    return (Pictures(shown.removeprefix(PLACE)),), cut


def _shortened(start: str, opening: str, cut: str) -> tuple[str, str]:
    """Start and opening without the end that belongs to the question."""
    if opening.endswith(cut):
        return start, opening.removesuffix(cut)
    return start.removesuffix(cut), opening


def _whole(template: Template) -> bool:
    """Whether every control token in what a template writes is one to the template."""
    parts = render(template, [*([_SYSTEM] if template.system is not None else []), *_TALK], open_answer=False)
    return sum(isinstance(part, Control) for part in parts) == sum(1 for _ in TOKEN.finditer(joined(parts)))


def _shared(one: str, other: str, *, end: bool = False) -> str:
    """What two texts have in common at their beginning or end, without cutting a control token."""
    units = [_UNIT.findall(text)[:: -1 if end else 1] for text in (one, other)]
    count = next((at for at, pair in enumerate(zip(*units, strict=False)) if pair[0] != pair[1]), min(map(len, units)))
    return "".join(units[0][:count][:: -1 if end else 1])


def _tail(common: str) -> str:
    """What ends an answer and is learned: up to the last control token, all where there is none."""
    tokens = list(TOKEN.finditer(common))
    ends = next((token.end() for token in tokens if token[0] != BOS_MARK), None)
    return common[:ends]


def _stops(tail: str) -> tuple[str, ...]:
    """Control tokens that end an answer."""
    names = [token[0] for token in TOKEN.finditer(tail) if token[0] != EOS_MARK]
    return (*names, "eos")


def _split(text: str, mark: str) -> tuple[str, str]:
    """What stands before and after a mark. LookupError where it is not there once."""
    if text.count(mark) != 1:
        raise LookupError(mark)
    before, _, after = text.partition(mark)
    return before, after


def _rest(text: str, head: str) -> str:
    """What follows a beginning. LookupError where the text begins otherwise."""
    if not text.startswith(head):
        raise LookupError(head)
    return text[len(head) :]
