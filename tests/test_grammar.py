"""Answers in a grammar: what may come next for every kind of tokenizer, what is refused, and the model that ships."""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_toys import ONE, opened, write_model
from fixtures import toys

from accessory.assemble import Bundle
from accessory.data.template import Template
from accessory.data.tokenizer import Tokenizer, open_tokenizer
from accessory.engine import Engine, Grammar, Request, grammar
from accessory.engine.grammar import Grammars, Matcher
from accessory.model import Sampling

TINY = Path(__file__).resolve().parents[1] / "accessory" / "tiny"
KINDS = ["sentencepiece", "markers", "unigram", "byte_level", "json_unigram", "llama3", "llama_json"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "colour": {"enum": ["red", "gr\u00fcn", 'a "b"\n', None, 3]},
        "many": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 99}, "maxItems": 3},
        "deep": {"type": "object", "properties": {"x": {"type": "boolean"}}, "additionalProperties": False},
    },
    "required": ["name", "colour", "many"],
    "additionalProperties": False,
}
ODD = ["a", "ab", "a b", " lead", 'q"uo\\te', "s/l*(a)sh", "two\nlines", "\u4e2d\u6587", "\U0001f600", "\u00e9t\u00e9"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {name: open_tokenizer(path) for name, path in toys.write_all(tmp_path_factory.mktemp("toys")).items()}


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return opened(TINY)


def schema(**told: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(told))


def choice(*texts: str) -> Grammar:
    return Grammar("choice", json.dumps(texts))


def walk(matcher: Matcher, dice: random.Random, *, stops: frozenset[int], most: int = 400) -> list[int]:
    """Ids at random that the grammar allows, to an end."""
    ids: list[int] = []
    while not matcher.done and len(ids) < most:
        token = dice.choice(matcher.allowed().nonzero()[:, 0].tolist())
        if token in stops:
            break
        ids.append(token)
        matcher.push(token)
    return ids


def fits(value: Any) -> bool:
    """Whether a value is of SCHEMA, by hand."""
    deep = value.get("deep", {})
    return (
        set(value) <= set(SCHEMA["properties"])
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and value["colour"] in SCHEMA["properties"]["colour"]["enum"]
        and len(value["many"]) <= 3
        and all(type(item) is int and -9 <= item <= 99 for item in value["many"])
        and deep in ({}, {"x": True}, {"x": False})
    )


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"json_unigram"}))
def test_any_way_through_a_schema_is_json_of_it(tokenizers, kind: str) -> None:
    tokenizer, compiled = tokenizers[kind], Grammars(tokenizers[kind])
    stops = frozenset({tokenizer.eos_id} - {None})
    for seed in range(12):
        lead, opening = ("", " ")[seed % 2], seed % 3 > 0
        matcher = compiled(Grammar("json_schema", json.dumps(SCHEMA)), lead=lead, opening=opening, stop_ids=stops)
        ids = walk(matcher, random.Random(seed), stops=stops, most=4000)
        text = tokenizer.decode(ids, opening=opening)
        assert text.startswith(lead) and fits(json.loads(text)), text
        assert not tokenizer.controls & set(ids)


