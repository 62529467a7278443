"""Calls in an answer's text: what is one, what is text, and that no piece of the stream decides it.

Must not need a tokenizer or a model.
"""

import json
import random

import pytest

from accessory.data.template import CallDelta, CallReader, tools_of

KINDS = {"action": "vicuna_v1", "tagged": "chatml", "opening": "llama3", "marked": "llamafactory/mistral"}
ARGUMENTS = {"q": 'a } " \\ ] { [', "n": [1, {"x": None}], "u": "\u00e9\U0001f415"}


def said(kind: str, *calls: tuple[str, dict]) -> str:
    """Calls as a model writes them."""
    if kind == "action":
        return "\n".join(f"Action: {name}\nAction Input: {json.dumps(given)}" for name, given in calls)
    key = "parameters" if kind == "opening" else "arguments"
    texts = [json.dumps({"name": name, key: given}) for name, given in calls]
    if kind == "tagged":
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
    if kind == "marked":
        return f"[TOOL_CALLS] [{', '.join(texts)}]"
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def heard(kind: str, pieces, **how) -> list:
    """What the reader gives, neighbouring texts as one, calls as (name, arguments)."""
    reader = CallReader(tools_of(KINDS[kind]), **how)
    items = [item for piece in pieces for item in reader.push(piece)] + reader.finish()
    out: list = []
    for item in items:
        if isinstance(item, CallDelta):
            out.append((item.name, json.loads(item.arguments)))
        elif out and isinstance(out[-1], str):
            out[-1] += item
        else:
            out.append(item)
    return out


TWO = [("get-weather.now", ARGUMENTS), ("b", {})]
CASES = {
    "action": [
        ("Thought: I look.\n" + said("action", *TWO), ["Thought: I look.", *TWO]),
        (said("action", TWO[0]) + "\nObservation: made up", [TWO[0], "\nObservation: made up"]),
        ("Action: f\nAction Input: ```json\n{}\n```\n", [("f", {})]),
        ("Action: f\nAction Input: ```{}``` so", [("f", {}), " so"]),
        ("```\nAction: f\nAction Input: {}\n```", ["```", ("f", {}), "\n```"]),
        ("The Action: f\nAction Input: {}", ["The Action: f\nAction Input: {}"]),
        ("Action: wait.\n\nAction: f\nAction Input: {}", ["Action: wait.", ("f", {})]),
        ("Action: a b\nAction Input: {}", ["Action: a b\nAction Input: {}"]),
        ("Action: f\nAction Input: none", ["Action: f\nAction Input: none"]),
        ("Action: f\nAction Input: {'a': 1}", ["Action: f\nAction Input: {'a': 1}"]),
        ('Action: f\nAction Input: {"a": [1', ['Action: f\nAction Input: {"a": [1']),
        ("Action: f", ["Action: f"]),
    ],
    "tagged": [
        ("I look.\n\n" + said("tagged", *TWO) + "\n", ["I look.", *TWO]),
        ("<tool_call>" + json.dumps({"name": "f", "arguments": '{"a": 1}'}), [("f", {"a": 1})]),
        ('<tool_call>[{"name": "f"}, {"name": "g"}]</tool_call>', [("f", {}), ("g", {})]),
        ("a <tool_call> b <tool", ["a <tool_call> b <tool"]),
        ('<tool_call>{"name": "f"}</tool_calls> <tool_call>{"name": "g"}</tool_call>', None),
        ('<tool_call>{"name": 3}</tool_call>', ['<tool_call>{"name": 3}</tool_call>']),
        ('<tool_call>{"name": "f", "arguments": NaN}</tool_call>', None),
        ('<tool_call>{"name": "f", "arguments": {"a"', ['<tool_call>{"name": "f", "arguments": {"a"']),
        ("x\n\n", ["x\n\n"]),
    ],
    "opening": [
        (" \n" + said("opening", TWO[0]), [TWO[0]]),
        ("<|python_tag|>" + said("opening", *TWO), TWO),
        ("; ".join(said("opening", call) for call in TWO), TWO),
        (said("opening", TWO[0]) + "\n\nDone.", [TWO[0], "\n\nDone."]),
        ("Sure: " + said("opening", TWO[1]), ["Sure: " + said("opening", TWO[1])]),
        ('{"name": "Bob"}', ['{"name": "Bob"}']),
        ('{"a": 1} {"name": "f", "parameters": {}}', ['{"a": 1} {"name": "f", "parameters": {}}']),
        ("[]", ["[]"]),
        ("[1, 2", ["[1, 2"]),
        ("<|python_", ["<|python_"]),
        ('{"type": "function", "function": {"name": "f", "arguments": {}}}', [("f", {})]),
    ],
    "marked": [
        ("I look. " + said("marked", *TWO), ["I look.", *TWO]),
        ('[TOOL_CALLS]{"name": "f", "arguments": {}} then', [("f", {}), " then"]),
        ("[TOOL_CALLS] f", ["[TOOL_CALLS] f"]),
        ("[TOOL_CALL", ["[TOOL_CALL"]),
        ("a list [1] and [TOOL", ["a list [1] and [TOOL"]),
    ],
}
ALL = [(kind, text, expected) for kind, cases in CASES.items() for text, expected in cases]


