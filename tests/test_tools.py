"""Tools in the renderer: the exact strings of every format, who may speak when, and the ids of the exported jinja.

Must not need a model.
"""

import json
from dataclasses import replace

import pytest
from hf_tokenizers import write
from test_template import written
from transformers import AutoTokenizer

from accessory.data.chat_template import chat_template, default_template
from accessory.data.encode import begins_run, encode, settle
from accessory.data.template import (
    DIALECTS,
    CallDelta,
    CallReader,
    Turn,
    get_template,
    read_calls,
    read_tools,
    render,
    tools_of,
)
from accessory.data.template.derive import from_jinja
from accessory.data.template.writer import written as text_of
from accessory.data.tokenizer import open_tokenizer
from accessory.engine import Request
from accessory.engine.prompt import _around, _marks, _stop_ids
from accessory.engine.text import AnswerText

WEATHER = {
    "name": "get-weather.now",
    "description": "The weather.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where"},
            "days": {"type": "array", "items": {"type": "integer"}},
            "unit": {"type": ["string", "null"], "enum": ["C", "F", 3]},
            "odd": True,
        },
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": WEATHER}, {"name": "now"}]
CALLS = [{"name": "get-weather.now", "arguments": {"city": "\u00e9"}}, {"name": "now", "arguments": {}}]
LINES = (
    "> Tool Name: get-weather.now\nTool Description: The weather.\nTool Args:\n"
    "  - city (string, required): Where\n"
    "  - days (array): , where each item should be integer\n"
    '  - unit (["string", "null"]): , should be one of [C, F, 3]\n'
    "  - odd (): \n\n"
    "> Tool Name: now\nTool Description: \nTool Args:\n\n"
)
IN_WORDS = (
    f"You have access to the following tools:\n{LINES}Use the following format if using a tool:\n```\n"
    "Action: tool name (one of [get-weather.now, now])\nAction Input: the input to the tool, in a JSON format "
    'representing the kwargs (e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
)
ACTIONS = 'Action: get-weather.now\nAction Input: {"city": "\u00e9"}\nAction: now\nAction Input: {}'
WRAPPED = [json.dumps({"type": "function", "function": tool}) for tool in (WEATHER, {"name": "now"})]
INDENTED = "\n\n".join(json.dumps(json.loads(tool), indent=4) for tool in WRAPPED)
AS_TAGS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    + "\n".join(WRAPPED)
    + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
