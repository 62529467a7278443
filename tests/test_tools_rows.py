"""Rows, messages and requests with tools: every spelling gives the same turns, and the same ids as chat.

Must not need a network.
"""

import json

import pytest
from engine_toys import ONE, opened, write_model
from feed_toys import corpus, texts, tokenizer, write_jsonl

from accessory.data.encode import encode
from accessory.data.feed import FeedConfig, Source, open_rows
from accessory.data.feed.columns import Reading
from accessory.data.feed.fit import Fitter
from accessory.data.feed.records import to_sample
from accessory.data.template import CallDelta, CallReader, Turn, demand, read_calls, read_tools, render, tools_of
from accessory.engine import Engine, Request
from accessory.engine.request import Grammar
from accessory.serve.messages import read_messages

TOOL = {
    "name": "get-weather",
    "description": "The weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
WRAPPED = [{"type": "function", "function": TOOL}]
CALLS = [{"name": "get-weather", "arguments": {"city": "Rome"}}, {"name": "get-weather", "arguments": {"city": "Oslo"}}]
TALK = [
    Turn("system", "Be."),
    Turn("tools", read_tools([TOOL])),
    Turn("user", "How is it?"),
    Turn("function", read_calls(CALLS), preface="I look."),
    Turn("tool", "22 C"),
    Turn("tool", "3 C"),
    Turn("assistant", "Warm."),
]
NAMED = [
    {"id": f"call_{number}", "type": "function", "function": call | {"arguments": json.dumps(call["arguments"])}}
    for number, call in enumerate(CALLS)
]
OPENAI = [
    {"role": "developer", "content": "Be."},
    {"role": "user", "content": "How is it?", "name": "ann"},
    {"role": "assistant", "content": "I look.", "tool_calls": NAMED},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "3 C"}]},
    {"role": "tool", "tool_call_id": "call_0", "content": "22 C"},
    {"role": "assistant", "content": "Warm."},
]
ROWS = {
    "openai": {"messages": OPENAI, "tools": WRAPPED},
    "swift": {
        "tools": json.dumps(WRAPPED),
        "messages": [
            *OPENAI[:2],
            {"role": "assistant", "content": "I look."},
            *({"role": "tool_call", "content": json.dumps(call)} for call in CALLS),
            *({"role": "tool_response", "content": said} for said in ("22 C", "3 C")),
            OPENAI[-1],
        ],
    },
    "sharegpt": {
        "system": "Be.",
        "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": "How is it?"},
            {"from": "gpt", "value": "I look."},
            {"from": "function_call", "value": json.dumps(CALLS)},
            {"from": "observation", "value": "22 C"},
            {"from": "observation", "value": "3 C"},
            {"from": "gpt", "value": "Warm."},
        ],
    },
}
READINGS = {
    "openai": Reading("openai", None),
    "swift": None,
    "sharegpt": Reading("sharegpt", (("messages", "conversations"), ("tools", "tools"), ("system", "system"))),
}


def sample(row: dict, **more):
    return to_sample(row, Source("a.jsonl", **more), seed=0, number=1)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("listed", [True, False])
def test_every_spelling_of_a_row_of_tools_is_the_same_conversation(kind, listed):
    reading = READINGS[kind] if listed else None
    assert sample(ROWS[kind], reading=reading).turns == TALK


def test_definitions_of_an_alpaca_row_stand_after_its_system_text():
    row = {"instruction": "How is it?", "output": "Warm.", "tools": json.dumps([TOOL])}
    assert sample(row).turns == [TALK[1], TALK[2], TALK[6]]
    assert sample(row | {"system": "Be."}).turns == [*TALK[:3], TALK[6]]
    for none in ("", "[]", "null", [], None):
        assert sample(row | {"tools": none}).turns == [TALK[2], TALK[6]]
    assert sample(row).begun("Be.", Source("a.jsonl")).turns == [*TALK[:3], TALK[6]]


def test_a_column_of_tools_that_is_not_listed_is_passed_over_and_counted():
    found = sample(ROWS["sharegpt"], reading=Reading("sharegpt", (("messages", "conversations"),)))
    assert found.turns == TALK[2:] and found.notes["fields_not_listed"] == 2


