"""The web page over HTTP: asked as its browser asks, by several people at once; its gate; its command."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from engine_toys import ONE, opened, picture, write_model

from accessory import cli
from accessory.data.template import Turn
from accessory.engine import Engine, Request
from accessory.serve import extras
from accessory.serve.terminal import talk
from accessory.serve.web.front import Front, front_of
from accessory.serve.web.server import serve_page
from accessory.serve.web.talk import Wishes
from accessory.serve.web.words import WebWords

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60.0
TOLD = ["", 6, 0.0, 1.0, 0, 1.0, 0]  # the panel


@contextlib.contextmanager
def served(engine: Engine, front: Front, *, template: str, **words: Any) -> Iterator[str]:
    """The address of a page that is served in a thread."""
    there, ended = threading.Event(), list[BaseException]()
    told: list[Any] = []

    def ready(port: int, leave: Callable[[], None]) -> None:
        told.extend([port, leave])
        there.set()

    def serve() -> None:
        try:
            serve_page(engine, front, WebWords(**{"port": 0, "key": None, **words}), template=template, ready=ready)
        except BaseException as error:
            ended.append(error)
            there.set()

    thread = threading.Thread(target=serve)
    thread.start()
    assert there.wait(PATIENCE) and not ended, ended
    try:
        yield f"http://127.0.0.1:{told[0]}"
    finally:
        told[1]()
        thread.join(PATIENCE)
    assert not thread.is_alive() and not ended, ended


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("seeing") / "model")
    picture(1).save(folder.parent / "noise.png")
    return folder


@pytest.fixture(scope="module")
def page(seeing: Path) -> Iterator[str]:
    bundle = opened(seeing)
    with Engine(bundle, ONE, rows=3) as engine:
        front = front_of(bundle, engine, template="alpaca", wishes=Wishes(max_new_tokens=6))
        with served(engine, front, template="alpaca") as url:
            yield url


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Engine]]:
    """A page whose answers end when somebody ends them, with a password."""
    folder = write_model(tmp_path_factory.mktemp("endless") / "model", "llama", sees=False, endless=True)
    bundle = opened(folder)
    with Engine(bundle, ONE, rows=1, window=30_000) as engine:
        front = front_of(bundle, engine, template="none", wishes=Wishes(max_new_tokens=20_000))
        with served(engine, front, template="none", key="a secret") as url:
            yield url, engine


@pytest.fixture(scope="module")
def alone(seeing: Path) -> Callable[..., str]:
    """What the engine says by itself."""
    engine = Engine(opened(seeing), ONE, rows=1)

    def say(turns: Any, *pictures: str) -> str:
        request = Request(turns, pictures=pictures, template="alpaca", max_gen_len=6)
        return engine.generate([request])[0].text

    return say


def browser(url: str, **how: Any) -> Any:
    """One person's page, without its looks."""
    from gradio_client import Client

    return Client(url, verbose=False, analytics_enabled=False, **how)


def said(update: Any) -> list[tuple[str, str]]:
    """(role, text) of what the chat shows; pictures as (picture)."""
    value = update[0]["value"] if isinstance(update[0], dict) else update[0]
    parts = [(each["role"], part) for each in value for part in each["content"]]
    return [(role, part["text"] if part["type"] == "text" else "(picture)") for role, part in parts]


def line(update: Any) -> str:
    """What stands below the chat."""
    return re.sub("<[^>]*>", "", update[2]["value"] if isinstance(update[2], dict) else update[2])


def ask(person: Any, text: str, *files: Path, mark: str = "", told: list[Any] = TOLD) -> Any:
    """Ask and wait for the end; the last values of the page."""
    from gradio_client import handle_file

    asked = {"text": text, "files": [handle_file(file) for file in files]}
    return person.predict(asked, mark, *told, api_name="/ask")


