"""The scheduler: requests join and leave the running batch at any step; rank 0 leads, the others follow.

Must not know files of weights, terminals or the network. A row of the cache is a request.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor

from accessory.assemble import Bundle
from accessory.data.image import Orientation
from accessory.dist import Ranks
from accessory.engine.ahead import Ahead
from accessory.engine.choose import Choice, Chooser, NoNumbers
from accessory.engine.interrupt import between_steps
from accessory.engine.prefix import NOTHING, Rows, Seat
from accessory.engine.prompt import Prompt, Prompter
from accessory.engine.reading import Reader, Score
from accessory.engine.request import Answer, Event, Finish, Odds, Request, Result
from accessory.engine.steps import Running, Stats, Turns, fine, piece, together, tokens, told
from accessory.engine.waiting import Waiting
from accessory.engine.wire import Wire
from accessory.engine.worker import Copy, Forget, Op, See, Worker

log = logging.getLogger(__name__)


class Engine:
    """Answers requests with one model, on one process or on all ranks of a tensor-parallel group.

    Every rank builds it; rank 0 then submits, steps and closes, while the others are in `follow`:

        with Engine(bundle, ranks) as engine:
            if not ranks.leader:
                engine.follow()
            else:
                print(engine.generate([Request("What is this?", pictures=["cat.png"])])[0].text)

    Only the leader samples; its choices reach the other ranks with the next step. A step either feeds a piece of the
    prompts that joined or decodes one token of each answer, in turn where there are both.
    """

    def __init__(
        self,
        bundle: Bundle,
        ranks: Ranks,
        *,
        rows: int = 8,
        window: int | None = None,
        prefill_chunk: int = 512,
        image_transform: str | None = None,
        orientation: Orientation = "keep",
        reuse: bool = True,
        deterministic: bool = False,
        compiled: bool = False,
        queue: int | None = None,
        speculate: int = 0,
    ) -> None:
        """rows: requests at once; window: tokens of each, prompt and answer (None: the model's); both cost memory now.

        prefill_chunk: most tokens of prompts per step. image_transform: None for the model's own.
        orientation: of photographs, `keep` as stored (the reference's) or `apply` what their EXIF says.
        reuse: a prompt takes the positions that it begins with from a row that has them.
        deterministic: a result depends on its request alone, bit by bit, never on who shares the batch or came before:
        answers go on in steps of all rows, prompts one by one in pieces cut at multiples of prefill_chunk, and only
        such pieces are reused. Slower where few requests run. compiled: compile the step of answers (static shapes; a
        CUDA graph on a GPU), which takes its time here. queue: most requests that wait (None: any number).
        speculate: most tokens of an answer that a step tries beside the newest one, where the text so far has them;
        answers stay the same, but for what rounding differs between shapes. Few rows and text that repeats gain.
        Raises ValueError for numbers below 1, unknown transforms and what excludes each other.
        """
        window = bundle.config.max_seq_len if window is None else window
        for name, value in (("rows", rows), ("window", window), ("prefill_chunk", prefill_chunk), ("queue", queue)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if compiled and deterministic:
            raise ValueError("compiled: got true with deterministic, whose rows attend one by one; drop one of them")
        self.window, self._leads, self.stats = window, ranks.leader, Stats()
        self._ahead = Ahead(speculate, self.stats, apart=deterministic, grows=bundle.config.rope_grows)
        self._chunk, self._apart = min(prefill_chunk, window), deterministic
        self._full = rows if deterministic or compiled else None
        self._worker = Worker(bundle.model, rows=rows, window=window, compiled=compiled, apart=deterministic)
        self._wire = None if ranks.control is None else Wire(ranks.control, rows=rows)
        self._prompter = Prompter(
            bundle, window=window, image_transform=image_transform, orientation=orientation, apart=deterministic
        )
        self._vocabulary = min(bundle.tokenizer.size, bundle.config.vocab_size)
        unsaid = [token for token in sorted(bundle.tokenizer.unsaid) if token < self._vocabulary]
        self._chooser = Chooser(vocabulary=self._vocabulary, unsaid=torch.tensor(unsaid, dtype=torch.int64))
        self._prompted = bundle.model.prompt is not None
        limits = {"chunk": prefill_chunk, "vocabulary": self._vocabulary}
        self._reader = Reader(self._run, self._drop, self._prompter, prompted=self._prompted, **limits)
        self._numbers = itertools.count()
        self._waiting = Waiting(queue)
        self._running: dict[int, Running] = {}  # by row
        self.rows = len(self._worker.alike)
        if self.rows < rows:
            log.warning("deterministic: %d of %d rows are alike here; the others stay empty", self.rows, rows)
        reuse, multiple = reuse and not bundle.config.rope_grows, self._chunk if deterministic else 1
        self._rows = Rows(rows, size=window, reuse=reuse, multiple=multiple, usable=self._worker.alike)
        self._turns = Turns()
        self._over = False

    # ---- the leader's side

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._waiting and not self._running

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return len(self._running)

    @property
    def over(self) -> bool:
        """Whether it was closed, or failed so that no request can be answered any more."""
        return self._over

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values on this rank."""
        return self._worker.cache.nbytes

    def length(self, request: Request) -> int:
        """Positions of the window that the request's prompt takes, pictures included; they are not opened for it."""
        return len(self._prompter.encode(request)[2].ids)

    def describe(self, request: Request) -> str:
        """The request's prompt for human eyes: control tokens by name, pictures as <picture 0>."""
        return self._prompter.encode(request)[2].text

    def prepare(self, request: Request) -> Prompt:
        """The slow part of a submission - text is encoded, pictures are read - on any thread. Raises as `submit`."""
        return self._prompter(request)

    def enqueue(self, request: Request, prompt: Prompt) -> Answer:
        """Queue a prepared request, on the thread that steps; it joins at a step with a free row. Raises QueueFull."""
        answer = Answer(next(self._numbers), request)
        self._waiting.push(answer, prompt)
        return answer

    def submit(self, request: Request) -> Answer:
        """Both at once. ValueError or OSError for a request that cannot be asked, QueueFull where too many wait."""
        return self.enqueue(request, self.prepare(request))

    def step(self) -> list[Event]:
        """Run one step of all requests and return what it brought, in no order that matters.

        A Ctrl-C during a step takes effect after it, so that the ranks stay in step. An error that is raised here by a
        rank of several ends the engine: the process should end, and the other ranks will follow.
        """
        assert self._leads, "only rank 0 steps; the others are in follow()"
        if self._over:
            raise RuntimeError("engine: got a step after its end or a failure; build a new one")
        with between_steps():
            failed = self._admit()
            everyone = [self._running[row] for row in sorted(self._running)]
            feeding = [running for running in everyone if running.feeding]
            speaking = [running for running in everyone if not running.feeding]
            if not everyone:
                return failed
            if self._turns.feed(len(feeding), len(speaking)):
                turn = self.stats.prompt_steps % 2 == 1
                return [*failed, *self._feed(together(feeding, chunk=self._chunk, alone=self._apart, shortest=turn))]
            self.stats.answer_steps += 1
            return [*failed, *self._speak(speaking)]

    def cancel(self, answer: Answer) -> Result:
        """End an answer where it is: its row is free at once. The result of a finished one does not change."""
        if answer.result is not None:
            return answer.result
        for running in self._running.values():
            if running.answer is answer:
                with between_steps():
                    result = self._finish(running, "cancelled")
                    if running.feeding:  # nobody has looked yet whether what it holds are numbers
                        self._drop(running.row)
                    return result
        prompt = self._waiting.remove(answer)
        if prompt is not None:
            self.stats.finished["cancelled"] += 1
            answer.result = Result("", [], "cancelled", len(prompt.ids), prompt.dropped)
            return answer.result
        raise ValueError(f"cancel: got answer {answer.id}, which is not of this engine")

    def stream(self, request: Request) -> Iterator[str]:
        """The answer's text, piece by piece; leaving the iteration, or Ctrl-C, cancels the request.

        ValueError for one that could not go on.
        """
        answer = self.submit(request)
        shown = 0
        try:
            while True:
                while shown < len(answer.parts):
                    shown += 1
                    yield answer.parts[shown - 1]
                if answer.result is not None:
                    return fine(answer.result)
                self.step()
        finally:
            self.cancel(answer)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """The results of all requests, in their order. If one of them cannot be asked, none is.

        ValueError for one that could not go on, after the others have ended.
        """
        prompts = [self.prepare(request) for request in requests]
        answers: list[Answer] = []
        try:
            for request, prompt in zip(requests, prompts, strict=True):
                while self._waiting.full:
                    self.step()
                answers.append(self.enqueue(request, prompt))
            while any(answer.result is None for answer in answers):
                self.step()
        finally:
            results = [self.cancel(answer) for answer in answers]
        for result in results:
            fine(result)
        return results

    def logits(self, asked: Request | Sequence[int]) -> Tensor:
        """Logits after every position of a prompt (a request's, pictures included) or of token ids, fp32
        [T, vocabulary] on the CPU. Answers under way wait, and go on where all rows are taken.

        Raises WindowError where it does not fit, ValueError for everything else that cannot be asked.
        """
        return self._reader.logits(self._lent(), asked)

    def score(self, asked: Request, continuations: Sequence[str]) -> list[Score]:
        """How likely each text is as the beginning of the answer. Raises as `logits` does."""
        return self._reader.scores(self._lent(), asked, continuations)

    def _lent(self) -> int:
        """A free row; where there is none, the answers go on until there is."""
        assert self._leads, "only rank 0 reads; the others are in follow()"
        if self._over:
            raise RuntimeError("engine: got a prompt after its end or a failure; build a new one")
        while (seat := self._rows.take(NOTHING)) is None:
            self.step()
        self._rows.release(seat.row, keep=False)
        return seat.row

    def close(self) -> None:
        """Leader: let the other ranks leave `follow`. Requests under way are lost. A second call does nothing."""
        if self._leads and self._wire is not None and not self._over:
            self._wire.send(None)
        self._over = True

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- the followers' side

    def follow(self) -> None:
        """Take part in every step until the leader closes. An error here must end the process: let it pass."""
        assert not self._leads and self._wire is not None, "rank 0 leads and does not follow"
        while (op := self._wire.receive()) is not None:
            self._worker.run(op)

    # ---- scheduling

    def _admit(self) -> list[Event]:
        """Give free rows to those whose turn it is; the events of those who cannot begin."""
        failed = []
        while self._waiting and self._rows.free:
            answer, prompt = self._waiting.first()
            try:
                choice = Choice(answer.request, prompt, vocabulary=self._vocabulary)
            except Exception as error:
                self._waiting.pop()
                failed.append(self._refuse(answer, prompt, error))
                continue
            seat = self._rows.take(prompt.keys)
            assert seat is not None, "a row is free"
            try:
                self._sit(seat, prompt)
            except BaseException:
                self._rows.release(seat.row, keep=False)
                raise
            self._waiting.pop()
            self._running[seat.row] = Running(answer, prompt, seat.row, seat.length, choice, seat.length)
            self.stats.prompt_tokens += len(prompt.ids)
            self.stats.cached_tokens += seat.length
        return failed

    def _sit(self, seat: Seat, prompt: Prompt) -> None:
        """Bring what a request begins with into its row."""
        if seat.length and seat.source != seat.row:
            self._run(Copy(seat.source, seat.row, seat.length))
        if self._prompted:
            if not seat.length:
                self._run(See(seat.row, prompt.pixels, prompt.order))
        elif prompt.pixels is not None and max(prompt.slots[seat.length :]) >= 0:
            self._run(See(seat.row, prompt.pixels, prompt.order))

    def _feed(self, chosen: list[Running]) -> list[Event]:
        """One step of some prompts."""
        self.stats.prompt_steps += 1
        op = piece(chosen, chunk=self._chunk, cut=self._apart)
        logits = self._run(op)
        for running, last in zip(chosen, op.positions.amax(1).tolist(), strict=True):
            running.fed = last + 1
            self._rows.feed(running.row, running.fed)
        ready = [running for running in chosen if not running.feeding]
        return [] if logits is None else self._accept(ready, logits)

    def _speak(self, speaking: list[Running]) -> list[Event]:
        """One step of the answers: a token of each, and what was proposed rightly."""
        tried = self._ahead.feed(speaking, self._run)
        if tried is None:
            logits = self._run(tokens(speaking, full=self._full, apart=self._apart))
            assert logits is not None, "every answer's next token was asked for"
            tried = [[] for _ in speaking], logits
        return self._ahead.walk(speaking, *tried, say=self._rows.say, accept=self._accept)

    def _run(self, op: Op) -> Tensor | None:
        """Do one op on all ranks."""
        if self._wire is None:
            return self._worker.run(op)
        try:
            self._wire.send(op)
            return self._worker.run(op)
        except BaseException:
            self._over = True  # nobody knows how far the others came
            raise

    def _drop(self, row: int) -> None:
        """Have all ranks forget what a row holds, unless they are somewhere inside a step that failed."""
        self._rows.forget(row)
        if not self._over:
            self._run(Forget(row))

    # ---- tokens to answers

    def _accept(self, ready: list[Running], logits: Tensor) -> list[Event]:
        """Choose a token for each row of logits [n, vocabulary], and move each answer on, or end it alone."""
        chosen = self._chooser(logits, [r.choice for r in ready], [r.next_position for r in ready])
        events = [self._advance(running, what) for running, what in zip(ready, chosen, strict=True)]
        for running, what in zip(ready, chosen, strict=True):
            if isinstance(what, NoNumbers):  # they must not meet the row's next request
                self._drop(running.row)
        return events

    def _advance(self, running: Running, what: tuple[int, Odds | None] | ValueError) -> Event:
        """Add one token to an answer, or end it."""
        answer, before = running.answer, len(running.answer.ids)
        if isinstance(what, ValueError):
            return Event(answer, -1, *self._fail(running, what))
        token, odds = what
        try:
            text, finish = running.advance(token, odds)
        except Exception as error:
            return Event(answer, token, *self._fail(running, error))
        self.stats.generated_tokens += len(answer.ids) - before
        return Event(answer, token, text, None if finish is None else self._finish(running, finish), odds)

    def _fail(self, running: Running, error: Exception) -> tuple[str, Result]:
        """End an answer that cannot go on: the rest of its text, and the result."""
        before = len(running.answer.parts)
        result = self._finish(running, "error", error=told(error))
        return "".join(running.answer.parts[before:]), result

    def _refuse(self, answer: Answer, prompt: Prompt, error: Exception) -> Event:
        """The end of a request that cannot begin."""
        self.stats.finished["error"] += 1
        answer.result = Result("", [], "error", len(prompt.ids), prompt.dropped, error=told(error))
        return Event(answer, -1, "", answer.result)

    def _finish(self, running: Running, finish: Finish, *, error: str = "") -> Result:
        """Free the row and make the result."""
        del self._running[running.row]
        self._rows.release(running.row)
        self.stats.finished[finish] += 1
        running.answer.result = running.result(finish, error)
        return running.answer.result