def allowed_by_hand(tokenizer: Tokenizer, ids: list[int], texts: list[str], opening: bool) -> tuple[set[int], bool]:
    """Which ids lead on to one of some texts, and whether the ids are one, by the bytes that each id adds."""
    first, said = opening, b""
    for token in ids:
        piece = tokenizer.piece_bytes(token, first=first)
        first, said = first and tokenizer.still_first(token, piece), said + piece
    going = set()
    for token in set(range(tokenizer.size)) - tokenizer.controls - tokenizer.unsaid:
        piece = tokenizer.piece_bytes(token, first=first)
        blank = first and not ids and bool(tokenizer.piece_bytes(token))
        if (piece or blank) and any(text.encode().startswith(said + piece) for text in texts):
            going.add(token)
    return going, said in [text.encode() for text in texts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opening", [True, False])
def test_exactly_what_leads_on_to_a_choice_is_allowed(tokenizers, kind: str, opening: bool) -> None:
    tokenizer, stop = tokenizers[kind], tokenizers[kind].eos_id
    stops = frozenset() if stop is None else frozenset({stop})
    compiled = Grammars(tokenizer)
    for seed in range(8):
        matcher = compiled(choice(*ODD), opening=opening, stop_ids=stops)
        ids: list[int] = []
        while not matcher.done:
            going, may_end = allowed_by_hand(tokenizer, ids, ODD, opening)
            expected = going | (stops if may_end else set())
            if not expected:
                with pytest.raises(ValueError, match="cannot go on"):
                    matcher.allowed()
                break
            assert set(matcher.allowed().nonzero()[:, 0].tolist()) == expected
            if not going:
                break
            ids.append(random.Random(seed * 99 + len(ids)).choice(sorted(going)))
            matcher.push(ids[-1])


@pytest.mark.parametrize("told", ["5", "0.01", "0.25", "100", "9973", "12.5"])
def test_multiples_of_ordinary_numbers_are_followed(tokenizers, told: str) -> None:
    tokenizer = tokenizers["byte_level"]
    matcher = Grammars(tokenizer)(Grammar("json_schema", f'{{"type": "number", "multipleOf": {told}, "minimum": 0}}'))
    for digit in told:
        assert matcher.allowed()[tokenizer.encode(digit)[0]]
        matcher.push(tokenizer.encode(digit)[0])
    assert matcher.possible


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"\d{3}-[a-f]+", "123-fade"),
        (r"(yes|no)( maybe)*", "yes maybe maybe"),
        (r"a/b\\c", "a/b\\c"),
        (r" +x", "  x"),
        ("one\ntwo", "one\ntwo"),
        (r"[\u{4e2d}-\u{4e2f}]+", "\u4e2d\u4e2f"),
        (r".*", "abc"),
    ],
)
def test_a_pattern_is_matched_as_a_whole(tokenizers, pattern: str, text: str) -> None:
    tokenizer = tokenizers["sentencepiece"]
    matcher = Grammars(tokenizer)(Grammar("regex", pattern), stop_ids=[tokenizer.eos_id])
    for byte in text.encode():
        token = next(i for i in range(tokenizer.size) if tokenizer.piece_bytes(i) == bytes([byte]))
        assert matcher.allowed()[token]
        matcher.push(token)
    assert matcher.done or bool(matcher.allowed()[tokenizer.eos_id])


def test_a_grammar_in_larks_notation_is_followed(tokenizers) -> None:
    tokenizer = tokenizers["llama_json"]
    text = 'start: verb " " noun\nverb: "see" | "eat"\nnoun: /[a-c]{2}/'
    for seed in range(5):
        matcher = Grammars(tokenizer)(Grammar("lark", text), lead=" ", opening=True)
        said = tokenizer.decode(walk(matcher, random.Random(seed), stops=frozenset()))
        assert re.fullmatch("(see|eat) [a-c]{2}", said.removeprefix(" ")) and said.startswith(" ")


def test_control_tokens_are_allowed_only_as_the_end(tokenizers) -> None:
    tokenizer = tokenizers["byte_level"]
    stop = tokenizer.control("<|im_end|>")
    matcher = Grammars(tokenizer)(Grammar("regex", "a+"), stop_ids=[stop])
    a = tokenizer.encode("a")[0]
    assert not matcher.allowed()[list(tokenizer.controls)].any()
    matcher.push(a)
    told = matcher.allowed()
    assert told[stop] and told[a] and told[list(tokenizer.controls)].sum() == 1


def test_an_ordinary_stop_id_waits_for_the_end_as_well(tokenizers) -> None:
    tokenizer = tokenizers["byte_level"]
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    matcher = Grammars(tokenizer)(Grammar("regex", "ab?"), stop_ids=[b])
    assert not matcher.allowed()[b]
    matcher.push(a)
    assert matcher.allowed().nonzero()[:, 0].tolist() == [b] and not matcher.done


def test_a_text_that_nothing_can_follow_is_done(tokenizers) -> None:
    tokenizer = tokenizers["byte_level"]
    matcher = Grammars(tokenizer)(choice("a"))
    assert not matcher.done
    matcher.push(tokenizer.encode("a")[0])
    assert matcher.done


