"""Tokenizers of every kind: plain text only, places, control tokens, decoding as it streams, damaged files.

Must not need a model.
"""

import base64
import json
import pickle
import random

import pytest
import sentencepiece
import tiktoken
import tokenizers
from fixtures import toys
from transformers import LlamaTokenizer

from accessory.data.backends import _parts
from accessory.data.tokenizer import Decoder, open_tokenizer

KINDS = ["sentencepiece", "markers", "unigram", "byte_level", "json_unigram", "llama3", "llama_json"]
LOSSLESS = ["sentencepiece", "markers", "byte_level", "llama3", "llama_json"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return toys.write_all(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def opened(paths):
    return {kind: open_tokenizer(path) for kind, path in paths.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_never_yields_a_control_token(opened, kind):
    tokenizer = opened[kind]
    spelled = [name for name in tokenizer.backend.names if name.isprintable()]
    for text in [*toys.CONTROL_TEXTS, *spelled, "\uffff</s>", "a<s>b</s>c [INST]<|im_start|>user\n<image>"]:
        assert not tokenizer.controls & set(tokenizer.encode(text)), text


@pytest.mark.parametrize("kind", LOSSLESS)
def test_text_comes_back_as_it_was(opened, kind):
    for text in toys.TEXTS + toys.CONTROL_TEXTS:
        assert opened[kind].decode(opened[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_spans_have_the_ids_of_encode_and_cover_the_text_in_order(opened, kind):
    for text in toys.TEXTS + toys.CONTROL_TEXTS:
        spans = opened[kind].spans(text)
        assert [token for token, _, _ in spans] == opened[kind].encode(text)
        assert [start for _, start, _ in spans] == sorted(start for _, start, _ in spans)
        assert [stop for _, _, stop in spans] == sorted(stop for _, _, stop in spans)
        covered = {place for _, start, stop in spans for place in range(start, stop)}
        blanks = {place for place, letter in enumerate(text) if letter.isspace()}  # some models drop blanks
        assert covered >= set(range(len(text))) - (set() if kind in LOSSLESS else blanks)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_ids_of_one_character_share_its_span(opened, kind):
    spans = opened[kind].spans("hello \U0001f600 fox")
    assert [(start, stop) for _, start, stop in spans if start <= 6 < stop] == [(6, 7)] * 4


def test_a_dummy_prefix_stands_for_no_character(opened):
    assert opened["sentencepiece"].spans(" x")[0][1:] == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_any_ids_is_what_decoding_them_gives(opened, kind):
    tokenizer, dice = opened[kind], random.Random(3)
    for _ in range(200):
        ids = [dice.randrange(tokenizer.size) for _ in range(dice.randrange(1, 30))]
        for opening in (True, False):
            stream = Decoder(tokenizer, opening=opening)
            streamed = [stream.push(token) for token in ids]
            raw = b"".join(_bytes_of(tokenizer, ids, opening))
            assert "".join(streamed) + stream.flush() == tokenizer.decode(ids, opening=opening)
            assert tokenizer.decode(ids, opening=opening) == raw.decode("utf-8", "replace")


def _bytes_of(tokenizer, ids, opening):
    first = opening
    for token in ids:
        piece = tokenizer.piece_bytes(token, first=first)
        first = first and tokenizer.still_first(token, piece)
        yield piece


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_stream_never_shows_half_a_character(opened, kind):
    for text in toys.TEXTS:
        stream, shown = Decoder(opened[kind]), ""
        for token in opened[kind].encode(text):
            shown += stream.push(token)
            assert text.startswith(shown)
        assert shown + stream.flush() == text


def test_an_unfinished_character_is_replaced_at_the_end_only(opened):
    tokenizer = opened["sentencepiece"]
    ids = tokenizer.encode("a\U0001f600")[:-1]
    stream = Decoder(tokenizer)
    assert "".join(stream.push(token) for token in ids) == "a"
    assert stream.flush() == "\ufffd"


def test_an_answer_that_goes_on_keeps_its_leading_space(opened):
    for kind in ("sentencepiece", "llama_json"):
        tokenizer = opened[kind]
        ids = tokenizer.encode("fox jumps")
        assert tokenizer.decode(ids, opening=False) == " fox jumps"


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram"])
def test_decoding_equals_sentencepiece_where_bytes_are_whole(opened, paths, kind):
    model = sentencepiece.SentencePieceProcessor(model_file=str(paths[kind]))
    visible = [i for i in range(model.get_piece_size()) if not model.is_byte(i)]
    visible = [i for i in visible if model.id_to_piece(i) not in toys.CONTROL_TEXTS or i < 3]
    dice = random.Random(5)
    for _ in range(300):
        ids = [dice.choice(visible) for _ in range(8)]
        assert opened[kind].decode(ids) == model.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "llama_json", "json_unigram"])
def test_decoding_equals_tokenizers(opened, paths, kind):
    path = paths[kind] / "tokenizer.json" if paths[kind].is_dir() else paths[kind]
    theirs = tokenizers.Tokenizer.from_str(path.read_text())
    for text in toys.TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert opened[kind].decode(ids) == theirs.decode(ids)


def test_ids_equal_sentencepiece(opened, paths):
    model = sentencepiece.SentencePieceProcessor(model_file=str(paths["sentencepiece"]))
    for text in toys.TEXTS:
        assert opened["sentencepiece"].encode(text) == model.encode(text)


def test_ids_equal_transformers_before_and_after_it_saves(opened, paths, tmp_path):
    model = sentencepiece.SentencePieceProcessor(model_file=str(paths["sentencepiece"]))
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    pairs = [(made[:cut], made[cut:], made) for made in vocab for cut in range(1, len(made))]
    pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    pairs.sort(key=lambda pair: tuple(vocab[piece] for piece in (pair[2], pair[0], pair[1])))
    theirs = LlamaTokenizer(vocab=vocab, merges=[pair[:2] for pair in pairs])
    theirs.save_pretrained(tmp_path)
    saved = open_tokenizer(tmp_path)
    assert (saved.bos_id, saved.eos_id) == (1, 2)
    for text in toys.TEXTS:
        if not text.startswith(" "):  # there Metaspace adds no prefix, and sentencepiece does
            ours = opened["sentencepiece"].encode(text)
            assert ours == theirs(text, add_special_tokens=False).input_ids == saved.encode(text)


def test_ids_equal_tiktoken(opened, paths):
    tokenizer = opened["llama3"]
    lines = (line.split() for line in paths["llama3"].read_bytes().splitlines())
    ranks = {base64.b64decode(word): int(rank) for word, rank in lines}
    theirs = tiktoken.Encoding("x", pat_str=tokenizer.backend.SPLIT, mergeable_ranks=ranks, special_tokens={})
    for text in toys.TEXTS:
        assert tokenizer.encode(text) == theirs.encode_ordinary(text)


def test_llama3_has_its_256_control_tokens_in_order(opened):
    tokenizer = opened["llama3"]
    start = tokenizer.size - 256
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    names += ["finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"]
    names += ["image", "reserved_special_token_2"]
    assert [tokenizer.control(f"<|{name}|>") - start for name in names] == list(range(13))
    assert tokenizer.control("<|reserved_special_token_245|>") == tokenizer.size - 1
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (start, start + 1, start + 4)


def test_long_runs_are_cut_as_meta_cuts_them():
    text = "a" * 7 + "  b" + " " * 5 + "cc"
    assert list(_parts(text, longest=100, run=3)) == ["aaa", "aaa", "a  b   ", "  cc"]
    assert "".join(_parts(text, longest=4, run=3)) == text
    assert list(_parts("ab cd", longest=4, run=100)) == ["ab cd"]


def test_a_million_letters_encode(opened):
    assert opened["llama3"].decode(opened["llama3"].encode("a" * 1_000_000)) == "a" * 1_000_000


def test_markers_of_a_sentencepiece_model_are_controls_and_other_symbols_are_text(opened, paths):
    model = sentencepiece.SentencePieceProcessor(model_file=str(paths["markers"]))
    tokenizer = opened["markers"]
    for name in ("<|im_start|>", "<|im_end|>", "[INST]", "<image>"):
        assert tokenizer.control(name) == model.piece_to_id(name) in model.encode(name)
    assert model.piece_to_id("\n\n") in tokenizer.encode("a\n\nb")


def test_added_tokens_are_controls_if_special_or_like_markers(opened):
    tokenizer, size = opened["llama_json"], opened["llama_json"].size
    assert tokenizer.control("<|im_start|>") == size - 3 and tokenizer.control("<tool>") == size - 2
    assert size - 1 in tokenizer.encode("un \u00e9t\u00e9")
    shown = tokenizer.decode([size - 3, size - 2, size - 1, tokenizer.eos_id])
    assert shown == "<tool>\u00e9t\u00e9"  # special tokens leave no trace, the others do


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_merges_that_make_a_control_token_are_not_followed(tmp_path, ignore_merges):
    vocab = {"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4}
    merges = [["<", "s"], ["<s", ">"]]
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
    added = {"id": 4, "content": "<s>", "special": True, "normalized": False}
    added |= {"single_word": False, "lstrip": False, "rstrip": False}
    content = toys.byte_level_json() | {"model": model, "added_tokens": [added], "pre_tokenizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.encode("<s>") == [3, 2]
    assert tokenizer.control("<s>") == tokenizer.bos_id == 4


def test_a_byte_level_piece_in_other_letters_stands_for_itself(tmp_path):
    content = toys.byte_level_json()
    size = max(content["model"]["vocab"].values()) + 1
    added = {"id": size, "content": "\u4e2d\u6587", "special": False, "normalized": False}
    content["added_tokens"].append(added | {"single_word": False, "lstrip": False, "rstrip": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert open_tokenizer(tmp_path).decode([size]) == "\u4e2d\u6587"


def test_control_finds_roles_and_names_the_near_ones(opened):
    tokenizer = opened["byte_level"]
    assert tokenizer.control("eos") == tokenizer.control("<|endoftext|>") == tokenizer.eos_id
    with pytest.raises(ValueError, match=r"<\|im_start\|>"):
        tokenizer.control("<|imstart|>")
    with pytest.raises(ValueError, match="'bos'"):
        tokenizer.control("bos")


def test_control_tokens_leave_no_trace_in_text(opened):
    tokenizer = opened["sentencepiece"]
    word = tokenizer.encode("fox")
    assert tokenizer.decode([tokenizer.bos_id, *word, tokenizer.eos_id]) == "fox"


def test_an_id_outside_the_vocabulary_is_an_error(opened):
    for token in (-1, opened["llama3"].size):
        with pytest.raises(ValueError, match=f"got {token}"):
            opened["llama3"].decode([token])


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogates_are_read_as_replacement_characters(opened, kind):
    assert opened[kind].encode("a\ud800b") == opened[kind].encode("a\ufffdb")
    assert opened[kind].spans("a\udfffb")[-1][2] == 3


@pytest.mark.parametrize("kind", ["sentencepiece", "llama3", "llama_json"])
def test_a_tokenizer_travels_to_another_process(opened, kind):
    copy = pickle.loads(pickle.dumps(opened[kind]))
    assert copy.encode("hello world") == opened[kind].encode("hello world")


def test_a_folder_is_read_as_its_kind_says(tmp_path, paths):
    (tmp_path / "tokenizer.model").write_bytes(paths["sentencepiece"].read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((paths["llama_json"] / "tokenizer.json").read_bytes())
    assert open_tokenizer(tmp_path).size == 400
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert open_tokenizer(tmp_path).size == 453


def test_tokens_added_beside_a_sentencepiece_model_are_controls(tmp_path, paths):
    (tmp_path / "tokenizer.model").write_bytes(paths["sentencepiece"].read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 400, "<image>": 401}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.size, tokenizer.pad_id, tokenizer.control("<image>")) == (402, 400, 401)
    assert 401 not in tokenizer.encode("<image>") and tokenizer.decode([401]) == ""


def test_the_folder_says_which_token_is_eos(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(toys.byte_level_json()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": None}))
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, tokenizer.control("<|im_end|>"))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("tokenizer.model", b"", "empty"),
        ("tokenizer.model", b"\x0a\x7fcut", "cut short"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        ("tokenizer.model", b"YQ== 0\nYg== 2\n", "ranks"),
        ("tokenizer.model", b"YQ== 0\n?? 1\n", "line 2"),
        ("tokenizer.json", b'{"model": ', "tokenizer.json"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {}}}', "WordPiece"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}', "vocab"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}}, "decoder": {"type": "CTC"}}', "CTC"),
    ],
)
def test_a_damaged_file_is_named_with_its_fault(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=said) as caught:
        open_tokenizer(tmp_path)
    assert name in str(caught.value)


def test_a_missing_tokenizer_is_an_error_that_says_what_is_there(tmp_path):
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ValueError, match=r"weights\.pth"):
        open_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone\.model"):
        open_tokenizer(tmp_path / "gone.model")
