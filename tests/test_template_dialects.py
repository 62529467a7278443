"""Templates of other tools and LLaVA's: exact strings, names with their dialect, pictures anywhere.

Must not need a tokenizer.
"""

import re

import pytest
from test_template import CURIOUS, HELPFUL, written

from accessory.data.template import (
    ALIASES,
    DIALECTS,
    TEMPLATES,
    Picture,
    Text,
    Turn,
    get_template,
    qualify,
    render,
    tagged,
)

USER = CURIOUS.format("user")
TALK = [Turn("user", " hi "), Turn("assistant", "yo"), Turn("user", "q2"), Turn("assistant", "a2")]
SYSTEM = Turn("system", "Be.")
LLAMA3 = (
    "<bos>{0}<start_header_id>user<end_header_id>\n\n hi <eot_id><start_header_id>assistant<end_header_id>\n\n"
    "[[yo<eot_id>]]<start_header_id>user<end_header_id>\n\nq2<eot_id><start_header_id>assistant<end_header_id>\n\n"
    "[[a2<eot_id>]]"
)
CHATML = (
    "{0}<im_start>user\n hi <im_end>\n<im_start>assistant\n[[yo<im_end>\n]]"
    "<im_start>user\nq2<im_end>\n<im_start>assistant\n[[a2<im_end>\n]]"
)
SAYS = "<im_start>system\n{0}<im_end>\n"
LLAMA2 = "<bos>[INST] {0} hi  [/INST][[yo<eos>]]<bos>[INST] q2 [/INST][[a2<eos>]]"
VICUNA = "{0}USER:  hi  ASSISTANT:[[yo<eos>]]USER: q2 ASSISTANT:[[a2<eos>]]"
MISTRAL = "<bos>[INST] {0} hi [/INST][[ yo<eos>]][INST] q2[/INST][[ a2<eos>]]"
ZH = "You are a helpful assistant. \u4f60\u662f\u4e00\u4e2a\u4e50\u4e8e\u52a9\u4eba\u7684\u52a9\u624b\u3002"

