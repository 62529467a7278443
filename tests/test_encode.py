"""Conversations as ids: one tokenisation per run, supervision by characters, pictures' slots, truncation.

Must not need a model.
"""

import pytest
from fixtures import toys

from accessory.data.encode import Encoded, encode, stop_ids, truncate_left
from accessory.data.template import TEMPLATES, Control, Picture, Text, Turn, render
from accessory.data.tokenizer import open_tokenizer

CHATML, LLAMA3, ALONE = ("chatml", "chatml_direct", "qwen_1_5"), ("llama3", "llava_llama_3"), ("caption", "plain")
FITTING = {name: ["byte_level", "markers"] for name in CHATML} | {name: ["llama3"] for name in LLAMA3}
EVERY = [(name, kind) for name in TEMPLATES for kind in FITTING.get(name, ["sentencepiece", "llama_json", "llama3"])]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    paths = toys.write_all(tmp_path_factory.mktemp("tokenizers"))
    return {kind: open_tokenizer(path) for kind, path in paths.items()}


def talk(name: str) -> list[Turn]:
    asked = ["", ""] if name in ALONE else ["what is it", "how many"]
    turns = [Turn("user", asked[0], 1), Turn("assistant", "a red fox."), Turn("user", asked[1], 2)]
    return [*turns, Turn("assistant", "some dogs \U0001f415!")]


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_training_ids_up_to_the_answer_are_the_ids_of_the_prompt(opened, name, kind):
    turns = talk(name)
    for end in (2, 4):
        whole = encode(render(name, turns[:end], open_answer=False), opened[kind], slots_per_picture=[3] * (end - 1))
        prompt = encode(render(name, turns[: end - 1]), opened[kind], slots_per_picture=[3] * (end - 1))
        count = len(prompt.ids)
        assert whole.ids[:count] == prompt.ids and whole.slots[:count] == prompt.slots
        assert whole.supervised[count] and not whole.supervised[count - 1]


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_what_is_supervised_reads_as_the_answers(opened, name, kind):
    turns, tokenizer = talk(name), opened[kind]
    whole = encode(render(name, turns, open_answer=False), tokenizer, slots_per_picture=[1, 1, 1])
    learned = [token for token, mark in zip(whole.ids, whole.supervised, strict=True) if mark]
    text = "".join(tokenizer.decode(learned).replace("\n###", "").split())
    assert text == "".join((turns[1].text + turns[3].text).split())
    stop = tokenizer.encode(TEMPLATES[name].stops[0])[-1] if TEMPLATES[name].stops else None
    assert learned[-1] in ({stop} if stop is not None else stop_ids(TEMPLATES[name], tokenizer))


@pytest.mark.parametrize("kind", ["sentencepiece", "llama_json", "byte_level", "llama3"])
def test_a_run_of_text_is_tokenised_once_and_whole(opened, kind):
    tokenizer = opened[kind]
    parts = [Text("hello wo"), Text("rld and", supervised=True), Text(" then")]
    assert encode(parts, tokenizer).ids == tokenizer.encode("hello world and then")


def test_a_token_that_straddles_belongs_to_the_answer(opened):
    tokenizer = opened["llama3"]
    assert [tokenizer.decode([token]) for token in tokenizer.encode("hello world then")] == ["hello", " world", " then"]
    parts = [Text("hello wo"), Text("rld th", supervised=True), Text("en")]
    assert encode(parts, tokenizer).supervised == [False, True, True]


def test_the_bytes_of_one_character_are_supervised_alike(opened):
    encoded = encode([Text("a"), Text("\U0001f600", supervised=True), Text("b")], opened["sentencepiece"])
    marks = "".join("01"[mark] for mark in encoded.supervised)
    assert marks.strip("0") == "1111"


def test_a_dummy_prefix_is_supervised_with_the_answer_that_it_begins(opened):
    encoded = encode([Control("bos"), Text("x", supervised=True)], opened["sentencepiece"])
    assert encoded.supervised == [False] + [True] * (len(encoded.ids) - 1)


def test_pictures_take_their_slots_in_running_rows(opened):
    parts = [Control("bos"), Picture(0), Text("hello world"), Picture(1), Picture(2)]
    encoded = encode(parts, opened["llama3"], slots_per_picture=[3, 1, 2])
    assert encoded.slots == [-1, 0, 1, 2, -1, -1, 3, 4, 5]
    assert [encoded.ids[i] for i in (1, 2, 3, 6, 7, 8)] == [0] * 6
    assert len(encoded.ids) == len(encoded.slots) == len(encoded.supervised)


def test_a_picture_after_bos_leaves_the_ids_of_the_text_alone(opened):
    tokenizer = opened["sentencepiece"]
    with_picture = encode(render("alpaca", [Turn("user", "hi", 1)]), tokenizer, slots_per_picture=[34])
    without = encode(render("alpaca", [Turn("user", "hi")]), tokenizer)
    assert with_picture.ids[:1] + with_picture.ids[35:] == without.ids
    assert with_picture.slots[1:35] == list(range(34))