TAGS = (
    '<tool_call>\n{"name": "get-weather.now", "arguments": {"city": "\u00e9"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
RESPONSES = "<tool_response>\n22\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
GIVEN = f"[AVAILABLE_TOOLS] [{', '.join(WRAPPED)}][/AVAILABLE_TOOLS]"
MARKED = (
    '[TOOL_CALLS] [{"name": "get-weather.now", "arguments": {"city": "\u00e9"}}, {"name": "now", "arguments": {}}]<eos>'
)
RESULTS = '[TOOL_RESULTS] {"content": 22}[/TOOL_RESULTS][TOOL_RESULTS] {"content": noon}[/TOOL_RESULTS]'
PARAMETERS = '{"name": "get-weather.now", "parameters": {"city": "\u00e9"}}, {"name": "now", "parameters": {}}'
SPELLING = '{"name": function name, "parameters": dictionary of argument name and its value}.'
DATED = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
HEADER = "<start_header_id>{}<end_header_id>\n\n"
AGAIN = f"{HEADER.format('ipython')}22<eot_id>{HEADER.format('ipython')}noon<eot_id>{HEADER.format('assistant')}"
GOLDEN = {
    "llama2": f"<bos>[INST] <<SYS>>\nBe.\n\n{IN_WORDS}\n<</SYS>>\n\nhi [/INST][[ {ACTIONS} <eos>]]"
    "<bos>[INST] 22\nnoon [/INST][[ It is. <eos>]]",
    "vicuna_v1": f"<bos>Be.\n\n{IN_WORDS} USER: hi ASSISTANT:[[ {ACTIONS}<eos>]]USER: 22\nnoon ASSISTANT:"
    "[[ It is.<eos>]]",
    "alpaca": f"<bos>Be.\n\n{IN_WORDS}\n\n### Instruction:\nhi\n\n### Response:[[{ACTIONS}<eos>]]\n\n"
    "### Instruction:\n22\nnoon\n\n### Response:[[It is.<eos>]]",
    "dialog": f"<bos>Be.\n\n{IN_WORDS}\n\n### Human: hi\n### Assistant:[[ {ACTIONS}\n###]] Human: 22\nnoon\n###"
    " Assistant:[[ It is.\n###]]<eos>",
    "llama3": f"<bos>{HEADER.format('system')}Environment: ipython\n{DATED}Be.<eot_id>{HEADER.format('user')}Given the "
    "following functions, please respond with a JSON for a function call with its proper arguments that best answers "
    f"the given prompt.\n\nRespond in the format {SPELLING}Do not use variables.\n\n{INDENTED}\n\nhi<eot_id>"
    f"{HEADER.format('assistant')}[[[{PARAMETERS}]<eot_id>]]{AGAIN}[[It is.<eot_id>]]",
    "chatml": f"<im_start>system\nBe.\n\n{AS_TAGS}<im_end>\n<im_start>user\nhi<im_end>\n<im_start>assistant\n"
    f"[[{TAGS}<im_end>]]\n<im_start>user\n{RESPONSES}<im_end>\n<im_start>assistant\n[[It is.<im_end>]]\n",
    "chatml_direct": f"<im_start>system\nBe.\n\n{AS_TAGS}<im_end><im_start>user\nhi<im_end><im_start>assistant\n"
    f"[[{TAGS}<im_end>]]<im_start>user\n{RESPONSES}<im_end><im_start>assistant\n[[It is.<im_end>]]",
    "mistral_instruct": f"<bos>{GIVEN}[INST] <<SYS>>\nBe.\n<</SYS>>\n\nhi [/INST][[{MARKED}]]{RESULTS}"
    "[[ It is. <eos>]]",
    "llamafactory/llama2": f"<bos>[INST] <<SYS>>\nBe.{IN_WORDS}\n<</SYS>>\n\nhi [/INST][[{ACTIONS}<eos>]]"
    "<bos>[INST] 22\nnoon [/INST][[It is.<eos>]]",
    "llamafactory/default": f"System: Be.{IN_WORDS}<eos>\nHuman: hi<eos>\nAssistant:[[{ACTIONS}<eos>\n]]"
    "Human: 22\nnoon<eos>\nAssistant:[[It is.<eos>\n]]",
    "llamafactory/chatml": f"<im_start>system\nBe.{IN_WORDS}<im_end>\n<im_start>user\nhi<im_end>\n<im_start>"
    f"assistant\n[[{ACTIONS}<im_end>\n]]<im_start>tool\n22\nnoon<im_end>\n<im_start>assistant\n[[It is.<im_end>\n]]",
    "llamafactory/qwen": f"<im_start>system\nBe.\n\n{AS_TAGS}<im_end>\n<im_start>user\nhi<im_end>\n<im_start>"
    f"assistant\n[[{TAGS}<im_end>\n]]<im_start>user\n{RESPONSES}<im_end>\n<im_start>assistant\n[[It is.<im_end>\n]]",
    "llamafactory/llama3": f"<bos>{HEADER.format('system')}Be.{DATED}You have access to the following functions. To "
    f"call a function, please respond with JSON for a function call. Respond in the format {SPELLING} Do not use "
    f"variables.\n\n{INDENTED}\n\n<eot_id>{HEADER.format('user')}hi<eot_id>{HEADER.format('assistant')}"
    f"[[[{PARAMETERS}]<eot_id>]]{AGAIN}[[It is.<eot_id>]]",
    "llamafactory/mistral": f"<bos>[INST] Be.{GIVEN}\n\nhi[/INST][[{MARKED}]]{RESULTS}[[ It is.<eos>]]",
}
HEAD = [Turn("system", "Be."), Turn("tools", read_tools(TOOLS))]
BODY = [
    Turn("user", "hi"),
    Turn("function", read_calls(CALLS)),
    Turn("tool", "22"),
    Turn("tool", "noon"),
    Turn("assistant", "It is."),
]
WITH = [f"{dialect}/{name}" for dialect, table in DIALECTS.items() for name, form in table.items() if form.tools]
DISTINCT = list({get_template(name): name for name in reversed(WITH)}.values())


@pytest.mark.parametrize("name", GOLDEN)
def test_tools_calls_and_results_are_written_exactly_so(name):
    assert written(name, [*HEAD, *BODY], open_answer=False) == GOLDEN[name]


def test_every_format_has_its_exact_text():
    shown = {tools_of(name) for name in GOLDEN}
    assert {get_template(name).tools for name in WITH} <= shown


def test_what_cannot_take_a_system_text_cannot_take_tools():
    for dialect, table in DIALECTS.items():
        for name, form in table.items():
            assert (tools_of(f"{dialect}/{name}") is None) == (form.system is None), name
    with pytest.raises(ValueError, match="no way to write tools; choose another template"):
        render("none", [HEAD[1], *BODY[:1]])


@pytest.mark.parametrize("name", DISTINCT)
def test_without_tools_nothing_changes_and_a_prompt_begins_what_is_learned(name):
    whole = render(name, [*HEAD, *BODY, Turn("user", "q2"), *BODY[1:]], open_answer=False)
    text = "".join(part.text for part in whole if hasattr(part, "text") and isinstance(part.text, str))
    for length in (1, 3, 4, 6):
        prompt = render(name, [*HEAD, *[*BODY, Turn("user", "q2")][:length]] if length != 3 else [*HEAD, *BODY[:4]])
        said = "".join(part.text for part in prompt if hasattr(part, "text") and isinstance(part.text, str))
        assert text.startswith(said), length
    assert "Tool" not in str(render(name, BODY[:1])) and "tools" not in str(render(name, BODY[:1]))


def test_a_single_call_of_llama_3_is_no_list_and_a_system_text_need_not_be():
    turns = [Turn("tools", read_tools(TOOLS)), BODY[0], Turn("function", read_calls(CALLS[1]))]
    said = written("llama3", turns, open_answer=False)
    assert said.endswith('[[{"name": "now", "parameters": {}}<eot_id>]]')
    assert said.startswith(f"<bos>{HEADER.format('system')}Environment: ipython\n{DATED}<eot_id>")
    assert written("chatml", turns, open_answer=False).startswith("<im_start>system\n# Tools\n")


def test_what_is_said_before_calls_stands_before_them_or_is_refused():
    function = Turn("function", read_calls(CALLS[1]), preface="I look.\n\n")
    expected = '[[I look.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><im_end>]]\n'
    assert written("chatml", [BODY[0], function], open_answer=False).endswith(expected)
    assert written("llamafactory/mistral", [BODY[0], function], open_answer=False).endswith(
        '[[ I look.[TOOL_CALLS] [{"name": "now", "arguments": {}}]<eos>]]'
    )
    with pytest.raises(ValueError, match="expected calls alone"):
        render("llama3", [BODY[0], function], open_answer=False)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([BODY[1]], "got 'function' as turn 1, expected 'user'"),
        ([BODY[0], BODY[2]], "got 'tool' as turn 2, expected 'assistant'"),
        ([BODY[0], BODY[1], BODY[4]], "got 'assistant' as turn 3, expected 'tool'; give the result"),
        ([BODY[0], BODY[1], BODY[2], BODY[0]], "got 'user' as turn 4"),
        ([BODY[0], HEAD[1]], "a tools turn can only be the first one"),
        ([HEAD[1], HEAD[1], BODY[0]], "a tools turn can only be the first one"),
        ([BODY[0], BODY[1]], "an end by 'function'"),
        ([BODY[0], Turn("function", "nonsense"), BODY[2]], "calls: got 'nonsense', expected JSON"),
        ([BODY[0], BODY[1], Turn("tool", "x", pictures=1)], "in user turns only"),
    ],
)
def test_turns_of_tools_out_of_order_are_an_error(turns, said):
    with pytest.raises(ValueError, match=said):
        render("chatml", turns)


DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("nonsense", "expected JSON"),
        ("[NaN]", "no number of JSON"),
        ("[" * 100_000, "expected JSON"),
        ([], "expected a list of definitions"),
        (3, "expected a list of definitions"),
        ([3], r"tools\[0\]: got 3"),
        ([{"type": "custom", "custom": {}}], "expected 'function'; drop the tool"),
        ([{"type": "function", "function": None}], r"tools\[0\].function: got None"),
        ([{"type": "function"}], r"tools\[0\].name: got None"),
        ([{"name": "a b"}], "without blanks"),
        ([{"name": "a", "description": 3}], r"tools\[0\].description: got 3"),
        ([{"name": "a", "parameters": []}], "expected a JSON schema"),
        ([{"name": "a", "parameters": {"properties": [1]}}], "properties: got \\[1\\], expected a mapping"),
        ([{"name": "a", "parameters": {"required": True}}], "required: got True, expected a list"),
        ([{"name": "a"}, {"name": "a"}], "'a' twice"),
        ([{"name": "a", "parameters": {"x": DEEP}}], "what JSON cannot hold"),
        ([{"name": "a", "parameters": {"x": {1, 2}}}], "what JSON cannot hold"),
    ],
)
def test_definitions_that_are_none_are_refused_in_a_sentence(tools, said):
    with pytest.raises(ValueError, match=said):
        read_tools(tools)


