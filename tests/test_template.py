"""Templates: the exact strings, places of pictures, supervision, order of turns.

Must not need a tokenizer.
"""

from dataclasses import fields

import pytest

from accessory.data.template import (
    ALIASES,
    DIALECTS,
    TEMPLATES,
    Control,
    Picture,
    Pictures,
    Text,
    Turn,
    get_template,
    render,
)

ASK = [Turn("user", "hi")]
TALK = [Turn("user", "hi"), Turn("assistant", "yo"), Turn("user", "q2")]
CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
BELOW = "Below is an instruction that describes a task"
WRITE = "Write a response that appropriately completes the request"


def written(name, turns, **options) -> str:
    """Controls as <name>, pictures as {number}, supervised stretches in double brackets."""
    out, open_ = "", False
    for part in render(name, turns, **options):
        marked = getattr(part, "supervised", False)
        out += ("[[" if marked else "]]") if marked != open_ else ""
        open_ = marked
        if isinstance(part, Text) or (isinstance(part, Control) and part.text):
            out += part.text if isinstance(part, Text) else part.name
        else:
            out += f"{{{part.index}}}" if isinstance(part, Picture) else f"<{part.name.strip('<|>')}>"
    return out + ("]]" if open_ else "")


HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
GOLDEN = {
    "alpaca": f"<bos>{BELOW}. {WRITE}.\n\n### Instruction:\nhi\n\n### Response:[[yo<eos>]]"
    "\n\n### Instruction:\nq2\n\n### Response:",
    "dialog": f"<bos>{CURIOUS.format('human')}\n\n### Human: hi\n### Assistant:[[ yo\n###]] Human: q2\n### Assistant:",
    "shortqa": f"<bos>{BELOW}. {WRITE} using a single word or phrase.\n\n### Instruction:\nhi\n\n### Response:"
    "[[yo<eos>]]\n\n### Instruction:\nq2\n\n### Response:",
    "qg": "<bos>Generate a question whose answer is:\nhi\n\nQuestion:\n[[yo<eos>]]"
    "\n\nGenerate a question whose answer is:\nq2\n\nQuestion:\n",
    "none": "<bos>hi[[yo<eos>]]q2",
    "vicuna_v1": f"<bos>{CURIOUS.format('user')} USER: hi ASSISTANT:[[ yo<eos>]]USER: q2 ASSISTANT:",
    "llava_v1": f"<bos>{CURIOUS.format('human')} USER: hi ASSISTANT:[[ yo<eos>]]USER: q2 ASSISTANT:",
    "llama2": "<bos>[INST] hi [/INST][[ yo <eos>]]<bos>[INST] q2 [/INST]",
    "llama3": "<bos><start_header_id>user<end_header_id>\n\nhi<eot_id><start_header_id>assistant<end_header_id>\n\n"
    "[[yo<eot_id>]]<start_header_id>user<end_header_id>\n\nq2<eot_id>"
    "<start_header_id>assistant<end_header_id>\n\n",
    "chatml": "<im_start>user\nhi<im_end>\n<im_start>assistant\n[[yo<im_end>]]\n<im_start>user\nq2<im_end>\n"
    "<im_start>assistant\n",
    "tiny": "<bos>Human: hi\nAssistant:[[ yo<eos>]]Human: q2\nAssistant:",
    "llava_1_5": "<bos>USER: hi ASSISTANT:[[ yo<eos>]]USER: q2 ASSISTANT:",
    "llava_llama_2": f"<bos>[INST] <<SYS>>\n{HELPFUL}\n<</SYS>>\n\nhi [/INST][[ yo <eos>]]<bos>[INST] q2 [/INST]",
    "mistral_instruct": "<bos>[INST] hi [/INST][[ yo <eos>]][INST] q2 [/INST]",
    "chatml_direct": "<im_start>system\nAnswer the questions.<im_end><im_start>user\nhi<im_end><im_start>assistant\n"
    "[[yo<im_end>]]<im_start>user\nq2<im_end><im_start>assistant\n",
    "llava_llama_3": f"<bos><start_header_id>system<end_header_id>\n\n{HELPFUL}<eot_id><start_header_id>user"
    "<end_header_id>\n\nhi<eot_id><start_header_id>assistant<end_header_id>\n\n[[yo<eot_id>]]<start_header_id>user"
    "<end_header_id>\n\nq2<eot_id><start_header_id>assistant<end_header_id>\n\n",
    "qwen_1_5": "<im_start>system\nYou are a helpful assistant.<im_end>\n<im_start>user\nhi<im_end>\n"
    "<im_start>assistant\n[[yo<im_end>]]\n<im_start>user\nq2<im_end>\n<im_start>assistant\n",
}
END = {
    "dialog": ("[[ a2\n###]]<eos>"),
    "chatml": "[[a2<im_end>]]\n",
    "qwen_1_5": "[[a2<im_end>]]\n",
    "chatml_direct": "[[a2<im_end>]]",
    "llama3": "[[a2<eot_id>]]",
    "llava_llama_3": "[[a2<eot_id>]]",
}
END |= {name: "[[ a2<eos>]]" for name in ("vicuna_v1", "llava_v1", "llava_1_5", "tiny")}
END |= {name: "[[ a2 <eos>]]" for name in ("llama2", "llava_llama_2", "mistral_instruct")}
PICTURES_ALONE = {"caption", "plain"}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_prompt_is_written_exactly_so(name):
    assert written(name, TALK) == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_a_conversation_is_its_prompt_and_the_answer(name):
    answered = [*TALK, Turn("assistant", "a2")]
    assert written(name, answered, open_answer=False) == GOLDEN[name] + END.get(name, "[[a2<eos>]]")


