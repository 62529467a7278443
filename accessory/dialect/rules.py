"""What becomes of one word of another tool: another name, another value, nothing to do, or a refusal.

Must not know any tool's words.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass
class Sheet:
    """The words of one command, half translated."""

    dialect: str
    verb: str
    words: Mapping[str, Any]
    """As they were given."""
    known: Collection[str]
    """The settings' own names."""
    env: Mapping[str, str]
    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, name: str, value: Any, word: str) -> None:
        """Set what a word means, or say that the verb has no use for it.

        ValueError where another word has said otherwise.
        """
        if name not in self.known:
            self.note(f"{word}: nothing to do, it says nothing about {self.verb}")
            return
        if name in self.values and self.origin.get(name) not in (None, word) and self.values[name] != value:
            raise ValueError(
                f"{word}: got {self.words[word]!r} beside {self.origin[name]} {self.words[self.origin[name]]!r},"
                " expected one of them, since both say the same thing; drop one"
            )
        self.values[name], self.origin[name] = value, word

    def default(self, **values: Any) -> None:
        """Set what the tool does where nobody says otherwise, as far as the settings know it."""
        for name, value in values.items():
            if name in self.known and name not in self.values:
                self.values[name] = value

    def note(self, text: str) -> None:
        """Say a line, once."""
        if text not in self.notes:
            self.notes.append(text)

    def given(self, word: str) -> bool:
        """Whether a word was given and says something."""
        return self.words.get(word) is not None


@dataclass(frozen=True)
class Word:
    """One word of a tool: what it is called here, or what is done."""

    to: str | None = None
    by: Callable[[Any], Any] | None = None
    """How its value is written here."""
    act: Callable[[Sheet, str, Any], None] | None = None
    """What it does where it is not one value."""
    idle: str = ""
    """Why nothing needs to be done."""
    only: tuple[Any, ...] = ()
    """The only values that are offered; others are refused."""
    remedy: str = ""

    def apply(self, sheet: Sheet, word: str, value: Any) -> None:
        """Translate. ValueError for what is not offered."""
        if self.only and written(value) not in map(written, self.only):
            allowed = " or ".join(str(item).lower() if isinstance(item, bool) else str(item) for item in self.only)
            raise ValueError(f"{word}: got {value}, expected {allowed}; {self.remedy or 'leave it out'}")
        if self.act is not None:
            self.act(sheet, word, value)
        if self.to is not None:
            try:
                sheet.put(self.to, value if self.by is None else self.by(value), word)
            except KeyError:
                raise ValueError(f"{word}: got {value!r}, which is not offered; leave it out") from None
        if self.idle and written(value) not in ("false", ""):
            sheet.note(f"{word}: nothing to do, {self.idle}")


def to(name: str, by: Callable[[Any], Any] | None = None) -> Word:
    """A word that is called otherwise here."""
    return Word(to=name, by=by)


def choose(name: str, table: Mapping[str, Any], *, remedy: str) -> Word:
    """A word whose values are called otherwise here."""
    return Word(to=name, by=lambda value: table[written(value)], only=tuple(table), remedy=remedy)


def idle(why: str) -> Word:
    """A word that needs no action."""
    return Word(idle=why)


def only(*values: Any, remedy: str = "") -> Word:
    """A word of which only these values are offered, and say what is done anyway."""
    return Word(only=values, remedy=remedy)


def act(what: Callable[[Sheet, str, Any], None]) -> Word:
    """A word that does more than name a value."""
    return Word(act=what)


def written(value: Any) -> str:
    """A value as a flag would have it: false, none, adamw_torch."""
    return "none" if value is None else str(value).strip().lower()


def is_true(value: Any, word: str) -> bool:
    """A truth value from a file or a flag. ValueError for anything else."""
    truth = _TRUTH.get(written(value))
    if truth is None:
        raise ValueError(f"{word}: got {value!r}, expected true or false")
    return truth


def number(value: Any, word: str) -> float:
    """A number from a file or a flag. ValueError for anything else."""
    try:
        if isinstance(value, bool):
            raise TypeError("a truth value")
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{word}: got {value!r}, expected a number") from None


def each(value: Any) -> list[str]:
    """The items of a list, of one text, or of a text with commas; empty ones are dropped."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [part.strip() for item in items for part in str(item).split(",") if part.strip()]