@pytest.mark.parametrize(
    "calls", [[], "[]", 3, [3], {"name": ""}, {"name": "f", "arguments": "{"}, {"name": "f", "arguments": [1]}]
)
def test_calls_that_are_none_are_refused_in_a_sentence(calls):
    with pytest.raises(ValueError, match="^calls.*, expected "):
        read_calls(calls)


def test_every_spelling_of_a_call_is_one():
    expected = '[{"name": "f", "arguments": {"a": 1}}]'
    inner = {"name": "f", "arguments": '{"a":1}'}
    for said in (inner, [inner], json.dumps(inner), {"id": "x", "type": "function", "function": inner}):
        assert read_calls(said) == expected
    assert read_calls({"name": "f", "parameters": {"a": 1}}) == expected
    assert all(read_calls({"name": "f", "arguments": none}).endswith("{}}]") for none in ("", None, {}))


@pytest.mark.parametrize(
    ("name", "quoted"),
    [
        *(("llama3", True), ("llama3", False), ("llamafactory/llama3", True), ("chatml", False)),
        *(("chatml_direct", False), ("qwen_1_5", False), ("llamafactory/qwen", False)),
    ],
)
def test_tools_are_read_off_a_chat_template_by_what_it_writes(name, quoted):
    form = get_template(name)
    form = replace(form, tools=replace(form.tools, result_quoted=quoted))
    found = from_jinja(chat_template(form))
    for turns in ([*HEAD, *BODY], BODY, [*HEAD[1:], *BODY[:2]], [*HEAD, *BODY[:4]]):
        assert text_of(found, turns) == text_of(form, turns)


def test_a_chat_template_that_writes_tools_in_words_of_its_own_is_followed_in_these():
    own = ("TOOLS {", "{tools}", "} call: <tool_call>")
    text = chat_template(replace(get_template("chatml"), tools=replace(tools_of("chatml"), after_system=own)))
    name = default_template({}, None, text)
    assert name == text and "TOOLS {{" in written(name, [*HEAD, BODY[0]])
    other = chat_template(replace(get_template("chatml"), tools=tools_of("vicuna_v1")))
    assert default_template({}, None, other) == "chatml"
    assert from_jinja(other).tools is None
    assert default_template({}, None, chat_template("chatml") + "{# #}") == "chatml"