def test_a_picture_is_uploaded_asked_about_and_remembered(page, seeing, alone):
    person, noise = browser(page), seeing.parent / "noise.png"
    first = alone([Turn("user", "what is it?", 1)], str(noise))
    assert said(ask(person, "what is it?", noise)) == [
        ("user", "(picture)"),
        ("user", "what is it?"),
        ("assistant", first),
    ]
    turns = [Turn("user", "what is it?", 1), Turn("assistant", first), Turn("user", "and then")]
    update = ask(person, "and then", mark="1")
    assert said(update)[-1] == ("assistant", alone(turns, str(noise))) and "6 tokens in" in line(update)


def test_two_people_at_once_have_conversations_of_their_own(page, alone):
    people = [browser(page), browser(page)]
    jobs = [
        each.submit({"text": f"I am {n}", "files": []}, "", *TOLD, api_name="/ask") for n, each in enumerate(people)
    ]
    for number, job in enumerate(jobs):
        own = [("user", f"I am {number}"), ("assistant", alone(f"I am {number}"))]
        assert said(job.result(PATIENCE)) == own
        again = [Turn(role, text) for role, text in own]
        assert said(ask(people[number], "and"))[-1][1] == alone([*again, Turn("user", "and")])


def test_regenerate_asks_once_more_and_clear_begins_anew(page, alone):
    person = browser(page)
    ask(person, "hello")
    told = said(ask(person, "and then", mark="1"))
    update = person.predict("2", *TOLD, api_name="/regenerate")
    assert said(update) == told and "temperature 0" in line(update)
    assert said(person.predict(api_name="/clear")) == []
    assert said(ask(person, "hello")) == [("user", "hello"), ("assistant", alone("hello"))]


@pytest.mark.parametrize(
    ("text", "mark", "told", "words"),
    [
        ("1" * 400, "", TOLD, "in a window of 256"),
        (" ", "", TOLD, "question: got nothing"),
        ("hello", "3", TOLD, "this page shows 3 question(s), expected 0"),
        ("hello", "", ["", None, *TOLD[2:]], "max_new_tokens: got None"),
        ("hello", "", ["", 6, -1.0, *TOLD[3:]], "temperature: got -1"),
    ],
)
def test_what_cannot_be_asked_is_a_line_and_goes_back_into_the_box(page, text, mark, told, words):
    update = ask(browser(page), text, mark=mark, told=told)
    assert words in line(update) and said(update) == []
    assert update[1]["value"]["text"] == text


