"""Bodies of requests to what the engine is asked, within the server's limits.

Must not know HTTP, or how answers are written. Every refusal names the field it is about.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from accessory.data.template import Turn
from accessory.data.template.tools import read_tools
from accessory.engine import Grammar, Request
from accessory.model import Sampling
from accessory.serve.api.errors import ApiError
from accessory.serve.api.pictures import open_image
from accessory.serve.api.protocol import ChatBody, CompletionBody, Message, Sampled, ScoreBody
from accessory.serve.api.tools import Toolbox, toolbox
from accessory.serve.messages import read_messages

if TYPE_CHECKING:
    from accessory.serve.api.served import Served

_BAREST = 16  # tokens of a completion where nobody says how many, as OpenAI has it
_LONGEST_STOP, _LONGEST_SCHEMA = 256, 64 << 10  # characters


@dataclass
class Asked:
    """What one body asks for."""

    requests: list[Request]
    """One for each choice, in order."""
    model: str
    stream: bool = False
    usage: bool = False
    """Whether a stream tells what it cost."""
    logprobs: bool = False
    box: Toolbox | None = None
    """The tools, where the answer may call some."""
    echoes: list[str] = field(default_factory=list)
    """What stands before each choice's text; none without echo."""
    prompts: int = 1
    """How many prompts there are; each has as many choices."""


def ask_chat(body: ChatBody, served: Served, client: str) -> Asked:
    """What a body for chat asks. ApiError or ValueError for what cannot be asked."""
    limits = served.settings
    _most("messages", len(body.messages), limits.max_messages)
    _most("tools", len(body.tools or ()), limits.max_tools)
    if body.top_logprobs is not None and not body.logprobs:
        raise _bad("top_logprobs", "got it without logprobs true, expected both; say logprobs true")
    box = toolbox(body, served.template)
    grammar = _format(body.response_format)
    if box is not None and grammar is None:
        grammar = box.grammar
    elif box is not None and grammar is not None and grammar.kind.startswith("json"):
        raise _bad("response_format", "got a form beside tools, expected one of them; drop one or set tool_choice none")
    served.fit(texts_of(body.messages))
    turns, pictures = conversation(body.messages, served, tools=None if box is None else box.tools)
    request = Request(
        turns,
        pictures=pictures,
        template=served.template,
        max_gen_len=_length(body.max_completion_tokens or body.max_tokens, limits.max_new_tokens, served),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=grammar,
        **_shared(body, served, client),
    )
    return Asked(_copies(request, body, served), **_manner(body, served), logprobs=bool(body.logprobs), box=box)


def ask_completion(body: CompletionBody, served: Served, client: str) -> Asked:
    """What a body for completions asks: texts as they are, after BOS, or ids. Raises as `ask_chat`."""
    _one_way(body)
    prompts = _prompts(body.prompt)
    _most("prompt", len(prompts), served.settings.max_prompts)
    served.fit([prompt for prompt in prompts if isinstance(prompt, str)])
    shared = _shared(body, served, client)
    length = _length(body.max_tokens, _BAREST, served)
    requests: list[Request] = []
    asked = Asked(requests, **_manner(body, served), logprobs=body.logprobs is not None, prompts=len(prompts))
    for prompt in prompts:
        ids = None if isinstance(prompt, str) else _checked(prompt, served)
        request = Request(
            prompt if isinstance(prompt, str) else "",
            ids=ids,
            template="none",
            max_gen_len=length,
            logprobs=body.logprobs,
            **shared,
        )
        copies = _copies(request, body, served)
        requests += copies
        if body.echo:
            asked.echoes += [prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt)] * len(copies)
    return asked


def ask_score(body: ScoreBody, served: Served) -> tuple[Request, list[str]]:
    """A prompt that is read, and the texts whose likelihood after it is asked for. Raises as `ask_chat`."""
    _most("continuations", len(body.continuations), served.settings.max_prompts)
    if (body.prompt is None) == (body.messages is None):
        raise _bad("prompt", "got it beside messages, or neither, expected one of them; give one")
    texts = list(body.continuations)
    if body.prompt is not None:
        served.fit([body.prompt, max(texts, key=len)])
        return Request(body.prompt, template="none", max_gen_len=1), texts
    assert body.messages is not None, "either a prompt or messages are there"
    _most("messages", len(body.messages), served.settings.max_messages)
    served.fit([*texts_of(body.messages), max(texts, key=len)])
    turns, pictures = conversation(body.messages, served)
    return Request(turns, pictures=pictures, template=served.template, max_gen_len=1), texts


