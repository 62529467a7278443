"""How templates write tools: formats as data, and definitions, calls and results of any spelling made one.
Knows no template by name and no tokenizer.

The formats, and whose they are:

- `ACTION`: lines "Action:" and "Action Input:" after a description of every argument, LLaMA-Factory's "default". For
  models that never learned tools (LLaMA 2, Vicuna, Alpaca ...) and, byte for byte, its templates that name no other.
- `QWEN`: JSON between <tool_call> tags, definitions between <tools>, results between <tool_response>, as Qwen 2.5 and
  Hermes have learned; for all of ChatML.
- `LLAMA3`: JSON with "parameters" that opens the answer, results by ipython, as LLaMA 3.1 has learned: the definitions
  before the first question. `LLAMA3_SYSTEM`: LLaMA-Factory's, which describes them after the system text.
- `MISTRAL`: [AVAILABLE_TOOLS], [TOOL_CALLS] and [TOOL_RESULTS] of Mistral's third tokenizer, without ids.
  `MISTRAL_SYSTEM`: LLaMA-Factory's, which puts the definitions behind the system text.

What differs from the originals: the date of LLaMA 3 is the one that its chat template has where no clock is (what was
learned is asked for the next day, too); Mistral writes the definitions before the last question, and here they stand
before the first, so that every prompt begins what was learned; several results in a row are written as the format has
them, in one turn. A text of tools or calls is text: it cannot become a control token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from accessory.data.template.forms import Control, Form, Text, Tools

SLOT = re.compile(r"\{(tools|names|name|quoted|arguments|text|rstrip)\}")
_NAME = re.compile(r"\S{1,128}")
_HEAD, _TAIL = Control("<|start_header_id|>"), Control("<|end_header_id|>")
_IM_START, _IM_END = Control("<|im_start|>"), Control("<|im_end|>")
_CALL, _END_CALL = Control("<tool_call>", text=True), Control("</tool_call>", text=True)
_RESPONSE, _END_RESPONSE = Control("<tool_response>", text=True), Control("</tool_response>", text=True)
_MARKS = {name: Control(f"[{name}]", text=True) for name in ("AVAILABLE_TOOLS", "/AVAILABLE_TOOLS", "TOOL_CALLS")}
_RESULTS, _END_RESULTS = Control("[TOOL_RESULTS]", text=True), Control("[/TOOL_RESULTS]", text=True)
_AVAILABLE: Form = (_MARKS["AVAILABLE_TOOLS"], " [{tools}]", _MARKS["/AVAILABLE_TOOLS"])
_SPELLING = '"parameters": dictionary of argument name and its value}.'
_SAMPLE = '{"input": "hello world", "num_beams": 5}'

ACTION_BARE = Tools(
    kind="action",
    tool="arguments",
    tool_between="",
    after_system=(
        "You have access to the following tools:\n{tools}Use the following format if using a tool:\n```\n"
        "Action: tool name (one of [{names}])\nAction Input: the input to the tool, in a JSON format representing the "
        f"kwargs (e.g. ```{_SAMPLE}```)\n```\n",
    ),
    call=("Action: {name}\nAction Input: {arguments}",),
)
"""LLaMA-Factory's: the description directly behind the system text."""
ACTION = replace(ACTION_BARE, joint="\n\n")
ACTION_CHATML = replace(
    ACTION_BARE,
    result_begins=(_IM_START, "tool\n"),
    result=("{text}",),
    result_between=("\n",),
    result_ends=(_IM_END, "\n"),
)
"""LLaMA-Factory's chatml: the same, with results by a role of their own."""
QWEN = Tools(
    kind="tagged",
    tool="line",
    joint="\n\n",
    after_system=(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
        "function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n</tools>\n\nFor each function call, "
        "return a json object with function name and arguments within ",
        *(_CALL, _END_CALL, " XML tags:\n", _CALL),
        '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
        _END_CALL,
    ),
    call=(_CALL, '\n{"name": {quoted}, "arguments": {arguments}}\n', _END_CALL),
    result_begins=("\n", _IM_START, "user\n"),
    result=(_RESPONSE, "\n{text}\n", _END_RESPONSE),
    result_between=("\n",),
    result_ends=(_IM_END, "\n"),
    mark=("<tool_call>", "</tool_call>"),
)
QWEN_DIRECT = replace(QWEN, result_begins=(_IM_START, "user\n"), result_ends=(_IM_END,))
"""Where no new line stands between turns."""
QWEN_SYSTEM = replace(QWEN, joint="", after_system=("\n\n", *QWEN.after_system), result_begins=(_IM_START, "user\n"))
"""Where the new line after an answer belongs to it, and a system text always stands before: Qwen's own, to the byte."""
LLAMA3 = Tools(
    kind="opening",
    tool="indented",
    tool_between="\n\n",
    before_system=("Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",),
    before_user=(
        "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
        'best answers the given prompt.\n\nRespond in the format {"name": function name, '
        f"{_SPELLING}Do not use variables.\n\n{{tools}}\n\n",
    ),
    call=('{"name": {quoted}, "parameters": {arguments}}',),
    call_begins=("[",),
    call_between=(", ",),
    call_ends=("]",),
    alone=True,
    preface=None,
    result=(_HEAD, "ipython", _TAIL, "\n\n{text}", Control("<|eot_id|>")),
)
LLAMA3_SYSTEM = replace(
    LLAMA3,
    before_system=(),
    after_system=(
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nYou have access to the following functions. "
        'To call a function, please respond with JSON for a function call. Respond in the format {"name": function '
        f"name, {_SPELLING} Do not use variables.\n\n{{tools}}\n\n",
    ),
    before_user=(),
)
MISTRAL = Tools(
    kind="marked",
    tool="line",
    tool_between=", ",
    start=(Control("bos"), *_AVAILABLE, Control("[INST]", text=True), " "),
    call=('{"name": {quoted}, "arguments": {arguments}}',),
    call_begins=(_MARKS["TOOL_CALLS"], " ["),
    call_between=(", ",),
    call_ends=("]",),
    preface=(" {rstrip}",),
    answer=("{text}", Control("eos")),
    result=(_RESULTS, ' {"content": {text}}', _END_RESULTS),
    mark=("[TOOL_CALLS]", ""),
)
MISTRAL_SYSTEM = replace(MISTRAL, start=None, after_system=_AVAILABLE)


