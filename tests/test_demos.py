"""The demos as people start them: one shot, through pipes, on a terminal, over ranks that may die."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import psutil
import pytest
from engine_toys import ONE, opened, picture, write_model

from accessory.checkpoint import write_folder
from accessory.data.template import Turn
from accessory.engine import Conversation, Engine, Request
from accessory.serve.keyboard import _edited
from accessory.serve.settings import Settings
from accessory.serve.terminal import KINDS, talk

DEMOS = Path(__file__).resolve().parents[1] / "demos"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
PATIENCE = 100  # seconds that a busy machine may take to start two ranks


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that sees, with a picture beside it."""
    folder = write_model(tmp_path_factory.mktemp("seeing") / "model")
    picture(1).save(folder.parent / "noise.png")
    picture(2).save(folder.parent / "other.png")
    return folder


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a session whose answers end when somebody ends them."""
    folder = write_model(tmp_path_factory.mktemp("endless") / "model", "llama", sees=False, endless=True)
    flags = ["--max_gen_len", "30000", "--max_seq_len", "32000", "--template", "none", "--dtype", "fp32"]
    return ["--pretrained_path", str(folder), *flags]


@pytest.fixture
def say(seeing: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator:
    """Run a demo in this process, with lines from a pipe; its stdout."""

    def run(kind: str, *flags: str, lines: str = "") -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        talk(kind, ["--pretrained_path", str(seeing), "--dtype", "fp32", "--max_gen_len", "6", *flags])
        return capfd.readouterr().out

    yield run
    logging.getLogger("accessory").handlers.clear()  # they write to a stderr that ends with this test


@pytest.fixture(scope="module")
def answers(seeing: Path):
    """What the engine says to a conversation, as a demo prints it."""
    engine = Engine(opened(seeing), ONE, rows=1)

    def ask(turns, *pictures: str, template: str | None = None) -> str:
        shown = [str(seeing.parent / name) for name in pictures]
        text = engine.generate([Request(turns, pictures=shown, template=template, max_gen_len=6)])[0].text
        return text if text.endswith("\n") else f"{text}\n"

    return ask


def test_one_shot_prints_the_answer_alone(say, answers, seeing):
    assert say("single_turn", "--prompt", "hello") == answers("hello")
    image = str(seeing.parent / "noise.png")
    assert say("single_turn_mm", "--image", image, "--prompt", "what?") == answers("what?", "noise.png")


def test_the_seeds_flags_open_a_folder_without_small_files(seeing, answers, tmp_path, capfd):
    config = json.loads((seeing / "config.json").read_text())
    for name, part in (("params", config.keys() - {"vision"}), ("vision", {"vision"})):
        (tmp_path / f"{name}.json").write_text(json.dumps({key: config[key] for key in part}))
    legacy, picture_path = tmp_path / "legacy", str(seeing.parent / "noise.png")
    write_folder(legacy, opened(seeing).model.state_dict(), fmt="pth", shards=2)
    for name in ("meta.json", "manifest.json"):
        (legacy / name).unlink()
    files = ["--llama_config", str(tmp_path / "params.json"), str(tmp_path / "vision.json")]
    files += ["--tokenizer_path", str(seeing / "tokenizer.model"), "--pretrained_path", str(legacy)]
    asked = ["--prompt", "what", "--image", picture_path, "--dtype", "fp32", "--max_gen_len", "6"]
    talk("single_turn_mm", ["--llama_type", "llama_qformerv2", *files, *asked])
    assert capfd.readouterr().out == answers([Turn("user", "what", 1)], "noise.png")
    logging.getLogger("accessory").handlers.clear()


def test_a_template_changes_what_is_asked_and_none_passes_it_raw(say, answers):
    asked = {name: say("single_turn", "--prompt", "a fox", "--template", name) for name in ("alpaca", "dialog", "none")}
    assert asked == {name: answers("a fox", template=name) for name in asked} and len(set(asked.values())) == 3
    assert say("single_turn", "--prompt", "a fox", "--noinstruct") == asked["none"]
    assert say("single_turn", "--prompt", "none", "--template", "none") == answers("none", template="none")


def test_an_empty_raw_prompt_continues_from_bos(say, answers):
    assert say("single_turn", "--prompt", "", "--template", "none") == answers("", template="none")


def test_a_pipe_of_questions_gets_an_answer_each(say, answers):
    out = say("single_turn", lines="hello\n\na fox\nexit\nnever asked\n")
    assert out == answers("hello") + answers("a fox")


def test_multi_turn_remembers_until_clear(say, answers):
    first = answers("hello")
    talked = Conversation()
    talked.add("hello", first[:-1])
    out = say("multi_turn", lines="hello\nand then\nclear\nhello\n")
    assert out == first + answers(talked.asked("and then")[0]) + first


def test_multi_turn_shows_its_picture_with_the_first_question(say, answers, seeing):
    image = str(seeing.parent / "noise.png")
    first = answers("what", "noise.png")
    talked = Conversation()
    talked.add("what", first[:-1], [image])
    out = say("multi_turn", "--image", image, lines="what\nand then\n")
    assert out == first + answers(talked.asked("and then")[0], "noise.png")


def test_a_full_window_forgets_the_oldest_exchanges_and_says_so(say, caplog, monkeypatch):
    questions = [f"the quick brown fox jumps over the lazy dog {number}" for number in range(5)]
    asked, submit = [], Engine.submit

    def watched(engine: Engine, request: Request) -> object:
        asked.append([turn.text for turn in request.turns if turn.role == "user"])
        assert engine.length(request) + request.max_gen_len <= engine.window
        return submit(engine, request)

    monkeypatch.setattr(Engine, "submit", watched)
    say("multi_turn", "--max_seq_len", "60", "--template", "none", lines="\n".join(questions))
    assert "oldest 1 exchange(s) of the conversation are forgotten" in caplog.text
    ends = range(1, len(questions) + 1)
    assert all(texts == questions[end - len(texts) : end] for end, texts in zip(ends, asked, strict=True))
    assert len(asked[1]) == 2 and len(asked[-1]) < 5


def test_a_question_longer_than_the_window_is_not_cut_in_silence(say):
    with pytest.raises(ValueError, match="in a window of 20"):
        say("multi_turn", "--max_seq_len", "20", lines="1" * 30)


def test_the_first_question_is_about_the_picture_of_the_command(say, answers, seeing):
    noise, other = (str(seeing.parent / name) for name in ("noise.png", "other.png"))
    out = say("single_turn_mm", "--image", noise, lines=f"what\n{other}\nwhat\n")
    assert out == answers("what", "noise.png") + answers("what", "other.png")


def test_a_picture_stays_in_view_until_another_or_none(say, answers, seeing):
    noise, other = (str(seeing.parent / name) for name in ("noise.png", "other.png"))
    lines = f"{noise}\nwhat\n\nwhat\n{other}\nwhat\n-\nwhat\n"
    expected = [answers("what", *shown) for shown in (["noise.png"], ["noise.png"], ["other.png"], [])]
    assert say("single_turn_mm", lines=lines) == "".join(expected)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "what", "is", "it"], "put it in quotes"),
        (["--noinstruct", "--template", "alpaca"], "with --noinstruct"),
        (["--n_gpus", "2", "--gpu_ids", "0", "1"], "together with --n_gpus"),
        (["--n_gpus", "0"], "--n_gpus: got 0"),
        (["--gpu_ids", "1", "1"], "different GPUs"),
        (["--max_gen_len", "0"], "--max_gen_len: got 0"),
        (["--max_seq_len", "1"], "--max_seq_len: got 1"),
        (["--temperatur", "1"], "did you mean 'temperature'"),
        (["--template", "alpacca"], "did you mean 'alpaca'"),
        (["--temperature", "-1"], "temperature: got -1"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        talk("single_turn", flags)


def test_a_question_that_cannot_be_asked_ends_one_shot_and_pipe(say):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        say("single_turn_mm", "--prompt", "what", "--image", "nowhere.png")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        say("single_turn_mm", lines="nowhere.png\nwhat\n")
    with pytest.raises(ValueError, match="in a window of 256"):
        say("single_turn", lines="1" * 300)


def test_the_seeds_flags_are_all_there():
    known = set(Settings.__dataclass_fields__)
    assert known >= {"llama_config", "tokenizer_path", "pretrained_path", "quant", "llama_type", "noinstruct", "n_gpus"}
    assert known >= {"gpu_ids", "max_seq_len", "prompt", "image", "template", "max_gen_len", "temperature", "top_p"}
    assert {path.stem for path in DEMOS.glob("*.py")} == set(KINDS)


@pytest.mark.parametrize(
    ("typed", "line"),
    [(b"ab\x7fc", b"ac"), (b"\xc3\xa9\x08x", b"x"), (b"a\n\x7fb", b"a\nb"), (b"\x7f\x7fa", b"a")],
)
def test_keys_typed_unseen_are_edited_as_a_terminal_would(typed, line):
    assert _edited(typed) == line


# ---- processes


def outside() -> dict[str, str]:
    """The environment of a person who has not installed the package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_a_bare_checkout_answers_about_a_picture_over_two_ranks_from_anywhere(seeing, answers, tmp_path):
    flags = ["--pretrained_path", str(seeing), "--dtype", "fp32", "--max_gen_len", "6"]
    command = [*TORCHRUN, str(DEMOS / "single_turn_mm.py"), *flags, "--image", "../noise.png", "--prompt", "what?"]
    (seeing.parent / "cwd").mkdir()
    done = subprocess.run(
        command, cwd=seeing.parent / "cwd", env=outside(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout) == (0, answers("what?", "noise.png")), done.stderr
    assert str(seeing) in done.stderr and "cut after 6 tokens" in done.stderr
    assert done.stderr.count("2 ranks: tp 2 x dp 1, gloo over cpu") == 1, done.stderr


def test_the_help_of_a_demo_needs_no_torch():
    script = str(DEMOS / "multi_turn.py")
    code = f"""import sys, runpy; sys.argv = ['x', '--help']
try: runpy.run_path({script!r}, run_name='__main__')
finally: assert 'torch' not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--pretrained_path TEXT ..." in done.stdout, done.stderr


@pytest.mark.parametrize("launcher", ["torchrun", "n_gpus"])
def test_a_rank_killed_mid_answer_ends_the_job_soon_and_wholly(launcher, endless, tmp_path):
    script = [str(DEMOS / "single_turn.py"), *endless, "--prompt", "hello"]
    command = [*TORCHRUN, *script] if launcher == "torchrun" else [sys.executable, *script, "--n_gpus", "2"]
    with (tmp_path / "stderr").open("w") as err:
        job = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err)
    try:
        assert job.stdout.read(200), (tmp_path / "stderr").read_text()
        family = psutil.Process(job.pid).children(recursive=True)
        victim = next(process for process in family if process.environ().get("RANK") == "1")
        began = time.monotonic()
        victim.kill()
        job.stdout.read()
        code = job.wait(30)
        assert code not in (0, None) and time.monotonic() - began < 30
        assert re.search(r"accessory: error: .*rank", (tmp_path / "stderr").read_text())
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
    finally:
        job.kill()
        job.wait()


# ---- terminals


@pytest.fixture
def terminal() -> Iterator:
    """Start a command on a terminal of its own."""
    started: list[pexpect.spawn] = []

    def start(command: list[str], **options) -> pexpect.spawn:
        child = pexpect.spawn(command[0], command[1:], encoding="utf-8", codec_errors="replace", **options)
        started.append(child)
        return child

    yield start
    for child in started:
        child.close(force=True)


def test_ctrl_c_under_torchrun_stops_the_answer_and_the_next_question_is_answered(terminal, endless):
    child = terminal([*TORCHRUN, str(DEMOS / "multi_turn.py"), *endless], timeout=PATIENCE)
    child.expect("Ctrl-C stops an answer.*> ")
    for question in ("tell me", "and now"):
        child.sendline(question)
        child.expect(f"{question}\r\n.{{50}}")  # the answer is under way
        child.send("\x03")
        child.expect(r"\(stopped\)\r\n> ")
    child.send("not this\x03")
    child.expect(r"\^C\r\n> ")
    child.sendline("exit")
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)


TALKER = """
import sys, time
from accessory.serve.keyboard import Keyboard
with Keyboard() as keyboard:
    while (line := keyboard.ask("> ")) is not None:
        print("got", ascii(line), flush=True)
        if line == "answer":
            with keyboard.watching() as stopped:
                print("working", flush=True)
                while not stopped():
                    time.sleep(0.01)
            print("stopped", flush=True)
print("end", flush=True)
"""


@pytest.fixture
def talker(terminal) -> pexpect.spawn:
    """A session on a terminal, with a stand-in for the answers."""
    child = terminal([sys.executable, "-c", TALKER], timeout=30)
    child.expect("> ")
    return child


def test_ctrl_c_at_the_prompt_clears_the_line(talker):
    talker.send("abc\x03")
    talker.expect("> ")
    talker.sendline("def")
    talker.expect("got 'def'")


def test_ctrl_d_at_the_prompt_ends_the_session(talker):
    talker.send("\x04")
    talker.expect("end")


def test_what_is_typed_during_an_answer_is_the_next_question(talker):
    talker.sendline("answer")
    talker.expect("working")
    talker.send("dropped\x03whole line\rbegu")
    talker.expect("stopped")
    talker.expect("got 'whole line'")
    talker.expect("> begu")
    talker.sendline("n")
    talker.expect("got 'begun'")


def test_sigterm_during_an_answer_gives_the_terminal_back(talker):
    def modes() -> list[bool]:
        flags = termios.tcgetattr(talker.child_fd)[3]
        return [bool(flags & mode) for mode in (termios.ECHO, termios.ICANON, termios.ISIG)]

    talker.sendline("answer")
    talker.expect("working")
    assert modes() == [False] * 3
    talker.kill(signal.SIGTERM)
    talker.expect(pexpect.EOF)
    assert modes() == [True] * 3
