"""Tokenizers written for transformers: the same ids for every text and conversation, whatever file they came from.

Must not need a model.
"""

import json
import random

import pytest
from fixtures import toys
from hf_tokenizers import write
from test_chat_template import BLANKS, SYSTEM, TALK, messages, ours
from transformers import AutoTokenizer

from accessory.data.chat_template import chat_template, default_template
from accessory.data.template import Turn
from accessory.data.tokenizer import open_tokenizer
from accessory.data.tokenizer_files import transformers_files

CONTENT = {"sentencepiece": "llama2", "markers": "chatml", "ranks": "llama3"}
"""Kinds of files, each with a template that fits."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of every kind: our tokenizer, and transformers' in the folder that was written."""
    found = {}
    markers = ["<|im_start|>", "<|im_end|>", "<image>"]
    data = {
        "sentencepiece": toys.sentencepiece_model(),
        "markers": toys.sentencepiece_model(user_defined_symbols=markers),
        "ranks": toys.rank_file(),
    }
    for kind, name in CONTENT.items():
        source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("folder")
        (source / "tokenizer.model").write_bytes(data[kind])
        tokenizer = open_tokenizer(source)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (folder / "tokenizer.model").write_bytes(data[kind])
        for file, text in transformers_files(tokenizer, chat_template=chat_template(name)).items():
            (folder / file).write_text(text, encoding="utf-8")
        found[kind] = tokenizer, AutoTokenizer.from_pretrained(folder), folder
    return found


def texts() -> list[str]:
    """Words, blanks, letters of all kinds, and words that the corpus never had."""
    dice = random.Random(1)
    pieces = [
        *toys.WORDS,
        " ",
        "  ",
        "\n",
        "\t",
        "1",
        "234",
        "\u4e2d",
        "e\u0301",
        "\U0001f600",
        "xylophone",
        "</",
        "'s",
    ]
    return [*toys.TEXTS, *("".join(dice.choices(pieces, k=dice.randint(1, 12))) for _ in range(150))]


@pytest.mark.parametrize("kind", CONTENT)
def test_every_text_has_the_same_ids(made, kind):
    tokenizer, theirs, _ = made[kind]
    for text in texts():
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text), text
    assert theirs("hello").input_ids == [tokenizer.bos_id, *tokenizer.encode("hello")]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize("kind", CONTENT)
def test_ids_are_read_back_as_the_same_text(made, kind):
    tokenizer, theirs, _ = made[kind]
    for text in toys.TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", CONTENT)
def test_conversations_have_the_same_ids(made, kind):
    tokenizer, theirs, _ = made[kind]
    blanks = [Turn(turn.role, turn.text) for turn in BLANKS]
    for name in (CONTENT[kind], "vicuna_v1", "alpaca", "llamafactory/default"):
        for turns in (TALK[:1], TALK, [*([SYSTEM]), *TALK], blanks[:3], blanks):
            asked = turns[-1].role == "user"
            options = {"add_generation_prompt": asked, "return_dict": False, "chat_template": chat_template(name)}
            got = theirs.apply_chat_template(messages(turns), **options)
            assert got == ours(tokenizer, name, turns, image=0), (name, turns)


@pytest.mark.parametrize("kind", CONTENT)
def test_we_read_what_we_wrote(made, kind):
    tokenizer, _, folder = made[kind]
    again = open_tokenizer(folder)
    assert (again.size, again.bos_id, again.eos_id) == (tokenizer.size, tokenizer.bos_id, tokenizer.eos_id)
    assert again.controls == tokenizer.controls
    for text in texts():
        assert again.encode(text) == tokenizer.encode(text)
    text = (folder / "chat_template.jinja").read_text()
    assert default_template({"model_type": "llama"}, {}, text) == CONTENT[kind]


def test_a_hugging_face_folder_keeps_its_files_but_for_the_chat_template(tmp_path):
    folder = write(tmp_path / "x", "prepend")
    tokenizer = open_tokenizer(folder)
    assert transformers_files(tokenizer) == {}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ 2 }}"}))
    files = transformers_files(open_tokenizer(folder), chat_template="{{ 1 }}")
    assert json.loads(files.pop("tokenizer_config.json")) == config | {"chat_template": "{{ 1 }}"}
    assert files == {"chat_template.jinja": "{{ 1 }}"}


def test_a_folder_of_the_other_flag_is_written_as_it_is_read(tmp_path):
    folder = write(tmp_path / "x", "unlegacy")
    tokenizer = open_tokenizer(folder)
    for name, text in transformers_files(tokenizer).items():
        (folder / name).write_text(text, encoding="utf-8")
    theirs, again = AutoTokenizer.from_pretrained(folder), open_tokenizer(folder)
    for name in ("llama2", "vicuna_v1", "chatml", "alpaca"):
        told = theirs.apply_chat_template(messages(TALK), chat_template=chat_template(name), return_dict=False)
        assert told == ours(tokenizer, name, TALK, image=0) == ours(again, name, TALK, image=0)


def test_a_folder_without_the_flag_is_named_so_that_its_file_is_read(tmp_path):
    folder = write(tmp_path / "x", "llama_flag")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("legacy")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(folder)
    for name, text in transformers_files(tokenizer).items():
        (folder / name).write_text(text, encoding="utf-8")
    theirs, again = AutoTokenizer.from_pretrained(folder), open_tokenizer(folder)
    for name in ("llama2", "vicuna_v1", "llamafactory/empty"):
        told = theirs.apply_chat_template(messages(TALK), chat_template=chat_template(name), return_dict=False)
        assert told == ours(tokenizer, name, TALK, image=0) == ours(again, name, TALK, image=0)


def test_llavas_own_way_with_pictures_cannot_be_written_and_is_told(tmp_path, caplog):
    folder = write(tmp_path / "x", "unlegacy")
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    transformers_files(open_tokenizer(folder))
    assert "no dummy space" in caplog.text


def test_a_model_that_is_no_bpe_is_left_to_transformers_with_a_word(tmp_path, caplog):
    (tmp_path / "tokenizer.model").write_bytes(toys.sentencepiece_model(model_type="unigram", vocab_size=340))
    files = transformers_files(open_tokenizer(tmp_path / "tokenizer.model"))
    told = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<s>", "eos_token": "</s>"}
    assert set(files) == {"tokenizer_config.json"} and json.loads(files["tokenizer_config.json"]) == told
    assert "no BPE" in caplog.text
