"""Forms, and the tools of a template, as statements of jinja.
Must not know a whole conversation, a template by name or a tokenizer.

Each statement eats the white space around it, so that lines write nothing. `ns` holds what a message says: text,
pictures, turns, system; and of tools `tools` and `names` (empty: there are none) and `call`: 0, 1 after calls, 2 after
results.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from accessory.data.template.forms import SLOT, Control, Form, Pictures, Template, Tools
from accessory.data.template.tools import SLOT as TOOLS_SLOT

_TOOL = "(tool['function'] if tool['function'] is defined else tool)"
_GIVEN = {"tools": "ns.tools", "names": "ns.names"}


def define(form: Template) -> Iterator[str]:
    """Read the tools that are given."""
    tools = form.tools
    if tools is None:
        return
    yield "{%- set ns.tools = '' -%}{%- set ns.names = '' -%}{%- set ns.call = 0 -%}{%- set ns.said = '' -%}"
    yield "{%- for tool in (tools or []) -%}"
    yield f"{{%- set tool = {_TOOL} -%}}"
    between = quoted(tools.tool_between) if tools.tool_between else "''"
    yield f"{{%- set ns.tools = ns.tools + ('' if loop.first else {between}) -%}}"
    yield "{%- set ns.names = ns.names + ('' if loop.first else ', ') + tool['name'] -%}"
    if tools.tool == "arguments":
        yield from _arguments()
    else:
        how = "tojson" if tools.tool == "line" else "tojson(indent=4)"
        yield f"{{%- set ns.tools = ns.tools + ({{'type': 'function', 'function': tool}} | {how}) -%}}"
    yield "{%- endfor -%}"


def begin(form: Template, picture: str) -> Iterator[str]:
    """The start, where there are tools another one."""
    if form.tools is None or form.tools.start is None:
        yield from write(form.start, picture)
        return
    yield f"{{%- if ns.names -%}}{{{{- {expression(form.tools.start, _GIVEN)} -}}}}{{%- else -%}}"
    yield from write(form.start, picture)
    yield "{%- endif -%}"


def around_system(form: Template) -> tuple[tuple[str, str], str]:
    """What stands around a system text, as expressions, and when there is one besides."""
    tools = form.tools
    if tools is None or not (tools.before_system or tools.after_system):
        return ("", ""), ""
    before, after = (expression(each, _GIVEN) for each in (tools.before_system, tools.after_system))
    if tools.after_system and tools.joint:
        after = f"({quoted(tools.joint)} if ns.system else '') + {after}"
    return (_if_given(before), _if_given(after)), " or ns.names"


def around_question(form: Template) -> tuple[str, str]:
    """The same of the first question."""
    if form.tools is None or not form.tools.before_user:
        return "", ""
    before = expression(form.tools.before_user, _GIVEN)
    return f"({before} if ns.names and ns.turns == 0 else '')", ""


def call(form: Template, tools: Tools, picture: str) -> Iterator[str]:
    """The calls of a message."""
    if tools.preface is None:
        yield "{%- if ns.text.strip() -%}{{- raise_exception('This template has no place for a text beside calls') -}}"
        yield "{%- endif -%}{%- set ns.said = '' -%}"
    else:
        said = expression(tools.preface, {"text": "ns.text", "rstrip": "ns.text.rstrip()"})
        yield f"{{%- set ns.said = ({said}) if ns.text.strip() else '' -%}}"
    around = " if message['tool_calls'] | length > 1 else ''" if tools.alone else ""
    if tools.call_begins:
        yield f"{{%- set ns.said = ns.said + ({expression(tools.call_begins, {})}{around}) -%}}"
    yield "{%- for call in message['tool_calls'] -%}"
    yield "{%- set call = call['function'] if call['function'] is defined else call -%}"
    given = "call['arguments'] or {}"
    values = {"name": "call['name']", "quoted": "(call['name'] | tojson)"}
    values["arguments"] = f"(call['arguments'] if call['arguments'] is string else ({given}) | tojson)"
    between = f"'' if loop.first else {expression(tools.call_between, {})}"
    yield f"{{%- set ns.said = ns.said + ({between}) + {expression(tools.call, values)} -%}}"
    yield "{%- endfor -%}"
    if tools.call_ends:
        yield f"{{%- set ns.said = ns.said + ({expression(tools.call_ends, {})}{around}) -%}}"
    yield "{%- set ns.text = '' -%}{%- set ns.call = 1 -%}"
    yield from write(form.answer if tools.answer is None else tools.answer, picture, around=("ns.said", ""))


def answer_calls(form: Template, tools: Tools, picture: str) -> Iterator[str]:
    """One result of several in a row, with what stands around all of them."""
    last = "{%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' -%}"
    if tools.result is None:
        yield "{%- set ns.said = ns.text if ns.call == 1 else ns.said + '\\n' + ns.text -%}{%- set ns.call = 2 -%}"
        yield last
        yield "{%- set ns.text = ns.said -%}"
        yield from write(form.between, picture)
        yield from write(form.user, picture)
        yield "{%- endif -%}"
        return
    yield "{%- if ns.call == 1 -%}"
    yield from write(tools.result_begins, picture)
    yield "{%- else -%}"
    yield from write(tools.result_between, picture)
    yield "{%- endif -%}{%- set ns.call = 2 -%}"
    yield from write(tools.result, picture, text="(ns.text | tojson)" if tools.result_quoted else "ns.text")
    yield last
    yield from write(tools.result_ends, picture)
    yield "{%- endif -%}"


def write(form: Form, picture: str, *, text: str = "ns.text", around: tuple[str, str] = ("", "")) -> Iterator[str]:
    """Write a form; text: the variable that holds the turn's; around: expressions that stand around it."""
    slots = {"text": text, "strip": f"{text}.strip()", "rstrip": f"{text}.rstrip()"}
    for name, said in slots.items():
        slots[name] = " + ".join(each for each in (around[0], said, around[1]) if each)
    slots["input"] = "message['input']"
    for item in form:
        if isinstance(item, Pictures):
            shown = quoted(picture + item.after)
            yield f"{{%- for _ in range(ns.pictures) -%}}{{{{- {shown} -}}}}{{%- endfor -%}}"
            yield "{%- set ns.pictures = 0 -%}"
        elif isinstance(item, Control):
            yield f"{{{{- {_control(item)} -}}}}"
        else:
            yield f"{{{{- {_terms(item, slots, SLOT)} -}}}}"


