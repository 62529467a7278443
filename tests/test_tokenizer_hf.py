"""Tokenizers of Hugging Face folders: text around pictures, LLaMA's legacy flag, tokens beside the file, padded rows.

Must not need a model.
"""

import json

import pytest
from fixtures import toys
from hf_tokenizers import KINDS, added, write
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

from accessory.data.chat_template import LLAVA, chat_template
from accessory.data.encode import begins_run, encode, settle
from accessory.data.template import Control, Picture, Text, Turn, render
from accessory.data.tokenizer import open_tokenizer

MISTRAL = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "<0x0A>": 13,
    "\u2581in": 297,
    "\u2581is": 349,
    "\u2581this": 456,
    "\u2581[": 733,
    "What": 3195,
    "\u2581image": 3469,
    "\u2581shown": 4894,
    "INST": 16289,
    "\u2581": 28705,
    "/": 28748,
    "]": 28793,
    "?": 28804,
}
"""Pieces of Mistral's first tokenizer by their ids there."""
ASKED = "What is shown in this image?"
GOLDEN = [1, 733, 16289, 28793, 28705, -1, 28705, 13, 3195, 349, 4894, 297, 456, 3469, 28804, 733, 28748, 16289, 28793]


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """A folder whose tokenizer.json has Mistral's pieces where they are needed, by its rules."""
    vocab, merges, spare = dict(MISTRAL), [], iter(range(20000, 28000))
    for piece in MISTRAL:
        if piece.startswith("<"):
            continue
        for end in range(1, len(piece) + 1):
            for part in (piece[:end], piece[end - 1]):
                if part not in vocab:
                    vocab[part] = next(spare)
            if end > 1 and [piece[: end - 1], piece[end - 1]] not in merges:
                merges.append([piece[: end - 1], piece[end - 1]])
    steps = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    base = toys.llama_json()
    content = base | {
        "model": base["model"] | {"vocab": vocab, "merges": merges, "byte_fallback": True},
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "added_tokens": [entry | {"normalized": False} for entry in base["added_tokens"][:3]],
    }
    vocab["\u7b26"] = 31999  # the last of Mistral's
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": begin,
        "pair": begin,
        "special_tokens": special,
    }
    folder = tmp_path_factory.mktemp("mistral")
    (folder / "tokenizer.json").write_text(json.dumps(added(content, ["<image>", "<pad>"])))
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<s>"}
    config |= {"eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_next"}))
    return folder


def shown(parts, tokenizer) -> list[int]:
    """Ids, a picture as -1."""
    encoded = encode(parts, tokenizer, slots_per_picture=[1] * sum(isinstance(part, Picture) for part in parts))
    return [-1 if slot >= 0 else token for token, slot in zip(encoded.ids, encoded.slots, strict=True)]


def test_llavas_prompt_for_mistral_has_its_golden_ids(mistral):
    tokenizer = open_tokenizer(mistral)
    assert shown(render("mistral_instruct", [Turn("user", ASKED, 1)]), tokenizer) == GOLDEN
    assert shown(render("swift/llava-mistral-instruct", [Turn("user", ASKED, 1)]), tokenizer) == GOLDEN


def test_the_golden_ids_are_transformers_too(mistral):
    theirs = AutoTokenizer.from_pretrained(mistral)
    ids = theirs(f"[INST] <image>\n{ASKED} [/INST]").input_ids
    image = theirs.convert_tokens_to_ids("<image>")
    assert [-1 if token == image else token for token in ids] == GOLDEN


def test_padding_and_places_of_pictures_are_never_said(mistral):
    tokenizer = open_tokenizer(mistral)
    assert tokenizer.size == 32002  # of 32064 rows
    assert {tokenizer.control("<image>"), tokenizer.control("<pad>")} == {32000, 32001} < tokenizer.unsaid
    assert not tokenizer.unsaid & set(MISTRAL.values())


@pytest.mark.parametrize("kind", KINDS)
def test_text_around_a_picture_has_the_ids_that_transformers_gives(tmp_path, kind):
    folder = write(tmp_path / kind, kind)
    theirs, tokenizer = AutoTokenizer.from_pretrained(folder), open_tokenizer(folder)
    image = theirs.convert_tokens_to_ids("<image>")
    for turns in ([Turn("user", "hello world", 2)], [Turn("user", "a fox or a dog", 2, places=(6,))]):
        parts = settle(render("vicuna_v1", turns), tokenizer)
        names = {"bos": theirs.bos_token, "eos": theirs.eos_token}
        text = "".join(
            part.text if isinstance(part, Text) else names[part.name] if isinstance(part, Control) else "<image>"
            for part in parts
        )
        ids = theirs(text, add_special_tokens=False).input_ids
        assert shown(parts, tokenizer) == [-1 if token == image else token for token in ids]