def test_former_calls_of_a_function_and_results_by_name_are_read():
    said = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "1"},
        {"role": "assistant", "content": "a"},
    ]
    turns = [Turn("user", "q"), Turn("function", read_calls({"name": "f"})), Turn("tool", "1"), Turn("assistant", "a")]
    assert sample({"messages": said}).turns == turns == read_messages(said)[0]


def test_results_without_an_answer_are_left_out_and_counted():
    row = {"messages": OPENAI[:-1], "tools": WRAPPED}
    assert sample(row).turns == TALK[:4] and sample(row).notes["turns_left_out"] == 2
    asked = to_sample(row, Source("a.jsonl"), seed=0, number=1, answered=False)
    assert asked.turns == TALK[:-1]


def test_a_row_is_learned_as_chat_writes_it_calls_and_answers_alone(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS["openai"], ROWS["sharegpt"]])
    found = corpus(path, cache=tmp_path / "cache", template="vicuna_v1", cutoff_len=4096)
    whole = encode(render("vicuna_v1", TALK, open_answer=False), tokenizer())
    assert found.row(0).ids.tolist() == whole.ids == found.row(1).ids.tolist()
    said = texts(found)[0]
    assert said.startswith("I look.\nAction: get-weather\nAction Input: ") and said.endswith("Warm.")
    assert "22 C" not in said and "How is it" not in said and "Tool Name" not in said
    again = corpus(path, cache=tmp_path / "cache", template="vicuna_v1", cutoff_len=4096)
    assert again.report == found.report and again.row(1).ids.tolist() == whole.ids
    asked = encode(render("vicuna_v1", TALK[:-1]), tokenizer()).ids
    assert whole.ids[: len(asked)] == asked


def test_a_template_without_tools_refuses_the_row_by_name(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS["openai"]])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*no way to write tools"):
        corpus(path, cache=tmp_path / "cache", template="none", on_bad_row="error")


def test_a_call_and_its_results_stay_together_when_exchanges_go():
    talk = list(TALK)
    for number in range(5):
        talk += [Turn("user", f"question {number} " * 5), Turn("function", read_calls(CALLS))]
        talk += [Turn("tool", f"result {number}"), Turn("assistant", f"answer {number} " * 5)]
    sizes = set()
    for cutoff in range(600, 2600, 50):
        found = Fitter(FeedConfig(sources=(), cutoff_len=cutoff), tokenizer()).fit(talk, "vicuna_v1")
        if found is None:
            continue
        text = tokenizer().decode(found.encoded.ids)
        kept = [number for number in range(5) if f"result {number}" in text]
        sizes.add(len(kept))
        assert kept == list(range(5 - len(kept), 5)) and kept and "Tool Name: get-weather" in text
        assert text.count("Action: get-weather") == 2 * (len(kept) + ("22 C" in text))
        assert all(f"question {number}" in text and f"answer {number}" in text for number in kept[1:])
    assert len(sizes) > 2


def test_an_exchange_that_ends_with_calls_gives_up_its_question_and_never_a_call():
    talk = [TALK[1], Turn("user", "how " * 300), TALK[3]]
    whole = len(encode(render("vicuna_v1", talk, open_answer=False), tokenizer()).ids)
    fitter = Fitter(FeedConfig(sources=(), cutoff_len=whole - 100), tokenizer())
    text = tokenizer().decode(fitter.fit(talk, "vicuna_v1").encoded.ids)
    assert text.endswith("".join(part.text for part in render("vicuna_v1", talk, open_answer=False)[-2:-1])[-40:])
    assert Fitter(FeedConfig(sources=(), cutoff_len=whole - 320), tokenizer()).fit(talk, "vicuna_v1") is None


def test_rows_that_are_asked_have_tools_in_their_turns_and_a_history_of_pairs(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS["openai"]])
    (row,) = open_rows([str(path)])
    assert list(row.turns) == TALK[:-1] and row.label == "Warm." and row.query == "22 C\n3 C" and row.system == "Be."
    assert row.history == [["How is it?", f"I look.\n{TALK[3].text}"]]


