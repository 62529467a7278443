"""The routes: what each of them reads, asks and answers.

Must not know sockets, signals or how the model was opened.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from accessory import __version__
from accessory.serve.api.answering import Answering
from accessory.serve.api.asking import Asked, ask_chat, ask_completion, ask_score, texts_of
from accessory.serve.api.body import Bodies, read_json
from accessory.serve.api.documents import document, schema_of
from accessory.serve.api.errors import ApiError, busy, refusal
from accessory.serve.api.gate import App, Gate
from accessory.serve.api.logprobs import Spelling
from accessory.serve.api.metrics import CONTENT_TYPE, Metrics
from accessory.serve.api.protocol import ChatBody, CompletionBody, EvaluationBody, ScoreBody, validate
from accessory.serve.api.served import Served
from accessory.serve.api.streams import EventStream, until_gone

B = TypeVar("B", bound=BaseModel)


def build(served: Served) -> App:
    """The application."""
    settings = served.settings
    docs = {"docs_url": "/docs", "openapi_url": "/openapi.json"} if settings.docs else {"docs_url": None}
    app = FastAPI(title="Accessory", version=__version__, redoc_url=None, **{"openapi_url": None, **docs})
    metrics = Metrics(served.service)
    _errors(app)
    _Routes(served, metrics).add(app)
    document(app)
    gate: App = Gate(app, key=settings.key, metrics=metrics, lines=settings.access_log)
    if settings.cors:
        from starlette.middleware.cors import CORSMiddleware

        gate = CORSMiddleware(gate, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"])
    return gate


def _errors(app: FastAPI) -> None:
    """Errors in OpenAI's shape, those of the router too."""

    async def refuse(request: Request, error: Exception) -> Response:
        told = refusal(error)
        return Response(told.body(), told.status, told.headers, "application/json")

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), f"a handler of HTTPException got {error!r}"
        what = "no such route" if error.status_code == 404 else "not with this method"
        told = ApiError(error.status_code, f"{what}; see /docs or /v1/models", headers=error.headers)
        return Response(told.body(), told.status, told.headers, "application/json")

    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(ApiError, refuse)


