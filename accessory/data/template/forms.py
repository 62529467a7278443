"""What templates are made of: turns, the parts that are written, forms with places for texts and pictures, and tools.
Knows no tokenizer and no template by name.

A form is a tuple of strings, `Control`s and `Pictures`. In a string, {text} stands for the turn's text, {strip} for the
same without blanks around it, {rstrip} without blanks after it, {input} for the turn's input; nothing else is replaced.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

PLACE = "<image>"
"""A picture's place in texts of people and of other tools."""
SLOT = re.compile(r"\{(text|strip|rstrip|input)\}")
ROLES = ("system", "tools", "user", "assistant", "function", "tool")
"""Who speaks: the tools that there are, as JSON (`tools.read_tools`); function: the assistant, who calls some of them
(`tools.read_calls`); tool: what one call gave."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: who speaks, the text, and how many pictures (user turns only) come with it."""

    role: str
    text: str
    pictures: int = 0
    input: str = ""
    """The second field of an alpaca record: what the instruction is to be applied to."""
    places: tuple[int, ...] = ()
    """Where in `text`, in characters, the last of the pictures stand; the others stand where the template puts them.
    A place beyond the text is its end; without pictures there are no places."""
    preface: str = ""
    """What the assistant says before the calls of a function turn."""


@dataclass(frozen=True)
class Control:
    """A control token by its text, or "bos" or "eos"; text: where the tokenizer has none of that name, it is text."""

    name: str
    supervised: bool = False
    text: bool = False


@dataclass(frozen=True)
class Text:
    """Plain text; neighbouring texts are one run and are tokenised together."""

    text: str
    supervised: bool = False


@dataclass(frozen=True)
class Picture:
    """The place of a picture, numbered over the conversation."""

    index: int


Part = Control | Text | Picture


@dataclass(frozen=True)
class Pictures:
    """In a form: the pictures of the turn that have no place in its text, each followed by a text."""

    after: str = ""


Form = tuple[str | Control | Pictures, ...]

BOS, EOS = Control("bos"), Control("eos")
LEARNED_EOS = Control("eos", supervised=True)


@dataclass(frozen=True)
class Tools:
    """How a template writes tools, the assistant's calls, and their results.

    In its forms {tools} stands for all definitions and {names} for their names; {name}, {quoted} and {arguments} for a
    call's name, the same as JSON, and its arguments as a JSON object; {text} and {rstrip} for the text beside it.
    """

    kind: Literal["action", "tagged", "opening", "marked"]
    """How calls are told from text (`CallReader`): by lines, between two tags, as JSON that opens the answer, as JSON
    after a mark."""
    tool: Literal["arguments", "line", "indented"]
    """How a definition is written: its arguments a line each; as JSON on one line, or on several."""
    call: Form
    """One call; `call_begins`, `call_between` and `call_ends` stand around and between several."""
    tool_between: str = "\n"
    start: Form | None = None
    """Where there are tools, the template's `start`."""
    before_system: Form = ()
    after_system: Form = ()
    """Around the system text, within its form; they are written without a system text, too."""
    joint: str = ""
    """Between a system text, where there is one, and `after_system`."""
    before_user: Form = ()
    """Before the text of the first question."""
    call_begins: Form = ()
    call_between: Form = ("\n",)
    call_ends: Form = ()
    alone: bool = False
    """A single call has nothing around it."""
    preface: Form | None = ("{rstrip}\n",)
    """What is said before calls; None: nothing can be."""
    answer: Form | None = None
    """Around calls; None: the template's `answer`."""
    result: Form | None = None
    """One result; None: the results, a line each, are a turn of the user."""
    result_quoted: bool = False
    """A result is written as a JSON string."""
    result_begins: Form = ()
    result_between: Form = ()
    result_ends: Form = ()
    mark: tuple[str, str] = ("", "")
    """What opens and closes calls in an answer's text."""

    @property
    def controls(self) -> tuple[str, ...]:
        """The control tokens that calls are told by, which are a part of an answer's text."""
        forms = (*self.call, *self.call_begins, *self.call_between, *self.call_ends)
        return tuple(dict.fromkeys(item.name for item in forms if isinstance(item, Control)))


@dataclass(frozen=True)
class Template:
    """How a conversation is written: start, system, first; user, opening, answer per exchange with `between` them; end.

    The answer is all that is supervised, and what an `end` marks so. A user turn's pictures go to the first `Pictures`
    met: in `start` or `between` before the turn, else in `user`. A prompt for an answer ends after `opening`.
    """

    user: Form
    answer: Form
    start: Form = (BOS,)
    first: Form = ()
    opening: Form = ()
    between: Form = ()
    end: Form = ()
    system: Form | None = None
    """None: the template has no place for a system turn."""
    no_system: Form = ()
    """Stands where a system text would, if there is none."""
    default_system: str = ""
    """Said where the conversation has no system turn; an empty system turn says nothing."""
    default_system_input: str | None = None
    """The same where the first user turn has an input."""
    user_input: Form | None = None
    """A user turn with an input; None: the input follows the text on a new line."""
    user_system: Form | None = None
    """The first user turn after a system text; None: as any other."""
    stops: tuple[str, ...] = ()
    """Strings that end an answer and are no part of it."""
    stop_controls: tuple[str, ...] = ("eos",)
    """Control tokens that end an answer, where the tokenizer has them."""
    tools: Tools | None = None
    """None: the template has no way to write tools."""

    @property
    def bare(self) -> bool:
        """Whether a question is its text alone, so that an empty one asks the model to go on."""
        items = [item for item in (*self.user, *self.opening, *self.between) if not isinstance(item, Pictures)]
        return all(isinstance(item, str) and not SLOT.sub("", item).strip() for item in items)


def tagged(role: str, text: str, *, tag: str = PLACE) -> Turn:
    """A turn whose text names the places of pictures by a tag, as Hugging Face's processors and ms-swift read it.

    Tags before all else go to the template's place for pictures, and blanks around them go with them; the others mark
    where in the text their pictures stand. Only for texts that may place pictures: a person's own text is data.
    """
    before, *rest = text.split(tag)
    if not rest:
        return Turn(role, text)
    leading = 0
    if not before.strip():
        leading = next((at for at, piece in enumerate(rest[:-1], start=1) if piece.strip()), len(rest))
        before, rest = rest[leading - 1].lstrip(), rest[leading:]
    places, written = [], before
    for piece in rest:
        places.append(len(written))
        written += piece
    return Turn(role, written, pictures=leading + len(places), places=tuple(places))
