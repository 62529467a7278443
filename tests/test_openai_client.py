"""`accessory api` in a process of its own, asked by the official client: chat, streams, log-probabilities, forms."""

import base64
import json
import math
import re
import runpy

import openai
import pytest
from api_server import TINY, shared, tiny
from engine_toys import ONE

from accessory.engine import Engine, Request

SEED = (
    "from openai import OpenAI\n"
    'client = OpenAI(api_key="0",base_url="http://0.0.0.0:8000/v1")\n'
    'messages = [{"role": "user", "content": "Who are you?"}]\n'
    'result = client.chat.completions.create(messages=messages, model="meta-llama/Meta-Llama-3-8B-Instruct")\n'
    "print(result.choices[0].message)\n"
)
WHO = [{"role": "user", "content": "Who are you?"}]
SEEN = "data:image/png;base64," + base64.b64encode((TINY / "example.png").read_bytes()).decode()


@pytest.fixture(scope="module")
def server():
    return shared()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def alone():
    """What the engine says by itself."""
    with Engine(tiny(), ONE, rows=1) as engine:
        yield lambda *turns, **how: engine.generate([Request(*turns, **how)])[0]


def chat(client, messages=WHO, **how):
    return client.chat.completions.create(messages=messages, model="any", **how)


def test_the_line_at_the_start_says_model_rows_memory_and_address(server):
    assert re.fullmatch(
        r"\S+tiny \(llama_qformerv2, float32, template tiny, window 512\); 8 at once, [\d.]+ MB of keys and values; "
        r"http://127\.0\.0\.1:\d+/v1\n",
        server.line,
    )


def test_the_example_of_the_seed_runs_with_only_its_port_changed(server, tmp_path, capsys):
    script = tmp_path / "api_call_example.py"
    script.write_text(SEED.replace("8000", str(server.port)))
    runpy.run_path(str(script))
    assert "I am the tiny model of Accessory" in capsys.readouterr().out


def test_an_answer_is_the_engines_own_under_whatever_name_the_model_is_called(client, alone):
    told = chat(client, temperature=0)
    result = alone("Who are you?", max_gen_len=512)
    assert told.choices[0].message.content == result.text and told.choices[0].message.role == "assistant"
    assert told.model == "any" and told.object == "chat.completion" and told.choices[0].finish_reason == "stop"
    assert told.usage.prompt_tokens == result.prompt_tokens and told.usage.completion_tokens == len(result.ids)
    assert told.usage.total_tokens == result.prompt_tokens + len(result.ids)
    assert told.usage.prompt_tokens_details.cached_tokens >= 0


def test_a_stream_has_role_content_finish_usage_and_the_fields_that_clients_read(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert {c.object for c in chunks} == {"chat.completion.chunk"} and len({c.created for c in chunks}) == 1
    assert len({c.id for c in chunks}) == 1 and {c.model for c in chunks} == {"any"}
    assert all(c.usage is None for c in chunks[:-1]) and len(chunks) > 10


def test_the_end_at_the_limit_is_said_in_streams_too(client):
    assert chat(client, max_tokens=3).choices[0].finish_reason == "length"
    assert chat(client, max_completion_tokens=3).usage.completion_tokens == 3
    assert [*chat(client, max_tokens=3, stream=True)][-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stop", ["tiny model", [" of Acc", "zzz"]])
def test_a_stop_string_across_tokens_ends_an_answer_and_is_no_part_of_it(client, stop):
    first = stop if isinstance(stop, str) else stop[0]
    whole = chat(client).choices[0].message.content
    told = chat(client, stop=stop).choices[0]
    assert told.message.content == whole[: whole.index(first)] and told.finish_reason == "stop"
    said = "".join(c.choices[0].delta.content or "" for c in chat(client, stop=stop, stream=True))
    assert said == told.message.content


def test_equal_seeds_give_equal_answers_and_n_gives_those_of_the_next_seeds(client):
    how = {"temperature": 2.0, "max_tokens": 12, "seed": 5}
    several = chat(client, n=3, **how)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in several.choices]
    assert texts == [chat(client, **{**how, "seed": 5 + i}).choices[0].message.content for i in range(3)]
    assert len(set(texts)) == 3 and several.usage.completion_tokens <= 36
    streamed = ["", "", ""]
    for chunk in chat(client, n=3, stream=True, **how):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_logprobs_are_of_the_models_own_distribution_and_join_to_the_answer(client):
    told = chat(client, logprobs=True, top_logprobs=3)
    content = told.choices[0].logprobs.content
    assert len(content) == told.usage.completion_tokens
    said = b"".join(bytes(entry.bytes) for entry in content).decode()
    assert said.strip() == told.choices[0].message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-6
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]


def test_a_bias_forbids_and_forces_tokens(client):
    first = chat(client, logprobs=True, max_tokens=1).choices[0].logprobs.content[0].token
    entry = tiny().tokenizer.encode("digits")[-1]
    forced = chat(client, logit_bias={str(entry): 100}, max_tokens=2, logprobs=True)
    tokens = [told.token for told in forced.choices[0].logprobs.content]
    assert len(set(tokens)) == 1 and tokens[0] != first


