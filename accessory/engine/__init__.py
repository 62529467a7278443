"""The engine: conversations in, text out, for many requests at once, every tensor-parallel rank in step.

Must not know weights' files, terminals or the network.
"""

from accessory.engine.conversation import Conversation
from accessory.engine.engine import Engine
from accessory.engine.prompt import WindowError
from accessory.engine.reading import Score
from accessory.engine.request import Answer, Event, Finish, Grammar, GrammarKind, Odds, Request, Result
from accessory.engine.waiting import QueueFull

__all__ = [
    "Answer",
    "Conversation",
    "Engine",
    "Event",
    "Finish",
    "Grammar",
    "GrammarKind",
    "Odds",
    "QueueFull",
    "Request",
    "Result",
    "Score",
    "WindowError",
]
