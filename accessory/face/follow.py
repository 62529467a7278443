"""What a rank runs that a Python program has started to share its model: open it, and follow.

Must not ask or print: the program that leads does.
"""

from __future__ import annotations

import threading
from typing import Any

_GRACE = 10.0  # seconds in which a leader that meets the same error says so itself, and ends this rank


def main(told: dict[str, Any]) -> None:
    """Follow until the leader closes. told: words, tp, rows."""
    from accessory import dist

    dist.launch(told["tp"])
    from accessory.dialect.words import ModelWords
    from accessory.face.loaded import serve

    dist.setup_logging(1)
    words = ModelWords(**told["words"])
    try:
        serve(words, dist.init(tp=told["tp"], device=words.device), rows=told["rows"])
    except (ValueError, OSError):
        threading.Event().wait(_GRACE)
        raise
