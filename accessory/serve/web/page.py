"""The page itself: gradio's components, and what happens when one of them is used.

Must not know engines: a talk asks, and the page shows what it has. Imported only to serve it, as gradio is slow.
"""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from shutil import copy
from typing import Any

import gradio as gr

from accessory.engine.waiting import QueueFull
from accessory.serve.service import Closed
from accessory.serve.web.front import Front
from accessory.serve.web.style import CSS, WIDE, head_of, theme, top_of
from accessory.serve.web.talk import UNSAID, Exchange, Talk, Talks, Wishes

log = logging.getLogger(__name__)

DAY = 86_400
LONGEST = 1 << 30  # characters of a pasted text; beyond its limit gradio would make it a file
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)
Update = tuple[Any, ...]


class Page:
    """Builds the page and answers its events. uploads: the folder that pictures come to.

    Every event yields or returns values of chat, box, line, mark and the button that regenerates. `mark` is the number
    of exchanges that a page shows: one that the server does not know of, since it was started anew, is not continued
    as if nothing had happened.
    """

    def __init__(self, talks: Talks, front: Front, uploads: Path) -> None:
        self._talks, self._front, self._uploads = talks, front, uploads
        # served from where uploads lie, so that no path of this host is told
        self._examples = [(text, path and Path(copy(path, uploads))) for text, path in front.examples]
        self._picture = front.picture and Path(copy(front.picture, uploads))

    def blocks(self) -> gr.Blocks:
        """The whole page."""
        front = self._front
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(self._uploads)
        gr.set_static_paths([self._uploads])  # shown as they lie there, instead of a copy for every look
        with gr.Blocks(
            title=f"{front.name} - Accessory", analytics_enabled=False, fill_height=True, delete_cache=(3600, DAY)
        ) as blocks:
            with gr.Sidebar(position="right", open=False, width=320, elem_id="settings"):
                told = self._settings()
            gr.HTML(top_of(front), elem_id="top")
            chat = self._chat()
            with gr.Row(elem_id="below"):
                line = gr.HTML("", elem_id="line")
                again = gr.Button("Regenerate", size="sm", interactive=False, elem_id="again", min_width=90, scale=0)
                clear = gr.Button("Clear", size="sm", elem_id="clear", min_width=60, scale=0)
            box = self._box()
            mark = gr.Textbox("", visible="hidden", elem_id="mark")
            outputs = [chat, box, line, mark, again]
            how: dict[str, Any] = {"outputs": outputs, "show_progress": "hidden", "concurrency_limit": None}
            box.submit(self.ask, [box, mark, *told], preprocess=False, api_name="ask", **how)
            again.click(self.again, [mark, *told], preprocess=False, api_name="regenerate", **how)
            if self._examples:
                chat.example_select(self.example, [mark, *told], preprocess=False, api_visibility="private", **how)
            box.stop(self.stop, None, None, queue=False, api_name="stop")
            clear.click(self.clear, None, outputs, queue=False, show_progress="hidden", api_name="clear")
            blocks.load(None, None, None, js=WIDE)
            blocks.unload(self.leave)
        return blocks

    def look(self) -> dict[str, Any]:
        """What `gr.mount_gradio_app` needs to know of how the page looks."""
        return {"theme": theme(), "css": CSS, "head": head_of(), "footer_links": [], "run_history": False}

    # ---- components

    def _settings(self) -> list[gr.components.Component]:
        """The panel, in the order of `Wishes`."""
        wishes, window = self._front.wishes, self._front.window
        gr.HTML("<h2>Settings</h2>")
        return [
            gr.Textbox(
                wishes.system,
                label="System prompt",
                lines=3,
                max_lines=8,
                placeholder="The template's own",
                elem_id="system",
            ),
            gr.Slider(1, window, min(wishes.max_new_tokens, window), step=1, label="Longest answer", info="Tokens"),
            gr.Slider(0, 2, min(wishes.temperature, 2), step=0.05, label="Temperature", info="0: always the likeliest"),
            gr.Slider(0.01, 1, wishes.top_p, step=0.01, label="Top-p", info="Only the likeliest that sum to this"),
            gr.Number(wishes.top_k, label="Top-k", info="Only so many likeliest; 0: all", precision=0, minimum=0),
            gr.Slider(1, 2, min(wishes.repetition_penalty, 2), step=0.05, label="Repetition penalty"),
            gr.Number(wishes.seed, label="Seed", info="The same seed draws the same answer", precision=0, minimum=0),
        ]

    def _chat(self) -> gr.Chatbot:
        memory = "" if self._front.remembers else "<p>Each question stands alone: nothing is remembered.</p>"
        asked = "Ask about a picture, or anything else." if self._front.sees else "Ask anything."
        examples = [{"text": text, "files": [str(path)] if path else []} for text, path in self._examples]
        for example, (_, path) in zip(examples, self._examples, strict=True):
            if path:
                example["icon"] = str(path)
        return gr.Chatbot(
            [],
            elem_id="chat",
            show_label=False,
            container=False,
            height="100%",
            min_height=120,
            scale=1,
            layout="bubble",
            buttons=["copy"],
            feedback_options=None,
            placeholder=f"<h2>{html.escape(self._front.name)}</h2><p>{asked}</p>{memory}",
            examples=examples or None,  # type: ignore[arg-type]
            allow_file_downloads=False,
            group_consecutive_messages=False,
        )

    def _box(self) -> gr.Textbox | gr.MultimodalTextbox:
        how: dict[str, Any] = {
            "show_label": False,
            "container": False,
            "elem_id": "box",
            "lines": 1,
            "max_lines": 8,
            "autofocus": True,
            "submit_btn": True,
            "stop_btn": False,
        }
        if not self._front.sees:
            return gr.Textbox("", placeholder="Ask something", **how)
        return gr.MultimodalTextbox(
            {"text": "", "files": [str(self._picture)] if self._picture else []},
            placeholder="Ask something; pictures may be dropped or pasted here",
            file_types=["image"],
            file_count="multiple" if self._front.several else "single",
            max_plain_text_length=LONGEST,
            **how,
        )

    # ---- events

    async def ask(self, request: gr.Request, asked: Any, mark: str, *told: Any) -> AsyncIterator[Update]:
        """The box was sent."""
        text, files = _content(asked)

        def begin(talk: Talk) -> AsyncGenerator[Exchange, None]:
            if not text.strip() and not files:
                raise ValueError("question: got nothing, expected some text; write something")
            return talk.ask(text, [self._uploaded(path) for path in files], self._wishes(told))

        async for update in self._show(request, mark, begin, kept=(text, files)):
            yield update

    async def example(self, request: gr.Request, event: gr.SelectData, mark: str, *told: Any) -> AsyncIterator[Update]:
        """One of the questions to begin with was chosen."""
        text, path = self._examples[int(event.index)]  # type: ignore[arg-type]
        files = [str(path)] if path else []
        async for update in self.ask(request, {"text": text, "files": files}, mark, *told):
            yield update

    async def again(self, request: gr.Request, mark: str, *told: Any) -> AsyncIterator[Update]:
        """The last answer is not good enough."""
        async for update in self._show(request, mark, lambda talk: talk.again(self._wishes(told)), anew=True):
            yield update

    async def stop(self, request: gr.Request) -> None:
        """The answer is long enough."""
        self._talk(request).stop()

    async def clear(self, request: gr.Request) -> Update:
        """A new conversation."""
        self._talk(request).clear()
        return [], gr.update(value=self._empty()), "", "", gr.update(interactive=False)

    async def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self._talks.leave(str(request.session_hash))

    async def _show(
        self,
        request: gr.Request,
        mark: str,
        begin: Callable[[Talk], AsyncGenerator[Exchange, None]],
        *,
        kept: tuple[str, Sequence[str]] | None = None,
        anew: bool = False,
    ) -> AsyncIterator[Update]:
        """Values for the page as an answer grows. kept: what goes back into the box where it could not be asked."""
        talk, skip, back = self._talk(request), gr.skip(), {}
        shown = talk.exchanges[:-1] if anew else talk.exchanges
        note, error = "", ""
        try:
            self._agree(talk, mark)
            async with aclosing(begin(talk)) as exchanges:
                sent = {"value": self._empty([] if self._front.remembers else kept[1])} if kept else {}
                busy = gr.update(submit_btn=False, stop_btn=True, **sent)
                yield _messages(shown), busy, "", skip, gr.update(interactive=False)
                async for exchange in exchanges:
                    note = exchange.note
                    yield _messages([*shown, exchange]), skip, skip, skip, skip
        except Exception as reason:  # whatever it is, a person waits for it
            error = self._reason(reason)
        if kept and (error or note == UNSAID):
            back = {"value": self._empty(kept[1], kept[0])}
        known = len(talk.exchanges)
        box = gr.update(submit_btn=True, stop_btn=False, **back)
        line = _line(note, talk.note, error)
        yield _messages(talk.exchanges), box, line, str(known or ""), gr.update(interactive=bool(known))

    def _agree(self, talk: Talk, mark: str) -> None:
        """ValueError where a page shows another conversation than the one that goes on here."""
        known = len(talk.exchanges)
        if mark.strip() and mark.strip() != str(known):
            raise ValueError(
                f"conversation: this page shows {mark} question(s), expected {known}, as the server was started anew or"
                " the page was left for long; clear it"
            )

    def _talk(self, request: gr.Request) -> Talk:
        return self._talks.of(str(request.session_hash))

    def _uploaded(self, path: str) -> Path:
        """A file that came through this page. ValueError for any other."""
        file = Path(path).resolve()
        if not file.is_relative_to(self._uploads.resolve()):
            raise ValueError("picture: got a path of this host, expected an uploaded file; add it with the paper clip")
        return file

    def _wishes(self, told: Sequence[Any]) -> Wishes:
        """What the panel says. ValueError for an empty field."""
        names = list(Wishes.__dataclass_fields__)
        values: dict[str, Any] = {"system": str(told[0] or "")}
        for name, value in zip(names[1:], told[1:], strict=True):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name}: got {value!r}, expected a number; fill it in")
            values[name] = float(value) if name in ("temperature", "top_p", "repetition_penalty") else int(value)
        return Wishes(**values)

    def _empty(self, files: Sequence[str] = (), text: str = "") -> Any:
        """A value of the box."""
        return {"text": text, "files": list(files)} if self._front.sees else text

    def _reason(self, error: Exception) -> str:
        """An error for the person, without paths of uploads."""
        if isinstance(error, Closed) or not self._talks.alive:
            return "The model is not running any more; whoever started it can see why."
        if not isinstance(error, (ValueError, OSError, QueueFull)):
            log.error("the page failed", exc_info=error)
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            said = f"{error.filename}: {error.strerror}"
        return re.sub(rf"{re.escape(str(self._uploads))}/(?:\w+/)?", "", said)