def texts_of(messages: Sequence[Message]) -> list[str]:
    """All that is said in messages."""
    said = []
    for message in messages:
        parts = [message.content] if isinstance(message.content, str) else [part.text for part in message.content or ()]
        said += [text for text in parts if text]
        said += [call.function.arguments for call in message.tool_calls or ()]
    return said


def conversation(
    messages: Sequence[Message], served: Served, *, tools: Sequence[Any] | None = None
) -> tuple[list[Any], list[Any]]:
    """Turns and opened pictures of messages. tools: definitions that the model is told."""
    count = sum(part.type == "image_url" for m in messages if isinstance(m.content, list) for part in m.content)
    _most("image_url", count, served.settings.max_images)
    if count and not served.sees:
        raise _bad("messages", f"got {count} pictures for a model without vision, expected text; ask without pictures")
    told = [_message(message, f"messages.{place}", served) for place, message in enumerate(messages)]
    turns, pictures = read_messages(told, system=served.settings.default_system)
    if tools is not None:
        turns.insert(int(turns[0].role == "system"), Turn("tools", read_tools(tools)))
    return turns, pictures


def _message(message: Message, where: str, served: Served) -> dict[str, Any]:
    """A message with its pictures opened."""
    told: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if message.role not in ("assistant", "tool") or message.tool_calls is None:
        told["content"] = message.content
    if message.content is None and not message.tool_calls:
        raise _bad(f"{where}.content", "got null, expected text or a list of parts")
    if isinstance(message.content, list):
        told["content"] = [
            _part(part, message, f"{where}.content.{at}", served) for at, part in enumerate(message.content)
        ]
    if message.tool_calls:
        if message.role != "assistant":
            raise _bad(f"{where}.tool_calls", f"got calls of the {message.role}, expected the assistant's; move them")
        told["content"] = told.get("content", message.content)
        told["tool_calls"] = [call.model_dump(include={"id", "type", "function"}) for call in message.tool_calls]
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    return told


def _part(part: Any, message: Message, where: str, served: Served) -> dict[str, Any]:
    """A part of a message's content."""
    if part.type == "text":
        if part.text is None:
            raise _bad(f"{where}.text", "got none, expected text in a part of type text")
        return {"type": "text", "text": part.text}
    if message.role != "user":
        raise _bad(where, f"got a picture of the {message.role}, expected it in a message of the user; move it")
    if part.image_url is None:
        raise _bad(f"{where}.image_url", "got none, expected an object with url in a part of type image_url")
    return {"type": "image", "image": open_image(part.image_url.url, served.settings, param=f"{where}.image_url")}


def _shared(body: Sampled, served: Served, client: str) -> dict[str, Any]:
    """Sampling, stops and bias, where the settings say what the body leaves out."""
    settings = served.settings
    stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    _most("stop", len(stops), settings.max_stops)
    if any(not stop or len(stop) > _LONGEST_STOP for stop in stops):
        raise _bad("stop", f"got a string of no or too many characters, expected 1 to {_LONGEST_STOP} each")
    return {
        "sampling": _sampling(body, served),
        "stops": (*stops, *settings.stop_words),
        "stop_ids": _checked(body.stop_token_ids or (), served, param="stop_token_ids"),
        "logit_bias": _bias(body.logit_bias or {}, served),
        "ignore_stops": bool(body.ignore_eos),
        "client": f"{client} {body.user or ''}",
    }


def _sampling(body: Sampled, served: Served) -> Sampling:
    """How tokens are chosen."""
    settings = served.settings
    drawn = settings.temperature if settings.do_sample is not False else 0.0
    temperature = drawn if body.temperature is None else body.temperature
    if body.do_sample is not None:
        temperature = (temperature or 1.0) if body.do_sample else 0.0
    seed = settings.seed if body.seed is None else body.seed

    def chosen(value: float | None, default: float) -> Any:
        return default if value is None else value

    return Sampling(
        temperature=temperature,
        top_p=chosen(body.top_p, settings.top_p),
        top_k=max(chosen(body.top_k, settings.top_k), 0),
        min_p=chosen(body.min_p, 0.0),
        repetition_penalty=chosen(body.repetition_penalty, settings.repetition_penalty),
        frequency_penalty=chosen(body.frequency_penalty, 0.0),
        presence_penalty=chosen(body.presence_penalty, 0.0),
        seed=secrets.randbits(62) if seed is None else seed,
    )


