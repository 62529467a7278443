"""ms-swift's interactive protocol: its hints, prompts and commands, on a terminal or a pipe.

Must not know models: it asks a speaker. Answers and prompts go to stdout, hints and notes to stderr.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from accessory.serve.asking import PLACE, name_of, question, spoken

if TYPE_CHECKING:
    from PIL.Image import Image

    from accessory.data.template import Turn
    from accessory.serve.journal import Journal
    from accessory.serve.keyboard import Keyboard
    from accessory.serve.speaker import Speaker

log = logging.getLogger(__name__)

MEDIA = "Input a media path or URL <<< "
RULE = "-" * 50
Media = Literal["round", "dialogue", "none"]


class _End(Exception):
    """The input is over."""


@dataclass
class Repl:
    """Questions one after another. In a terminal an error is shown and the session goes on; in a pipe it ends it.

    media: whether pictures may come with each question (round), with the first of a conversation, or never.
    """

    speaker: Speaker
    keyboard: Keyboard
    look: Callable[[str], Image]
    """Opens a picture by what was typed."""
    media: Media = "none"
    system: str | None = None
    """Said at the beginning of every conversation; none: the template's."""
    journal: Journal | None = None
    names: list[str] = field(default_factory=list)
    """Sources of the pictures of this conversation, in order."""
    results: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> None:
        """Until `exit`, `quit` or the end of the input."""
        self._hints()
        self._reset(self.system)
        lines, wants_system = False, False
        try:
            while True:
                text = self._read(lines=lines, system=wants_system)
                word = text.strip().lower()
                if wants_system:
                    self._reset(text if text.strip() else self.system)
                    wants_system = False
                elif word in ("exit", "quit"):
                    return
                elif word == "clear":
                    self._reset(self.speaker.history.system)
                elif word == "reset-system":
                    wants_system = True
                elif word in ("multi-line", "single-line"):
                    lines = word == "multi-line"
                    self._note(
                        "End multi-line input with `#`; `single-line#` leaves it." if lines else "Input single lines."
                    )
                elif word:
                    self._round(text)
        except _End:
            if not self.keyboard.terminal:
                sys.stdout.write("\n")  # after the prompt that nobody answered

    def _read(self, *, lines: bool, system: bool) -> str:
        """A question or a system text; several lines end with one that ends with #."""
        letters = f"{'M' if lines else ''}{'S' if system else ''}"
        prompt, said = f"<<<[{letters}] " if letters else "<<< ", list[str]()
        while True:
            line = self._ask(prompt if not said else "")
            if not lines:
                return line
            said.append(line.removesuffix("#"))
            if line.endswith("#"):
                return "\n".join(said)

    def _ask(self, prompt: str) -> str:
        line = self.keyboard.ask(prompt)
        if line is None:
            raise _End(prompt)
        return line

    def _round(self, text: str) -> None:
        """One question, its pictures, its answer and the rule below it."""
        try:
            names, pictures = self._pictures(text)
            asked = question(text, places=bool(names))
            with self.keyboard.watching() as stopped:
                answer, cut = self.speaker.answer(asked, pictures, stopped=stopped)
        except (ValueError, OSError) as error:
            if not self.keyboard.terminal or isinstance(error, BrokenPipeError):
                raise
            self._note(f"error: {error}")
            return
        if cut:
            self._note("(stopped)")
        sys.stdout.write(f"{RULE}\n")
        sys.stdout.flush()
        if answer or not cut:
            self._keep(asked, answer, names, pictures)

    def _pictures(self, text: str) -> tuple[list[str], list[Image]]:
        """Names and pictures of a question: one for each place, or one or none where it has no place."""
        if self.media == "none" or (self.media == "dialogue" and self.names):
            return [], []
        places = text.count(PLACE)
        names = [self._ask(MEDIA).strip() for _ in range(places or 1)]
        if not places and not names[0]:
            return [], []
        if "" in names:
            raise ValueError(f"media: got nothing for place {names.index('') + 1} of {places} {PLACE}; name a picture")
        return names, [self.look(name) for name in names]

    def _keep(self, asked: Turn, answer: str, names: list[str], pictures: list[Image]) -> None:
        """Remember the exchange, and write it down."""
        history = self.speaker.history
        turns = history.asked(asked, pictures)[0]
        history.add(asked, answer, pictures)
        self.names = [*self.names, *names][-len(history.pictures) :] if history.pictures else []
        record = spoken(turns)
        record = {"system": record["system"], "query": record["query"], "response": answer} | {
            "history": record["history"],
            "images": [name_of(name) for name in self.names],
        }
        self.results.append(record)
        if self.journal is not None:
            self.journal.append(record)

    def _reset(self, system: str | None) -> None:
        self.speaker.history.clear()
        self.speaker.history.system = system
        self.names = []

    def _hints(self) -> None:
        log.info("Input `exit` or `quit` to exit the conversation.")
        log.info("Input `multi-line` to switch to multi-line input mode.")
        log.info("Input `reset-system` to reset the system and clear the history.")
        log.info("Input `clear` to clear the history.")
        if self.media != "none":
            log.info("Please enter the conversation content first, followed by the path to the multimedia file.")
        self._note("Ctrl-C stops an answer.")

    def _note(self, text: str) -> None:
        """A line for the person, not for a pipe."""
        if self.keyboard.terminal:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
