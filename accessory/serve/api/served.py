"""What the routes stand on: the service, the model's tokenizer and template, and how long a text may be.

Must not know HTTP.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from accessory.engine import WindowError
from accessory.serve.api.settings import ApiSettings

if TYPE_CHECKING:
    from accessory.data.tokenizer import Tokenizer
    from accessory.serve.service import Service

T = TypeVar("T")

_SHORT = 20_000  # characters that are looked at on the event loop itself


@dataclass
class Served:
    """One model, served."""

    settings: ApiSettings
    service: Service
    tokenizer: Tokenizer
    template: str
    """How conversations are written."""
    name: str
    """In /v1/models."""
    sees: bool
    """Whether the model takes pictures."""
    vocabulary: int
    created: int = field(default_factory=lambda: int(time.time()))
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="read"))
    """For long texts and pictures, which must not hold the event loop up."""

    @functools.cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(len(self.tokenizer.piece_bytes(token)) for token in range(self.tokenizer.size))

    async def aside(self, work: Callable[[], T], *, long: bool) -> T:
        """Do work here, or in a thread where it may take long."""
        if not long:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    def is_long(self, texts: Sequence[str]) -> bool:
        """Whether texts are to be looked at in a thread."""
        return sum(map(len, texts)) > _SHORT

    def fit(self, texts: Sequence[str]) -> None:
        """WindowError for texts that cannot fit the window, before minutes are spent on their tokens.

        Ids alone are counted, which costs a tenth of an encoding with places, and only where they could be too many.
        """
        window, size = self.service.engine.window, sum(map(len, texts))
        if size > window * self.longest:
            raise WindowError(
                f"prompt: got {size} characters, expected at most the {window} tokens of the window; shorten it"
            )
        if size > 4 * window and (count := sum(len(self.tokenizer.encode(text)) for text in texts)) > window + 64:
            raise WindowError(f"prompt: got {count} tokens, expected fewer than the window of {window}; shorten it")
