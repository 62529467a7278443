"""Every command of the README names real files, verbs, targets and flags; the tree names real rooms.

Must not run the commands: demos, tools and the rest have tests of their own.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from accessory.cli import VERBS
from accessory.config import parse
from accessory.dialect import translator
from accessory.export.settings import ExportSettings
from accessory.serve.api.settings import ApiSettings
from accessory.serve.chat import ChatSettings
from accessory.serve.infer_settings import InferSettings
from accessory.serve.predict_settings import PredictSettings
from accessory.serve.web.main import WebchatSettings
from accessory.train.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = sorted({line for line in LINES if shlex.split(line, comments=True)})
INLINE = sorted(set(re.findall(r"`((?:accessory|demos/|tools/|exps/|bash |tests/)[^`]*)`", README)))


VERB_SETTINGS = {
    "train": ("train", Settings),
    "sft": ("train", Settings),
    "infer": ("infer", InferSettings),
    "chat": ("chat", ChatSettings),
    "export": ("export", ExportSettings),
    "predict": ("predict", PredictSettings),
    "api": ("api", ApiSettings),
    "webchat": ("webchat", WebchatSettings),
}


@cache
def flags_of(script: str) -> set[str]:
    """The flags that a script's --help prints."""
    run = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return set(re.findall(r"^\s*(--\w+)", run.stdout, re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_real(command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {words[1]}"
        return
    if words[:3] == ["python", "-m", "accessory"]:
        check_verb(words[3:])
        return
    if words[0] in ("bash", "sbatch"):
        scripts = [word for word in words[1:] if word.endswith((".sh", ".sbatch"))]
        assert scripts and all((ROOT / script).is_file() for script in scripts), f"{words} names no file"
        return
    assert words[0] in ("python", "torchrun"), f"{words[0]} is not checked by this test"
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file(), f"{script} is not there"
    used = {word.partition("=")[0] for word in words[words.index(script) :] if word.startswith("--")}
    assert used <= flags_of(script), f"{script} has no {', '.join(used - flags_of(script))}"


def check_verb(words: list[str]) -> None:
    """`accessory VERB`: its settings are known, and its config is there."""
    verb, settings = VERB_SETTINGS[words[0]]
    configs = [word for word in words[1:] if word.endswith(".yaml")]
    assert all((ROOT / config).is_file() for config in configs), f"{configs} is not there"
    parse(settings, words[1:], translate=translator(verb))


@pytest.mark.parametrize("text", INLINE)
def test_what_the_readme_names_is_there(text: str) -> None:
    words = text.removeprefix("bash ").split()
    if words[0] == "accessory":
        assert len(words) == 1 or words[1] in VERBS, f"no verb {words[1]}"
    else:
        assert list(ROOT.glob(words[0])), f"{words[0]} is not there"


def test_the_tree_names_every_room_and_no_other() -> None:
    tree = re.search(r"^accessory/\n((?:  .+\n)+)", README, re.MULTILINE).group(1)
    named = {
        word
        for line in tree.splitlines()
        for word in re.findall(r"^  (\S+)|  (\w+/|\w+\.py)(?=\s|$)", line)
        for word in word
        if word
    }
    rooms = {path.name + ("/" if path.is_dir() else "") for path in (ROOT / "accessory").iterdir()}
    rooms -= {"__init__.py", "__main__.py", "__pycache__/"}
    assert named == rooms, named ^ rooms
