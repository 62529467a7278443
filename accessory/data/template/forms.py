"""What templates are made of: turns, the parts that are written, and forms with places for texts and pictures.
Knows no tokenizer and no template by name.

A form is a tuple of strings, `Control`s and `Pictures`. In a string, {text} stands for the turn's text, {strip} for the
same without blanks around it, {rstrip} without blanks after it, {input} for the turn's input; nothing else is replaced.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PLACE = "<image>"
"""A picture's place in texts of people and of other tools."""
SLOT = re.compile(r"\{(text|strip|rstrip|input)\}")


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
