"""`accessory infer` and `accessory chat` on a small model that sees: scripted sessions, a terminal, and datasets."""

from __future__ import annotations

import functools
import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import llava_toys
import pexpect
import pytest
from engine_toys import ONE, opened, picture, write_model

from accessory.data.template import Turn
from accessory.dist import Ranks
from accessory.engine import Engine, Request
from accessory.serve import chat, infer
from accessory.serve.infer_settings import InferSettings
from spawn import run_ranks

RULE = "-" * 50
MEDIA = "Input a media path or URL <<< "
Run = Callable[..., str]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that sees, with two pictures beside it."""
    folder = write_model(tmp_path_factory.mktemp("seeing") / "model")
    for name, seed in (("noise", 1), ("other", 2)):
        picture(seed).save(folder.parent / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def engine(seeing: Path) -> Engine:
    return Engine(opened(seeing), ONE, rows=1)


@pytest.fixture(scope="module")
def answer(seeing: Path, engine: Engine) -> Callable[..., str]:
    """What the model says to turns, alone."""

    def ask(turns: str | list[Turn], *pictures: str, limit: int = 6) -> str:
        shown = [str(seeing.parent / f"{name}.png") for name in pictures]
        return engine.generate([Request(turns, pictures=shown, max_gen_len=limit)])[0].text

    return ask


@pytest.fixture
def say(seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> Iterator[Run]:
    """Run a verb in this process, with lines from a pipe; its stdout."""

    def run(verb: object, *flags: str, lines: str = "", model: Path = seeing) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        monkeypatch.chdir(seeing.parent)
        words = ["--model_name_or_path", str(model), "--precision", "fp32", "--max_new_tokens", "6", *flags]
        if verb is infer:
            words += ["--result_dir", str(tmp_path)]
        verb.main(words)
        return capfd.readouterr().out

    yield run
    logging.getLogger("accessory").handlers.clear()  # they write to a stderr that ends with this test


def shown(text: str) -> str:
    """An answer and the rule below it, as a session shows them."""
    return f"{text}\n{RULE}\n"


def user(text: str, pictures: int = 0) -> Turn:
    return Turn("user", text, pictures=pictures)


# ---- the interactive protocol


def test_a_scripted_session_is_the_known_protocol(say, answer, tmp_path):
    first = answer([user("what", 1)], "noise")
    talked = [user("what", 1), Turn("assistant", first), user("and then")]
    second, alone = answer(talked, "noise"), answer("hello")
    lines = "what\nnoise.png\n\nand then\n\nCLEAR \nhello\n\nExit\nnever asked\n"
    out = say(infer, lines=lines)
    turn = f"<<< {MEDIA}"
    assert out == f"{turn}{shown(first)}<<< {turn}{shown(second)}<<< {turn}{shown(alone)}<<< "
    records = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    assert records[0] == {"system": None, "query": "what", "response": first, "history": [], "images": ["noise.png"]}
    assert records[1]["history"] == [["what", first]] and records[1]["images"] == ["noise.png"]
    assert (records[2]["history"], records[2]["images"]) == ([], [])


def test_a_place_asks_for_its_picture_and_pictures_stay_until_clear(say, answer, tmp_path):
    two = answer([Turn("user", "compare to", pictures=2, places=(7,))], "noise", "other")
    out = say(infer, lines="<image>compare<image> to\nnoise.png\nother.png\n")
    assert out == f"<<< {MEDIA}{MEDIA}{shown(two)}<<< \n"
    later = [user("hello"), Turn("assistant", answer("hello")), user("what", 1)]
    out = say(infer, lines="hello\n\n<image>what\nnoise.png\n")
    assert out == f"<<< {MEDIA}{shown(answer('hello'))}<<< {MEDIA}{shown(answer(later, 'noise'))}<<< \n"
    records = [
        json.loads(line) for line in max(tmp_path.glob("*.jsonl"), key=lambda path: path.stem).read_text().splitlines()
    ]
    assert records[-1]["query"] == "<image>what" and records[-1]["images"] == ["noise.png"]


def test_several_lines_and_a_system_text_have_prompts_of_their_own(say, answer):
    def asked(system: str | None, text: str) -> str:
        return shown(answer([*([Turn("system", system)] if system else []), user(text)]))

    lines = "multi-line\none\ntwo#\n\nreset-system#\nbe\nbrief#\nhello#\n\nsingle-line#\nreset-system\n\nhello\n\n"
    out = say(infer, lines=lines)
    expected = f"<<< <<<[M] {MEDIA}{asked(None, 'one' + chr(10) + 'two')}<<<[M] <<<[MS] "
    expected += f"<<<[M] {MEDIA}{asked('be' + chr(10) + 'brief', 'hello')}<<<[M] <<< <<<[S] "
    assert out == f"{expected}<<< {MEDIA}{asked(None, 'hello')}<<< \n"


def test_a_model_that_does_not_see_is_asked_without_pictures(say, tmp_path):
    blind = write_model(tmp_path / "blind" / "model", "llama", sees=False)
    text = Engine(opened(blind), ONE, rows=1).generate([Request("<image>hello", max_gen_len=6)])[0].text
    out = say(infer, model=blind, lines="<image>hello\n")
    assert out == f"<<< {shown(text)}<<< \n"


def test_a_picture_that_is_not_there_ends_a_pipe_with_its_reason(say):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        say(infer, lines="what\nnowhere.png\n")
    with pytest.raises(ValueError, match="nothing for place 2 of 2"):
        say(infer, lines="<image><image>what\nnoise.png\n\n")


def test_a_picture_from_a_private_address_is_shown_only_where_that_is_allowed(say, answer, seeing):
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(seeing.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/noise.png"
        with pytest.raises(ValueError, match="allow_private_urls"):
            say(infer, lines=f"what\n{url}\n")
        out = say(infer, "--allow_private_urls", "true", lines=f"what\n{url}\n")
        server.shutdown()
    assert out.endswith(f"<<< {MEDIA}{shown(answer([user('what', 1)], 'noise'))}<<< \n")


def test_the_hints_name_the_commands(say, caplog):
    with caplog.at_level(logging.INFO, logger="accessory"):
        say(infer, lines="exit\n")
    for hint in ("`exit` or `quit`", "`multi-line`", "`reset-system`", "Input `clear`", "path to the multimedia file"):
        assert hint in caplog.text


def test_ctrl_c_on_a_terminal_stops_the_answer_and_the_session_goes_on(tmp_path):
    folder = write_model(tmp_path / "endless" / "model", "llama", sees=False, endless=True)
    words = ["--model_name_or_path", str(folder), "--precision", "fp32", "--template", "none", "--save_result", "false"]
    words += ["--max_new_tokens", "30000", "--max_seq_len", "32000"]
    code = f"import sys; from accessory.serve.infer import main; sys.exit(main({words!r}))"
    child = pexpect.spawn(sys.executable, ["-c", code], encoding="utf-8", codec_errors="replace", timeout=100)
    try:
        child.expect("<<< ")
        child.sendline("tell me")
        child.expect(r"tell me\r\n.{50}")
        child.send("\x03")
        child.expect(rf"\(stopped\)\r\n{RULE}\r\n<<< ")
        child.sendline("quit")
        child.expect(pexpect.EOF)
        child.close()
        assert (child.exitstatus, child.signalstatus) == (0, None)
    finally:
        child.close(force=True)


def test_a_dry_run_prints_the_settings_and_opens_nothing(capsys):
    assert infer.main(["--model_name_or_path", "nowhere", "--dry_run", "true", "--top_k", "3"]) == 0
    assert chat.main(["--model_name_or_path", "nowhere", "--dry_run"]) == 0
    assert "top_k: 3\n" in capsys.readouterr().out


# ---- chat


def test_a_scripted_chat_has_its_prompts_forgets_and_takes_pictures(say, answer, seeing):
    first = answer("hello")
    second = answer([user("hello"), Turn("assistant", first), user("what", 1)], "noise")
    out = say(chat, lines="hello\n<image>what\nnoise.png\nclear\nhello\nexit\n")
    prompt = "\nUser: "
    said = f"{prompt}Assistant: {first}\n{prompt}Picture 1 (path or URL): Assistant: {second}\n"
    assert out == f"{said}{prompt}{prompt}Assistant: {first}\n{prompt}"


def test_a_chat_shows_photographs_upright_and_the_first_one_by_flag(say, answer, seeing):
    exif = picture(1).getexif()
    exif[0x0112] = 3
    picture(1).rotate(180).save(seeing.parent / "turned.png", exif=exif)
    out = say(chat, "--image", "turned.png", lines="what\n")
    assert out == f"\nUser: Assistant: {answer([user('what', 1)], 'noise')}\n\nUser: \n"


# ---- datasets


@pytest.fixture
def rows(seeing: Path, tmp_path: Path) -> Path:
    """Rows with and without pictures, history and system text."""
    made = [
        {"query": "what", "response": "a thing", "images": [str(seeing.parent / "noise.png")]},
        {"query": "hello", "response": "yes", "system": "be brief"},
        {"query": "<image>and then", "response": "no", "history": [["hi", "ho"]], "images": ["noise.png"]},
        {"query": "the quick brown fox jumps over the lazy dog", "response": "x"},
        {"query": "a fox", "response": "y"},
    ]
    made[2]["images"] = [str(seeing.parent / "other.png")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def records_of(folder: Path) -> list[dict]:
    (path,) = [each for each in folder.glob("*.jsonl") if each.name != "rows.jsonl"]
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_dataset_is_answered_in_order_with_pictures_labels_and_ids(say, answer, rows, tmp_path, seeing):
    out = say(infer, "--dataset", str(rows), "--infer_batch_size", "3")
    done = records_of(tmp_path)
    assert [record["id"] for record in done] == [f"rows.jsonl:{n}" for n in range(1, 6)]
    assert [record["label"] for record in done] == ["a thing", "yes", "no", "x", "y"]
    expected = [
        answer([user("what", 1)], "noise"),
        answer([Turn("system", "be brief"), user("hello")]),
        answer([user("hi"), Turn("assistant", "ho"), user("and then", 1)], "other"),
        answer("the quick brown fox jumps over the lazy dog"),
        answer("a fox"),
    ]
    assert [record["response"] for record in done] == expected
    image = str(seeing.parent / "noise.png")
    assert done[0]["images"] == [image] and done[2]["history"] == [["hi", "ho"]]
    assert out.startswith(
        f"[PROMPT]what[OUTPUT]{expected[0]}\n\n[LABELS]a thing\n[IMAGES]['{image}']\n{RULE}\n[SYSTEM]"
    )
    assert out.count(RULE) == 5


def test_resume_answers_what_is_missing_and_nothing_twice(say, rows, tmp_path, monkeypatch):
    asked, enqueue = [], Engine.enqueue

    def watched(self: Engine, request: Request, prompt: object) -> object:
        asked.append(request.turns[-1].text)
        if len(asked) == 4:
            raise KeyboardInterrupt("killed here")
        return enqueue(self, request, prompt)

    monkeypatch.setattr(Engine, "enqueue", watched)
    flags = ["--dataset", str(rows), "--infer_batch_size", "1", "--resume", "true"]
    with pytest.raises(KeyboardInterrupt):
        say(infer, *flags)
    before = records_of(tmp_path)
    assert len(before) == 3
    (path,) = [each for each in tmp_path.glob("*.jsonl") if each != rows]
    path.write_bytes(path.read_bytes()[:-5])  # the last line was on its way
    say(infer, *flags, "--infer_batch_size", "2")
    assert asked[4:] == ["and then", "the quick brown fox jumps over the lazy dog", "a fox"]
    done = records_of(tmp_path)
    assert [record["id"] for record in done] == [f"rows.jsonl:{n}" for n in range(1, 6)] and done[:2] == before[:2]
    rows.write_text(rows.read_text().replace("a fox", "a wolf"))
    with pytest.raises(ValueError, match="asks 'a wolf', but .* answered 'a fox' under this id"):
        say(infer, *flags)


def test_a_row_that_cannot_be_asked_is_named_or_skipped_and_counted(say, rows, tmp_path, caplog):
    bad = {"query": "look", "response": "x", "images": ["nowhere.png"]}
    rows.write_text(json.dumps(bad) + "\n" + rows.read_text())
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*nowhere\.png.*set on_bad_row to skip"):
        say(infer, "--dataset", str(rows), "--save_result", "false")
    out = say(infer, "--dataset", str(rows), "--on_bad_row", "skip")
    assert len(records_of(tmp_path)) == 5 and out.count(RULE) == 5
    assert "1 rows were not asked" in caplog.text


def test_only_the_first_rows_are_answered_where_that_is_said(say, rows, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="accessory"):
        out = say(infer, "--dataset", str(rows), "--show_dataset_sample", "2", "--verbose", "false")
    assert out == "" and len(records_of(tmp_path)) == 2
    assert "`--show_dataset_sample -1`" in caplog.text and "save_result_path: " in caplog.text


def test_the_rows_of_a_runs_validation_are_answered_from_its_checkpoint(say, seeing, rows, tmp_path):
    (seeing / "train.yaml").write_text(
        f"dataset: [{rows}]\nval_size: 2\ndataset_seed: null\nseed: 1\ntemplate: alpaca\n"
    )
    say(infer, "--ckpt_dir", str(seeing), "--load_dataset_config", "true", "--dialect", "accessory")
    held = records_of(tmp_path)
    assert len(held) == 2 and {record["id"] for record in held} < {f"rows.jsonl:{n}" for n in range(1, 6)}


def test_a_llava_answers_pictures_of_any_size_together_as_alone(say, tmp_path):
    folder = llava_toys.write_model(tmp_path / "llava" / "model")
    made = []
    for number, size in enumerate([*llava_toys.SHAPES, None, *llava_toys.SHAPES]):
        made.append({"query": f"what is {number}", "response": "x", "images": []})
        if size is not None:
            picture(number, size).save(tmp_path / f"{number}.png")
            made[-1]["images"] = [str(tmp_path / f"{number}.png")]
    made.append(
        {"query": "<image>one<image>two", "response": "x", "images": [f"{tmp_path}/0.png", f"{tmp_path}/1.png"]}
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    found = []
    for width in ("4", "1"):
        for old in tmp_path.glob("2*.jsonl"):
            old.unlink()
        flags = ["--dataset", str(tmp_path / "rows.jsonl"), "--infer_batch_size", width, "--verbose", "false"]
        say(infer, *flags, model=folder)
        found.append([record["response"] for record in records_of(tmp_path)])
    assert found[0] == found[1] and len(set(found[0])) > 3


@pytest.mark.slow
def test_a_run_that_is_killed_and_gone_on_with_equals_an_unbroken_one(seeing, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"query": f"the fox {n}", "response": "x"}) + "\n" for n in range(60)))

    def command(name: str) -> list[str]:
        flags = ["--dataset", str(rows), "--result_dir", str(tmp_path / name), "--resume", "true", "--verbose", "false"]
        words = ["--model_name_or_path", str(seeing), "--precision", "fp32", "--max_new_tokens", "60", *flags]
        return [sys.executable, "-m", "accessory", "infer", *words]

    subprocess.run(command("whole"), check=True, timeout=100)
    job = subprocess.Popen(command("broken"))
    try:
        while job.poll() is None and not any(path.stat().st_size for path in (tmp_path / "broken").glob("*.jsonl")):
            threading.Event().wait(0.01)
    finally:
        job.kill()
        job.wait()
    killed = len(records_of(tmp_path / "broken"))
    assert 0 < killed < 60
    subprocess.run(command("broken"), check=True, timeout=100)
    assert records_of(tmp_path / "broken") == records_of(tmp_path / "whole")


def share(ranks: Ranks, folder: str, rows: str, results: str) -> list[dict]:
    """A data-parallel rank's part of the work."""
    settings = InferSettings(
        model_name_or_path=[folder],
        precision="fp32",
        max_new_tokens=6,
        dataset=[rows],
        result_dir=results,
        infer_batch_size=2,
        verbose=False,
    )
    return infer.ask(settings, infer.open_dataset(settings), ranks).records


def test_two_data_parallel_ranks_write_the_same_file_as_one(seeing, rows, tmp_path):
    results = tmp_path / "two"
    alone = share(ONE, str(seeing), str(rows), str(tmp_path / "one"))
    both, nothing = run_ranks(share, 2, str(seeing), str(rows), str(results), tp=1)
    assert both == alone and nothing == [] and len(list(results.glob("*.jsonl"))) == 1