def test_a_token_that_does_not_fit_is_an_error_at_the_next_look(tokenizers) -> None:
    tokenizer = tokenizers["byte_level"]
    for wrong in (tokenizer.encode("b")[0], tokenizer.eos_id):
        matcher = Grammars(tokenizer)(choice("aa"))
        matcher.push(wrong)
        assert not matcher.done
        with pytest.raises(ValueError, match="choice: the answer cannot go on"):
            matcher.allowed()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (Grammar("json_schema", "{"), "no JSON"),
        (Grammar("json_schema", '{"minimum": NaN}'), "NaN is no JSON"),
        (Grammar("json_schema", "[" * 5000), "no JSON"),
        (Grammar("json_schema", "[]"), "got a list, expected a JSON object"),
        (Grammar("json_schema", "false"), "Unsatisfiable"),
        (schema(type="strin"), "Invalid type: strin"),
        (schema(type="array", uniqueItems=True), "uniqueItems"),
        (schema(**{"not": {"type": "string"}}), "Unimplemented"),
        (schema(**{"$ref": "http://127.0.0.1:1/x"}), "does not fetch"),
        (schema(**{"$ref": "#/$defs/none"}), "does not exist"),
        (schema(type="string", format="weird"), "Unknown format"),
        (schema(type="string", pattern="(?=a)b"), "look-ahead"),
        (schema(enum=[]), "Unsatisfiable"),
        (schema(type="integer", multipleOf=999983), "multipleOf: got 999983"),
        (schema(allOf=[{"multipleOf": 997}, {"multipleOf": 0.991}]), "multipleOf: got 997, 0.991"),
        (schema(**{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "no token of the model fits"),
        (schema(type="object", properties={f"p{i}": {"type": "string", "maxLength": i} for i in range(800)}), "items"),
        (schema(**{"x-guidance": {"lenient": True}}), "drop it"),
        (schema(description="x" * 70_000), "got more than 65536 bytes"),
        (Grammar("json_schema", '{"properties":{"a":' * 40 + "{}" + "}}" * 40), "more than 64 levels"),
        (Grammar("regex", "(a|b"), "unclosed group"),
        (Grammar("regex", r"(a)\1"), "backreferences"),
        (Grammar("regex", ""), "."),
        (Grammar("choice", "red"), "no JSON"),
        (Grammar("choice", "[]"), "expected a JSON list"),
        (Grammar("choice", '["a", ""]'), "at least one character"),
        (Grammar("choice", '["a", 3]'), "expected a JSON list"),
        (Grammar("choice", json.dumps(["a"] * 1025)), "1 to 1024"),
        (Grammar("lark", "start: other"), "other"),
        (Grammar("lark", "begin: /a/"), "start"),
        (Grammar("lark", ""), "."),
        (Grammar("yaml", "a"), "expected json_object, json_schema, regex, choice or lark"),  # type: ignore[arg-type]
    ],
    ids=lambda value: value.text[:40] if isinstance(value, Grammar) else "",
)
def test_what_cannot_be_enforced_is_refused_in_one_sentence(tokenizers, wrong: Grammar, why: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ValueError, match=re.escape(why) if why != "." else None) as caught:
        Grammars(tokenizers["byte_level"])(wrong)
    told = str(caught.value)
    assert "\n" not in told and len(told) < 500 and re.search("expected|mend|change|drop|shorten", told)
    assert time.perf_counter() - began < 10


def test_a_tokenizer_that_cannot_write_it_is_told_at_once(tokenizers) -> None:
    assert not any(b"{" in tokenizers["json_unigram"].piece_bytes(i) for i in range(tokenizers["json_unigram"].size))
    with pytest.raises(ValueError, match="no token of the model fits"):
        Grammars(tokenizers["json_unigram"])(Grammar("json_object"))


def test_a_way_of_several_that_no_token_goes_on_does_not_forbid_the_others(tokenizers) -> None:
    tokenizer = tokenizers["json_unigram"]
    missing = next(
        c for c in "#%&@^~" if not any(c.encode() in tokenizer.piece_bytes(i) for i in range(tokenizer.size))
    )
    texts = ["the", *(f"{c}{missing}" for c in "aeiost" * 3)]
    assert Grammars(tokenizer)(Grammar("choice", json.dumps(texts))).allowed().any()


