"""Chat templates: the ids of training, of chat and of transformers are the same; folders' own are recognised.

Must not need a model.
"""

import logging

import pytest
from hf_tokenizers import KINDS, write
from transformers import AutoTokenizer

from accessory.data.chat_template import LLAVA, chat_template, default_template, writes_the_same
from accessory.data.encode import encode
from accessory.data.template import DIALECTS, TEMPLATES, Turn, get_template, is_jinja, label, render, tagged
from accessory.data.tokenizer import open_tokenizer
from accessory.dialect.models import MODELS

NAMES = [f"{dialect}/{name}" for dialect, table in DIALECTS.items() for name in table]
DISTINCT = list({get_template(name): name for name in reversed(NAMES)}.values())
UNBOUNDED = ("accessory/none", "llamafactory/fewshot", "llamafactory/empty")
"""Nothing stands between a question and its answer there, so that one token may hold letters of both."""
METASPACE = ("legacy", "unlegacy", "llama_flag")
"""transformers puts no dummy space before a run that begins with a blank, and sentencepiece does; we do as it does."""
TALK = [
    Turn("user", "what is it?\n"),
    Turn("assistant", "a red fox."),
    Turn("user", "how many dogs"),
    Turn("assistant", "some \U0001f415!"),
]
SYSTEM = Turn("system", "be brief, 'please'. \\n ")
SEEN = [tagged("user", "<image>\nwhat <image>is<image>?"), TALK[1], tagged("user", "and <image>it?"), TALK[3]]
BLANKS = [tagged("user", " what <image> is "), TALK[1], Turn("user", " how"), Turn("assistant", " some ")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Of every kind: their tokenizer and ours."""
    root = tmp_path_factory.mktemp("folders")
    folders = {kind: write(root / kind, kind) for kind in KINDS}
    return {kind: (AutoTokenizer.from_pretrained(folder), open_tokenizer(folder)) for kind, folder in folders.items()}


def alone(name: str) -> bool:
    """Whether a template takes pictures without text."""
    return name.endswith(("/caption", "/plain"))


def messages(turns) -> list[dict]:
    """Turns as transformers has them."""
    return [{"role": turn.role, "content": content(turn)} for turn in turns]


def content(turn: Turn) -> str | list[dict]:
    """Text with tags for pictures within it; parts where pictures stand where the template puts them."""
    text, leading = turn.text, turn.pictures - len(turn.places)
    for place in reversed(turn.places):
        text = f"{text[:place]}<image>{text[place:]}"
    return [*[{"type": "image"}] * leading, {"type": "text", "text": text}] if leading else text


def talks(name: str, *, blanks: bool = True):
    """Conversations of every length, with a system text where there is a place for it, with pictures and without."""
    seen = SEEN if not alone(name) else [Turn("user", "", 2), TALK[1], Turn("user", "", 1), TALK[3]]
    for length in (1, 2, 3, 4):
        yield seen[:length]
    for turns in () if alone(name) else (TALK[:1], TALK[:3], TALK, *([BLANKS[:3], BLANKS] if blanks else [])):
        yield turns
        if get_template(name).system is not None:
            yield [SYSTEM, *turns]
    if get_template(name).system is not None:
        yield [Turn("system", ""), *seen]


def ours(tokenizer, name, turns, *, image: int) -> list[int]:
    """The ids of training or, where the user spoke last, of chat; a picture as one id."""
    parts = render(name, turns, open_answer=turns[-1].role == "user")
    encoded = encode(parts, tokenizer, slots_per_picture=[1] * sum(turn.pictures for turn in turns))
    return [image if slot >= 0 else token for token, slot in zip(encoded.ids, encoded.slots, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DISTINCT)
def test_training_chat_and_the_exported_chat_template_have_the_same_ids(opened, kind, name):
    theirs, tokenizer = opened[kind]
    theirs.chat_template, image = chat_template(name), tokenizer.control("<image>")
    for turns in talks(name, blanks=kind not in METASPACE):
        asked = turns[-1].role == "user"
        got = theirs.apply_chat_template(messages(turns), add_generation_prompt=asked, return_dict=False)
        assert got == ours(tokenizer, name, turns, image=image), turns


@pytest.mark.parametrize("name", [name for name in DISTINCT if name not in UNBOUNDED])
def test_what_is_asked_begins_what_is_learned(opened, name):
    turns = TALK if not alone(name) else [Turn("user", "", 2), TALK[1], Turn("user", "", 1), TALK[3]]
    for _, tokenizer in opened.values():
        whole = ours(tokenizer, name, turns, image=0)
        for length in (1, 3):
            prompt = ours(tokenizer, name, turns[:length], image=0)
            assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize("name", UNBOUNDED)
def test_where_a_question_runs_into_its_answer_a_blank_keeps_them_apart(opened, name):
    turns = [Turn("user", "what is it"), Turn("assistant", " a fox")]
    for _, tokenizer in opened.values():
        whole, prompt = ours(tokenizer, name, turns, image=0), ours(tokenizer, name, turns[:1], image=0)
        assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize("name", [name for name in DISTINCT if not alone(name)])
def test_no_typed_token_becomes_one(opened, name):
    for theirs, tokenizer in opened.values():
        special = [*theirs.get_added_vocab(), "<0x0A>", "[INST]", "<<SYS>>", "<image>", "<s>", "</s>"]
        typed = "a " + " ".join(special) + " b" + "".join(special)
        kept = []
        for text in (typed, "hi"):
            head = [Turn("system", text)] if get_template(name).system is not None else []
            turns = [*head, Turn("user", text, input=text), Turn("assistant", text), Turn("user", text)]
            ids = ours(tokenizer, name, turns, image=-1)
            kept.append([token for token in ids if token in tokenizer.controls or token < 0])
        assert kept[0] == kept[1]


def test_the_reference_forms_take_an_input_beside_the_content(opened):
    theirs, tokenizer = opened["prepend"]
    told = [{"role": "user", "content": "Add.", "input": "1 2"}]
    for name in ("alpaca", "vicuna_v1", "llama2"):
        got = theirs.apply_chat_template(
            told, chat_template=chat_template(name), add_generation_prompt=True, return_dict=False
        )
        assert got == ours(tokenizer, name, [Turn("user", "Add.", input="1 2")], image=0)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([{"role": "assistant", "content": "a"}], "Roles"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "Roles"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "Roles"),
        ([{"role": "tool", "content": "a"}], "Roles"),
        ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "no place"),
    ],
)
def test_an_exported_chat_template_refuses_what_we_refuse(opened, turns, said):
    with pytest.raises(Exception, match=said):
        opened["prepend"][0].apply_chat_template(turns, chat_template=chat_template("none"))


def test_an_exported_chat_template_of_pictures_alone_refuses_text(opened):
    with pytest.raises(Exception, match="pictures alone"):
        opened["prepend"][0].apply_chat_template(
            [{"role": "user", "content": "a"}], chat_template=chat_template("plain")
        )


# ---- what a folder's chat template is

CHATML = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = (
    "{% for m in messages %}{% set said = '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim "
    "~ '<|eot_id|>' %}{% if loop.first %}{{ bos_token }}{% endif %}{{ said }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set told = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set told = false %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}{% if loop.first and told %}"
    "{% set said = '<<SYS>>\n' + told + '\n<</SYS>>\n\n' + m.content %}{% else %}{% set said = m.content %}{% endif %}"
    "{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAVA_MISTRAL = (  # as LLaVA's folders have it: list contents, no BOS, other ends of answers
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% for p in m.content if p.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content[0].text + '<end> ' }}{% endif %}{% endfor %}"
)
LLAVA_CARD = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% for p in m.content if p.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('order') }}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
HEADED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DEFAULTED = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
DATED = (
    "{{ bos_token }}{% set told = '' %}{% set rest = messages %}{% if messages[0].role == 'system' %}"
    "{% set told = messages[0].content | trim %}{% set rest = messages[1:] %}{% endif %}"
    "{% if strftime_now is defined %}{% set day = strftime_now('%Y') %}{% else %}{% set day = '2024' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + day + '\n\n' + told + '<|eot_id|>' }}"
    + LLAMA3.replace("messages", "rest").replace("{% if loop.first %}{{ bos_token }}{% endif %}", "")
)
LATE = (  # the system text goes into the last question: no text of turns alone
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("name", NAMES)
def test_our_own_chat_templates_are_known_by_their_text(name):
    found = default_template({}, {"chat_template": chat_template(name)})
    assert chat_template(found) == chat_template(name) and not is_jinja(found)


@pytest.mark.parametrize(
    ("text", "name"),
    [(CHATML, "chatml"), (LLAMA3, "llama3"), (LLAMA2, "llama2"), (chat_template("tiny") + "\n", "tiny")],
)
def test_a_chat_template_is_known_by_what_it_writes(text, name):
    assert default_template({"model_type": "llama"}, {"chat_template": text}) == name
    assert default_template({"model_type": "llama"}, {}, text) == name
    several = [{"name": "tool_use", "template": LATE}, {"name": "default", "template": text}]
    assert default_template({"model_type": "llama"}, {"chat_template": several}) == name


@pytest.mark.parametrize(("text", "name"), [(LLAVA_MISTRAL, "mistral_instruct"), (LLAVA_CARD, "llava_1_5")])
def test_a_llava_is_known_by_its_first_question(text, name):
    assert default_template({"model_type": "llava_next"}, None, text) == name


@pytest.mark.parametrize("text", [INSTRUCT, HEADED, DEFAULTED, DATED, LLAVA_CARD, LLAVA_MISTRAL])
def test_an_unknown_chat_template_is_followed_to_the_letter(opened, text):
    name = default_template({"model_type": "llama"}, {"chat_template": text})
    assert name == text and is_jinja(name) and label(name) == "of its chat template"
    theirs, tokenizer = opened["v3"]
    image, lists = tokenizer.control("<image>"), "p.text" in text
    dated = text.replace("strftime_now", "no_clock")
    for turns in (TALK[:1], TALK[:2], TALK[:3], TALK, [SYSTEM, *TALK[:3]]):
        if turns[0] is SYSTEM and get_template(name).system is None:
            continue
        told = messages(turns)
        for message in told if lists else ():
            message["content"] = [{"type": "text", "text": message["content"]}]
        options = {"add_generation_prompt": turns[-1].role == "user", "return_dict": False}
        assert theirs.apply_chat_template(told, chat_template=dated, **options) == ours(
            tokenizer, name, turns, image=image
        )
    if lists:
        told = messages([Turn("user", "hi", 2)])
        got = theirs.apply_chat_template(told, chat_template=text, add_generation_prompt=True, return_dict=False)
        assert got == ours(tokenizer, name, [Turn("user", "hi", 2)], image=image)


def test_a_chat_template_stands_for_a_template_only_if_it_writes_the_same():
    assert writes_the_same(LLAMA2, "llama2") and writes_the_same(INSTRUCT, INSTRUCT)
    assert not writes_the_same(LLAVA_CARD, "llava_1_5") and not writes_the_same("{{ bos", "llama2")


def test_a_followed_chat_template_says_how_its_answers_end():
    assert get_template(DATED).stop_controls == ("<|eot_id|>", "eos")
    assert get_template(INSTRUCT).stop_controls == ("eos",)
    assert get_template(DEFAULTED).default_system == "Be kind."
    assert get_template(INSTRUCT).system is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LATE, "does not follow from its turns"),
        ("{{ bos_token }", "unexpected"),
        ("{{ strftime_now('%Y') }}{{ messages[0].content }}", "strftime_now"),
        ("{% for i in range(999) %}{{ messages }}{% endfor %}", "no end"),
        ("{% for i in range(99999) %}{% endfor %}", "count of 99999"),
        ("{{ 'a' * 999999999 }}", "no repeated texts"),
        ("{{ 9 ** 999999999 }}", "no powers"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ '' if 0 }}" * 9999, "characters"),
    ],
)
def test_a_chat_template_that_cannot_be_followed_is_told_and_left(text, said, caplog):
    with caplog.at_level(logging.WARNING):
        assert default_template({"model_type": "llama"}, {"chat_template": text}) == "none"
    assert said in caplog.text
    with pytest.raises(ValueError, match="chat template"):
        get_template(text)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "llama"}, "none"),
        ({"model_type": "llama", "_name_or_path": "lmsys/vicuna-7b-v1.5"}, "vicuna_v1"),
        ({"model_type": "llava_llama"}, "vicuna_v1"),
        ({"model_type": "llava_mistral", "vocab_size": 32000}, "mistral_instruct"),
        ({"model_type": "llava_qwen", "vocab_size": 152064}, "qwen_1_5"),
        ({"model_type": "llava_llama", "vocab_size": 64000}, "chatml_direct"),
        ({"model_type": "llava_llama", "vocab_size": 128256}, "llava_llama_3"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "vicuna_v1"),
        ({"model_type": "llava_next", "text_config": {"model_type": "llama", "vocab_size": 64064}}, "chatml_direct"),
        ({"model_type": "llava_next", "text_config": {"model_type": "mistral"}}, "mistral_instruct"),
        ({"model_type": "llava_next", "text_config": {"model_type": "qwen2", "vocab_size": 152064}}, "qwen_1_5"),
        ({"model_type": "llama", "template": "llamafactory/Mistral"}, "llamafactory/mistral"),
    ],
)
def test_a_folder_without_a_chat_template_is_known_by_its_family(config, name):
    assert default_template(config) == name
    assert name in LLAVA or "llava" not in config["model_type"]


def test_a_model_type_goes_before_the_folder():
    for model_type, row in MODELS.items():
        found = default_template({"model_type": "llama", "template": "alpaca"}, None, LLAMA3, model_type)
        assert get_template(found) is get_template(row.template)
    with pytest.raises(ValueError, match="model_type: got 'llava1_7'"):
        default_template({}, None, None, "llava1_7")


def test_every_template_of_llava_is_one_of_ours():
    assert set(LLAVA) < set(TEMPLATES)