def test_a_picture_may_stand_before_bos_as_with_the_references_clip(opened):
    tokenizer = opened["sentencepiece"]
    parts = render("alpaca", [Turn("user", "hi there", 1)])
    encoded = encode(parts, tokenizer, slots_per_picture=[5], before_bos=True)
    assert encoded.slots[:6] == [0, 1, 2, 3, 4, -1]
    assert encoded.ids[5:] == encode(render("alpaca", [Turn("user", "hi there")]), tokenizer).ids
    short = truncate_left(encoded, limit=8)
    assert short.slots[:6] == encoded.slots[:6] and short.ids[5] == tokenizer.bos_id
    assert short.ids[6:] == encoded.ids[-2:]


def test_text_around_a_picture_is_tokenised_as_llava_does(opened):
    tokenizer = opened["sentencepiece"]
    encoded = encode(render("llama2", [Turn("user", "what", 1)]), tokenizer, slots_per_picture=[1])
    at = encoded.slots.index(0)
    assert encoded.ids[1:at] == tokenizer.encode("[INST] ")
    assert encoded.ids[at + 1 :] == tokenizer.encode("\nwhat [/INST]")


@pytest.mark.parametrize(
    ("parts", "slots"),
    [
        ([Text("a")], [3]),
        ([Picture(0)], []),
        ([Picture(0), Picture(0)], [3, 3]),
        ([Picture(1)], [3]),
        ([Picture(0)], [0]),
    ],
)
def test_pictures_and_slots_that_do_not_match_are_an_error(opened, parts, slots):
    with pytest.raises(ValueError, match="expected"):
        encode(parts, opened["llama3"], slots_per_picture=slots)


def test_typed_controls_and_placeholders_stay_text(opened):
    typed = "</s> <s> [INST] <<SYS>> <image> <|im_end|> <|eot_id|>"
    for name, kind in [*EVERY, ("dialog", "markers")]:
        if name in ALONE:
            continue
        plain = encode(render(name, [Turn("user", "hi")]), opened[kind])
        forged = encode(render(name, [Turn("user", typed)]), opened[kind])
        controls = [[token for token in got.ids if token in opened[kind].controls] for got in (plain, forged)]
        assert controls[0] == controls[1] and forged.slots == [-1] * len(forged.ids)


def test_bos_is_left_out_where_a_tokenizer_has_none(opened):
    parts = [Control("bos"), Text("hello")]
    assert encode(parts, opened["byte_level"]).ids == opened["byte_level"].encode("hello")
    assert encode(parts, opened["byte_level"]).head == 0 and encode(parts, opened["llama3"]).head == 1


def test_a_template_for_another_tokenizer_is_an_error(opened):
    with pytest.raises(ValueError, match="im_start"):
        encode(render("chatml", [Turn("user", "hi")]), opened["sentencepiece"])


def test_the_text_of_a_conversation_can_be_read(opened):
    parts = render("vicuna_v1", [Turn("system", "S."), Turn("user", "hi", 1)])
    encoded = encode(parts, opened["sentencepiece"], slots_per_picture=[2])
    assert encoded.text == "<bos>S. USER: <picture 0>\nhi ASSISTANT:"


def example() -> Encoded:
    marks = [False] * 8
    return Encoded([1, 10, 0, 0, 11, 12, 0, 13], [-1, -1, 0, 1, -1, -1, 2, -1], marks, "", head=1)


def test_truncation_drops_the_oldest_text_and_keeps_bos_and_pictures():
    cut = truncate_left(example(), limit=6)
    assert (cut.ids, cut.slots) == ([1, 0, 0, 12, 0, 13], [-1, 0, 1, -1, 2, -1])
    assert len(cut.supervised) == 6 and cut.head == 1
    assert truncate_left(example(), limit=5).ids == [1, 0, 0, 0, 13]


def test_a_conversation_that_fits_is_not_touched():
    encoded = example()
    assert truncate_left(encoded, limit=8) is encoded


def test_a_window_too_small_for_bos_and_pictures_is_an_error():
    with pytest.raises(ValueError, match="window of 4 positions, expected at least 5"):
        truncate_left(example(), limit=4)


def test_a_conversation_without_bos_may_lose_its_first_token():
    encoded = Encoded([7, 8, 9], [-1] * 3, [False] * 3, "")
    assert truncate_left(encoded, limit=1).ids == [9]


def test_stop_ids_are_those_that_the_tokenizer_has(opened):
    llama3, plain = opened["llama3"], opened["sentencepiece"]
    names = ("<|eot_id|>", "<|eom_id|>", "eos")
    assert stop_ids(TEMPLATES["llama3"], llama3) == {llama3.control(name) for name in names}
    assert stop_ids(TEMPLATES["llama3"], plain) == {plain.eos_id}