def read_tools(said: Any) -> str:
    """Definitions of tools as the text of a turn of "tools": a JSON list of {"name", "description", "parameters"}.

    said: a list of definitions, or its JSON: OpenAI's {"type": "function", "function": {...}} or the inner mapping
    alone. Other fields of a definition stay. Raises ValueError for anything else.
    """
    listed = _json(said, "tools") if isinstance(said, str) else said
    listed = [listed] if isinstance(listed, Mapping) else listed
    if not isinstance(listed, Sequence) or isinstance(listed, str | bytes) or not listed:
        raise ValueError(f"tools: got {said!r:.60}, expected a list of definitions of functions")
    tools = [_definition(each, number) for number, each in enumerate(listed)]
    names = [tool["name"] for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"tools: got {twice!r:.60} twice, expected names that differ; rename one")
    return _text(tools, "tools")


def read_calls(said: Any) -> str:
    """Calls as the text of a turn of "function": a JSON list of {"name", "arguments"}, arguments a mapping.

    said: a list of calls, one call, or the JSON of these; a call is {"name", "arguments"} or OpenAI's {"function":
    {...}}, with arguments as a mapping or as its JSON ("" and null are none). Raises ValueError for anything else.
    """
    listed = _json(said, "calls") if isinstance(said, str) else said
    listed = [listed] if isinstance(listed, Mapping) else listed
    if not isinstance(listed, Sequence) or isinstance(listed, str | bytes) or not listed:
        raise ValueError(f"calls: got {said!r:.60}, expected a call, or a list of calls, of name and arguments")
    return _text([_call(each) for each in listed], "calls")


def names_of(tools: str) -> list[str]:
    """The names in the text of a turn of "tools"."""
    return [tool["name"] for tool in json.loads(read_tools(tools))]


def described(tools: Tools, text: str) -> dict[str, str]:
    """What the slots {tools} and {names} stand for; text: of the turn of "tools"."""
    listed = json.loads(read_tools(text))
    written = tools.tool_between.join(_written(tools, tool) for tool in listed)
    return {"tools": written, "names": ", ".join(tool["name"] for tool in listed)}


def called(tools: Tools, text: str, preface: str = "") -> list[Text | Control]:
    """The calls of a function turn, and what is said before them, as parts.

    Raises ValueError for a text that is no calls, and for a preface where the format has no place for one.
    """
    calls = json.loads(read_calls(text))
    parts: list[Text | Control] = []
    if preface.strip():
        if tools.preface is None:
            raise ValueError(
                f"calls: got the text {preface[:40]!r} before them, expected calls alone, as this template has no "
                "place for it; drop it, or choose another template"
            )
        parts += filled(tools.preface, {"text": preface, "rstrip": preface.rstrip()})
    around = not (tools.alone and len(calls) == 1)
    parts += filled(tools.call_begins, {}) if around else []
    for number, call in enumerate(calls):
        values = {"name": call["name"], "quoted": _text(call["name"], "name")}
        values["arguments"] = _text(call["arguments"], "arguments")
        parts += filled(tools.call_between, {}) if number else []
        parts += filled(tools.call, values)
    return [*parts, *(filled(tools.call_ends, {}) if around else [])]