def test_every_template_has_its_golden_string():
    assert set(GOLDEN) | PICTURES_ALONE == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_parts_of_a_prompt_begin_those_of_the_answered_conversation(name):
    said = "" if name in PICTURES_ALONE else "ask"
    turns = [Turn("user", said, 1), Turn("assistant", "one"), Turn("user", said, 2), Turn("assistant", "two")]
    for count in (1, 3):
        prompt, whole = render(name, turns[:count]), render(name, turns, open_answer=False)
        assert whole[: len(prompt)] == prompt
        assert getattr(whole[len(prompt)], "supervised", False)


def test_alpaca_with_an_input():
    turns = [Turn("user", "Add.", input="1 2")]
    assert written("alpaca", turns) == (
        f"<bos>{BELOW}, paired with an input that provides further context. {WRITE}.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )


def test_an_input_follows_the_text_where_a_template_has_no_place_for_it():
    assert written("none", [Turn("user", "Add.", input="1 2")]) == "<bos>Add.\n1 2"


def test_a_caption_is_asked_with_a_picture_alone():
    assert written("caption", [Turn("user", "", 1), Turn("assistant", "a fox")], open_answer=False) == (
        "<bos>{0}[[a fox<eos>]]"
    )
    with pytest.raises(ValueError, match="pictures alone"):
        render("caption", [Turn("user", "what?", 1)])


def test_a_projector_learns_a_picture_and_its_caption():
    assert written("plain", [Turn("user", "", 1), Turn("assistant", "a fox")], open_answer=False) == (
        "<bos>{0}[[a fox\n]]"
    )


def test_an_empty_prompt_of_none_is_bos_alone():
    assert render("none", [Turn("user", "")]) == [Control("bos")]


@pytest.mark.parametrize("name", ["alpaca", "dialog", "shortqa", "qg", "none"])
def test_the_reference_forms_put_a_picture_right_after_bos(name):
    parts = render(name, [Turn("user", "hi", 1)])
    assert parts[:2] == [Control("bos"), Picture(0)]
    assert written(name, [Turn("user", "hi", 1)]).replace("{0}", "") == written(name, ASK)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("vicuna_v1", "USER: {0}\nhi ASSISTANT:"),
        ("llava_v1", "USER: {0}\nhi ASSISTANT:"),
        ("llama2", "<bos>[INST] {0}\nhi [/INST]"),
        ("llama3", "user<end_header_id>\n\n{0}\nhi<eot_id>"),
        ("chatml", "<im_start>user\n{0}\nhi<im_end>"),
        ("llava_1_5", "<bos>USER: {0}\nhi ASSISTANT:"),
        ("llava_llama_2", "<</SYS>>\n\n{0}\nhi [/INST]"),
        ("mistral_instruct", "<bos>[INST] {0}\nhi [/INST]"),
        ("chatml_direct", "Answer the questions.<im_end><im_start>user\n{0}\nhi<im_end>"),
        ("llava_llama_3", "user<end_header_id>\n\n{0}\nhi<eot_id>"),
        ("qwen_1_5", "<im_start>user\n{0}\nhi<im_end>\n"),
    ],
)
def test_other_forms_put_a_picture_before_the_users_text(name, place):
    assert place in written(name, [Turn("user", "hi", 1)])


def test_pictures_of_any_turn_stay_with_it():
    turns = [Turn("user", "hi"), Turn("assistant", "yo"), Turn("user", "q2", 2)]
    assert written("vicuna_v1", turns).endswith("<eos>]]USER: {0}\n{1}\nq2 ASSISTANT:")
    assert written("alpaca", turns).endswith("<eos>]]{0}{1}\n\n### Instruction:\nq2\n\n### Response:")
    assert written("dialog", turns).endswith("\n###]] Human: {0}{1}q2\n### Assistant:")