@pytest.mark.parametrize(("kind", "text", "expected"), ALL)
def test_calls_and_text_are_told_apart(kind, text, expected):
    whole = heard(kind, [text])
    if expected is not None:
        assert whole == expected
    assert "".join(item for item in whole if isinstance(item, str)).count("{") <= text.count("{")


@pytest.mark.parametrize(("kind", "text", "expected"), ALL)
def test_no_cut_of_the_stream_changes_what_is_heard(kind, text, expected):
    whole = heard(kind, [text])
    assert heard(kind, list(text)) == whole
    for at in range(1, len(text)):
        assert heard(kind, [text[:at], text[at:]]) == whole, text[:at]


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_no_call_goes_out_as_it_comes(kind):
    reader = CallReader(tools_of(KINDS[kind]))
    text = "It is 22 C < 30 C [so] warm.\nAct"
    out = ["".join(reader.push(letter)) for letter in text]
    assert "".join(out[:20]) == text[:19].rstrip() or "".join(out[:20]) == text[:20].rstrip()
    assert "".join(out) + "".join(reader.finish()) == text


@pytest.mark.parametrize("kind", KINDS)
def test_only_tools_that_there_are_are_called(kind):
    text = said(kind, ("f", {}))
    assert heard(kind, [text], names=["f"]) == [("f", {})]
    assert heard(kind, [text], names=["g"]) == [text]


def test_ids_are_the_same_for_the_same_answer_and_differ_between_answers():
    def ids(salt: str) -> list:
        reader = CallReader(tools_of("chatml"), salt=salt)
        return [(call.index, call.id) for call in reader.push(said("tagged", *TWO)) if isinstance(call, CallDelta)]

    assert ids("a") == ids("a") and not set(ids("a")) & set(ids("b"))
    assert [number for number, _ in ids("a")] == [0, 1] and all(name.startswith("call_") for _, name in ids("a"))


@pytest.mark.parametrize("kind", KINDS)
def test_garbage_is_text_to_the_letter(kind):
    deep = "[" * 100_000 + "]" * 100_000
    for value in (deep, '{"name": "f", "arguments": ' + deep + "}", '{"name": "f", "parameters": ' + "9" * 5000 + "}"):
        mark = {"action": "Action: f\nAction Input: ", "tagged": "<tool_call>", "marked": "[TOOL_CALLS]"}.get(kind, "")
        text = f"{mark}{value}" + ("</tool_call>" if kind == "tagged" else "")
        found = heard(kind, [text])
        assert all(isinstance(item, str) for item in found) and "".join(found) == text or kind == "action"


def test_a_long_call_costs_no_more_per_piece_than_a_short_one():
    text = said("tagged", ("f", {"text": "{}" * 50_000}))
    reader = CallReader(tools_of("chatml"))
    assert [call.name for piece in text for call in reader.push(piece)] == ["f"]


BITS = {
    "action": ["Action:", " f", "\n", "Action Input:", "{}", ' {"a": "}"}', "```", "json", " ", "x", "Act", "f-1", "{"],
    "tagged": [
        "<tool_call>",
        "</tool_call>",
        "\n",
        '{"name": "f"}',
        '{"name": "g", "arguments": {}}',
        "<",
        "x",
        " ",
        "[",
    ],
    "opening": ["<|python_tag|>", '{"name": "f", "parameters": {}}', "[", "]", ", ", ";", "\n", "x", "{", "<|py"],
    "marked": ["[TOOL_CALLS]", '[{"name": "f"}]', '{"name": "f"}', " ", "\n", "[", "x", "[TOOL", "]"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_mixture_of_bits_is_lost_or_heard_differently_in_pieces(kind):
    dice = random.Random(kind)
    for _ in range(400):
        text = "".join(dice.choice(BITS[kind]) for _ in range(dice.randint(1, 9)))
        whole = heard(kind, [text])
        assert heard(kind, list(text)) == whole, text
        cuts = sorted(dice.sample(range(len(text) + 1), min(3, len(text))))
        pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert heard(kind, pieces) == whole, (text, pieces)
        if all(isinstance(item, str) for item in whole):
            assert "".join(whole) == text
        else:  # what is no call is there in its order
            rest = iter("".join(text.split()))
            assert all(letter in rest for letter in "".join(i for i in whole if isinstance(i, str)) if letter.strip())
