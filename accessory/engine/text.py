"""Tokens of one answer to the text that may be shown: whole characters, up to a stop string, without the template's.

Must not know models or scheduling. Each token costs the same, however long the answer has become.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from accessory.data.tokenizer import Decoder, Tokenizer


class AnswerText:
    """The text of one answer as its tokens come.

    The answer is cut before the stop string that is complete first, wherever token boundaries fall; what may still
    become one is held back until it is decided. `opening`: the answer begins a text (see `Tokenizer.decode`).
    `lead` and `tail`: what the template writes around an answer (often a space); no part of it where it is there.
    `shown`: control tokens that are a part of the text, such as the marks of calls.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        opening: bool = False,
        lead: str = "",
        tail: str = "",
        shown: Mapping[int, str] | None = None,
    ) -> None:
        self._decoder = Decoder(tokenizer, opening=opening)
        self._stops = [_Matcher(stop) for stop in stops]
        self._tail = _Matcher(tail) if tail else None
        self._lead, self._begun, self._held = lead, "", ""
        self._shown = dict(shown or {})
        self.stopped = False
        """Whether a stop string was met; nothing comes after it."""

    def push(self, token: int) -> str:
        """The text that this token settles, perhaps none."""
        return self._feed(self._decoder.push(token) + self._shown.get(token, ""))

    def finish(self, *, complete: bool) -> str:
        """What is left at the end; complete: the model ended the answer itself, so that the tail belongs to it."""
        text = self._feed(self._decoder.flush())
        if self.stopped:
            return text
        if self._lead:  # fewer characters than the lead: they are the answer
            return text + self._begun
        rest = self._held
        if complete and self._tail is not None and self._tail.matched:
            rest = rest[: -len(self._tail.pattern)]
        self._held = ""
        return text + rest

    def _feed(self, text: str) -> str:
        """Settle what can be settled of the text so far."""
        if self.stopped or not text:
            return ""
        if self._lead:
            self._begun += text
            if len(self._begun) < len(self._lead) and self._lead.startswith(self._begun):
                return ""
            text, self._lead = self._begun.removeprefix(self._lead), ""
        if not self._stops and self._tail is None:
            return text
        begin = len(self._held)
        text = self._held + text
        for place in range(begin, len(text)):
            found = [len(stop.pattern) for stop in self._stops if stop.step(text[place])]
            if found:
                self.stopped, self._held = True, ""
                return text[: place + 1 - max(found)]
            if self._tail is not None:
                self._tail.step(text[place])
        watched = self._stops if self._tail is None else [*self._stops, self._tail]
        settled = len(text) - max(matcher.state for matcher in watched)
        self._held = text[settled:]
        return text[:settled]


class _Matcher:
    """Knuth, Morris and Pratt's search for one string: `state` characters of it are matched so far."""

    def __init__(self, pattern: str) -> None:
        assert pattern, "an empty string would match everywhere"
        self.pattern, self.state = pattern, 0
        self._back = [0] * (len(pattern) + 1)  # after i characters: how many of them may begin the next match
        length = 0
        for i in range(1, len(pattern)):
            while length and pattern[i] != pattern[length]:
                length = self._back[length]
            length += pattern[i] == pattern[length]
            self._back[i + 1] = length

    @property
    def matched(self) -> bool:
        """Whether the text read so far ends with the pattern."""
        return self.state == len(self.pattern)

    def step(self, character: str) -> bool:
        """Read one character; True where the pattern ends with it."""
        if self.matched:
            self.state = self._back[self.state]
        while self.state and self.pattern[self.state] != character:
            self.state = self._back[self.state]
        self.state += self.pattern[self.state] == character
        return self.matched
