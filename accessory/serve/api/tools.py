"""Tools of a request: what the model is told, and what of its answer is a call.

Must not know how a template writes either: `data.template` does.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accessory.data.template import CallDelta, CallReader, Form, Text, Tools, get_template, tools_of
from accessory.data.template.tools import filled
from accessory.engine import Grammar
from accessory.serve.api.errors import ApiError

if TYPE_CHECKING:
    from accessory.serve.api.protocol import ChatBody

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How arguments of a call that must come are written: as templates write those of a conversation."""


@dataclass(frozen=True)
class Toolbox:
    """The tools that an answer may call."""

    form: Tools
    """How the template writes calls."""
    tools: list[dict[str, Any]]
    parallel: bool = True
    """Whether an answer may have several calls."""
    grammar: Grammar | None = None
    """What makes the answer a call, where it must be one."""

    def speech(self, salt: str) -> Speech:
        """What reads one answer. salt: what tells its calls' names from others'."""
        names = [tool["name"] for tool in self.tools]
        return Speech(CallReader(self.form, names=names, salt=salt), parallel=self.parallel)


@dataclass
class Speech:
    """One answer as it comes: texts, and pieces of calls as OpenAI streams them."""

    reader: CallReader
    parallel: bool = True
    called: bool = False
    over: bool = False
    """Whether nothing more is wanted: a second call where only one may be."""
    _ids: set[int] = field(default_factory=set)

    def push(self, text: str) -> Iterator[str | dict[str, Any]]:
        """What a piece of the answer's text settles."""
        return self._told(self.reader.push(text))

    def finish(self) -> Iterator[str | dict[str, Any]]:
        """What is left at the end of the answer."""
        return self._told(self.reader.finish())

    def _told(self, items: Sequence[str | CallDelta]) -> Iterator[str | dict[str, Any]]:
        for item in items:
            if isinstance(item, str):
                if item and not self.over:
                    yield item
                continue
            self.over = self.over or (item.index > 0 and not self.parallel)
            if not self.over:
                self.called = True
                yield self._delta(item)

    def _delta(self, item: CallDelta) -> dict[str, Any]:
        """A piece of a call: the first one has its id and its name."""
        function: dict[str, Any] = {"arguments": item.arguments}
        if item.index in self._ids:
            return {"index": item.index, "function": function}
        self._ids.add(item.index)
        function = {"name": item.name or "", **function}
        return {
            "index": item.index,
            "id": item.id or f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": function,
        }


def toolbox(body: ChatBody, template: str) -> Toolbox | None:
    """The tools of a body; None where the answer can call none. ApiError for what cannot be asked."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise _bad("tool_choice", "got one without tools, expected tools to choose from; give tools")
        return None
    if choice == "none":
        return None
    form = tools_of(get_template(template))
    if form is None:
        raise _bad("tools", "got tools for a template that has no way to write them; choose another template")
    tools = [tool.model_dump(exclude_none=True)["function"] for tool in body.tools]
    grammar = None if choice in (None, "auto") else forced(form, _chosen(choice, tools))
    return Toolbox(form, tools, parallel=body.parallel_tool_calls is not False, grammar=grammar)


def forced(form: Tools, tools: Sequence[dict[str, Any]]) -> Grammar:
    """One call of one of these tools, as the template writes it, with arguments of its schema; in Lark's notation."""
    begins, ends = ("", "") if form.alone else (_plain(form.call_begins, {}), _plain(form.call_ends, {}))
    rules = [f"start: {' | '.join(f'call{number}' for number in range(len(tools)))}"]
    for number, tool in enumerate(tools):
        values = {"name": tool["name"], "quoted": json.dumps(tool["name"], ensure_ascii=False), "arguments": "\0"}
        before, _, after = _plain(form.call, values).partition("\0")
        pieces = [_literal(begins + before), f"arguments{number}", _literal(after + ends)]
        schema = {"type": "object", **(tool.get("parameters") or {}), "x-guidance": _SPACING}
        rules.append(f"call{number}: {' '.join(filter(None, pieces))}")
        rules.append(f"arguments{number}: %json {json.dumps(schema)}")
    return Grammar("lark", "\n".join(rules))


def _plain(form: Form, values: Mapping[str, str]) -> str:
    """A form of a call as the text that an answer has for it."""
    return "".join(part.text if isinstance(part, Text) else part.name for part in filled(form, values))


def _literal(text: str) -> str:
    """A text in Lark's notation; nothing for none."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def whole_calls(items: Sequence[str | dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """An answer's text and calls, of all its pieces."""
    text, calls = "", dict[int, dict[str, Any]]()
    for item in items:
        if isinstance(item, str):
            text += item
        elif item["index"] not in calls:
            calls[item["index"]] = {**item, "function": dict(item["function"])}
            del calls[item["index"]]["index"]
        else:
            calls[item["index"]]["function"]["arguments"] += item["function"]["arguments"]
    return text, list(calls.values())


def _chosen(choice: Any, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools of which one must be called."""
    if choice == "required":
        return tools
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    found = [tool for tool in tools if tool["name"] == name]
    if not found:
        raise _bad("tool_choice", "got no name of a tool, expected {type: function, function: {name: ...}}")
    return found


def _bad(param: str, why: str) -> ApiError:
    return ApiError(400, f"{param}: {why}", param=param, code="invalid_value")
