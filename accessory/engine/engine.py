"""The scheduler: requests join and leave the running batch at any step; rank 0 leads, the others follow.

Must not know files of weights, terminals or the network. A row of the cache is a request.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from accessory.assemble import Bundle
from accessory.data.image import Orientation
from accessory.dist import Ranks
from accessory.engine.interrupt import between_steps
from accessory.engine.prompt import Prompt, Prompter
from accessory.engine.reading import Reader, Score
from accessory.engine.request import Answer, Event, Finish, Request, Result
from accessory.engine.wire import Wire
from accessory.engine.worker import Forget, Forward, Op, See, Worker
from accessory.model import sample

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Running:
    """A request that has a row."""

    answer: Answer
    prompt: Prompt
    row: int
    fed: int
    """Positions of the prompt that are in the cache."""
    seen: Tensor | None = None
    """Ids for the repetition penalty, with room for all to come; None where there is no penalty."""

    @property
    def feeding(self) -> bool:
        return self.fed < len(self.prompt.ids)

    @property
    def next_position(self) -> int:
        """The position that the next chosen token will take."""
        return len(self.prompt.ids) + len(self.answer.ids)


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
    ) -> None:
        """rows: requests at once; window: tokens of each, prompt and answer (None: the model's); both cost memory now.

        prefill_chunk: most tokens of one prompt per step. image_transform: None for the model's own.
        orientation: of photographs, `keep` as stored (the reference's) or `apply` what their EXIF says.
        Raises ValueError for numbers below 1 and unknown transforms.
        """
        window = bundle.config.max_seq_len if window is None else window
        for name, value in (("rows", rows), ("window", window), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.window, self._leads, self._chunk = window, ranks.leader, prefill_chunk
        self._worker = Worker(bundle.model, rows=rows, window=window)
        self._wire = None if ranks.control is None else Wire(ranks.control, rows=rows)
        self._prompter = Prompter(bundle, window=window, image_transform=image_transform, orientation=orientation)
        self._vocabulary = min(bundle.tokenizer.size, bundle.config.vocab_size)
        self._unsaid = torch.tensor([token for token in sorted(bundle.tokenizer.unsaid) if token < self._vocabulary])
        self._prompted = bundle.model.prompt is not None
        self._reader = Reader(
            self._run,
            self._prompter,
            chunk=prefill_chunk,
            vocabulary=self._vocabulary,
            prompted=self._prompted,
        )
        self._numbers = itertools.count()
        self._waiting: deque[tuple[Answer, Prompt]] = deque()
        self._running: dict[int, _Running] = {}  # by row
        self._free = set(range(rows))
        self._fed_last = False
        self._over = False

    # ---- the leader's side

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._waiting and not self._running

    def length(self, request: Request) -> int:
        """Positions of the window that the request's prompt takes, pictures included; they are not opened for it."""
        return len(self._prompter.encode(request)[2].ids)

    def describe(self, request: Request) -> str:
        """The request's prompt for human eyes: control tokens by name, pictures as <picture 0>."""
        return self._prompter.encode(request)[2].text

    def submit(self, request: Request) -> Answer:
        """Queue a request; it joins at a step with a free row. ValueError or OSError for one that cannot be asked."""
        return self._enqueue(request, self._prompter(request))

    def step(self) -> list[Event]:
        """Run one step of all requests and return what it brought, in no order that matters.

        A Ctrl-C during a step takes effect after it, so that the ranks stay in step. An error that is raised here by a
        rank of several ends the engine: the process should end, and the other ranks will follow.
        """
        assert self._leads, "only rank 0 steps; the others are in follow()"
        if self._over:
            raise RuntimeError("engine: got a step after its end or a failure; build a new one")
        with between_steps():
            self._admit()
            everyone = [self._running[row] for row in sorted(self._running)]
            feeding = [running for running in everyone if running.feeding]
            speaking = [running for running in everyone if not running.feeding]
            self._fed_last = bool(feeding) and not (speaking and self._fed_last)
            chosen = feeding if self._fed_last else speaking
            if not chosen:
                return []
            logits = self._run(self._piece(feeding) if self._fed_last else self._tokens(speaking))
            for running in chosen:
                running.fed = min(running.fed + self._chunk, len(running.prompt.ids))
            ready = [running for running in chosen if not running.feeding]
            return [] if logits is None else self._accept(ready, logits)

    def cancel(self, answer: Answer) -> Result:
        """End an answer where it is: its row is free at once. The result of a finished one does not change."""
        if answer.result is not None:
            return answer.result
        for running in self._running.values():
            if running.answer is answer:
                with between_steps():
                    if running.feeding and running.prompt.pixels is not None and not self._over:
                        self._run(Forget(running.row))
                    return self._finish(running, "cancelled")
        for place, (waiting, prompt) in enumerate(self._waiting):
            if waiting is answer:
                del self._waiting[place]
                answer.result = Result("", [], "cancelled", len(prompt.ids), prompt.dropped)
                return answer.result
        raise ValueError(f"cancel: got answer {answer.id}, which is not of this engine")

    def stream(self, request: Request) -> Iterator[str]:
        """The answer's text, piece by piece; leaving the iteration, or Ctrl-C, cancels the request."""
        answer = self.submit(request)
        shown = 0
        try:
            while True:
                while shown < len(answer.parts):
                    shown += 1
                    yield answer.parts[shown - 1]
                if answer.result is not None:
                    return
                self.step()
        finally:
            self.cancel(answer)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """The results of all requests, in their order. If one of them cannot be asked, none is."""
        prompts = [self._prompter(request) for request in requests]
        answers = [self._enqueue(request, prompt) for request, prompt in zip(requests, prompts, strict=True)]
        try:
            while any(answer.result is None for answer in answers):
                self.step()
        finally:
            results = [self.cancel(answer) for answer in answers]
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
        while not self._free:
            self.step()
        return min(self._free)

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

    def _enqueue(self, request: Request, prompt: Prompt) -> Answer:
        answer = Answer(next(self._numbers), request)
        self._waiting.append((answer, prompt))
        return answer

    def _admit(self) -> None:
        """Give free rows, lowest first, to those who wait longest."""
        while self._waiting and self._free:
            answer, prompt = self._waiting[0]
            row = min(self._free)
            running = _Running(answer, prompt, row, self._reusable(row, prompt))
            if prompt.pixels is not None or self._prompted:
                self._run(See(row, prompt.pixels, prompt.order))
            self._waiting.popleft()
            self._free.remove(row)
            self._running[row] = running

    def _reusable(self, row: int, prompt: Prompt) -> int:
        """How many leading positions of the prompt a free row already holds: the seam for prefix reuse."""
        return 0

    def _piece(self, feeding: list[_Running]) -> Forward:
        """The next piece of each prompt, ragged, padded on the right."""
        sizes = [min(self._chunk, len(running.prompt.ids) - running.fed) for running in feeding]
        shape = (len(feeding), max(sizes))
        ids, positions = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
        slots, last = torch.full(shape, -1), torch.full(shape[:1], -1)
        for at, (running, size) in enumerate(zip(feeding, sizes, strict=True)):
            start, stop = running.fed, running.fed + size
            ids[at, :size] = torch.tensor(running.prompt.ids[start:stop])
            positions[at, :size] = torch.arange(start, stop)
            slots[at, :size] = torch.tensor(running.prompt.slots[start:stop])
            if stop == len(running.prompt.ids):
                last[at] = size - 1
        pictured = slots if bool((slots >= 0).any()) else None
        extent = int(positions.max()) + 1
        return Forward(ids, positions, last, extent, _rows([running.row for running in feeding]), pictured)

    def _tokens(self, speaking: list[_Running]) -> Forward:
        """The newest token of each answer.

        Rows 0 to B-1 are read without a copy of the cache, so a few holes among them are cheaper as padding.
        """
        width = speaking[-1].row + 1
        rows = list(range(width)) if width <= 2 * len(speaking) else [running.row for running in speaking]
        ids, positions = [0] * len(rows), [-1] * len(rows)
        for running in speaking:
            at = rows.index(running.row)
            ids[at], positions[at] = running.answer.ids[-1], running.next_position - 1
        last = [0 if position >= 0 else -1 for position in positions]
        return Forward(
            torch.tensor(ids)[:, None],
            torch.tensor(positions)[:, None],
            torch.tensor(last),
            max(positions) + 1,
            _rows(rows),
        )

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

    # ---- tokens to answers

    def _accept(self, ready: list[_Running], logits: Tensor) -> list[Event]:
        """Choose a token for each row of logits [n, vocabulary], and move each answer on.

        Raises ValueError for logits that are no numbers, after the answers of this step were cancelled.
        """
        if logits.isnan().any():
            for running in ready:  # what such a row left in the cache must not meet the next request
                self._run(Forget(running.row))
                self._finish(running, "cancelled")
            raise ValueError("logits: got NaN, expected numbers; fp16 overflows in some models: choose bf16 or fp32")
        said = logits[:, : self._vocabulary]  # ids beyond the tokenizer's pad the weights and mean nothing
        if len(self._unsaid):
            said = said.index_fill(1, self._unsaid.to(said.device), -torch.inf)
        chosen = sample(
            said,
            [running.answer.request.sampling for running in ready],
            [running.next_position for running in ready],
            seen=[self._seen(running, logits.device) for running in ready],
        )
        return [self._advance(running, token) for running, token in zip(ready, chosen.tolist(), strict=True)]

    def _advance(self, running: _Running, token: int) -> Event:
        """Add one token to an answer, or end it."""
        answer, prompt = running.answer, running.prompt
        if token in prompt.stop_ids:
            text = self._say(answer, prompt.text.finish(complete=True))
            return Event(answer, token, text, self._finish(running, "stop"))
        answer.ids.append(token)
        text = prompt.text.push(token)
        finish: Finish | None = "stop" if prompt.text.stopped else None
        if finish is None and len(answer.ids) == prompt.limit:
            finish = "length"
            text += prompt.text.finish(complete=False)
            finish = "stop" if prompt.text.stopped else finish
        if running.seen is not None:
            running.seen[len(running.seen) - prompt.limit + len(answer.ids) - 1] = token
        self._say(answer, text)
        return Event(answer, token, text, None if finish is None else self._finish(running, finish))

    def _say(self, answer: Answer, text: str) -> str:
        if text:
            answer.parts.append(text)
        return text

    def _finish(self, running: _Running, finish: Finish) -> Result:
        """Make the result and free the row."""
        answer, prompt = running.answer, running.prompt
        if finish == "cancelled":
            self._say(answer, prompt.text.finish(complete=False))
        del self._running[running.row]
        self._free.add(running.row)
        answer.result = Result("".join(answer.parts), answer.ids, finish, len(prompt.ids), prompt.dropped)
        return answer.result

    def _seen(self, running: _Running, device: torch.device) -> Tensor | None:
        """The ids so far, where a penalty asks for them; a picture's positions have none."""
        if running.answer.request.sampling.repetition_penalty == 1.0:
            return None
        prompt = running.prompt
        if running.seen is None:
            said = [token for token, slot in zip(prompt.ids, prompt.slots, strict=True) if slot < 0]
            running.seen = torch.tensor([*said, *[0] * prompt.limit], device=device)
        return running.seen[: len(running.seen) - prompt.limit + len(running.answer.ids)]


def _rows(rows: list[int]) -> Tensor | None:
    """Rows as the cache takes them: None where they are the first ones."""
    return None if rows == list(range(len(rows))) else torch.tensor(rows)
