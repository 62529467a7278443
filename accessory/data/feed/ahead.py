"""Pictures that rows name by URL, fetched side by side before the rows are read, each once.

Must not know tokens. What could not be fetched is remembered, so that no row waits for it again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from accessory.data.feed.files import Bad, Raw, parse
from accessory.data.feed.records import to_sample
from accessory.data.feed.sources import FeedConfig, Source
from accessory.data.picture import kind_of, open_picture

THREADS = 8
WINDOW = 64  # rows whose pictures are fetched at once
REMEMBERED = 10_000


class Scout:
    """Looks at the pictures of rows to come."""

    def __init__(self, config: FeedConfig) -> None:
        self.config = config
        self._failed: dict[str, OSError | ValueError] = {}

    def ahead(self, rows: Iterable[tuple[Raw, Source]]) -> Iterator[tuple[Raw, Source]]:
        """The same rows; by the time one comes, its URLs are in the cache or known to fail."""
        if not self.config.pictures or self.config.stage != "sft":
            yield from rows
            return
        held: deque[tuple[Raw, Source, list[Future[None]]]] = deque()
        flying: dict[str, Future[None]] = {}
        pool = ThreadPoolExecutor(THREADS)
        try:
            for raw, source in rows:
                urls = self._urls(raw, source)
                for url in urls:
                    if url not in flying:
                        flying[url] = pool.submit(self._fetch, url)
                held.append((raw, source, [flying[url] for url in urls]))
                if len(held) >= WINDOW:
                    yield _landed(held)
                if len(flying) > REMEMBERED:
                    flying.clear()
            while held:
                yield _landed(held)
        finally:
            pool.shutdown(cancel_futures=True)

    def look(self, name: str) -> None:
        """See that a picture is there; what is fetched is kept. FileNotFoundError or ConnectionError where it is not,
        which may change, ValueError for what is no picture."""
        if name in self._failed:
            raise self._failed[name]
        if kind_of(name) != "path":
            how = {"allow_private_urls": self.config.allow_private_urls, "cache": self.config.picture_cache}
            open_picture(name, **how)
        elif not os.path.isfile(name):
            raise FileNotFoundError(f"picture {name}: no such file")

    def _urls(self, raw: Raw, source: Source) -> list[str]:
        """The URLs among a row's pictures; none where the row makes no sense, which is found out later."""
        if isinstance(raw.value, bytes) and b"http" not in raw.value and b"HTTP" not in raw.value:
            return []
        value = parse(raw)
        if isinstance(value, Bad) or not _mentions(value):
            return []
        try:
            found = to_sample(value, source, seed=self.config.seed, number=raw.number)
        except ValueError:
            return []
        return [name for name in found.pictures if kind_of(name) == "url"]

    def _fetch(self, url: str) -> None:
        """Look at one, and remember how it failed."""
        try:
            self.look(url)
        except (OSError, ValueError) as error:
            if len(self._failed) < REMEMBERED:
                self._failed[url] = error


def _mentions(value: Any) -> bool:
    """Whether a row has a text that may be a URL, or a list of some."""
    if isinstance(value, str):
        return value[:5].strip().lower().startswith("http") or '"http' in value[:1000]
    if isinstance(value, Mapping):
        return any(_mentions(inner) for inner in value.values())
    return isinstance(value, list) and any(_mentions(inner) for inner in value)


def _landed(held: deque[tuple[Raw, Source, list[Future[None]]]]) -> tuple[Raw, Source]:
    """The oldest row, when its pictures are there."""
    raw, source, waits = held.popleft()
    for one in waits:
        one.result()
    return raw, source
