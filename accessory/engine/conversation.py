"""The history of a conversation: what was said, with which pictures, and what goes when the window is full.

Must not know engines: it gives turns and pictures for a request and takes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from accessory.data.template import Turn
from accessory.engine.request import PictureSource


@dataclass
class Conversation:
    """Finished exchanges. Every request renders them anew, so that all ids are those of one training record."""

    system: str | None = None
    exchanges: list[tuple[Turn, Turn]] = field(default_factory=list)
    pictures: list[PictureSource] = field(default_factory=list)
    """Of all exchanges, in order."""

    def asked(self, text: str | Turn, pictures: Sequence[PictureSource] = ()) -> tuple[list[Turn], list[PictureSource]]:
        """Turns and pictures of a request that asks `text` next; a Turn says where its pictures stand, too."""
        turns = [] if self.system is None else [Turn("system", self.system)]
        for exchange in self.exchanges:
            turns.extend(exchange)
        return [*turns, _question(text, len(pictures))], [*self.pictures, *pictures]

    def add(self, text: str | Turn, answer: str, pictures: Sequence[PictureSource] = ()) -> None:
        """Keep an exchange."""
        self.exchanges.append((_question(text, len(pictures)), Turn("assistant", answer)))
        self.pictures.extend(pictures)

    def forget_oldest(self) -> bool:
        """Drop the first exchange and its pictures; False where there is none."""
        if not self.exchanges:
            return False
        question, _ = self.exchanges.pop(0)
        del self.pictures[: question.pictures]
        return True

    def clear(self) -> None:
        """Drop all exchanges; the system text stays."""
        self.exchanges.clear()
        self.pictures.clear()


def _question(text: str | Turn, pictures: int) -> Turn:
    """A question with so many pictures."""
    return replace(text, pictures=pictures) if isinstance(text, Turn) else Turn("user", text, pictures=pictures)