def _content(asked: Any) -> tuple[str, list[str]]:
    """Text and files of a box. ValueError is for whoever made up their own."""
    if isinstance(asked, str) or asked is None:
        return asked or "", []
    files = [file.get("path", "") if isinstance(file, dict) else str(file) for file in asked.get("files") or []]
    return str(asked.get("text") or ""), files


def _messages(exchanges: Sequence[Exchange]) -> list[dict[str, Any]]:
    """What the chat shows."""
    said = []
    for each in exchanges:
        shown = [{"path": str(path)} for path in each.pictures]
        said.append({"role": "user", "content": [*shown, *_text(each.text)]})
        if each.answer:
            said.append({"role": "assistant", "content": _text(each.answer)})
        elif each.note:
            said.append({"role": "assistant", "content": _text("*(nothing)*")})
    return said


def _text(text: str) -> list[dict[str, str]]:
    """A text as Markdown in which nothing is HTML: outside of code, tags are shown instead of dropped."""
    pieces = _CODE.split(text)
    pieces[::2] = [piece.replace("&", "&amp;").replace("<", "&lt;") for piece in pieces[::2]]
    return [{"type": "text", "text": "".join(pieces)}] if text else []


def _line(note: str, more: str, error: str) -> str:
    """The line below the chat."""
    if error:
        return f'<span class="error" role="alert">{html.escape(error)}</span>'
    return f'<span class="note" role="status">{html.escape(" ".join(filter(None, [note, more])))}</span>'
