"""A grammar of answers that are calls of tools and nothing else, in Lark's notation as llguidance reads it.
Must not know engines or tokenizers: the marks of a format are spelled as text.

What it allows is written as `render` writes calls, so that `CallReader` reads it and a later prompt repeats it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from accessory.data.template.forms import Control, Form, Tools
from accessory.data.template.tools import SLOT, read_tools

MOST = 8
"""Calls in one answer: one that is unsure would go on for ever."""
_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def demand(tools: Tools, definitions: Any, *, only: str | None = None, several: bool = False) -> str:
    """The grammar of a call of one of these tools, its arguments by its schema.

    definitions: as `read_tools` takes them, or the text of a turn of "tools". only: the name of the one that must be
    called. several: up to `MOST` calls. Raises ValueError for definitions that are none and for a name that none
    of them has; a schema that cannot be a grammar is found when the grammar is compiled.
    """
    listed = json.loads(read_tools(definitions))
    chosen = [(number, tool) for number, tool in enumerate(listed) if only in (None, tool["name"])]
    if not chosen:
        names = ", ".join(tool["name"] for tool in listed)[:200]
        raise ValueError(f"tool_choice: got {only!r:.60}, expected one of {names}; name a tool that is given")
    alone = " ".join(["call"] if tools.alone else _around(tools, "call"))
    start = [alone]
    if several:
        more = " ".join(["call", "(", *_spelled(tools.call_between), "call", f"){{{int(tools.alone)},{MOST - 1}}}"])
        start = ([alone] if tools.alone else []) + [" ".join(_around(tools, more))]
    lines = [f"start: {' | '.join(start)}", f"call: {' | '.join(f'call_{number}' for number, _ in chosen)}"]
    for number, tool in chosen:
        values = {"name": tool["name"], "quoted": json.dumps(tool["name"], ensure_ascii=False)}
        lines.append(f"call_{number}: {' '.join(_spelled(tools.call, values, f'arguments_{number}'))}")
        schema = {"type": "object", **(tool.get("parameters") or {}), "x-guidance": _SPACES}
        lines.append(f"arguments_{number}: %json {json.dumps(schema, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def _around(tools: Tools, calls: str) -> list[str]:
    """Calls between what begins and ends them."""
    return [*_spelled(tools.call_begins), calls, *_spelled(tools.call_ends)]


def _spelled(form: Form, values: dict[str, str] | None = None, arguments: str = "") -> Iterator[str]:
    """A form as the terms of a rule; arguments: the rule that stands for them."""
    run = ""
    for item in form:
        assert isinstance(item, str | Control), f"a form of calls has no pictures: {form}"
        if isinstance(item, Control):
            run += item.name
            continue
        at = 0
        for slot in SLOT.finditer(item):
            run, at = run + item[at : slot.start()], slot.end()
            if slot[1] != "arguments":
                run += (values or {})[slot[1]]
                continue
            yield json.dumps(run, ensure_ascii=False)
            yield arguments
            run = ""
        run += item[at:]
    if run:
        yield json.dumps(run, ensure_ascii=False)