def _bias(asked: dict[str, float], served: Served) -> dict[int, float]:
    """logit_bias by number."""
    _most("logit_bias", len(asked), served.settings.max_logit_bias)
    if wrong := next((key for key in asked if not (key.isascii() and key.isdecimal() and len(key) < 10)), None):
        raise _bad("logit_bias", f"got the key {wrong[:20]!r}, expected the number of a token")
    _checked([int(key) for key in asked], served, param="logit_bias")
    if any(not -100 <= value <= 100 for value in asked.values()):
        raise _bad("logit_bias", "got a value beyond -100 to 100, expected one within")
    return {int(key): float(value) for key, value in asked.items()}


def _manner(body: Sampled, served: Served) -> dict[str, Any]:
    """Model and stream."""
    if body.stream_options is not None and not body.stream:
        raise _bad("stream_options", "got it without stream true, expected both; drop it or say stream true")
    usage = bool(body.stream and body.stream_options and body.stream_options.include_usage)
    return {"model": body.model or served.name, "stream": bool(body.stream), "usage": usage}


def _copies(request: Request, body: Sampled, served: Served) -> list[Request]:
    """The request n times, each with a seed of its own."""
    n = body.n or 1
    _most("n", n, served.settings.max_n)
    sampling = request.sampling
    return [request, *(replace(request, sampling=replace(sampling, seed=sampling.seed + i)) for i in range(1, n))]


def _length(asked: int | None, default: int, served: Served) -> int:
    """Most tokens of an answer; the window bounds it anyway."""
    most = served.settings.max_tokens
    if asked is not None and most is not None:
        _most("max_tokens", asked, most)
    length = default if asked is None else asked
    return min(length, most or length, served.service.engine.window)


def _format(asked: dict[str, Any] | None) -> Grammar | None:
    """response_format as a grammar."""
    kind = None if asked is None else asked.get("type")
    if asked is None or kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_object")
    if kind != "json_schema":
        raise _bad("response_format", "got another type, expected text, json_object or json_schema")
    told = asked.get("json_schema")
    schema = told.get("schema") if isinstance(told, dict) else None
    if not isinstance(schema, dict):
        raise _bad("response_format", "got no json_schema.schema, expected a JSON schema (an object)")
    text = json.dumps(schema)
    if len(text) > _LONGEST_SCHEMA:
        raise _bad("response_format", f"got a schema of {len(text)} characters, expected at most {_LONGEST_SCHEMA}")
    return Grammar("json_schema", text)


def _prompts(asked: Any) -> list[str | list[int]]:
    """The prompts of a body."""
    if isinstance(asked, str):
        return [asked]
    if not asked:
        raise _bad("prompt", "got an empty list, expected a text, token ids, or a list of these")
    return [list(asked)] if isinstance(asked[0], int) else list(asked)


def _checked(ids: Sequence[int], served: Served, *, param: str = "prompt") -> list[int]:
    """Token ids that there are."""
    wrong = next((token for token in ids if not 0 <= token < served.vocabulary), None)
    if wrong is not None:
        raise _bad(param, f"got token id {wrong}, expected 0 to {served.vocabulary - 1}")
    if not ids and param == "prompt":
        raise _bad(param, "got no token id, expected at least one")
    return list(ids)


def _one_way(body: CompletionBody) -> None:
    """ApiError for what completions had once and nobody answers here."""
    if body.suffix:
        raise _bad("suffix", "got a text, expected none, since answers are written at the end; leave it out")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise _bad("best_of", f"got {body.best_of} for n {body.n or 1}, expected as many; leave it out")
    if body.echo and body.logprobs is not None:
        raise _bad("echo", "got it with logprobs, expected one of them; /v1/score tells how likely texts are")


def _most(name: str, got: int, most: int) -> None:
    """ApiError for more than there may be."""
    if got > most:
        raise _bad(name, f"got {got}, expected at most {most}")


def _bad(param: str, why: str) -> ApiError:
    return ApiError(400, f"{param}: {why}", param=param, code="invalid_value")
