"""Server-sent events of a stream, written by hand: what is the same in all of them is written once.

Must not know engines; a piece of an answer becomes bytes here.
"""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

DONE = b"data: [DONE]\n\n"


class Chunks:
    """The events of one stream, in the form of chat or of completions.

    usage: the last event but [DONE] tells it, and the others say null.
    """

    def __init__(self, *, chat: bool, id: str, created: int, model: str, usage: bool) -> None:
        kind = "chat.completion.chunk" if chat else "text_completion"
        self._head = f'data: {{"id":{quoted(id)},"object":"{kind}","created":{created},"model":{quoted(model)},'
        self._open, self._close = ('"delta":{"content":', "}") if chat else ('"text":', "")
        self._nothing = '"delta":{}' if chat else '"text":""'
        self._tail = ',"usage":null}\n\n' if usage else "}\n\n"

    def role(self, index: int) -> str:
        """The first event of a chat's choice."""
        return self._choice(index, '"delta":{"role":"assistant","content":""}', "null", "null")

    def text(self, index: int, text: str, logprobs: str = "null") -> str:
        """A piece of an answer."""
        return self._choice(index, f"{self._open}{quoted(text)}{self._close}", logprobs, "null")

    def call(self, index: int, delta: dict[str, Any], logprobs: str = "null") -> str:
        """A piece of a call of a tool."""
        return self._choice(index, f'"delta":{{"tool_calls":[{json.dumps(delta)}]}}', logprobs, "null")

    def finish(self, index: int, reason: str, logprobs: str = "null") -> str:
        """The last event of a choice."""
        return self._choice(index, self._nothing, logprobs, quoted(reason))

    def usage(self, usage: dict[str, Any]) -> str:
        """What it cost."""
        return f'{self._head}"choices":[],"usage":{json.dumps(usage)}}}\n\n'

    def _choice(self, index: int, said: str, logprobs: str, finish: str) -> str:
        return (
            f'{self._head}"choices":[{{"index":{index},{said},"logprobs":{logprobs},"finish_reason":{finish}}}]'
            f"{self._tail}"
        )


def failure(body: bytes) -> bytes:
    """An error in the middle of a stream, after which nothing comes."""
    return b"event: error\ndata: " + body + b"\n\n"