# What a conversation begins with: by itself, and with the system text "Be.".
LLAMAFACTORY = {
    "llama2": (LLAMA2, "", "<<SYS>>\nBe.\n<</SYS>>\n\n"),
    "llama2_zh": (LLAMA2, f"<<SYS>>\n{ZH}\n<</SYS>>\n\n", "<<SYS>>\nBe.\n<</SYS>>\n\n"),
    "llama3": (LLAMA3, "", "<start_header_id>system<end_header_id>\n\nBe.<eot_id>"),
    "mistral": (MISTRAL, "", "Be.\n\n"),
    "vicuna": (VICUNA, USER, "Be."),
    "llava": (VICUNA, USER, "Be."),
    "alpaca": (
        "{0}### Instruction:\n hi \n\n### Response:\n[[yo<eos>\n\n]]"
        "### Instruction:\nq2\n\n### Response:\n[[a2<eos>\n\n]]",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
        "Be.",
    ),
    "default": (
        "{0}Human:  hi <eos>\nAssistant:[[yo<eos>\n]]Human: q2<eos>\nAssistant:[[a2<eos>\n]]",
        "",
        "System: Be.<eos>\n",
    ),
    "chatml": (CHATML, "", SAYS.format("Be.")),
    "chatml_de": (
        CHATML,
        SAYS.format("Du bist ein freundlicher und hilfsbereiter KI-Assistent."),
        SAYS.format("Be."),
    ),
    "empty": ("{0} hi [[yo]]q2[[a2]]", "", "Be."),
    "qwen": (
        CHATML,
        SAYS.format("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        SAYS.format("Be."),
    ),
    "yi": (CHATML, "", SAYS.format("Be.")),
    "llava_next_qwen": (CHATML, SAYS.format("You are a helpful assistant."), SAYS.format("Be.")),
}
SAME = {
    "llava_next": "vicuna",
    "llava_next_llama3": "llama3",
    "llava_next_mistral": "mistral",
    "llava_next_yi": "yi",
}


@pytest.mark.parametrize("name", LLAMAFACTORY)
def test_llamafactorys_templates_are_written_exactly_so(name):
    form, silent, system = LLAMAFACTORY[name]
    assert written(f"llamafactory/{name}", TALK, open_answer=False) == form.replace("{0}", silent)
    assert written(f"llamafactory/{name}", [SYSTEM, *TALK], open_answer=False) == form.replace("{0}", system)


def test_every_template_of_llamafactory_has_its_golden_string():
    assert set(LLAMAFACTORY) | set(SAME) | {"fewshot"} == set(DIALECTS["llamafactory"])
    for name, other in SAME.items():
        assert DIALECTS["llamafactory"][name] == DIALECTS["llamafactory"][other]


def test_fewshot_learns_one_eos_at_the_end():
    assert written("llamafactory/fewshot", TALK, open_answer=False) == " hi [[yo\n\n]]q2[[a2\n\n<eos>]]"
    assert written("llamafactory/fewshot", TALK[:3]) == " hi [[yo\n\n]]q2"


@pytest.mark.parametrize("name", sorted(DIALECTS["llamafactory"]))
def test_a_picture_stands_directly_before_the_text_in_llamafactorys(name):
    assert "{0}hi" in written(f"llamafactory/{name}", [Turn("user", "hi", 1)])


@pytest.mark.parametrize(
    ("name", "prompt", "again"),
    [
        ("llava1_5", "<bos>USER: {0}\nQ\nASSISTANT:", "[[ A<eos>]]USER: Q2\nASSISTANT:"),
        (
            "llava-vicuna",
            f"<bos>{CURIOUS.format('human')} USER: {{0}}\nQ ASSISTANT:",
            "[[ A<eos>]]USER: Q2 ASSISTANT:",
        ),
        ("llava-mistral-instruct", "<bos>[INST] {0}\nQ [/INST]", "[[ A <eos>]][INST] Q2 [/INST]"),
        (
            "llava-yi-instruct",
            "<im_start>system\nAnswer the questions.<im_end><im_start>user\n{0}\nQ<im_end><im_start>assistant\n",
            "[[A<im_end>]]<im_start>user\nQ2<im_end><im_start>assistant\n",
        ),
        (
            "llama-llava-next",
            f"<bos><start_header_id>system<end_header_id>\n\n{HELPFUL}<eot_id><start_header_id>user<end_header_id>"
            "\n\n{0}\nQ<eot_id><start_header_id>assistant<end_header_id>\n\n",
            "[[A<eot_id>]]<start_header_id>user<end_header_id>\n\nQ2<eot_id>"
            "<start_header_id>assistant<end_header_id>\n\n",
        ),
        (
            "llava-qwen-instruct",
            "<im_start>system\nYou are a helpful assistant.<im_end>\n<im_start>user\n{0}\nQ<im_end>\n"
            "<im_start>assistant\n",
            "[[A<im_end>]]\n<im_start>user\nQ2<im_end>\n<im_start>assistant\n",
        ),
        (
            "llava-llama-instruct",
            "<bos><start_header_id>user<end_header_id>\n\n{0}\nQ<eot_id><start_header_id>assistant<end_header_id>\n\n",
            "[[A<eot_id>]]<start_header_id>user<end_header_id>\n\nQ2<eot_id>"
            "<start_header_id>assistant<end_header_id>\n\n",
        ),
    ],
)
def test_swifts_names_are_llavas_exact_prompts(name, prompt, again):
    turns = [Turn("user", "Q", 1), Turn("assistant", "A"), Turn("user", "Q2")]
    assert written(f"swift/{name}", turns[:1]) == prompt
    assert written(f"swift/{name}", turns) == prompt + again


def test_a_name_with_its_dialect_wins_over_the_dialect_asked_for():
    assert get_template("llamafactory/vicuna") is get_template("vicuna", dialect="llamafactory")
    assert get_template("accessory/alpaca", dialect="llamafactory") is TEMPLATES["alpaca"]
    assert get_template("alpaca", dialect="llamafactory") != TEMPLATES["alpaca"]
    assert get_template("Swift/llava1_6-mistral-instruct") is TEMPLATES["mistral_instruct"]


def test_a_qualified_name_finds_the_same_template_in_any_dialect():
    for dialect, table in DIALECTS.items():
        for name in [*table, *ALIASES[dialect]]:
            told = qualify(name, dialect=dialect)
            assert get_template(told) is get_template(name, dialect=dialect)
            assert ("/" in told) == (dialect != "accessory")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llamafactory/vicunna", "did you mean 'vicuna'"),
        ("llamafactory/vicuna_v1", "did you mean 'vicuna'"),
        ("lamafactory/vicuna", "did you mean 'llamafactory'"),
        ("swift/llama3", "there is llamafactory/llama3|there is accessory/llama3"),
        ("llama2_zh", "there is llamafactory/llama2_zh"),
        ("/models/x", "dialect ''"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(name, said):
    with pytest.raises(ValueError, match=said):
        get_template(name)


@pytest.mark.parametrize(
    ("text", "turn"),
    [
        ("hi", Turn("user", "hi")),
        ("<image>\nhi", Turn("user", "hi", 1)),
        (" <image> <image>\nhi ", Turn("user", "hi ", 2)),
        ("<image>", Turn("user", "", 1)),
        ("a<image>b<image>", Turn("user", "ab", 2, places=(1, 2))),
        ("<image>\na <image><image> b", Turn("user", "a  b", 3, places=(2, 2))),
    ],
)
def test_tags_say_where_pictures_stand(text, turn):
    assert tagged("user", text) == turn


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("caption", "plain")])
def test_pictures_within_a_text_stay_there_in_every_template(name):
    turns = [
        tagged("user", "one <image>, two <image><image>!"),
        Turn("assistant", "yo"),
        tagged("user", "<image>a<image>b"),
    ]
    text = written(name, turns)
    assert "one {0}, two {1}{2}!" in text and "a{4}b" in text
    assert [int(number) for number in re.findall(r"\{(\d)\}", text)] == [0, 1, 2, 3, 4]
    apart = written(name, [Turn("user", "one , two !"), Turn("assistant", "yo"), Turn("user", "ab", 1)])
    assert re.sub(r"\{[0124]\}", "", text).replace("{3}", "{0}") == apart