def test_a_compiled_grammar_is_kept_and_the_oldest_are_not(tokenizers, monkeypatch) -> None:
    made: list[Grammar] = []
    inner = grammar._compile

    def count(tokenizer: Any, asked: Grammar, lead: str) -> Any:
        made.append(asked)
        return inner(tokenizer, asked, lead)

    monkeypatch.setattr(grammar, "_compile", count)
    compiled = Grammars(tokenizers["byte_level"])
    one, other = compiled(choice("ab")), compiled(choice("ab"))
    one.push(tokenizers["byte_level"].encode("a")[0])
    assert len(made) == 1 and not one.allowed().equal(other.allowed()), "each answer has a state of its own"
    for number in range(40):
        compiled(choice(f"a{number}"))
    assert len(compiled._kept) == 32
    compiled(choice("ab"))
    assert len(made) == 42


def test_threads_may_compile_at_once(tokenizers) -> None:
    compiled, found, failed = Grammars(tokenizers["llama3"]), [], []

    def work(seed: int) -> None:
        try:
            for number in range(6):
                matcher = compiled(Grammar("json_schema", json.dumps({"enum": [f"v{(seed + number) % 4}", 1]})))
                found.append(tokenizers["llama3"].decode(walk(matcher, random.Random(seed), stops=frozenset())))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed and len(found) == 48 and all(json.loads(text) in ("v0", "v1", "v2", "v3", 1) for text in found)


def test_without_the_library_the_remedy_is_named(tokenizers, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"got no llguidance .* expected .* pip install 'accessory\[serve\]'"):
        Grammars(tokenizers["llama3"])(choice("a"))


SETTINGS = [
    Sampling(),
    Sampling(temperature=1.5, seed=1),
    Sampling(temperature=1.5, seed=2),
    Sampling(temperature=1.5, top_p=0.9, seed=3),
    Sampling(temperature=1.5, top_k=5, seed=4),
    Sampling(temperature=1.5, min_p=0.2, repetition_penalty=1.3, seed=5),
    Sampling(temperature=5.0, frequency_penalty=2.0, presence_penalty=2.0, seed=6),
    Sampling(temperature=1.5, top_p=0.5, top_k=3, frequency_penalty=-2.0, seed=7),
]


def test_the_model_that_ships_answers_in_a_schema_with_every_setting(tiny) -> None:
    engine = Engine(tiny, ONE, rows=8)
    told = Grammar("json_schema", json.dumps(SCHEMA))
    requests = [Request("Tell me about it.", sampling=s, grammar=told, max_gen_len=400) for s in SETTINGS]
    for result in engine.generate(requests):
        assert result.finish == "stop" and fits(json.loads(result.text)), result.text