def filled(form: Form, values: Mapping[str, str]) -> list[Text | Control]:
    """A form with these values as text; nothing is looked for in a value."""
    parts: list[Text | Control] = []
    for item in form:
        if isinstance(item, Control):
            parts.append(item)
        elif isinstance(item, str):
            parts.append(Text(SLOT.sub(lambda slot: values.get(slot[1], slot[0]), item)))
    return parts


def wrapped(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A definition as OpenAI has it."""
    return {"type": "function", "function": tool}


def _written(tools: Tools, tool: Mapping[str, Any]) -> str:
    """One definition in the format's way."""
    if tools.tool == "line":
        return _text(wrapped(tool), "tools")
    if tools.tool == "indented":
        return json.dumps(wrapped(tool), ensure_ascii=False, indent=4)
    schema = tool.get("parameters") or {}
    required, properties = schema.get("required") or [], schema.get("properties") or {}
    lines = "".join(_argument(name, value, required) for name, value in properties.items())
    return f"> Tool Name: {tool['name']}\nTool Description: {_plain(tool.get('description'))}\nTool Args:\n{lines}\n"


def _argument(name: str, value: Any, required: Sequence[Any]) -> str:
    """One argument in words; a schema that only says whether anything goes says nothing."""
    value = value if isinstance(value, Mapping) else {}
    kind = f"{_plain(value.get('type'))}{', required' if name in required else ''}"
    said = _plain(value.get("description"))
    choices, items = value.get("enum"), value.get("items")
    if isinstance(choices, list) and choices:
        said += f", should be one of [{', '.join(_plain(choice) for choice in choices)}]"
    if isinstance(items, Mapping) and items:
        said += f", where each item should be {_plain(items.get('type'))}"
    return f"  - {name} ({kind}): {said}\n"


def _plain(value: Any) -> str:
    """A text as it is, nothing for nothing, anything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _definition(said: Any, number: int) -> dict[str, Any]:
    """One definition, unwrapped and looked at."""
    where = f"tools[{number}]"
    if not isinstance(said, Mapping):
        raise ValueError(f"{where}: got {said!r:.60}, expected a mapping with name, description and parameters")
    if "function" in said or "type" in said:
        kind = said.get("type", "function")
        if kind != "function":
            raise ValueError(f"{where}.type: got {kind!r:.40}, expected 'function'; drop the tool")
        said = said.get("function", {key: value for key, value in said.items() if key != "type"})
    if not isinstance(said, Mapping):
        raise ValueError(f"{where}.function: got {said!r:.60}, expected a mapping with name and parameters")
    _name(said.get("name"), where)
    if not isinstance(said.get("description"), str | None):
        raise ValueError(f"{where}.description: got {said['description']!r:.40}, expected text; mend it")
    schema = said.get("parameters")
    if not isinstance(schema, Mapping | None):
        raise ValueError(f"{where}.parameters: got {schema!r:.40}, expected a JSON schema (a mapping); mend it")
    for key, kind, word in (("properties", Mapping, "a mapping"), ("required", list, "a list of names")):
        if schema and not isinstance(schema.get(key), kind | None):
            raise ValueError(f"{where}.parameters.{key}: got {schema[key]!r:.40}, expected {word}; mend it")
    return dict(said)


def _call(said: Any) -> dict[str, Any]:
    """One call, unwrapped, its arguments as a mapping."""
    if isinstance(said, Mapping) and isinstance(said.get("function"), Mapping):
        said = said["function"]
    if not isinstance(said, Mapping):
        raise ValueError(f"calls: got {said!r:.60}, expected a mapping with name and arguments")
    name = _name(said.get("name"), "calls")
    arguments = said.get("arguments", said.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments, f"calls: the arguments of {name}") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise ValueError(f"calls: got the arguments {arguments!r:.40} of {name:.40}, expected a JSON object")
    return {"name": name, "arguments": arguments}


def _name(said: Any, where: str) -> str:
    """A name that can stand in a line and in JSON."""
    if not isinstance(said, str) or not _NAME.fullmatch(said):
        raise ValueError(f"{where}.name: got {said!r:.60}, expected 1 to 128 characters without blanks; rename it")
    return said


def _json(said: str, what: str) -> Any:
    """Strict JSON. ValueError says what it was to be."""
    try:
        return json.loads(said, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: got {said!r:.60}, expected JSON ({error or 'nested too deep'}); mend it") from None


def _text(value: Any, what: str) -> str:
    """JSON on one line, as chat templates write it."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what}: got what JSON cannot hold ({error}), expected texts, numbers and lists") from None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