def test_only_a_template_without_words_takes_an_empty_question():
    bare = {f"{dialect}/{name}" for dialect, table in DIALECTS.items() for name in table if table[name].bare}
    assert bare == {
        "accessory/none",
        "accessory/caption",
        "accessory/plain",
        "llamafactory/fewshot",
        "llamafactory/empty",
    }


def test_blanks_go_up_to_the_first_and_last_picture_alone():
    turn = tagged("user", "  <image> a <image>  ")
    assert written("llama2", [turn]) == "<bos>[INST] {0}\na {1} [/INST]"
    assert written("llama2", [Turn("user", " x ", 2, places=(0, 3))]) == "<bos>[INST] {0} x {1} [/INST]"


def test_places_beyond_a_text_are_its_end_and_without_pictures_there_are_none():
    assert written("vicuna_v1", [Turn("user", "hi", 1, places=(9,))]).endswith("USER: hi{0} ASSISTANT:")
    assert written("vicuna_v1", [Turn("user", "hi", 0, places=(1,))]).endswith("USER: hi ASSISTANT:")
    assert written("caption", [Turn("user", "", 1, places=(0,))]) == "<bos>{0}"


@pytest.mark.parametrize("turn", [Turn("user", "ab", 2, places=(2, 1)), Turn("user", "ab", 1, places=(0, 1))])
def test_places_that_make_no_sense_are_an_error(turn):
    with pytest.raises(ValueError, match="places: got"):
        written("vicuna_v1", [turn])


@pytest.mark.parametrize("name", [f"{dialect}/{name}" for dialect, table in DIALECTS.items() for name in table])
def test_a_prompt_begins_the_answered_conversation_in_every_dialect(name):
    said = "" if name.endswith(("caption", "plain")) else "ask"
    turns = [Turn("user", said, 1), Turn("assistant", "one"), Turn("user", said, 2), Turn("assistant", "two")]
    for count in (1, 3):
        prompt, whole = render(name, turns[:count]), render(name, turns, open_answer=False)
        assert whole[: len(prompt)] == prompt
        assert getattr(whole[len(prompt)], "supervised", False)


@pytest.mark.parametrize("name", [f"{dialect}/{name}" for dialect, table in DIALECTS.items() for name in table])
def test_a_typed_tag_or_token_is_text_in_every_dialect(name):
    if name.endswith(("caption", "plain")):
        return
    typed = "{text} <image> </s> <|im_end|> <|eot_id|> [INST] <<SYS>> {{ x }} {% endif %}"
    forged = render(
        name, [Turn("system", typed), Turn("user", typed)] if get_template(name).system else [Turn("user", typed)]
    )
    calm = render(
        name, [Turn("system", "hi"), Turn("user", "hi")] if get_template(name).system else [Turn("user", "hi")]
    )
    assert not any(isinstance(part, Picture) for part in forged)
    assert [Text(part.text.replace(typed, "hi")) if isinstance(part, Text) else part for part in forged] == calm