def test_a_damaged_picture_is_said_by_its_name_alone(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    shown = line(ask(browser(page), "what", tmp_path / "broken.png"))
    assert "broken.png" in shown and "/" not in shown.split("broken.png")[0]


def test_a_page_of_single_questions_keeps_the_picture_in_view_and_nothing_else(seeing, alone):
    bundle, noise = opened(seeing), seeing.parent / "noise.png"
    with Engine(bundle, ONE, rows=1) as engine:
        wishes = Wishes(max_new_tokens=6)
        front = front_of(bundle, engine, template="alpaca", wishes=wishes, remembers=False, picture=noise)
        with served(engine, front, template="alpaca") as url:
            person = browser(url)
            update = ask(person, "what", noise)
            assert said(update)[-1][1] == alone([Turn("user", "what", 1)], str(noise))
            assert said(ask(person, "and", mark="1"))[-1][1] == alone("and")
            page = httpx.get(url).text
            assert "nothing is remembered" in page and page.count("noise.png") >= 1


def test_a_text_is_shown_as_it_was_said_tags_and_all(page):
    shown = said(ask(browser(page), "<b>x</b> & `<i>` <box>"))[0]
    assert shown == ("user", "&lt;b>x&lt;/b> &amp; `<i>` &lt;box>")


def test_stop_ends_an_answer_that_grows_and_the_next_one_is_asked(endless):
    url, engine = endless
    person = browser(url, headers={"Authorization": "Bearer a secret"})
    for number in range(2):
        job = person.submit(f"tell {number}", "", "", 20_000, *TOLD[2:], api_name="/ask")
        grown = next(update for update in job if len(said(update)) == 2 * number + 2)
        person.predict(api_name="/stop")
        update = job.result(PATIENCE)
        assert said(update)[-1][1].startswith(said(grown)[-1][1]) and line(update).startswith("Stopped after")
        assert engine.running == 0


def test_a_page_that_is_closed_frees_its_row(endless):
    url, engine = endless
    person = browser(url, headers={"Authorization": "Bearer a secret"})
    job = person.submit("tell", "", "", 20_000, *TOLD[2:], api_name="/ask")
    next(update for update in job if len(said(update)) == 2)
    assert engine.running == 1
    job.cancel()
    ended = threading.Event()
    for _ in range(600):
        if engine.running == 0:
            break
        ended.wait(0.1)
    assert engine.running == 0


def test_an_engine_that_fails_is_told_and_ends_the_page(seeing, monkeypatch):
    def fail() -> None:
        raise RuntimeError("the engine broke")

    with Engine(opened(seeing), ONE, rows=1) as engine:
        monkeypatch.setattr(engine, "step", fail)
        with pytest.raises(AssertionError, match="the engine broke"):
            with served(engine, Front("toy", sees=True), template="alpaca") as url:
                person = browser(url)
                told = None
                with contextlib.suppress(Exception):  # the page may be gone before its line was read
                    told = line(ask(person, "hello"))
                assert told is None or "not running any more" in told


# ---- the gate


def test_without_the_password_nothing_is_there(endless):
    url, _ = endless
    with httpx.Client(base_url=url) as web:
        for path in ("/", "/config", "/gradio_api/info", "/nowhere"):
            got = web.get(path)
            assert got.status_code == 401 and "Password" in got.text and "gradio_config" not in got.text
        assert web.post("/gradio_api/queue/join", json={}).status_code == 401
        assert web.get("/config", headers={"Authorization": "Bearer a secre"}).status_code == 401
        assert web.post("/login", data={"key": "no"}).status_code == 401
        assert web.post("/login", data={"key": "a secret"}).status_code == 303
        assert "gradio_config" in web.get("/").text  # by the cookie that came


def test_only_what_the_page_needs_is_there(page):
    with httpx.Client(base_url=page) as web:
        assert web.get("/").status_code == 200
        shut = ["/monitoring", "/gradio_api/vibe-code", "/docs", "/openapi.json", "/gradio_api/deep_link"]
        shut += ["/gradio_api/proxy=http://127.0.0.1", "/gradio_api/file=http://127.0.0.1/a.png"]
        shut += [f"/gradio_api/file={__file__}", "/gradio_api/file=/etc/hostname", "/gradio_api/runs"]
        assert {path: web.get(path).status_code for path in shut} == dict.fromkeys(shut, 404)


@pytest.mark.parametrize(
    "path", [__file__, "/etc/hostname", "http://127.0.0.1/a.png", "a.png", "/tmp/../etc/passwd", 3]
)
def test_a_file_that_nobody_uploaded_is_not_read(page, path):
    asked = {"text": "what", "files": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
    for route in ("queue/join", "call/ask", "run/predict"):
        body = {"data": [asked, "", *TOLD], "fn_index": 0, "session_hash": "a"}
        got = httpx.post(f"{page}/gradio_api/{route}", json=body)
        assert got.status_code == 400 and "event: got a file" in got.text
    assert httpx.post(f"{page}/gradio_api/queue/join", content=b"[" * 100_000).status_code == 400


def test_a_browser_may_not_leave_this_host(page):
    policy = httpx.get(page).headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
    config = json.loads(re.search(r"window\.gradio_config = (\{.*?\});</script>", httpx.get(page).text)[1])
    assert config["analytics_enabled"] is False and config["footer_links"] == []
    assert not [sheet for sheet in config["stylesheets"] if sheet.startswith("http")]


def test_an_upload_is_served_as_a_picture_that_does_nothing(page, seeing):
    files = {"files": ("a.html", b"<script>alert(1)</script>", "text/html")}
    (path,) = httpx.post(f"{page}/gradio_api/upload", files=files).json()
    got = httpx.get(f"{page}/gradio_api/file={path}")
    assert got.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert got.headers["x-content-type-options"] == "nosniff"


# ---- the command


def test_nothing_is_asked_of_other_hosts(seeing, monkeypatch):
    reached, connect = [], socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            reached.append(address)
            raise OSError("no network here")
        connect(self, address)

    looked, find = [], socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", watched)
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **how: looked.append(host) or find(host, *rest, **how)
    )
    with Engine(opened(seeing), ONE, rows=1) as engine:
        with served(engine, Front("toy", sees=True), template="alpaca") as url:
            assert httpx.get(url).status_code == 200
    assert reached == [] and set(looked) <= {"127.0.0.1", "localhost"}


def test_an_address_that_is_taken_is_said(page):
    port = int(page.rpartition(":")[2])
    with pytest.raises(OSError, match=f"port: got {port} at 127.0.0.1, which cannot be had"):
        serve_page(None, Front("toy"), WebWords(port=port), template="none")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "70000"], "port: got 70000"),
        (["--key", " "], "empty password"),
        (["--max_concurrent", "0"], "max_concurrent: got 0"),
        (["--template", "alpacca"], "did you mean 'alpaca'"),
        (["--image", "a.png", "b.png"], "expected one to begin with"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(flags, words, capsys):
    assert cli.main(["webchat", *flags]) == 1
    assert words in capsys.readouterr().err


def test_the_address_comes_from_gradios_own_variables_and_no_key_is_printed(monkeypatch, capsys):
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SERVER_PORT", "7999")
    monkeypatch.setenv("WEBCHAT_KEY", "a secret")
    assert cli.main(["app-ui", "--dry_run", "true"]) == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert (told["host"], told["port"], told["key"]) == ("0.0.0.0", 7999, "(given)")
    monkeypatch.setenv("GRADIO_SERVER_PORT", "many")
    assert cli.main(["webchat", "--dry_run", "true"]) == 1
    assert "GRADIO_SERVER_PORT: got 'many'" in capsys.readouterr().err


def test_a_missing_package_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "gradio" else object())
    assert cli.main(["webchat"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "got no gradio" in said and "accessory[serve]" in said


@pytest.mark.parametrize(
    ("flags", "words"), [(["--prompt", "hello"], "--web: got it with --prompt"), (["--port", "-1"], "port: got -1")]
)
def test_a_demo_that_cannot_have_a_page_says_so(flags, words):
    with pytest.raises(ValueError, match=words):
        talk("single_turn", ["--web", *flags])


MODULE = [sys.executable, "-m", "accessory", "webchat"]
DEMO = ["demos/single_turn_mm.py", "--web", "--image", "accessory/tiny/example.png"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        MODULE,
        [*MODULE, "--nproc_per_node", "2"],
        [sys.executable, *DEMO],
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *DEMO],
    ],
    ids=["verb", "verb on two ranks", "demo", "demo under torchrun"],
)
def test_a_command_serves_its_page_until_sigterm_and_leaves_nothing_behind(command, tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    job = subprocess.Popen(
        [*command, "--port", "0"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT
    )
    try:
        found = next(filter(None, (re.match(r"page: (http://127\.0\.0\.1:\d+)", line) for line in job.stderr)))
        person = browser(found[1])
        update = ask(
            person, "What is in this picture?", ROOT / "accessory" / "tiny" / "example.png", told=["", 60, *TOLD[2:]]
        )
        assert "big blue triangle" in said(update)[-1][1]
        family = psutil.Process(job.pid).children(recursive=True)
        with httpx.stream("GET", f"{found[1]}/gradio_api/heartbeat/abc") as open_page:
            next(open_page.iter_lines())
            job.send_signal(signal.SIGTERM)
            rest = job.communicate(timeout=2 * PATIENCE)[1]
        assert "page is closed" in rest
        if "torch.distributed.run" not in command:  # which ends with what it was ended by
            assert job.returncode == 0 and "Traceback" not in rest, rest
        assert not psutil.wait_procs(family, timeout=10)[1]
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("accessory-page")] == []
    finally:
        job.kill()
        job.communicate()
