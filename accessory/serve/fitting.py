"""A conversation cut to the window: the oldest exchanges go until there is room for an answer.

Must not know who talks, nor say what was forgotten: whoever asks does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accessory.data.template import Turn
    from accessory.engine import Conversation, Engine, Request
    from accessory.engine.request import PictureSource

Make = Callable[[Sequence["Turn"], Sequence["PictureSource"]], "Request"]


def fitted(
    engine: Engine, history: Conversation, text: str | Turn, pictures: Sequence[PictureSource], *, make: Make
) -> tuple[Request, int]:
    """The request that asks next, made of turns and pictures by `make`, and how many exchanges `history` lost for it.

    Room is left for max_gen_len tokens, at most a quarter of the window. Raises ValueError or OSError for what cannot
    be asked.
    """
    forgotten = 0
    while True:
        request = make(*history.asked(text, pictures))
        room = min(request.max_gen_len, engine.window // 4)
        if not history.exchanges or engine.length(request) + room <= engine.window:
            return request, forgotten
        history.forget_oldest()
        forgotten += 1
