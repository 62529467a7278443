"""The bodies of requests as OpenAI's interface has them, and ours beside them.

Must not know limits of this server or its model: types and ranges that hold everywhere are checked here.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from accessory.config import nearest
from accessory.serve.api.errors import ApiError

IDLE = frozenset(
    "metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention prediction".split()
)
"""OpenAI's fields that make no difference here."""
_MESSAGE_IDLE = frozenset("name refusal annotations".split())
_LONGEST_SEED = 2**63
_STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

B = TypeVar("B", bound=BaseModel)


class StreamOptions(BaseModel):
    """What comes beside the pieces of a stream."""

    model_config = _STRICT
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampled(BaseModel):
    """What chat and completions share."""

    model_config = _STRICT
    model: str | None = Field(None, max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-_LONGEST_SEED, lt=_LONGEST_SEED)
    logit_bias: dict[str, float] | None = None
    user: str | None = Field(None, max_length=1024)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    do_sample: bool | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=64)
    ignore_eos: bool | None = None


class Function(BaseModel):
    """What a tool is called and takes."""

    model_config = _STRICT
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A function that the model may ask to be called."""

    model_config = _STRICT
    type: Literal["function"]
    function: Function


class Called(BaseModel):
    """The name and the arguments of a call."""

    model_config = _STRICT
    name: str = Field(min_length=1, max_length=128)
    arguments: str = "{}"


class Call(BaseModel):
    """A call that the assistant asked for."""

    model_config = _STRICT
    id: str | None = None
    type: Literal["function"] = "function"
    function: Called


class ImageUrl(BaseModel):
    """Where a picture is."""

    model_config = _STRICT
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class Part(BaseModel):
    """A piece of a message's content."""

    model_config = _STRICT
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class Message(BaseModel):
    """One message of a conversation."""

    model_config = _STRICT
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None


class ChatBody(Sampled):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None


class CompletionBody(Sampled):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1)


class ScoreBody(BaseModel):
    """POST /v1/score: how likely each continuation is, after a text as it is or as the answer to messages."""

    model_config = _STRICT
    model: str | None = Field(None, max_length=1024)
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    continuations: list[str] = Field(min_length=1)
    user: str | None = Field(None, max_length=1024)


class EvaluationBody(BaseModel):
    """POST /v1/score/evaluation: what a reward model thinks of texts."""

    model_config = _STRICT
    model: str | None = Field(None, max_length=1024)
    messages: list[str] = Field(min_length=1)
    max_length: int | None = Field(None, ge=1)


BODIES: tuple[type[BaseModel], ...] = (ChatBody, CompletionBody, ScoreBody, EvaluationBody)


def validate(kind: type[B], content: dict[str, Any], *, forgive: bool) -> B:
    """A body of this kind. forgive: fields that nobody knows are ignored. ApiError, with the field's name, for one
    that cannot be."""
    try:
        body = kind.model_validate(content)
    except ValidationError as error:
        raise _fault(error) from None
    if not forgive:
        _known(body, "")
    return body


def _fault(error: ValidationError) -> ApiError:
    """The first fault, by the field's name and without its value."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    branches = ("str", "int", "float", "bool")  # which pydantic adds where a field may be one of several things
    loc = [part for part in first["loc"] if part not in branches]
    place = [str(part) for part in loc if not isinstance(part, str) or part.isidentifier()]
    param = ".".join(place) or None
    why = first["msg"][:200].replace("Input should be", "expected").replace("Field required", "expected it, got none")
    return ApiError(400, f"{param or 'body'}: {why}", param=param, code="invalid_value")


def _known(body: BaseModel, where: str) -> None:
    """ApiError for a field that nobody knows, wherever it stands; null says nothing."""
    idle = IDLE if not where else _MESSAGE_IDLE if isinstance(body, Message) else frozenset()
    for name, value in (body.model_extra or {}).items():
        if value is not None and name not in idle:
            names = [known for known in type(body).model_fields if known.isidentifier()]
            path = f"{where}{name[:80]}"
            sentence = f"{path!r}: unknown field; {nearest(name[:80], names)}"
            raise ApiError(400, sentence, param=path, code="unknown_parameter")
    for name in type(body).model_fields:
        value = getattr(body, name)
        for place, inner in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(inner, BaseModel):
                _known(inner, f"{where}{name}{'' if place is None else f'.{place}'}.")
