"""The web page in a headless Chromium, on the model that ships: type, stream, show, stop, ask again, clear."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_toys import ONE, opened, write_model
from playwright.sync_api import Browser, Page, expect, sync_playwright
from test_webchat import served

from accessory.engine import Engine
from accessory.serve.web.front import front_of
from accessory.serve.web.talk import Wishes

pytestmark = pytest.mark.slow

TINY = Path(__file__).resolve().parents[1] / "accessory" / "tiny"
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()
SEEN = "A small black circle, a big blue triangle, a big yellow square and a small red star."
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    assert path is not None, "chromium: got none, expected it for these tests; bash .ci/chromium installs it"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    bundle = opened(TINY)
    with Engine(bundle, ONE, rows=2) as engine:
        front = front_of(bundle, engine, template=bundle.template, wishes=Wishes(max_new_tokens=80))
        with served(engine, front, template=bundle.template) as url:
            yield url


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Engine]]:
    """A page whose answers end when somebody ends them, with a password."""
    bundle = opened(write_model(tmp_path_factory.mktemp("endless") / "model", "llama", sees=False, endless=True))
    with Engine(bundle, ONE, rows=1, window=30_000) as engine:
        front = front_of(bundle, engine, template="none", wishes=Wishes(max_new_tokens=20_000))
        with served(engine, front, template="none", key="a secret") as url:
            yield url, engine


def visit(chromium: Browser, url: str, *, width: int = 1280, height: int = 800) -> tuple[Page, list[str]]:
    """A person's page, and what is wrong with it: errors, and requests to other hosts."""
    context = chromium.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(PATIENCE)
    page, wrong = context.new_page(), list[str]()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda asked: None if asked.url.startswith((url, "data:", "blob:")) else wrong.append(asked.url))
    page.goto(url)
    return page, wrong


def send(page: Page, text: str) -> None:
    page.locator("#box textarea").fill(text)
    page.locator("#box textarea").press("Enter")


def said(page: Page, *, by: str = "bot") -> list[str]:
    return page.locator(f"#chat .message.{by} .message-content").all_inner_texts()


def finished(page: Page) -> None:
    """Wait for the end of the answer under way."""
    expect(page.locator("#line .note")).to_contain_text("tokens in", timeout=PATIENCE)


def upload(page: Page, path: Path) -> None:
    page.locator("#box input[type=file]").set_input_files(path)
    expect(page.locator("#box img")).to_be_visible(timeout=PATIENCE)


def test_a_picture_is_uploaded_and_the_answer_is_right_and_nothing_comes_from_outside(chromium, tiny):
    page, wrong = visit(chromium, tiny)
    expect(page.locator("#top")).to_contain_text("Accessory tiny")
    upload(page, TINY / "example.png")
    send(page, "What is in this picture?")
    finished(page)
    assert said(page) == [SEEN] and said(page, by="user") == ["What is in this picture?"]
    expect(page.locator("#chat .message.user img")).to_have_count(1)
    send(page, "What color is the star?")
    expect(page.locator("#chat .message.bot .message-content")).to_have_count(2, timeout=PATIENCE)
    finished(page)
    assert "red" in said(page)[1].lower() and wrong == []
    page.context.close()


def test_the_example_is_asked_by_a_click_and_clear_begins_anew(chromium, tiny):
    page, wrong = visit(chromium, tiny)
    page.locator("#chat .example").click()
    finished(page)
    assert said(page) == [SEEN]
    page.locator("#again").click()
    expect(page.locator("#line")).to_contain_text("At temperature 0", timeout=PATIENCE)
    assert said(page) == [SEEN]
    page.locator("#clear").click()
    expect(page.locator("#chat .message")).to_have_count(0, timeout=PATIENCE)
    expect(page.locator("#chat .example")).to_be_visible()
    assert wrong == []
    page.context.close()


def test_an_answer_grows_until_stop_and_another_one_is_asked(chromium, endless):
    url, engine = endless
    page, wrong = visit(chromium, url)
    page.locator("#key").fill("a secret")
    page.keyboard.press("Enter")
    answers = page.locator("#chat .message.bot .message-content")
    for number in range(1, 3):
        send(page, f"tell {number}")
        expect(answers).to_have_count(number, timeout=PATIENCE)
        first = len(answers.last.inner_text())
        page.wait_for_function(
            "least => [...document.querySelectorAll('#chat .message.bot')].at(-1).innerText.length > least",
            arg=first + 9,
        )
        page.locator("#box .stop-button").click()
        expect(page.locator("#line .note")).to_contain_text("Stopped after", timeout=PATIENCE)
        assert engine.running == 0
    assert [error for error in wrong if "401" not in error] == []  # which asked for the password
    page.context.close()


def test_who_closes_the_page_frees_the_row(chromium, endless):
    url, engine = endless
    page, _ = visit(chromium, url)
    page.locator("#key").fill("a secret")
    page.keyboard.press("Enter")
    send(page, "tell")
    expect(page.locator("#chat .message.bot .message-content")).to_have_count(1, timeout=PATIENCE)
    page.context.close()
    other, _ = visit(chromium, url)
    other.locator("#key").fill("a secret")
    other.keyboard.press("Enter")
    send(other, "and I")  # there is one row
    expect(other.locator("#chat .message.bot .message-content")).to_have_count(1, timeout=PATIENCE)
    other.locator("#box .stop-button").click()
    expect(other.locator("#line .note")).to_contain_text("Stopped after", timeout=PATIENCE)
    other.context.close()


def test_what_cannot_be_asked_is_said_in_red_and_stays_in_the_box(chromium, tiny):
    page, wrong = visit(chromium, tiny)
    send(page, "12345 " * 600)
    expect(page.locator("#line .error")).to_contain_text("in a window of 512", timeout=PATIENCE)
    assert page.locator("#box textarea").input_value() == "12345 " * 600
    expect(page.locator("#chat .message")).to_have_count(0)
    assert wrong == []
    page.context.close()


def test_two_people_have_conversations_of_their_own(chromium, tiny):
    (one, _), (other, _) = visit(chromium, tiny), visit(chromium, tiny)
    one.locator("#chat .example").click()
    send(other, "What color is the star?")
    finished(one)
    finished(other)
    assert said(one) == [SEEN] and said(other, by="user") == ["What color is the star?"]
    assert said(other) != [SEEN]
    one.context.close()
    other.context.close()


def test_on_a_phone_the_panel_begins_closed_and_everything_fits(chromium, tiny):
    page, wrong = visit(chromium, tiny, width=390, height=844)
    page.locator("#chat .example").click()
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.querySelector('#box').getBoundingClientRect().bottom") <= 844
    page.locator("#settings .toggle-button").click()
    expect(page.locator("#system textarea")).to_be_in_viewport()
    assert said(page) == [SEEN] and wrong == []
    page.context.close()