# ---- messages


def test_openais_messages_are_read_whole():
    assert read_messages(OPENAI, tools=WRAPPED) == (TALK, [])
    assert read_messages(OPENAI[1:], system="Be.", tools=WRAPPED) == (TALK, [])
    silent = [OPENAI[1], {"role": "assistant", "tool_calls": NAMED, "content": None}]
    assert read_messages(silent)[0][1] == Turn("function", read_calls(CALLS))
    plain = {"role": "assistant", "content": "x", "tool_calls": [], "function_call": None}
    assert read_messages([OPENAI[1], plain])[0][1] == Turn("assistant", "x")


def test_messages_of_one_speaker_in_a_row_are_one_turn():
    image = {"type": "image_url", "image_url": {"url": "u"}}
    told = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, {"role": "user", "content": "c"}]
    told += [{"role": "user", "content": [image, {"type": "text", "text": "d"}, image]}]
    turns, pictures = read_messages(told)
    assert turns == [Turn("system", "a\n\nb"), Turn("user", "c\n\nd", pictures=2, places=(3, 4))]
    assert pictures == ["u", "u"]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([OPENAI[1], {"role": "user", "content": "x", "tool_calls": NAMED}], "expected them of the assistant"),
        ([OPENAI[1], {"role": "assistant", "tool_calls": [3]}], "calls: got 3"),
        ([OPENAI[1], {"role": "assistant", "tool_calls": "x"}], "calls: got 'x', expected JSON"),
        ([OPENAI[1], {"role": "assistant", "content": None}], "expected text or a list of parts"),
        ([*OPENAI[1:3], OPENAI[3]], "no result for the call 'call_0'"),
        ([*OPENAI[1:3], OPENAI[3], OPENAI[3]], "got 'call_1', expected one result for each"),
        ([*OPENAI[1:3], OPENAI[3] | {"tool_call_id": "x"}], "got 'x', expected one result for each"),
        ([OPENAI[1], OPENAI[2] | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "arguments of f"),
        ([{"role": "tool", "content": {"a": 1}}], "expected text or a list of parts"),
    ],
)
def test_messages_of_tools_that_make_no_sense_are_refused(messages, said):
    with pytest.raises(ValueError, match=said):
        read_messages(messages)


# ---- the engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("tools") / "model", "llama", sees=False, max_seq_len=2048)
    return Engine(opened(folder), ONE)


def test_a_conversation_of_tools_is_asked_as_it_is_learned(engine):
    turns = read_messages(OPENAI[:-1], tools=WRAPPED)[0]
    request = Request(turns, template="vicuna_v1", max_gen_len=4)
    (result,) = engine.generate([request])
    assert result.prompt_tokens == len(encode(render("vicuna_v1", TALK[:-1]), tokenizer()).ids)
    with pytest.raises(ValueError, match="no way to write tools"):
        engine.submit(Request(turns, template="none"))


@pytest.mark.parametrize("name", ["vicuna_v1", "llama2", "mistral_instruct", "llamafactory/default"])
@pytest.mark.parametrize("several", [False, True])
def test_a_call_that_is_demanded_is_made_and_read(engine, name, several):
    tools = tools_of(name)
    text = demand(tools, WRAPPED, only=TOOL["name"], several=several)
    turns = read_messages(OPENAI[1:2], tools=WRAPPED)[0]
    request = Request(turns, template=name, max_gen_len=900, grammar=Grammar("lark", text))
    (result,) = engine.generate([request])
    reader = CallReader(tools, names=[TOOL["name"]])
    heard = [*reader.push(result.text), *reader.finish()]
    calls = [item for item in heard if isinstance(item, CallDelta)]
    assert calls[0].name == TOOL["name"] and calls[0].arguments == '{"city": "Rome"}'
    assert len(calls) == len(heard) and result.finish == "stop" and (several or len(calls) == 1)


def test_a_demand_of_a_tool_that_is_not_given_is_refused():
    with pytest.raises(ValueError, match="tool_choice: got 'f', expected one of get-weather"):
        demand(tools_of("chatml"), WRAPPED, only="f")