TOOL_MARKS = [
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Of several kinds, one of them with the marks of tools as tokens: their tokenizer and ours."""
    root = tmp_path_factory.mktemp("folders")
    folders = {kind: write(root / kind, kind) for kind in ("prepend", "byte_level", "v3")}
    file = folders["v3"] / "tokenizer.json"
    content = json.loads(file.read_text())
    last = content["added_tokens"][-1]
    marks = [last | {"id": last["id"] + at, "content": mark} for at, mark in enumerate(TOOL_MARKS, start=1)]
    file.write_text(json.dumps(content | {"added_tokens": content["added_tokens"] + marks}))
    return {kind: (AutoTokenizer.from_pretrained(folder), open_tokenizer(folder)) for kind, folder in folders.items()}


def messages(turns) -> list[dict]:
    """Turns as transformers has them."""
    told = []
    for turn in turns:
        if turn.role == "function":
            calls = [{"type": "function", "function": call} for call in json.loads(turn.text)]
            told.append({"role": "assistant", "content": turn.preface or None, "tool_calls": calls})
        elif turn.role != "tools":
            told.append({"role": turn.role, "content": turn.text})
    return told


def talks(name: str):
    """Conversations of tools that end at every place, with a system text and without."""
    preface = tools_of(name).preface is not None
    said = Turn("function", read_calls(CALLS[:1]), preface=" I look. \n" if preface else "")
    talk = [*BODY, Turn("user", "q2 "), said, Turn("tool", " [1] "), said, Turn("tool", "x"), BODY[4]]
    for head, lengths in ((HEAD, (1, 2, 4, 5, 8, len(talk))), (HEAD[1:], (1,)), ([], (len(talk),))):
        for length in lengths:
            yield [*head, *talk[:length]]


@pytest.mark.parametrize("name", DISTINCT)
def test_training_chat_and_the_exported_chat_template_have_the_same_ids(opened, name):
    text = chat_template(name)
    for kind, (theirs, ours) in opened.items():
        for turns in list(talks(name))[0 if kind == "v3" else -3 :]:
            asked = turns[-1].role in ("user", "tool")
            parts = render(name, turns, open_answer=asked)
            got = theirs.apply_chat_template(
                messages(turns),
                chat_template=text,
                tools=TOOLS if any(turn.role == "tools" for turn in turns) else None,
                add_generation_prompt=asked,
                return_dict=False,
            )
            assert got == encode(parts, ours).ids, turns


@pytest.mark.parametrize("name", ["llama3", "chatml", "vicuna_v1", "mistral_instruct"])
def test_an_exported_chat_template_refuses_what_we_refuse(opened, name):
    theirs = opened["prepend"][0]
    for turns in ([BODY[0], BODY[2]], [BODY[0], BODY[1], BODY[4]], [BODY[0], BODY[1], BODY[2], BODY[0]]):
        with pytest.raises(Exception, match="Roles"):
            theirs.apply_chat_template(messages(turns), chat_template=chat_template(name))


@pytest.mark.parametrize("template", DISTINCT)
def test_nothing_that_a_tool_says_or_is_called_becomes_a_token(opened, template):
    for theirs, ours in opened.values():
        typed = "".join([*theirs.get_added_vocab(), "<0x0A>", "[INST]", "</s>", "{text}", "{tools}", "{arguments}"])
        kept = []
        for text in (typed, "hi"):
            name = text[:100]
            tool = {"name": name, "description": text, "parameters": {"properties": {text: {"description": text}}}}
            call = Turn("function", read_calls({"name": name, "arguments": {text: text}}))
            turns = [Turn("tools", read_tools([tool])), Turn("user", text), call, Turn("tool", text)]
            ids = encode(render(template, turns), ours).ids
            kept.append([token for token in ids if token in ours.controls])
        assert kept[0] == kept[1]


@pytest.mark.parametrize("name", DISTINCT)
def test_calls_that_were_learned_are_read_back_from_their_ids(opened, name):
    form = get_template(name)
    preface = "I look." if form.tools.preface is not None else ""
    turns = [HEAD[1], BODY[0], Turn("function", read_calls(CALLS), preface=preface)]
    for _, ours in opened.values():
        asked, whole = (encode(render(name, turns[:length], open_answer=length == 2), ours) for length in (2, 3))
        request = Request(turns[:2], template=name)
        ends = _stop_ids(form, ours)
        lead, tail = _around(form)
        text = AnswerText(
            ours,
            stops=form.stops,
            opening=begins_run(settle(render(name, turns[:2]), ours), ours),
            lead=lead,
            tail=tail,
            shown=_marks(form, request, ours),
        )
        reader, items = CallReader(form.tools), []
        for token in whole.ids[len(asked.ids) :]:
            if token in ends or text.stopped:
                break
            items += reader.push(text.push(token))
        items += [*reader.push(text.finish(complete=True)), *reader.finish()]
        calls = [item for item in items if isinstance(item, CallDelta)]
        assert [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls] == CALLS
        assert "".join(item for item in items if isinstance(item, str)).strip() == preface
