"""Tests of config: where a setting may come from, what is accepted, and what each refusal says.

Must not need torch, a model or a verb.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from accessory.config import dump, help_text, nearest, parse


@dataclass
class Optim:
    lr: float = 1e-3
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass
class Base:
    seed: int = 0
    """Where randomness starts."""


@dataclass
class Settings(Base):
    prompt: str = ""
    """What to ask, a text that is
    long enough for two lines."""
    quant: bool = False
    """Store weights in 4 bit."""
    pretrained_path: list[str] = field(default_factory=list)
    """Folders, base first."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    top_p: float | None = None
    image: Path | None = None
    rope_scaling: float | dict | None = None
    optim: Optim = field(default_factory=Optim)


@dataclass
class Needy:
    name: str
    """Has no default."""


def settings(*argv: str) -> Settings:
    return parse(Settings, argv, prog="try")


def refusal(*argv: str) -> str:
    with pytest.raises(ValueError) as caught:
        settings(*argv)
    assert "\n" not in str(caught.value), str(caught.value)
    return str(caught.value)


def written(tmp_path: Path, text: str, *, name: str = "c.yaml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_defaults_hold_without_arguments():
    assert settings() == Settings()


@pytest.mark.parametrize("argv", [["seed=3"], ["--seed", "3"], ["--seed=3"]])
def test_three_spellings_of_a_flag_mean_the_same(argv):
    assert settings(*argv).seed == 3


def test_a_dash_in_a_flag_counts_as_an_underscore():
    assert settings("--top-p", "0.5").top_p == 0.5


def test_flag_beats_file_beats_default(tmp_path):
    path = written(tmp_path, "seed: 1\nprompt: from file\n")
    got = settings(path, "seed=2")
    assert (got.seed, got.prompt, got.quant) == (2, "from file", False)


def test_the_last_of_two_flags_counts():
    assert settings("seed=1", "--seed", "2").seed == 2


def test_a_json_file_is_a_config_file(tmp_path):
    assert settings(written(tmp_path, '{"optim": {"lr": 1e-5}}', name="c.json")).optim.lr == 1e-5


def test_an_empty_file_changes_nothing(tmp_path):
    assert settings(written(tmp_path, "# nothing\n")) == Settings()


@pytest.mark.parametrize(("argv", "want"), [(["--quant"], True), (["--quant", "false"], False), (["quant=true"], True)])
def test_a_bool_stands_bare_or_with_a_value(argv, want):
    assert settings(*argv).quant is want


def test_a_bare_bool_does_not_swallow_the_next_flag():
    got = settings("--quant", "--seed", "4")
    assert (got.quant, got.seed) == (True, 4)


def test_a_list_takes_values_up_to_the_next_flag():
    got = settings("--pretrained_path", "base", "delta", "seed=5", "--quant")
    assert (got.pretrained_path, got.seed, got.quant) == (["base", "delta"], 5, True)


@pytest.mark.parametrize("text", ["pretrained_path=[a, b]", "--pretrained_path=[a, b]"])
def test_a_list_may_be_written_in_brackets(text):
    assert settings(text).pretrained_path == ["a", "b"]


def test_a_list_given_twice_is_refused_since_paths_would_be_lost():
    assert "given twice" in refusal("--pretrained_path", "a", "--pretrained_path", "b")


def test_one_value_in_a_file_is_a_list_of_one(tmp_path):
    assert settings(written(tmp_path, "pretrained_path: base\n")).pretrained_path == ["base"]


def test_nested_settings_have_dotted_keys(tmp_path):
    got = settings(written(tmp_path, "optim:\n  lr: 0.1\noptim.betas: [0.5, 0.6]\n"), "--optim.lr", "0.2")
    assert got.optim == Optim(lr=0.2, betas=(0.5, 0.6))


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001"])
def test_a_float_in_a_file_may_be_written_as_people_write_it(tmp_path, text):
    assert settings(written(tmp_path, f"optim:\n  lr: {text}\n")).optim.lr == 1e-5


@pytest.mark.parametrize("text", ["1e4", "1.0e+4"])
def test_a_whole_number_in_float_form_is_refused_with_the_right_one(tmp_path, text):
    assert "write 10000" in refusal(f"seed={text}")
    assert "write 10000" in refusal(written(tmp_path, f"seed: {text}\n"))


def test_none_empties_an_optional_setting(tmp_path):
    assert settings(written(tmp_path, "top_p: 0.5\n"), "--top_p", "none").top_p is None


def test_a_union_takes_the_member_that_fits():
    assert settings("rope_scaling=2").rope_scaling == 2.0
    assert settings("rope_scaling={type: linear, factor: 2}").rope_scaling == {"type": "linear", "factor": 2}


def test_a_path_becomes_a_path():
    assert settings("--image", "a b.png").image == Path("a b.png")


def test_a_value_may_begin_with_a_dash_or_hold_an_equals_sign():
    assert settings("--prompt", "- one = two").prompt == "- one = two"
    assert settings("--prompt=--x").prompt == "--x"
    assert settings("--seed", "-1").seed == -1


def test_an_empty_prompt_is_a_value():
    assert settings("--prompt", "").prompt == ""


def test_an_unknown_flag_names_the_nearest():
    text = refusal("--promt", "x")
    assert "--promt" in text and "'prompt'" in text


def test_an_unknown_key_names_the_file_and_the_nearest(tmp_path):
    path = written(tmp_path, "optim:\n  rl: 1\n")
    text = refusal(path)
    assert path in text and "'optim.rl'" in text and "'optim.lr'" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: three\n", "a whole number"),
        ("seed: true\n", "a whole number"),
        ("prompt: 2023\n", "put it in quotes"),
        ("prompt: on\n", "put it in quotes"),
        ("quant: 3\n", "true or false"),
        ("seed:\n", "a whole number"),
        ("dtype: fp8\n", "fp16"),
        ("optim: 3\n", "mapping"),
        ("optim:\n  betas: [1]\n", "expected 2"),
        ("- a\n", "mapping"),
    ],
)
def test_a_wrong_type_says_got_and_expected(tmp_path, text, said):
    path = written(tmp_path, text)
    got = refusal(path)
    assert path in got and "got" in got and "expected" in got and said in got, got


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_a_key_named_twice_in_a_file_is_refused(tmp_path, name):
    assert "'seed' given twice" in refusal(written(tmp_path, '{"seed": 1, "seed": 2}', name=name))