class _Routes:
    """The handlers, over one served model."""

    def __init__(self, served: Served, metrics: Metrics) -> None:
        settings = served.settings
        self._served, self._metrics, self._spelling = served, metrics, Spelling(served.tokenizer)
        self._bodies = Bodies(
            limit=int(settings.max_body_mb * 1e6),
            total=int(settings.max_bodies_mb * 1e6),
            seconds=settings.body_timeout_s,
        )
        self._scores = 0

    def add(self, app: FastAPI) -> None:
        """All of them."""
        posts: list[tuple[str, Callable[[Request], Awaitable[Response]], type[BaseModel]]] = [
            ("/v1/chat/completions", self.chat, ChatBody),
            ("/v1/completions", self.completions, CompletionBody),
            ("/v1/score", self.score, ScoreBody),
            ("/v1/score/evaluation", self.evaluation, EvaluationBody),
        ]
        for path, handler, body in posts:
            app.add_api_route(path, handler, methods=["POST"], openapi_extra=schema_of(body), response_model=None)
        app.add_api_route("/v1/models", self.models, methods=["GET"], response_model=None)
        app.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"], response_model=None)
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        app.add_api_route("/metrics", self.numbers, methods=["GET"], response_model=None)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, as OpenAI's /v1/chat/completions does."""
        body = await self._read(request, ChatBody)
        parts = [part for m in body.messages if isinstance(m.content, list) for part in m.content]
        long = any(part.type == "image_url" for part in parts) or self._served.is_long(texts_of(body.messages))
        client = _client(request)
        asked = await self._aside(lambda: ask_chat(body, self._served, client), long=long, param="messages")
        return await self._answer(request, asked, chat=True, param="messages")

    async def completions(self, request: Request) -> Response:
        """Go on with texts as they are, as OpenAI's /v1/completions does."""
        body = await self._read(request, CompletionBody)
        prompts = [body.prompt] if isinstance(body.prompt, str) else [p for p in body.prompt if isinstance(p, str)]
        long, client = self._served.is_long(prompts), _client(request)
        asked = await self._aside(lambda: ask_completion(body, self._served, client), long=long, param="prompt")
        return await self._answer(request, asked, chat=False, param="prompt")

    async def score(self, request: Request) -> Response:
        """How likely continuations are after a prompt, a text as it is, or as the answer to messages."""
        body = await self._read(request, ScoreBody)
        asked, texts = await self._aside(lambda: ask_score(body, self._served), long=True, param="prompt")
        if self._scores >= self._served.settings.queue:
            raise busy(f"queue: got a request beside {self._scores}, expected fewer at once; ask again later")
        self._scores += 1
        future = self._served.service.call(lambda engine: (engine.length(asked), engine.score(asked, texts)))
        try:
            length, scores = await _watched(request, asyncio.wrap_future(future))
        except Exception as error:
            raise refusal(error, param="prompt") from error
        finally:
            future.cancel()
            self._scores -= 1
        told = [
            {"index": i, "logprob": score.logprob, "tokens": score.tokens, "greedy": score.greedy}
            for i, score in enumerate(scores)
        ]
        usage = {"prompt_tokens": length, "completion_tokens": 0, "total_tokens": length}
        head = {"object": "score", "created": int(time.time()), "model": body.model or self._served.name}
        return _json({**head, "scores": told, "usage": usage})

    async def evaluation(self, request: Request) -> Response:
        """What a reward model thinks of texts; the model here is none."""
        await self._read(request, EvaluationBody)
        sentence = "model: got a language model, expected a reward model; /v1/score tells how likely texts are"
        raise ApiError(405, sentence, param="model", headers={"allow": ""})

    async def models(self, request: Request) -> Response:
        """The model that answers; requests may call it by any name."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request, name: str) -> Response:
        """The same alone, by its name."""
        if name != self._served.name:
            sentence = "model: no such model here, expected one of /v1/models (requests may use any name)"
            raise ApiError(404, sentence, param="model", code="model_not_found")
        return _json(self._model())

    async def health(self, request: Request) -> Response:
        """Whether requests are answered."""
        service = self._served.service
        if not service.alive:
            raise ApiError(503, "the engine is gone, and the server ends; start it again")
        return _json({"status": "ok", "running": service.engine.running, "waiting": service.engine.waiting})

    async def numbers(self, request: Request) -> Response:
        """Counters for Prometheus."""
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _read(self, request: Request, kind: type[B]) -> B:
        """The body of a request, checked by itself."""
        headers = dict(request.scope["headers"])
        data = await self._bodies.read(headers, request.receive)
        long = len(data) > 1 << 16
        forgive = self._served.settings.unknown_fields == "ignore"
        kind_of = headers.get(b"content-type", b"")
        return await self._served.aside(lambda: validate(kind, read_json(data, kind_of), forgive=forgive), long=long)

    async def _aside(self, work: Callable[[], Any], *, long: bool, param: str) -> Any:
        """What a body asks; whatever is wrong with it as a refusal."""
        try:
            return await self._served.aside(work, long=long)
        except Exception as error:
            raise refusal(error, param=param) from error

    async def _answer(self, request: Request, asked: Asked, *, chat: bool, param: str) -> Response:
        """The answer, whole or as a stream."""
        answering = Answering(asked, self._served.service, self._spelling, chat=chat)
        try:
            if not asked.stream:
                return Response(await _watched(request, answering.whole()), media_type="application/json")
            await _watched(request, answering.open())
        except Exception as error:
            raise refusal(error, param=param) from error
        began = request.scope.get("began", time.monotonic())

        def over() -> None:
            answering.cancel()
            if answering.first is not None:
                self._metrics.first(answering.first - began)
                answering.first = None

        return EventStream(answering.pieces(), over=over)

    def _model(self) -> dict[str, Any]:
        """One entry of /v1/models."""
        window = self._served.service.engine.window
        told = {"id": self._served.name, "object": "model", "created": self._served.created}
        return {**told, "owned_by": "accessory", "max_model_len": window}


async def _watched(request: Request, work: Awaitable[Any]) -> Any:
    """The result of work, which is cancelled when whoever asked goes away. ApiError then, which nobody hears."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(400, "the connection was closed before the answer; ask again")
    finally:
        gone.cancel()
        task.cancel()


def _client(request: Request) -> str:
    """Who asks, for the order of those who wait."""
    return "" if request.client is None else request.client.host


def _json(told: dict[str, Any]) -> Response:
    return Response(json.dumps(told), media_type="application/json")