def test_llama2_strips_as_meta_does():
    turns = [Turn("user", " a "), Turn("assistant", " b\n"), Turn("user", "\nc ")]
    assert written("llama2", turns) == "<bos>[INST] a [/INST][[ b <eos>]]<bos>[INST] c [/INST]"
    system = [Turn("system", " s "), Turn("user", " a ")]
    assert written("llama2", system) == "<bos>[INST] <<SYS>>\n s \n<</SYS>>\n\n a [/INST]"


def test_llama3_strips_every_turn():
    turns = [Turn("system", " s\n"), Turn("user", "\na ")]
    assert written("llama3", turns) == (
        "<bos><start_header_id>system<end_header_id>\n\ns<eot_id><start_header_id>user<end_header_id>\n\na<eot_id>"
        "<start_header_id>assistant<end_header_id>\n\n"
    )


def test_a_system_turn_replaces_the_default():
    turns = [Turn("system", "Be brief."), *ASK]
    assert written("vicuna_v1", turns) == "<bos>Be brief. USER: hi ASSISTANT:"
    assert written("dialog", turns) == "<bos>Be brief.\n\n### Human: hi\n### Assistant:"
    assert written("alpaca", turns) == "<bos>Be brief.\n\n### Instruction:\nhi\n\n### Response:"
    assert written("chatml", turns).startswith("<im_start>system\nBe brief.<im_end>\n<im_start>user\n")


def test_an_empty_system_turn_says_nothing():
    turns = [Turn("system", ""), *ASK]
    assert written("vicuna_v1", turns) == "<bos>USER: hi ASSISTANT:"
    assert written("dialog", turns) == "<bos>### Human: hi\n### Assistant:"
    assert written("none", turns) == "<bos>hi"


def test_a_template_without_a_place_for_a_system_text_refuses_it():
    with pytest.raises(ValueError, match="no place"):
        render("none", [Turn("system", "Be brief."), *ASK])


def test_what_a_user_types_is_never_read_as_a_form():
    typed = "{text} {input} {0} <s> </s> [INST] <image> <|im_end|> %s {strip}"
    for name in GOLDEN:
        parts = render(name, [Turn("user", typed)])
        assert any(isinstance(part, Text) and typed in part.text for part in parts)
        calm = [Text(part.text.replace(typed, "hi")) if isinstance(part, Text) else part for part in parts]
        assert calm == render(name, ASK)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([], "no turns"),
        ([Turn("assistant", "yo")], "got 'assistant' as turn 1, expected 'user'"),
        ([Turn("user", "a"), Turn("user", "b")], "got 'user' as turn 2, expected 'assistant'"),
        ([Turn("system", "s")], "no turns"),
        ([Turn("system", "s"), Turn("system", "t"), Turn("user", "a")], "can only be the first"),
        ([Turn("user", "a"), Turn("assistant", "b"), Turn("system", "s")], "can only be the first"),
        ([Turn("user", "a"), Turn("assistant", "b")], "an end by 'assistant', expected an end by 'user'"),
        ([Turn("human", "a")], "did you mean 'user'"),
        ([Turn("tool", "a")], "got 'tool'"),
        ([Turn("system", "s", 1), Turn("user", "a")], "move them to a user turn"),
        ([Turn("user", "a", -1)], "got -1"),
    ],
)
def test_turns_out_of_order_are_an_error(turns, said):
    with pytest.raises(ValueError, match=said):
        render("llama3", turns)


def test_training_needs_an_answer_at_the_end():
    with pytest.raises(ValueError, match="add the answer"):
        render("llama3", ASK, open_answer=False)


def test_a_template_is_found_by_its_aliases():
    assert get_template("llama2-chat") is get_template("LLaMA-2") is TEMPLATES["llama2"]
    assert get_template("###") is get_template("default") is TEMPLATES["dialog"]
    assert get_template("vicuna-v1") is TEMPLATES["vicuna_v1"] and get_template("None") is TEMPLATES["none"]
    for dialect, table in ALIASES.items():
        assert set(table.values()) <= set(DIALECTS[dialect]) and not set(table) & set(DIALECTS[dialect])


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'alpaca'"):
        get_template("alpacca")
    with pytest.raises(ValueError, match="dialect"):
        get_template("alpaca", dialect="klingon")


def test_answers_end_where_the_templates_say():
    assert TEMPLATES["dialog"].stops == ("\n###",)
    assert TEMPLATES["llama3"].stop_controls[0] == "<|eot_id|>" and TEMPLATES["chatml"].stop_controls[0] == "<|im_end|>"
    assert all("eos" in template.stop_controls for template in TEMPLATES.values())


def test_every_form_of_every_template_is_made_of_known_items():
    for name, template in TEMPLATES.items():
        for field in fields(template):
            value = getattr(template, field.name)
            if isinstance(value, tuple):
                assert all(isinstance(item, str | Control | Pictures) for item in value), (name, field.name)
