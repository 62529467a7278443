"""Log-probabilities of an answer's tokens as JSON, in the two forms that OpenAI has.

Must not know requests or streams.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accessory.data.tokenizer import Tokenizer
    from accessory.engine import Odds

_LEAST = -9999.0  # what stands for minus infinity, which JSON cannot hold


class Spelling:
    """Tokens as text and bytes, each worked out once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.text = lru_cache(maxsize=1 << 16)(self._text)
        self._json = lru_cache(maxsize=1 << 16)(self._entry)

    def chat(self, odds: Sequence[Odds]) -> str:
        """{"content": [{"token", "logprob", "bytes", "top_logprobs"}], "refusal": null}."""
        entries = []
        for each in odds:
            top = ",".join(f"{{{self._json(token)},{_logprob(value)}}}" for token, value in each.top)
            entries.append(f'{{{self._json(each.token)},{_logprob(each.logprob)},"top_logprobs":[{top}]}}')
        return f'{{"content":[{",".join(entries)}],"refusal":null}}'

    def completion(self, odds: Sequence[Odds], offset: int) -> str:
        """{"tokens", "token_logprobs", "top_logprobs", "text_offset"}; offset: characters before the first token."""
        tokens, offsets = [], []
        for each in odds:
            tokens.append(self.text(each.token))
            offsets.append(offset)
            offset += len(tokens[-1])
        top = [{self.text(token): max(value, _LEAST) for token, value in reversed(each.top)} for each in odds]
        chosen = [max(each.logprob, _LEAST) for each in odds]
        told = {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}
        return json.dumps(told)

    def _text(self, token: int) -> str:
        """A token as text: a control token by its name, half a character as U+FFFD."""
        return self._tokenizer.control_name(token) or self._tokenizer.piece_bytes(token).decode("utf-8", "replace")

    def _entry(self, token: int) -> str:
        """The members of a token's object that are always the same."""
        spelled = list(self._tokenizer.piece_bytes(token))
        return f'"token":{json.dumps(self.text(token))},"bytes":{json.dumps(spelled)}'


def _logprob(value: float) -> str:
    return f'"logprob":{max(value, _LEAST)!r}'
