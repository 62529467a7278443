"""`accessory chat`: a conversation in a terminal or through a pipe, in the manner of LLaMA-Factory's.

Must not know models: it asks a speaker. Prompts and answers go to stdout, notes to stderr.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from accessory import dist
from accessory.config import parse
from accessory.dialect.translate import translator
from accessory.dialect.words import AheadWords, GenerationWords, ModelWords
from accessory.serve.asking import PLACE, look, question
from accessory.serve.keyboard import Keyboard
from accessory.serve.opening import (
    check_words,
    describe,
    open_bundle,
    open_engine,
    resolved,
    sampling_of,
    start_ranks,
    template_of,
)
from accessory.serve.speaker import Speaker

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

SYSTEM, IMAGE = "/system", "/image"
BLOCK, MORE = '"""', "... "


@dataclass
class ChatSettings(ModelWords, GenerationWords, AheadWords):
    """Talk with a model; it remembers the conversation."""

    image: list[str] = field(default_factory=list)
    """Pictures (path or URL) that come with the first question."""
    dry_run: bool = False
    """Print the settings as they are understood, and stop."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `accessory chat`. Raises ValueError or OSError for settings and models that cannot be."""
    settings = parse(
        ChatSettings, argv, prog="accessory chat", description=ChatSettings.__doc__ or "", translate=translator("chat")
    )
    settings.check_ahead()
    check_words(settings, settings)
    if settings.dry_run:
        sys.stdout.write(resolved(settings))
        return 0
    ranks = start_ranks(settings)
    bundle = open_bundle(settings, ranks)
    with open_engine(settings, bundle, ranks, rows=1, orientation="keep", speculate=settings.speculate) as engine:
        if not ranks.leader:
            engine.follow()
        else:
            template = template_of(settings, bundle)
            log.info("model: %s", describe(bundle, template, engine))
            speaker = Speaker(
                engine,
                sampling_of(settings),
                template,
                max_gen_len=settings.max_new_tokens,
                stops=settings.stop_words,
                lead="Assistant: ",
                bounds=("--max_seq_len", "--max_new_tokens"),
            )
            speaker.history.system = settings.default_system
            door = functools.partial(
                look, orientation=settings.orientation or "apply", allow_private_urls=settings.allow_private_urls
            )
            with Keyboard(prompts=True) as keyboard:
                Chat(speaker, keyboard, door, sees=bundle.vision is not None, images=settings.image).run()
    dist.close()
    return 0


@dataclass
class Chat:
    """The session. In a terminal an error is shown and the session goes on; in a pipe it ends it."""

    speaker: Speaker
    keyboard: Keyboard
    look: Callable[[str], Image]
    """Opens a picture by what was typed."""
    sees: bool = False
    images: Sequence[str] = ()
    """For the first question."""
    _waiting: list[Image] = field(default_factory=list)
    """Pictures that the next question is about."""

    def run(self) -> None:
        """Until `exit` or the end of the input."""
        self._waiting = [self.look(name) for name in self.images]
        self._help()
        while True:
            text = self.keyboard.ask("\nUser: ")
            word = None if text is None else text.strip()
            if word is None or word == "exit":
                if word is None and not self.keyboard.terminal:
                    sys.stdout.write("\n")  # after the prompt that nobody answered
                return
            if word == "clear":
                self.speaker.history.clear()
                log.info("The conversation is forgotten.")
            else:
                self._guarded(text or "")

    def _help(self) -> None:
        pictures = f"; `{PLACE}` in a question asks for a picture, `{IMAGE} NAME` gives one" if self.sees else ""
        log.info("`clear` forgets the conversation, `exit` leaves; Ctrl-C stops an answer%s.", pictures)
        log.info('A line that begins with """ opens a text of many lines, which """ closes; `%s TEXT` is told', SYSTEM)
        log.info("to the model before the conversation, and `%s` alone takes it back.", SYSTEM)

    def _guarded(self, text: str) -> None:
        """What a line asks for. In a terminal an error is shown; in a pipe it is raised."""
        try:
            self._take(text)
        except (ValueError, OSError) as error:
            if not self.keyboard.terminal or isinstance(error, BrokenPipeError):
                raise
            self._note(f"error: {error}")

    def _take(self, text: str) -> None:
        """Do what a line says: a command with what follows it, or a question, either of many lines."""
        command, _, rest = text.strip().partition(" ")
        if command == SYSTEM:
            self._instruct(self._whole(rest.lstrip()))
        elif command == IMAGE and self.sees:
            if not rest.strip():
                raise ValueError(f"{IMAGE}: got no name, expected a path or a URL; write one behind it")
            self._waiting.append(self.look(rest.strip()))
            log.info("%d picture(s) wait for the next question.", len(self._waiting))
        else:
            asked = self._whole(text)
            if asked.strip() or self.speaker.takes_silence:
                self._exchange(asked)

    def _whole(self, text: str) -> str:
        """A text, which reads further lines where it opens a block. ValueError where nothing closes it."""
        if not text.lstrip().startswith(BLOCK):
            return text
        line, lines = text.lstrip()[len(BLOCK) :], list[str]()
        while not line.rstrip().endswith(BLOCK):
            lines.append(line)
            told = self.keyboard.ask(MORE if self.keyboard.terminal else "")
            if told is None:
                raise ValueError(f"block: got the end of the input, expected {BLOCK} to close the text; it is dropped")
            line = told
        lines.append(line.rstrip()[: -len(BLOCK)])
        return "\n".join(lines).removeprefix("\n").removesuffix("\n")

    def _instruct(self, text: str) -> None:
        """Set what stands before the conversation; nothing: the template's own."""
        self.speaker.instruct(text or None)
        if text:
            log.info("Told before the conversation: %s", text)
        else:
            log.info("Nothing is told before the conversation but what the template says.")

    def _exchange(self, text: str) -> None:
        """One question and its answer. The pictures that wait are its own once it could be asked."""
        pictures = [*self._waiting]
        places = text.count(PLACE) if self.sees else 0
        for number in range(places - len(pictures)):
            pictures.append(self._picture(number + 1))
        asked = question(text, places=places > 0)
        with self.keyboard.watching() as stopped:
            answer, cut = self.speaker.answer(asked, pictures, stopped=stopped)
        if cut:
            self._note("(stopped)")
        if answer or not cut:
            self.speaker.history.add(asked, answer, pictures)
        self._waiting = []

    def _picture(self, number: int) -> Image:
        """Ask for a picture."""
        line = self.keyboard.ask(f"Picture {number} (path or URL): ")
        if not line or not line.strip():
            raise ValueError(f"picture {number}: got nothing for its place {PLACE}; name a picture")
        return self.look(line)

    def _note(self, text: str) -> None:
        """A line for the person, not for a pipe."""
        if self.keyboard.terminal:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
