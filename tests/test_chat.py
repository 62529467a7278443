"""`accessory chat`: texts of many lines, a system text at the prompt, pictures by name; in a pipe and on a terminal."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
from engine_toys import ONE, opened, picture, write_model

from accessory.data.template import Turn
from accessory.engine import Engine, Request
from accessory.serve import chat
from accessory.serve.speaker import Speaker

Run = Callable[..., str]
PROMPT = "\nUser: "


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("seeing") / "model")
    picture(1).save(folder.parent / "noise.png")
    return folder


@pytest.fixture
def say(seeing: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> Iterator[Run]:
    """Chat with lines from a pipe; its stdout."""

    def run(lines: str, *flags: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        monkeypatch.chdir(seeing.parent)
        words = ["--model_name_or_path", str(seeing), "--precision", "fp32", "--max_new_tokens", "6"]
        chat.main([*words, "--template", "llama2", *flags])
        return capfd.readouterr().out

    yield run
    logging.getLogger("accessory").handlers.clear()  # they write to a stderr that ends with this test


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Turn], int]]:
    """Turns and number of pictures of every question."""
    seen, submit = list[tuple[list[Turn], int]](), Engine.submit

    def watched(self: Engine, request: Request) -> object:
        seen.append((list(request.turns), len(request.pictures)))
        return submit(self, request)

    monkeypatch.setattr(Engine, "submit", watched)
    return seen


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        ('"""one\n  two\n\nexit"""\nhello\n', ["one\n  two\n\nexit", "hello"]),
        ('"""\none\n/system two\n"""\n', ["one\n/system two"]),
        ('  """one"""\n', ["one"]),
        ('say """ here\n', ['say """ here']),
        ('""""""\n"""\n"""\nhello\n', ["hello"]),
        ("a path C:\\\nhello\n", ["a path C:\\", "hello"]),
        ("/systematic\n/image of it\n", ["/systematic"]),
    ],
)
def test_a_block_is_one_question_of_many_lines(say, asked, lines, texts, seeing):
    if "/image" in lines:
        with pytest.raises(FileNotFoundError, match="of it"):
            say(lines)
    else:
        out = say(lines)
        assert out.startswith(PROMPT) and out.count("Assistant: ") == len(texts)
    assert [turns[-1].text for turns, _ in asked] == texts


def test_a_block_that_nobody_closes_is_not_asked(say, asked):
    with pytest.raises(ValueError, match="block: got the end of the input"):
        say('"""one\ntwo\n')
    assert asked == []


def test_a_system_text_is_told_from_the_prompt_on_until_it_is_taken_back(say, asked, caplog):
    with caplog.at_level(logging.INFO, logger="accessory"):
        say('hello\n/system be brief\nand\nclear\nhi\n/system """be\nlong"""\nso\n/system\nend\n')
    assert [turns[0].text for turns, _ in asked if turns[0].role == "system"] == ["be brief", "be brief", "be\nlong"]
    assert [turns[-1].text for turns, _ in asked] == ["hello", "and", "hi", "so", "end"]
    assert [len(turns) for turns, _ in asked] == [1, 4, 2, 4, 5]
    assert "Told before the conversation: be brief" in caplog.text and "but what the template says" in caplog.text


@pytest.mark.parametrize(
    ("template", "text", "words"), [("none", "be brief", "no place"), ("llama2", "1" * 300, "256")]
)
def test_a_system_text_that_cannot_be_told_is_refused_at_once(seeing, template, text, words):
    with Engine(opened(seeing), ONE, rows=1) as engine:
        speaker = Speaker(engine, chat.sampling_of(chat.ChatSettings()), template, max_gen_len=6)
        speaker.history.add("hello", "there")
        with pytest.raises(ValueError, match=words):
            speaker.instruct(text)
        assert speaker.history.system is None and len(speaker.history.exchanges) == 1


def test_pictures_are_given_by_name_before_their_question(say, asked):
    out = say("/image noise.png\n/image ./noise.png\nwhat\n<image>and\nnoise.png\nend\n")
    assert [pictures for _, pictures in asked] == [2, 3, 3] and "Picture 1 (path or URL): " in out
    assert [turns[-1].pictures for turns, _ in asked] == [2, 1, 0]
    with pytest.raises(ValueError, match="/image: got no name"):
        say("/image\n")


def test_the_first_lines_name_what_can_be_typed(say, caplog):
    with caplog.at_level(logging.INFO, logger="accessory"):
        say("exit\n")
    for words in (
        "`clear` forgets",
        "`exit` leaves",
        "Ctrl-C stops",
        '"""',
        "`/system TEXT`",
        "`/image NAME`",
        "`<image>`",
    ):
        assert words in caplog.text


def test_on_a_terminal_blocks_errors_and_stopped_answers_leave_the_session_going(tmp_path):
    folder = write_model(tmp_path / "endless" / "model", "llama", sees=False, endless=True)
    words = ["--model_name_or_path", str(folder), "--precision", "fp32", "--template", "llama2"]
    words += ["--max_new_tokens", "30000", "--max_seq_len", "32000"]
    code = f"import sys; from accessory.serve.chat import main; sys.exit(main({words!r}))"
    child = pexpect.spawn(sys.executable, ["-c", code], encoding="utf-8", codec_errors="replace", timeout=100)
    try:
        child.expect("User: ")
        child.sendline("/system be brief")
        child.expect("Told before the conversation: be brief.*User: ")
        child.sendline('"""tell')
        child.expect(r"\.\.\. ")
        child.sendline('me"""')
        child.expect("Assistant: .{50}")
        child.send("\x03")
        child.expect(r"\(stopped\)\r\n\r\nUser: ")
        child.sendline('"""dropped')
        child.expect(r"\.\.\. ")
        child.send("\x04")
        child.expect("error: block: .*User: ")
        child.sendline("exit")
        child.expect(pexpect.EOF)
        child.close()
        assert (child.exitstatus, child.signalstatus) == (0, None)
    finally:
        child.close(force=True)
