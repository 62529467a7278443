"""META and plain names as sources: keys, variables, places, and what is said where they are wrong.

Must not tokenise.
"""

import pytest

from accessory.data.feed import Source, read_sources


def meta(tmp_path, text: str) -> str:
    path = tmp_path / "data.yaml"
    path.write_text(text)
    return str(path)


def test_a_meta_list_gives_its_entries_in_order(tmp_path):
    text = """
META:
  - path: a.json
    type: text
  - path: b.json
    type: image_text
    preprocess: single_turn_llava
    prompt_type: shortqa
    root: coco
    ratio: 0.5
"""
    assert read_sources([meta(tmp_path, text)], root=None) == [
        Source("a.json"),
        Source("b.json", "image_text", "single_turn_llava", "shortqa", "coco", 0.5),
    ]


def test_the_folder_of_pictures_holds_where_meta_names_none(tmp_path):
    path = meta(tmp_path, "META:\n  - path: a.json\n  - {path: b.json, root: own}\n")
    assert [source.root for source in read_sources([path, "c.json"], root="media")] == ["media", "own", "media"]


def test_variables_are_replaced_and_an_unset_one_is_named(tmp_path, monkeypatch):
    path = meta(tmp_path, "META:\n  - {path: $DATA/a.json, root: $DATA/pictures}\n")
    monkeypatch.setenv("DATA", "/data")
    assert read_sources([path, "$DATA/b.json"], root=None)[:2] == [
        Source("/data/a.json", root="/data/pictures"),
        Source("/data/b.json"),
    ]
    monkeypatch.delenv("DATA")
    with pytest.raises(ValueError, match=r"\$DATA is not set; set it to the folder that holds the data"):
        read_sources([path], root=None)


def test_a_prompt_type_of_none_is_the_bare_template(tmp_path):
    for none in ("None", "null"):
        (source,) = read_sources([meta(tmp_path, f"META:\n  - {{path: a.json, prompt_type: {none}}}\n")], root=None)
        assert source.prompt_type.lower() == "none"


def test_paths_hold_from_the_yaml_where_they_are_not_below_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("[]")
    monkeypatch.chdir("/")
    (source,) = read_sources([meta(tmp_path, "META:\n  - path: a.json\n")], root=None)
    assert source.path == str(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("META:\n  - path: a.json\n    promt_type: alpaca\n", "did you mean 'prompt_type'"),
        ("META:\n  - type: text\n", "expected a mapping with a `path`"),
        ("META: 3\n", "expected `META:` and a list"),
        ("META:\n  - {path: a.json, ratio: 1.5}\n", "ratio: got 1.5"),
        ("META:\n  - {path: a.json, prompt_type: alpacca}\n", "did you mean 'alpaca'"),
        ("META:\n  - {path: a.json, preprocess: captions}\n", "did you mean 'caption'"),
        ("META: [\n", "data.yaml"),
    ],
)
def test_a_wrong_meta_is_one_sentence(tmp_path, text, said):
    with pytest.raises(ValueError, match="data.yaml") as caught:
        read_sources([meta(tmp_path, text)], root=None)
    assert said in str(caught.value)