def test_malformed_yaml_is_one_sentence_with_file_and_line(tmp_path):
    text = refusal(written(tmp_path, "seed: [1\nprompt: x\n"))
    assert "c.yaml" in text and "line 2" in text


def test_yaml_cannot_build_python_objects(tmp_path):
    assert "c.yaml" in refusal(written(tmp_path, "prompt: !!python/object/apply:os.getcwd []\n"))


def test_an_absent_file_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        settings("nowhere.yaml")


def test_a_flag_without_its_value_is_refused():
    assert "--prompt: no value" in refusal("--prompt", "--quant")
    assert "--pretrained_path: no value" in refusal("--pretrained_path")


def test_a_stray_word_is_refused():
    assert "'stray'" in refusal("seed=1", "stray")


def test_a_setting_without_default_must_be_given():
    with pytest.raises(ValueError, match="--name: missing"):
        parse(Needy, [])


def test_the_help_is_made_of_names_types_strings_and_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Settings, ["--help"], prog="accessory try", description="Tries things.")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for part in ("usage: accessory try", "Tries things.", "--seed INT", "Where randomness starts. (default: 0)"):
        assert part in text
    assert "a text that is long enough" in " ".join(text.split())
    assert "--dtype {fp32,bf16,fp16}" in text and "--optim.lr FLOAT" in text and "--pretrained_path TEXT ..." in text


def test_the_help_says_what_is_required():
    assert "(required)" in help_text(Needy, prog="x")


def test_a_dump_reads_back_equal(tmp_path):
    made = settings("optim.lr=1e-5", "--pretrained_path", "a", "b", "--image", "x.png", "--prompt", "1e-5", "top_p=1")
    dump(made, tmp_path / "out.yaml")
    assert parse(Settings, [str(tmp_path / "out.yaml")]) == made
    assert [path.name for path in tmp_path.iterdir()] == ["out.yaml"]


def test_nearest_lists_the_names_when_none_is_close():
    assert nearest("zzz", ["chat", "infer"]) == "expected one of chat, infer"


def test_config_does_not_import_torch():
    code = "import sys, accessory.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