def begins_json(text: str) -> bool:
    """Whether a text that was cut somewhere may go on to be JSON, by where Python's reader gives up."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        rest = text[error.pos :]
        cut = r"|tr?u?|fa?l?s?|nu?l?|-|(\.\d*)?([eE][-+]?)?"
        string = error.msg.startswith("Unterminated string")
        return string or bool(re.fullmatch(cut, rest)) or (r"\u" in text[-6:] and "escape" in error.msg)
    return True


@pytest.mark.parametrize("length", [1, 2, 3, 7, 20, 60])
def test_an_answer_cut_by_its_length_begins_json(tiny, length: int) -> None:
    requests = [
        Request("What is it?", sampling=setting, grammar=Grammar("json_object"), max_gen_len=length)
        for setting in SETTINGS
    ]
    for result in Engine(tiny, ONE).generate(requests):
        assert result.text.startswith("{"[: len(result.text)]) and begins_json(result.text), result.text
        assert result.finish == "length" or isinstance(json.loads(result.text), dict)


def test_a_shorter_answer_is_the_beginning_of_the_longer_one(tiny) -> None:
    request = Request(
        "Hm?", grammar=Grammar("json_schema", json.dumps(SCHEMA)), sampling=Sampling(temperature=1.5, seed=11)
    )
    engine = Engine(tiny, ONE)
    whole = engine.generate([replace(request, max_gen_len=300)])[0]
    assert fits(json.loads(whole.text))
    lengths = range(1, len(whole.ids), 9)
    parts = engine.generate([replace(request, max_gen_len=length) for length in lengths])
    for length, part in zip(lengths, parts, strict=True):
        assert part.ids == whole.ids[:length] and part.finish == "length"


def test_grammars_and_plain_answers_share_a_batch(tiny) -> None:
    plain = [Request("What is it?", max_gen_len=8), Request("Hello", max_gen_len=8)]
    bound = replace(plain[0], grammar=choice("yes", "no"))
    alone = [result.ids for result in Engine(tiny, ONE).generate(plain)]
    first, said, second = Engine(tiny, ONE).generate([plain[0], bound, plain[1]])
    assert said.text in ("yes", "no") and said.finish == "stop" and [first.ids, second.ids] == alone


def test_a_matcher_that_fails_in_mid_answer_ends_its_request_alone(tiny, monkeypatch) -> None:
    plain = Request("What is it?", max_gen_len=8)
    bound = Request("Hm?", grammar=Grammar("json_schema", json.dumps(SCHEMA)), max_gen_len=90)
    alone = [result.text for result in Engine(tiny, ONE).generate([plain, bound])]
    engine, steps, inner = Engine(tiny, ONE), [0], Matcher.allowed
    poisoned = engine.submit(replace(bound, client="poisoned"))
    others = [engine.submit(plain), engine.submit(bound)]

    def allowed(self: Matcher) -> torch.Tensor:
        steps[0] += self is bad
        if steps[0] > 3 and self is bad:
            raise ValueError("json_schema: the answer cannot go on (a limit); simplify the grammar")
        return inner(self)

    engine.step()
    bad = next(r.prompt.grammar for r in engine._running.values() if r.answer is poisoned)
    monkeypatch.setattr(Matcher, "allowed", allowed)
    while not engine.idle:
        engine.step()
    result = poisoned.result
    assert result is not None and result.finish == "error" and "cannot go on" in result.error
    assert result.text and alone[1].startswith(result.text) and len(result.ids) >= 3
    assert [other.result.text for other in others if other.result] == alone


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model of more rows than its tokenizer has tokens, that never ends an answer by itself."""
    folder = tmp_path_factory.mktemp("rows") / "model"
    return opened(write_model(folder, "llama", sees=False, vocab_size=448, endless=True))


FORM = Template(user=("{text}",), answer=(" {text} ", "#"), stops=("#", "a"))


def test_a_padded_vocabulary_is_no_hindrance(endless) -> None:
    assert endless.config.vocab_size > endless.tokenizer.size
    request = Request("x", grammar=Grammar("json_schema", json.dumps(SCHEMA)), max_gen_len=250, template="none")
    for setting in SETTINGS[:4]:
        result = Engine(endless, ONE).generate([replace(request, sampling=setting)])[0]
        assert result.finish in ("stop", "length") and begins_json(result.text)


def test_the_templates_space_precedes_the_answer_and_its_stop_strings_do_not_count(endless) -> None:
    request = Request("x", grammar=choice("#a#", " a"), template=FORM, max_gen_len=30)
    engine = Engine(endless, ONE)
    seen = {
        engine.generate([replace(request, sampling=Sampling(temperature=9.0, seed=seed))])[0].text for seed in range(24)
    }
    assert seen == {"#a#", " a"}


def test_a_requests_own_stop_string_ends_an_answer_in_a_grammar(endless) -> None:
    request = Request("x", grammar=choice("one, two"), template="none", stops=(",",), max_gen_len=30)
    result = Engine(endless, ONE).generate([request])[0]
    assert (result.text, result.finish) == ("one", "stop")


def test_without_any_stop_an_answer_in_a_grammar_still_ends(endless) -> None:
    request = Request("x", grammar=choice("one"), template="none", ignore_stops=True, max_gen_len=30)
    result = Engine(endless, ONE).generate([request])[0]
    assert (result.text, result.finish) == ("one", "stop")


@pytest.mark.slow
def test_many_seeds_at_a_high_temperature_keep_to_a_schema(tiny) -> None:
    engine = Engine(tiny, ONE, rows=16)
    told = Grammar("json_schema", json.dumps(SCHEMA))
    settings = [Sampling(temperature=1.5, seed=seed, top_p=(1.0, 0.9, 0.5)[seed % 3]) for seed in range(150)]
    torch.manual_seed(0)
    for result in engine.generate(
        [Request("Go on.", sampling=setting, grammar=told, max_gen_len=400) for setting in settings]
    ):
        assert result.finish == "stop" and fits(json.loads(result.text)), result.text