@pytest.mark.parametrize("kind", ["prepend", "first", "byte_level", "legacy", "v3"])
def test_llavas_processor_with_our_chat_template_has_the_ids_of_training(tmp_path, kind):
    folder, picture = write(tmp_path / kind, kind), Image.new("RGB", (40, 30))
    theirs, tokenizer = AutoTokenizer.from_pretrained(folder), open_tokenizer(folder)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    look, image = {"type": "image", "image": picture}, tokenizer.control("<image>")
    told = [
        {"role": "user", "content": [look, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a fox"}]},
        {"role": "user", "content": [look, look, {"type": "text", "text": "and now?"}]},
    ]
    turns = [Turn("user", "what is it?", 1), Turn("assistant", "a fox"), Turn("user", "and now?", 2)]
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    for name in LLAVA:
        processor = LlavaProcessor(pixels, theirs, chat_template=chat_template(name), **options)
        [ids] = processor.apply_chat_template([told], tokenize=True, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        encoded = encode(render(name, turns), tokenizer, slots_per_picture=[4, 4, 4])
        assert ids == [image if slot >= 0 else token for token, slot in zip(encoded.ids, encoded.slots, strict=True)]


def sentencepiece_folder(folder, *, legacy, model_type=None):
    write(folder, "legacy")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("legacy")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ({} if legacy is None else {"legacy": legacy})))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return open_tokenizer(folder)


@pytest.mark.parametrize(
    ("legacy", "model_type", "spaced"),
    [
        (None, None, "cp"),
        (True, "llama", "cp"),
        (False, "llama", ""),
        (False, "llava_next", ""),
        (False, "llava_llama", "p"),  # LLaVA's own code tokenises what follows a picture apart
    ],
)
def test_the_legacy_flag_says_which_runs_have_a_dummy_space(tmp_path, legacy, model_type, spaced):
    tokenizer = sentencepiece_folder(tmp_path / "x", legacy=legacy, model_type=model_type)
    space, after = tokenizer.encode("hello")[0], {"control": "c", "picture": "p"}
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello" and tokenizer.prefixes("")
    for before, letter in after.items():
        assert (tokenizer.encode("hello", after=before)[0] == space) == (letter in spaced)
        assert tokenizer.prefixes(before) == (letter in spaced)
        assert tokenizer.spans("hello", after=before)[-1][2] == 5
        assert tokenizer.decode(tokenizer.encode("hello", after=before), opening=letter in spaced) == "hello"


def test_an_answer_after_a_control_token_keeps_its_space_where_none_is_put(tmp_path):
    old, new = (sentencepiece_folder(tmp_path / str(flag), legacy=flag) for flag in (True, False))
    assert begins_run([Control("bos")], old) and not begins_run([Control("bos")], new)
    assert not begins_run([Control("bos"), Text("a")], old) and begins_run([], new)
    assert begins_run([Picture(0)], old) and not begins_run([Picture(0)], new)


def test_another_flag_is_another_tokenizer_to_caches(tmp_path):
    old, new = (sentencepiece_folder(tmp_path / str(flag), legacy=flag) for flag in (True, False))
    assert old.digest != new.digest


def test_a_marker_is_a_control_token_where_the_tokenizer_has_it(tmp_path):
    plain, v3 = (open_tokenizer(write(tmp_path / kind, kind)) for kind in ("prepend", "v3"))
    parts = render("llama2", [Turn("user", "hi")])
    assert shown(parts, plain) == shown([Control("bos"), Text("[INST] hi [/INST]")], plain)
    assert shown(parts, v3) == [1, v3.control("[INST]"), *v3.encode(" hi "), v3.control("[/INST]")]


def test_tokens_that_only_the_files_beside_name_are_controls(tmp_path):
    folder = write(tmp_path / "x", "prepend")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    size = open_tokenizer(folder).size
    for number, said in ((size + 2, None), (size - 1, "call id")):
        entry = {str(number): {"content": "<extra>", "special": True}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": entry}))
        if said:
            with pytest.raises(ValueError, match=said):
                open_tokenizer(folder)
            continue
        tokenizer = open_tokenizer(folder)
        assert tokenizer.control("<extra>") == number and tokenizer.size == number + 1
        assert number not in tokenizer.encode("<extra>") and tokenizer.decode([number]) == ""
        assert {size, size + 1} < tokenizer.unsaid  # holes


@pytest.mark.parametrize(("told", "adds"), [(None, True), (True, True), (False, False)])
def test_a_plain_text_begins_with_bos_unless_the_folder_says_no(tmp_path, told, adds):
    folder = write(tmp_path / "x", "prepend")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | ({} if told is None else {"add_bos_token": told}))
    )
    tokenizer = open_tokenizer(folder)
    assert tokenizer.adds_bos == adds and tokenizer.bos_id == 1
    assert (
        shown(render("vicuna_v1", [Turn("user", "hi")]), tokenizer)[0] == 1
    )  # as a chat template says, whatever it is
    assert not open_tokenizer(write(tmp_path / "y", "no_bos")).adds_bos


def test_eos_and_bos_are_said_whatever_else_they_are(tmp_path):
    folder = write(tmp_path / "x", "prepend")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(folder)
    assert tokenizer.pad_id == tokenizer.eos_id and tokenizer.unsaid == {tokenizer.control("<image>")}
