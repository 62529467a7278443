"""Counters of the server for Prometheus, and the engine's own as they stand when somebody looks.

Must not know requests' texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from accessory.serve.service import Service

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """What /metrics tells."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "accessory_http_requests", "Requests by route and status.", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "accessory_http_seconds",
            "Seconds from a request's head to the last byte of its answer, by route.",
            ["route"],
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._first = Histogram(
            "accessory_first_token_seconds",
            "Seconds from a request's head to the first token of a streamed answer.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._registry.register(_Engine(service))  # type: ignore[arg-type]

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first(self, seconds: float) -> None:
        """Count a first token."""
        self._first.observe(seconds)

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)


class _Engine:
    """The engine's state, read when it is asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Any]:
        engine, stats = self._service.engine, self._service.engine.stats
        gauges = {
            "alive": ("Whether the engine answers.", int(self._service.alive)),
            "running": ("Requests that have a row.", engine.running),
            "waiting": ("Requests that wait for a row.", engine.waiting),
            "under_way": ("Requests under way, those whose prompts are made included.", self._service.jobs),
            "rows": ("Requests that are answered at once, at most.", engine.rows),
            "window": ("Tokens of a prompt and its answer, at most.", engine.window),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"accessory_engine_{name}", text, value=value)
        counters = {
            "prompt_tokens": ("Positions of prompts.", stats.prompt_tokens),
            "cached_tokens": ("Of these, taken from an earlier request.", stats.cached_tokens),
            "generated_tokens": ("Tokens of answers.", stats.generated_tokens),
            "proposed_tokens": ("Tokens of answers that were tried ahead.", stats.proposed_tokens),
            "accepted_tokens": ("Of these, those that were right.", stats.accepted_tokens),
            "steps": ("Steps of prompts and of answers.", stats.prompt_steps + stats.answer_steps),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"accessory_engine_{name}", text, value=value)
        finished = CounterMetricFamily("accessory_engine_finished", "Requests by how they ended.", labels=["finish"])
        for finish, count in list(stats.finished.items()):
            finished.add_metric([finish], count)
        yield finished

    def describe(self) -> list[Any]:
        """Nothing: asked for names at registration, which depend on nothing."""
        return []
