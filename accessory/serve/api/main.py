"""`accessory api`: opens a model on its ranks, listens, and serves until it is told to end.

Must not import torch or the packages of the extra before the settings are read, nor know routes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accessory import dist
from accessory.config import parse
from accessory.dialect.translate import translator
from accessory.dist.place import read_place
from accessory.serve.api.settings import ApiSettings
from accessory.serve.budget import open_serving
from accessory.serve.extras import need
from accessory.serve.opening import check_words, describe, open_bundle, resolved, start_ranks, template_of

if TYPE_CHECKING:
    from accessory.assemble import Bundle
    from accessory.engine import Engine
    from accessory.serve.api.http import Server
    from accessory.serve.service import Service

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SWITCH = 0.001  # seconds after which a thread in Python lets another one in, so that the event loop is not held up
_FILES = 1 << 16  # descriptors, so that many connections are no fault


def main(argv: Sequence[str] | None = None) -> int:
    """Run `accessory api`. Raises ValueError or OSError for settings, models and addresses that cannot be, and what
    ended the engine."""
    settings = parse(
        ApiSettings, argv, prog="accessory api", description=ApiSettings.__doc__ or "", translate=translator("api")
    )
    settings.check()
    check_words(settings, settings.generation())
    if settings.dry_run:
        sys.stdout.write(resolved(settings.shown()))
        return 0
    need("api", "fastapi", "uvicorn", "h11", "pydantic", "prometheus_client")
    listening = listen(settings) if read_place(os.environ).rank == 0 else None  # before minutes of loading
    ranks = start_ranks(settings)
    if ranks.dp_size > 1:
        raise ValueError(
            f"tensor_parallel_size: got {ranks.shard.size} for {ranks.world} ranks, expected all of them to share the "
            "model; start one server for each model"
        )
    bundle = open_bundle(settings, ranks)
    with open_serving(settings, settings, bundle, ranks) as engine:
        if not ranks.leader:
            with _deaf():
                engine.follow()
        else:
            assert listening is not None, "rank 0 listens"
            serve(settings, bundle, engine, listening)
    dist.close()
    return 0


def listen(settings: ApiSettings) -> socket.socket:
    """A socket at the settings' address, which nobody is let in by yet. OSError, in one sentence, where it is taken."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, number)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        where, why = f"{settings.host}:{settings.port}", error.strerror or error
        raise OSError(f"{where}: cannot listen there ({why}), expected a free address; set host or port") from error
    return made


def serve(settings: ApiSettings, bundle: Bundle, engine: Engine, listening: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, and let the answers under way end. Raises what ended the engine."""
    service, server = prepared(settings, bundle, engine)
    sys.setswitchinterval(_SWITCH)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, _FILES) if hard >= 0 else _FILES, hard))
    with service:
        _announce(settings, bundle, engine, listening)
        server.run([listening])
    if service.error is not None:
        raise service.error


def prepared(settings: ApiSettings, bundle: Bundle, engine: Engine) -> tuple[Service, Server]:
    """What answers, not yet started, and the server in front of it, which ends when the engine does."""
    import uvicorn

    from accessory.serve.api.app import build
    from accessory.serve.api.http import Server, protocol
    from accessory.serve.api.served import Served
    from accessory.serve.service import Service

    service = Service(engine, queue=settings.queue)
    served = Served(
        settings,
        service,
        tokenizer=bundle.tokenizer,
        template=template_of(settings, bundle),
        name=settings.api_model_name or Path(bundle.source).name,
        sees=bundle.vision is not None,
        vocabulary=min(bundle.tokenizer.size, bundle.config.vocab_size),
    )
    log.debug("the longest token has %d bytes", served.longest)  # worked out before anybody waits for it
    config = uvicorn.Config(
        build(served),  # type: ignore[arg-type]
        http=protocol(header_timeout=settings.header_timeout_s, write_timeout=settings.write_timeout_s),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.idle_timeout_s,  # type: ignore[arg-type]
        timeout_graceful_shutdown=settings.drain_s,  # type: ignore[arg-type]
        h11_max_incomplete_event_size=1 << 15,
    )
    for name in ("error", "access"):  # what it has to say, others say here
        logging.getLogger(f"uvicorn.{name}").setLevel(logging.CRITICAL)
    server = Server(config)
    service.when_gone(server.stop)
    return service, server


def _announce(settings: ApiSettings, bundle: Bundle, engine: Engine, listening: socket.socket) -> None:
    """The one line that says what is served where, and a warning where strangers may ask."""
    host, port = listening.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    memory = f"{engine.rows} at once"
    if engine.cache_bytes:
        memory += f", {engine.cache_bytes / 1e6:.1f} MB of keys and values"
    sys.stdout.write(f"{describe(bundle, template_of(settings, bundle), engine)}; {memory}; {where}\n")
    sys.stdout.flush()
    if settings.key is None and not settings.local:
        log.warning("host: got %s without a key: whoever reaches it may ask; set API_KEY or api_key", settings.host)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """On a rank that follows: the leader says when to end, no signal does."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
