"""What is refused, and what went wrong, in the shape that OpenAI's clients expect.

Must not know routes. A sentence never holds what a person asked, nor a key.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Mapping

from accessory.engine import WindowError
from accessory.engine.waiting import QueueFull
from accessory.serve.service import Closed

log = logging.getLogger(__name__)

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
# what the sentences of other rooms begin with, as bodies have it
_FIELDS = {
    **{name: name for name in "temperature top_p top_k min_p repetition_penalty logit_bias tools messages".split()},
    **{name: "response_format" for name in ("json_schema", "json_object", "grammar")},
    **{name: "messages" for name in ("calls", "images", "pictures", "picture")},
    "lark": "tools",
    "stops": "stop",
}
_AGAIN = {"retry-after": "1"}


class ApiError(Exception):
    """A refusal: status, sentence, and what it is about (param), in a word that programs read (code)."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": told}).encode()


def busy(message: str) -> ApiError:
    """Too many ask at once."""
    return ApiError(429, message, code="rate_limit_exceeded", headers=_AGAIN)


def refusal(error: BaseException, *, param: str | None = None) -> ApiError:
    """What to answer for an error of whatever was asked; one that is nobody's fault but ours is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, WindowError):
        return ApiError(400, str(error), param=param, code="context_length_exceeded")
    if isinstance(error, QueueFull):
        return busy(str(error))
    if isinstance(error, Closed):
        return ApiError(503, "the server is ending, expected a running one; ask again later", headers=_AGAIN)
    if isinstance(error, (ValueError, ConnectionError)):
        return ApiError(400, " ".join(str(error).split()), param=_param(str(error)) or param)
    broke(error)
    return ApiError(500, "the request failed inside the server; see its log")


def broke(error: BaseException) -> None:
    """Write down where a fault of ours is, without its words, which may be what a person said."""
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("a request failed: %s\n%s", type(error).__name__, where)


def _param(sentence: str) -> str | None:
    """The field that a sentence of ours is about, by the word before its first colon; None where that is no field."""
    word = re.match(r"\w*", sentence)
    return None if word is None else _FIELDS.get(word[0])
