"""The data feed of training: rows of any file to tokens, once and cached, and from there to micro-batches for ever.

Must not know models, optimisers or collectives. What needs torch is imported when first asked for, so that processes
which only tokenise start without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from accessory.data.feed.named import read_sources
from accessory.data.feed.sources import FeedConfig, Source

if TYPE_CHECKING:
    from accessory.data.feed.batches import Batch
    from accessory.data.feed.corpus import Conversation, Corpus, Row, open_corpus
    from accessory.data.feed.deal import Feed
    from accessory.data.feed.rows import RawRow, Rows, open_rows
    from accessory.data.feed.split import held_out
    from accessory.data.feed.stream import Stream

_HOMES = {
    "Batch": "accessory.data.feed.batches",
    "Feed": "accessory.data.feed.deal",
    "Conversation": "accessory.data.feed.corpus",
    "Corpus": "accessory.data.feed.corpus",
    "Row": "accessory.data.feed.corpus",
    "open_corpus": "accessory.data.feed.corpus",
    "RawRow": "accessory.data.feed.rows",
    "Rows": "accessory.data.feed.rows",
    "open_rows": "accessory.data.feed.rows",
    "held_out": "accessory.data.feed.split",
    "Stream": "accessory.data.feed.stream",
}

__all__ = [
    "Batch",
    "Conversation",
    "Corpus",
    "Feed",
    "FeedConfig",
    "RawRow",
    "Row",
    "Rows",
    "Source",
    "Stream",
    "held_out",
    "open_corpus",
    "open_rows",
    "read_sources",
]


def __getattr__(name: str) -> Any:
    """Import the home of `name`."""
    if name not in _HOMES:
        raise AttributeError(f"module 'accessory.data.feed' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
