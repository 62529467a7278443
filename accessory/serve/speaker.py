"""Asks the engine within a conversation, and shows the answer on stdout as it comes.

Must not read questions or know models; what it prints is the answer alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from accessory.serve.fitting import fitted
from accessory.serve.steady import safe_length

if TYPE_CHECKING:
    from accessory.data.template import Turn
    from accessory.engine import Engine, Request
    from accessory.engine.request import PictureSource
    from accessory.model import Sampling

log = logging.getLogger(__name__)

# what a terminal would take for a command; from a model it is noise
_COMMANDS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Speaker:
    """Asks the engine, and shows the answer as it comes.

    stops: further strings that end an answer. steady: of an unfinished answer only whole words are shown.
    stream: False shows the answer when it is whole. lead: stands before every answer. bounds: what a person may raise
    when an answer was cut, by the window or by max_gen_len.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        template: str,
        *,
        max_gen_len: int,
        stops: Sequence[str] = (),
        steady: bool = False,
        stream: bool = True,
        lead: str = "",
        bounds: tuple[str, str] = ("--max_seq_len", "--max_gen_len"),
    ) -> None:
        from accessory.data.template import get_template
        from accessory.engine import Conversation

        self._engine, self._sampling, self._template, self._length = engine, sampling, template, max_gen_len
        self._stops, self._steady, self._stream = tuple(stops), steady, stream
        self._lead, self._bounds = lead, bounds
        self.takes_silence = get_template(template).bare
        """Whether an empty question is one: the template adds no words of its own."""
        self.history = Conversation()
        self._plain = not sys.stdout.isatty()
        self._held, self._last = "", ""
        for stream_ in (sys.stdout, sys.stderr):
            if hasattr(stream_, "reconfigure"):
                stream_.reconfigure(errors="replace")

    def answer(
        self, text: str | Turn, pictures: Sequence[PictureSource] = (), *, stopped: Callable[[], bool] = lambda: False
    ) -> tuple[str, bool]:
        """Ask within the history and print the answer, ended by one newline; (what was said, whether it was stopped).

        Raises ValueError or OSError for what cannot be asked, where nothing was printed, and for what cannot go on.
        """
        answer = self._engine.submit(self._request(text, pictures))
        shown, self._held, self._last = 0, "", ""
        sys.stdout.write(self._lead)
        while answer.result is None or shown < len(answer.parts):
            if answer.result is None:
                self._engine.step()
                if stopped():
                    self._engine.cancel(answer)
            for part in answer.parts[shown:]:
                self._show(part)
                shown += 1
            sys.stdout.flush()
        assert answer.result is not None, f"the loop ended before answer {answer.id} did"
        self._write(self._held)
        if self._last != "\n":
            sys.stdout.write("\n")
        sys.stdout.flush()
        if answer.result.finish == "error":
            raise ValueError(answer.result.error)
        if answer.result.finish == "length":
            full = answer.result.prompt_tokens + len(answer.result.ids) >= self._engine.window
            log.info("(cut after %d tokens; %s allows more)", len(answer.result.ids), self._bounds[not full])
        return answer.result.text, answer.result.finish == "cancelled"

    def instruct(self, text: str | None) -> None:
        """Tell the model this before the conversation; None: what the template tells it. ValueError for a template
        without a place for it, and for a text that leaves no room."""
        from accessory.engine import Conversation

        talked, self.history = self.history, Conversation(system=text)
        try:
            length = self._engine.length(self._request(".", ()))
        finally:
            self.history = talked
        if length >= self._engine.window:
            raise ValueError(
                f"system: got {length} tokens with a question, expected less than the window of {self._engine.window};"
                f" shorten it or raise {self._bounds[0]}"
            )
        self.history.system = text

    def _show(self, part: str) -> None:
        """Print what may be shown now of the answer so far, and keep the rest."""
        if self._stream and not self._steady:
            self._write(part)
            return
        self._held += part
        settled = safe_length(self._held) if self._stream else 0
        self._write(self._held[:settled])
        self._held = self._held[settled:]

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text if self._plain else text.translate(_COMMANDS))
            self._last = text[-1]

    def _request(self, text: str | Turn, pictures: Sequence[PictureSource]) -> Request:
        """The request. Of a history that leaves too little room for an answer the oldest exchanges go, not quietly."""
        from accessory.engine import Request

        def make(turns: Sequence[Turn], shown: Sequence[PictureSource]) -> Request:
            return Request(
                turns,
                pictures=shown,
                template=self._template,
                sampling=self._sampling,
                max_gen_len=self._length,
                stops=self._stops,
            )

        request, forgotten = fitted(self._engine, self.history, text, pictures, make=make)
        if forgotten:
            log.info("(the window is full: the oldest %d exchange(s) of the conversation are forgotten)", forgotten)
        return request
