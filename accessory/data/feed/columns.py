"""What the fields and the speakers of rows are called, as dataset_info.json says, and rows that nothing here can learn.

Must not know templates, tokens or files. The names and their defaults are LLaMA-Factory's; what such an entry does not
list is passed over as there, but counted, and pictures are always kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS: dict[str, str | None] = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": None,
    "messages": "conversations",
    "system": None,
    "tools": None,
    "images": None,
    "videos": None,
    "audios": None,
    "chosen": None,
    "rejected": None,
    "kto_tag": None,
}
"""Fields by what they mean, with the names they have where none are given."""
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
FORMATTINGS = ("alpaca", "sharegpt", "openai")
_OF_ALPACA = ("prompt", "query", "response", "history", "system")
_OF_DIALOGS = ("messages", "system")
_UNUSED = {"videos": "videos", "video": "videos", "audios": "audio", "audio": "audio"}


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are read: the entry of a dataset_info.json."""

    formatting: str = "alpaca"
    """alpaca: a question and an answer; sharegpt, openai: a list of turns."""
    columns: tuple[tuple[str, str], ...] | None = None
    """(meaning, field); None: the fields have their usual names."""
    tags: tuple[tuple[str, str], ...] = ()
    """(what, name) of the keys of a turn and of who speaks."""

    def field(self, meaning: str) -> str | None:
        """The field that means this; None where there is none."""
        if self.columns is not None:
            return dict(self.columns).get(meaning)
        if meaning == "messages" and self.formatting == "openai":
            return "messages"
        return COLUMNS[meaning] or (meaning if meaning in ("history", "system", "tools") else None)

    def tag(self, name: str) -> str:
        """The name of a key of a turn, or of who speaks."""
        return dict(self.tags).get(name) or (OPENAI_TAGS if self.formatting == "openai" else TAGS)[name]


def renamed(row: Mapping[str, Any], reading: Reading, notes: Counter[str]) -> dict[str, Any]:
    """The row under the names of an alpaca row (instruction, input, output, history) or of a dialog (conversations
    of from and value), with system, tools and images. notes: counts fields that are there and not listed."""
    dialogs = reading.formatting != "alpaca"
    meanings = _OF_DIALOGS if dialogs else _OF_ALPACA
    new: dict[str, Any] = {}
    for meaning in meanings:
        field = reading.field(meaning)
        name = COLUMNS[meaning] or meaning
        if field is not None:
            if field not in row and meaning in ("prompt", "response", "messages"):
                raise ValueError(f"{field}: missing among the fields {', '.join(map(str, row))[:120]}; see its columns")
            new[name] = row.get(field)
        elif row.get(name):
            notes["fields_not_listed"] += 1
    for meaning in ("videos", "audios"):
        new[meaning] = row.get(reading.field(meaning) or meaning)
    tools = reading.field("tools")
    new["tools"] = row.get(tools) if tools else None
    notes["fields_not_listed"] += tools is None and is_filled(row.get("tools"))
    pictures = reading.field("images")
    if pictures is not None:
        new["images"] = row.get(pictures)
    else:
        new |= {name: row[name] for name in ("images", "image") if name in row}
    if dialogs and isinstance(new.get("conversations"), Sequence) and not isinstance(new["conversations"], str):
        new["conversations"] = [_turn(entry, reading) for entry in new["conversations"]]
    return new


def refuse(row: Mapping[str, Any]) -> None:
    """ValueError for a row that has more than questions, answers, pictures and tools: nothing is dropped silently."""
    if is_filled(row.get("rejected_response")) or (is_filled(row.get("chosen")) and is_filled(row.get("rejected"))):
        raise ValueError(
            "got a chosen and a rejected answer, expected one answer, since preferences are not learned here; "
            "keep the chosen one alone"
        )
    for name, what in _UNUSED.items():
        if is_filled(row.get(name)):
            raise ValueError(f"{name}: got {what}, expected none, since no model here takes them; drop the row")


def filled(value: Any, placeholders: Mapping[str, str]) -> Any:
    """A row with {{name}} replaced by its text wherever a text says so."""
    if isinstance(value, str):
        for name, text in placeholders.items():
            value = value.replace("{{" + name + "}}", text)
        return value
    if isinstance(value, Mapping):
        return {key: filled(inner, placeholders) for key, inner in value.items()}
    return [filled(inner, placeholders) for inner in value] if isinstance(value, list) else value


def _turn(entry: Any, reading: Reading) -> Any:
    """One turn under from and value, who speaks under our names."""
    if not isinstance(entry, Mapping):
        return entry
    role, content = reading.tag("role_tag"), reading.tag("content_tag")
    if role not in entry:
        raise ValueError(f"got a turn of the fields {', '.join(map(str, entry))[:80]}, expected {role} and {content}")
    speakers = {
        reading.tag("user_tag"): "user",
        reading.tag("assistant_tag"): "assistant",
        reading.tag("system_tag"): "system",
        reading.tag("observation_tag"): "observation",
        reading.tag("function_tag"): "function_call",
    }
    if reading.formatting == "openai":
        speakers.setdefault("developer", "system")
    who = entry[role]
    known = speakers.get(who) if isinstance(who, str) else None
    if known is None:
        raise ValueError(f"got a turn of {who!r:.40}, expected one of {', '.join(speakers)}; mend it, or its tags")
    extra = {name: entry[name] for name in ("tool_calls", "function_call", "tool_call_id") if name in entry}
    return {"from": known, "value": entry.get(content), **extra}


def is_filled(value: Any) -> bool:
    """Whether a field says anything."""
    return bool(value.strip()) and value.strip() not in ("[]", "{}", "null") if isinstance(value, str) else bool(value)
