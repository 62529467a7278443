"""The settings of `accessory api`: the shared words, the address, who may ask, and what a request may cost.

Must not import torch, nor read a request.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Literal

from accessory.dialect.words import GenerationWords, ModelWords, ServingWords

_LOOPBACK = ("127.", "localhost", "::1")


def _port() -> int:
    """API_PORT, else 8000. ValueError where it is none."""
    told = os.environ.get("API_PORT", "").strip() or "8000"
    if not (told.isascii() and told.isdecimal()) or int(told) > 65535:
        raise ValueError(f"API_PORT: got {told!r}, expected 0 (a free one) to 65535; correct or unset it")
    return int(told)


@dataclass
class ApiSettings(ModelWords, GenerationWords, ServingWords):
    """Serve a model to programs, through OpenAI's interface."""

    seed: int | None = None  # type: ignore[assignment]
    """When drawing, for requests without one: the same seed gives the same answer; none: each answer draws anew."""
    host: str = field(default_factory=lambda: os.environ.get("API_HOST", "").strip() or "127.0.0.1")
    """Address to listen at; API_HOST says it too. Others than this host's own should have a key."""
    port: int = field(default_factory=_port)
    """Port to listen at, 0: a free one, which is printed; API_PORT says it too."""
    api_key: str | None = None
    """What clients must send as a bearer token, on every route; none: API_KEY, else anybody may ask."""
    api_model_name: str = field(default_factory=lambda: os.environ.get("API_MODEL_NAME", "").strip())
    """The model's name in /v1/models; without it API_MODEL_NAME, else its folder's. Requests may use any name."""
    docs: bool = True
    """Whether /docs and /openapi.json are there (behind the key, where there is one)."""
    cors: list[str] = field(default_factory=list)
    """Origins (https://example.org) whose pages may ask from a browser; * for all."""
    unknown_fields: Literal["error", "ignore"] = "error"
    """What becomes of fields that nobody knows: refused with status 400, as OpenAI does, or ignored. What a request
    says counts before these settings; what it leaves out is theirs. OpenAI's fields are understood; of these metadata,
    store, service_tier, safety_identifier, prompt_cache_key, prompt_cache_retention and prediction make no difference,
    and user none but for whose turn it is. Further ones are top_k, min_p, repetition_penalty, do_sample,
    stop_token_ids and ignore_eos."""
    allow_remote_images: bool = False
    """Pictures may be given as http(s) URLs, which this host then fetches."""
    access_log: bool = True
    """A line for each request: who, which route, status, milliseconds. Never what was said."""
    drain_s: float = 30.0
    """Seconds that answers under way get to end after a first SIGTERM or Ctrl-C."""
    max_body_mb: float = 32.0
    """Largest body of a request, in MB."""
    max_bodies_mb: float = 256.0
    """Of all bodies that are held at once, in MB; beyond them a request is to be asked again later."""
    max_messages: int = 1024
    """Most messages of a conversation."""
    max_images: int = 16
    """Most pictures of a request."""
    max_pixels: int = 32_000_000
    """Most pixels of one picture."""
    max_n: int = 8
    """Most answers to one request."""
    max_prompts: int = 32
    """Most prompts in one request for completions, and most continuations or texts of one for scores."""
    max_stops: int = 16
    """Most stop strings, each of at most 256 characters."""
    max_logit_bias: int = 1024
    """Most entries of logit_bias."""
    max_tools: int = 128
    """Most tools of a request."""
    max_tokens: int | None = None
    """Most tokens of an answer that a request may ask for; none: what the window holds."""
    header_timeout_s: float = 10.0
    """Seconds in which the head of a request must arrive."""
    body_timeout_s: float = 60.0
    """Seconds in which its body must."""
    write_timeout_s: float = 60.0
    """Seconds after which a client that does not read its answer is let go."""
    idle_timeout_s: float = 30.0
    """Seconds that a connection stays open without a request."""
    dry_run: bool = False
    """Print the settings as they are understood, and stop."""

    def check(self) -> None:
        """ValueError for values that cannot be."""
        self.check_serving()
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: got {self.port}, expected 0 (a free one) to 65535")
        at_least_one = "max_messages max_images max_pixels max_n max_prompts max_stops max_logit_bias max_tools".split()
        for name in (*at_least_one, "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        timeouts = [f"{what}_timeout_s" for what in ("header", "body", "write", "idle")]
        for name in ("max_body_mb", "max_bodies_mb", *timeouts):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0")
        if not 0 <= self.drain_s < float("inf"):
            raise ValueError(f"drain_s: got {self.drain_s}, expected 0 seconds or more")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key: got an empty text, expected a key; leave it out for none")

    @property
    def key(self) -> str | None:
        """The key that clients must send; None: anybody may ask."""
        return self.api_key or os.environ.get("API_KEY", "").strip() or None

    @property
    def local(self) -> bool:
        """Whether only this host can reach it."""
        return self.host.startswith(_LOOPBACK)

    def shown(self) -> ApiSettings:
        """The same without the key, for people's eyes."""
        return replace(self, api_key=None if self.api_key is None else "(given)")

    def generation(self) -> GenerationWords:
        """Generation's words with a seed, for whoever checks them."""
        return replace(self, seed=0 if self.seed is None else self.seed)