def expression(form: Form, values: Mapping[str, str]) -> str:
    """A form as one expression; values: expressions by the slot."""
    terms = []
    for item in form:
        assert isinstance(item, str | Control), f"a form of tools has no pictures: {form}"
        terms.append(_control(item) if isinstance(item, Control) else _terms(item, values, TOOLS_SLOT))
    return " + ".join(terms) or "''"


def quoted(text: str) -> str:
    """A text as a literal of jinja, which reads backslashes as Python does."""
    escaped = text.encode("unicode_escape").decode("ascii").replace("'", "\\'")
    return f"'{escaped}'"


def _control(item: Control) -> str:
    return {"bos": "bos_token", "eos": "eos_token"}.get(item.name, quoted(item.name))


def _terms(text: str, values: Mapping[str, str], slot: re.Pattern[str]) -> str:
    """A string with slots as a sum."""
    at, terms = 0, []
    for found in slot.finditer(text):
        if found[1] not in values:
            continue
        terms += [quoted(text[at : found.start()])] if found.start() > at else []
        terms.append(values[found[1]])
        at = found.end()
    terms += [quoted(text[at:])] if at < len(text) else []
    return " + ".join(terms)


def _if_given(said: str) -> str:
    """An expression that says nothing where there are no tools."""
    return "" if said == "''" else f"(({said}) if ns.names else '')"


def _arguments() -> Iterator[str]:
    """A definition with its arguments in words."""
    yield "{%- set ns.tools = ns.tools + '> Tool Name: ' + tool['name'] + '\\nTool Description: ' -%}"
    yield "{%- set ns.tools = ns.tools + (tool['description'] or '') + '\\nTool Args:\\n' -%}"
    yield "{%- set schema = tool['parameters'] or {} -%}"
    yield "{%- for name, value in (schema['properties'] or {}) | items -%}"
    yield "{%- set value = value if value is mapping else {} -%}"
    yield f"{{%- set ns.tools = ns.tools + '  - ' + name + ' (' + {_plain('type')} -%}}"
    yield "{%- set ns.tools = ns.tools + (', required' if name in (schema['required'] or []) else '') + '): ' -%}"
    yield f"{{%- set ns.tools = ns.tools + {_plain('description')} -%}}"
    yield "{%- for choice in (value['enum'] or []) -%}"
    yield "{%- set ns.tools = ns.tools + (', should be one of [' if loop.first else ', ') -%}"
    yield "{%- set choice = choice if choice is string else '' if choice is none else choice | tojson -%}"
    yield "{%- set ns.tools = ns.tools + choice -%}"
    yield "{%- set ns.tools = ns.tools + (']' if loop.last else '') -%}"
    yield "{%- endfor -%}"
    yield "{%- if value['items'] is mapping and value['items'] -%}"
    yield "{%- set value = value['items'] -%}"
    yield f"{{%- set ns.tools = ns.tools + ', where each item should be ' + {_plain('type')} -%}}"
    yield "{%- endif -%}"
    yield "{%- set ns.tools = ns.tools + '\\n' -%}"
    yield "{%- endfor -%}"
    yield "{%- set ns.tools = ns.tools + '\\n' -%}"


def _plain(key: str) -> str:
    """A field as text: texts as they are, nothing for nothing, anything else as JSON."""
    field = f"value['{key}']"
    return f"({field} if {field} is string else {field} | tojson if {field} is defined and {field} is not none else '')"