def test_penalties_keep_an_answer_from_saying_the_same_again(client):
    entry = str(tiny().tokenizer.encode("digits")[-1])
    how = {"logit_bias": {entry: 40}, "max_tokens": 8, "logprobs": True, "temperature": 0}

    def kinds(**more):
        content = chat(client, **how, **more).choices[0].logprobs.content
        return len({told.token for told in content})

    assert kinds() == 1 <= kinds(frequency_penalty=2.0, presence_penalty=2.0)
    assert kinds(extra_body={"repetition_penalty": 20.0}) > 1


def test_further_fields_of_ours_are_understood(client):
    told = chat(client, temperature=1.5, max_tokens=6, seed=1, extra_body={"top_k": 1})
    assert told.choices[0].message.content == chat(client, max_tokens=6).choices[0].message.content
    told = chat(client, temperature=1.5, max_tokens=6, seed=1, extra_body={"min_p": 1.0})
    assert told.choices[0].message.content == chat(client, max_tokens=6).choices[0].message.content
    assert chat(client, max_tokens=60, extra_body={"ignore_eos": True}).usage.completion_tokens == 60


def test_a_schema_is_kept_to_by_every_answer(client):
    schema = {
        "type": "object",
        "properties": {"shape": {"enum": ["circle", "square"]}, "count": {"type": "integer", "maximum": 9}},
        "required": ["shape", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "drawing", "schema": schema, "strict": True}}
    for seed in range(3):
        told = chat(client, response_format=form, temperature=1.0, seed=seed, max_tokens=200).choices[0]
        read = json.loads(told.message.content)
        assert read["shape"] in ("circle", "square") and read["count"] <= 9 and told.finish_reason == "stop"
    said = "".join(c.choices[0].delta.content or "" for c in chat(client, response_format=form, stream=True))
    assert set(json.loads(said)) == {"shape", "count"}


def test_a_json_object_is_one(client):
    told = chat(client, response_format={"type": "json_object"}, max_tokens=400, temperature=1.0, seed=3).choices[0]
    assert told.finish_reason == "length" or isinstance(json.loads(told.message.content), dict)


def test_a_picture_is_seen(client):
    text = {"type": "text", "text": "How many shapes are there?"}
    picture = {"type": "image_url", "image_url": {"url": SEEN}}
    told = chat(client, [{"role": "user", "content": [picture, text]}])
    with Engine(tiny(), ONE, rows=1) as engine:
        (expected,) = engine.generate([Request(text["text"], pictures=[TINY / "example.png"])])
    assert told.choices[0].message.content == expected.text and told.usage.prompt_tokens == expected.prompt_tokens
    assert chat(client, [{"role": "user", "content": [text]}]).choices[0].message.content != expected.text


def test_completions_go_on_with_texts_and_ids_as_they_are(client, alone):
    text = "The drawing"
    result = alone(text, template="none", max_gen_len=6)
    told = client.completions.create(prompt=text, model="any", max_tokens=6)
    assert told.choices[0].text == result.text and told.object == "text_completion"
    tokenizer = tiny().tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(text, after="bos")]
    several = client.completions.create(prompt=[ids, ids], model="any", max_tokens=6, echo=True)
    assert [choice.text for choice in several.choices] == [text + result.text] * 2
    assert several.usage.prompt_tokens == 2 * result.prompt_tokens
    pieces = ["", ""]
    for chunk in client.completions.create(prompt=[text, text], model="any", max_tokens=6, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == [result.text] * 2


def test_completions_tell_logprobs_in_their_own_form(client):
    told = client.completions.create(prompt="The", model="any", max_tokens=5, logprobs=2).choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert told.text_offset[0] == 0 and told.text_offset[1] == len(told.tokens[0])
    assert max(told.top_logprobs[0].values()) == told.token_logprobs[0]


def test_the_model_is_listed_under_its_folders_name(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_scores_are_those_of_the_engine(client):
    with Engine(tiny(), ONE, rows=1) as engine:
        expected = engine.score(Request("The drawing", template="none"), [" shows", " zz"])
    body = {"prompt": "The drawing", "continuations": [" shows", " zz"]}
    told = client.post("/score", body=body, cast_to=object)
    assert [score["logprob"] for score in told["scores"]] == pytest.approx([s.logprob for s in expected], abs=1e-4)
    assert [score["tokens"] for score in told["scores"]] == [s.tokens for s in expected]
    told = client.post("/score", body={"messages": WHO, "continuations": ["I am", "You"]}, cast_to=object)
    assert told["scores"][0]["logprob"] > told["scores"][1]["logprob"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("how", "param"),
    [
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
)
def test_what_cannot_be_asked_is_an_error_before_the_first_byte(client, how, param, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **{"messages": WHO, **how}, stream=stream)
    error = caught.value
    assert error.param == param and error.type == "invalid_request_error" and error.body["message"]
