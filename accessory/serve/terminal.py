"""The demos: one question, or a session of them, in a terminal, through pipes or in a browser.

Must not hold tensors or know how answers are made: it asks an engine. Answers go to stdout, all else to stderr.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from accessory.config import parse
from accessory.dist import launch
from accessory.dist.place import read_place
from accessory.serve.extras import need
from accessory.serve.keyboard import Keyboard
from accessory.serve.settings import Settings
from accessory.serve.speaker import Speaker
from accessory.serve.web.server import WEB, serve_page, wait_for_leader

if TYPE_CHECKING:
    from accessory.assemble import Bundle
    from accessory.engine import Engine
    from accessory.model import Sampling

log = logging.getLogger(__name__)

Kind = Literal["single_turn", "multi_turn", "single_turn_mm"]
KINDS: dict[Kind, str] = {
    "single_turn": "Ask a language model one question at a time; nothing is remembered.",
    "multi_turn": "Talk with a language model; it remembers the conversation.",
    "single_turn_mm": "Ask a multimodal model about a picture, one question at a time.",
}
ROWS = 4  # questions that a page answers at once
WINDOW = 4096  # tokens, where nobody asks for more: a cache of a long-context model's whole window may not fit


def talk(kind: Kind, argv: Sequence[str] | None = None) -> None:
    """Run a demo on this process's command line, or `argv`.

    Raises ValueError or OSError for settings, models and one-shot questions that cannot be.
    """
    settings = parse(Settings, argv, prog=f"{kind}.py", description=KINDS[kind])
    settings.check()
    if settings.web:
        need("--web", *WEB)
    if settings.gpu_ids:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, settings.gpu_ids))
    launch(len(settings.gpu_ids) or settings.n_gpus or 1)
    from accessory import dist
    from accessory.assemble import open_model
    from accessory.data.image import load_picture
    from accessory.engine import Engine
    from accessory.quant import settle

    sampling = _sampling(settings)
    rank = read_place(os.environ).rank
    dist.setup_logging(rank)  # before `init`, which may wait for other ranks and says so
    if settings.image and rank == 0:
        load_picture(settings.image, orientation=settings.orientation)  # before minutes of loading
    ranks = dist.init(device=settings.device)
    if ranks.device.type == "cpu" and (settings.gpu_ids or (settings.n_gpus or 1) > 1):
        log.info("no GPU here: %d rank(s) on the CPU", ranks.world)
    bundle = open_model(
        settings.pretrained_path,
        ranks=ranks,
        llama_type=settings.llama_type,
        llama_config=settings.llama_config,
        tokenizer_path=settings.tokenizer_path,
        dtype=dist.dtype_from_name(settings.dtype) if settings.dtype else None,
        quant=settings.quant,
        max_seq_len=settings.max_seq_len,
        answers=True,
    )
    settle(bundle.model, rows=ROWS if settings.web else 1)
    window = bundle.config.max_seq_len if settings.max_seq_len else min(bundle.config.max_seq_len, WINDOW)
    with Engine(
        bundle,
        ranks,
        rows=ROWS if settings.web else 1,
        window=window,
        image_transform=settings.image_transform,
        orientation=settings.orientation,
    ) as engine:
        if ranks.leader:
            _lead(kind, settings, sampling, engine, bundle)
        else:
            if settings.web:
                wait_for_leader()
            engine.follow()
    dist.close()


def _sampling(settings: Settings) -> Sampling:
    """How tokens are chosen. ValueError for values that cannot be, and for a template that there is not."""
    from accessory.data.template import get_template
    from accessory.model import Sampling

    if settings.template:
        get_template(settings.template)
    return Sampling(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        repetition_penalty=settings.repetition_penalty,
        seed=settings.seed,
    )


def _lead(kind: Kind, settings: Settings, sampling: Sampling, engine: Engine, bundle: Bundle) -> None:
    """Rank 0: say what runs, then answer."""
    template = "none" if settings.noinstruct else settings.template or bundle.template
    dtype = f"{str(bundle.dtype).removeprefix('torch.')}{', NF4' if settings.quant else ''}"
    what = f"{bundle.llama_type}, {dtype}, template {template}, window {engine.window}"
    log.info("model: %s (%s)", bundle.source, what)
    if settings.web:
        _serve(kind, settings, sampling, engine, bundle, template)
        return
    speaker = Speaker(engine, sampling, template, max_gen_len=settings.max_gen_len)
    if settings.prompt:
        speaker.answer(settings.prompt[0], [settings.image] if settings.image else [])
    else:
        with Keyboard() as keyboard:
            Session(kind, speaker, keyboard, image=settings.image).run()


def _serve(kind: Kind, settings: Settings, sampling: Sampling, engine: Engine, bundle: Bundle, template: str) -> None:
    """Rank 0: the page that fits the demo."""
    from accessory.serve.web.front import first_picture, front_of
    from accessory.serve.web.talk import wishes

    front = front_of(
        bundle,
        engine,
        template=template,
        wishes=wishes(sampling, settings.max_gen_len),
        remembers=kind == "multi_turn",
        picture=first_picture([settings.image] if settings.image else [], sees=bundle.vision is not None),
    )
    serve_page(engine, front, settings, template=template)


@dataclass
class Session:
    """Questions one after another. In a terminal an error is shown and the session goes on; in a pipe it ends it."""

    kind: Kind
    speaker: Speaker
    keyboard: Keyboard
    image: str | None = None
    """The picture in view."""
    given: bool = field(init=False)
    """Whether that picture came with the command, so that the first question is about it."""

    def __post_init__(self) -> None:
        self.given = self.image is not None

    def run(self) -> None:
        """Until `exit` or the end of the input."""
        self._help()
        while True:
            if self.kind == "single_turn_mm" and not self._look():
                return
            text = self.keyboard.ask("Question: " if self.kind == "single_turn_mm" else "> ")
            word = None if text is None else text.strip()
            if word in (None, "exit", "quit"):
                return
            if word == "clear":
                self.speaker.history.clear()
                self._note("(the conversation is forgotten)" if self.kind == "multi_turn" else "(nothing to forget)")
            elif word or self.speaker.takes_silence:
                self._exchange(text)

    def _exchange(self, text: str) -> None:
        """One question and its answer."""
        fresh = self.kind != "multi_turn" or not self.speaker.history.exchanges
        pictures = [self.image] if self.image and fresh else []
        try:
            with self.keyboard.watching() as stopped:
                answer, cut = self.speaker.answer(text, pictures, stopped=stopped)
        except (ValueError, OSError) as error:
            if not self.keyboard.terminal or isinstance(error, BrokenPipeError):
                raise
            self._note(f"error: {error}")
            return
        if cut:
            self._note("(stopped)")
        if self.kind == "multi_turn" and (answer or not cut):
            self.speaker.history.add(text, answer, pictures)

    def _look(self) -> bool:
        """Ask for a picture until one can be read; False at the end of the input. The one of --image comes unasked."""
        from accessory.data.image import load_picture

        if self.given:
            self.given = False
            return True
        while (line := self.keyboard.ask("Path of a picture (Enter: the same, -: none): ")) is not None:
            word = line.strip()
            if word in ("exit", "quit"):
                return False
            path = {"": self.image, "-": None}.get(word, os.path.expanduser(word))
            try:
                if path is not None:
                    load_picture(path)
            except (ValueError, OSError) as error:
                if not self.keyboard.terminal:
                    raise
                self._note(f"error: {error}")
                continue
            self.image = path
            return True
        return False

    def _help(self) -> None:
        clear = "`clear` forgets the conversation; " if self.kind == "multi_turn" else ""
        self._note(f"Ctrl-C stops an answer; {clear}`exit` or Ctrl-D leaves.")

    def _note(self, text: str) -> None:
        """A line for the person, not for a pipe."""
        if self.keyboard.terminal:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
