"""Tools through the official client: definitions, forced and free calls, streams, results, and who may speak how."""

import json

import openai
import pytest
from api_server import inside, tiny

WEATHER = {
    "type": "function",
    "function": {
        "name": "get-weather.now",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Oslo"]}, "days": {"type": "integer", "minimum": 0, "maximum": 3}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
ASK = [{"role": "user", "content": "What is the weather in Oslo?"}]
TEMPLATES = ["vicuna_v1", "llamafactory/mistral"]


@pytest.fixture(scope="module", params=TEMPLATES)
def client(request):
    with inside(tiny(), template=request.param) as server:
        yield server.client()


def chat(client, messages=ASK, **how):
    return client.chat.completions.create(messages=messages, model="any", **{"max_tokens": 300, **how})


def joined(chunks):
    """A stream's text, calls and finish."""
    text, calls, finish = "", {}, None
    for chunk in chunks:
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        for delta in choice.delta.tool_calls or []:
            call = calls.setdefault(delta.index, {"id": delta.id, "name": delta.function.name, "arguments": ""})
            call["arguments"] += delta.function.arguments
        finish = choice.finish_reason or finish
    return text, [calls[index] for index in sorted(calls)], finish


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get-weather.now"}}])
def test_a_forced_call_is_one_of_the_tools_with_arguments_of_its_schema(client, choice):
    tools = [WEATHER] if choice == "required" else [TIME, WEATHER]
    told = chat(client, tools=tools, tool_choice=choice, temperature=1.0, seed=1).choices[0]
    (call,) = told.message.tool_calls
    assert call.function.name == "get-weather.now" and call.type == "function" and call.id
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Bern", "Oslo") and arguments["days"] <= 3
    assert told.finish_reason == "tool_calls" and not told.message.content


def test_a_streamed_call_is_the_same(client):
    how = {"tools": [WEATHER], "tool_choice": "required", "temperature": 1.0, "seed": 4}
    whole = chat(client, **how).choices[0].message.tool_calls[0]
    text, calls, finish = joined(chat(client, stream=True, **how))
    assert not text and finish == "tool_calls" and len(calls) == 1 and calls[0]["id"]
    assert calls[0]["name"] == whole.function.name
    assert json.loads(calls[0]["arguments"]) == json.loads(whole.function.arguments)


def test_an_answer_that_calls_nothing_is_text_in_both_ways(client):
    whole = chat(client, tools=[WEATHER], max_tokens=30).choices[0]
    assert whole.message.tool_calls is None and whole.finish_reason in ("stop", "length")
    text, calls, finish = joined(chat(client, tools=[WEATHER], max_tokens=30, stream=True))
    assert (text, calls, finish) == (whole.message.content, [], whole.finish_reason)


def test_calls_and_their_results_are_read_back(client):
    call = chat(client, tools=[WEATHER], tool_choice="required").choices[0].message
    history = [*ASK, call.model_dump(), {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "rain"}]
    with_result = chat(client, history, tools=[WEATHER], max_tokens=4)
    assert with_result.usage.prompt_tokens > chat(client, tools=[WEATHER], max_tokens=4).usage.prompt_tokens
    two = [{"id": f"c{i}", "type": "function", "function": {"name": "time", "arguments": "{}"}} for i in range(2)]
    results = [{"role": "tool", "tool_call_id": f"c{i}", "content": str(i)} for i in range(2)]
    history = [*ASK, {"role": "assistant", "content": None, "tool_calls": two}, *results]
    assert chat(client, history, tools=[TIME], max_tokens=4).usage.completion_tokens <= 4


def test_no_tool_is_told_where_none_may_be_called(client):
    plain = chat(client, max_tokens=4)
    none = chat(client, tools=[WEATHER], tool_choice="none", max_tokens=4)
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens
    assert chat(client, tools=[WEATHER], max_tokens=4).usage.prompt_tokens > plain.usage.prompt_tokens


@pytest.mark.parametrize(
    ("how", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [TIME] * 200}, "tools"),
    ],
)
def test_tools_that_make_no_sense_are_refused(client, how, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **how)
    assert caught.value.param == param


def test_a_developer_speaks_as_the_system_does(client):
    said = [
        chat(client, [{"role": role, "content": "Be short."}, *ASK], max_tokens=2, logprobs=True)
        for role in ("system", "developer")
    ]
    assert said[0].usage.prompt_tokens == said[1].usage.prompt_tokens
    first = [told.choices[0].logprobs.content[0].logprob for told in said]
    assert first[0] == pytest.approx(first[1], abs=1e-4)
