"""Logits of a step to one token for each answer: penalties, biases, grammars, odds, and the draw.

Must not know rows of the cache, text or other ranks. An answer's token depends on its own logits and state alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from accessory.engine.prompt import Prompt
from accessory.engine.request import Odds, Request
from accessory.model import sample
from accessory.model.sample import leading, lowered, penalised


class NoNumbers(ValueError):
    """Logits that are no numbers: neither is what the row holds."""


class Choice:
    """What one request's next token depends on beside its logits: the ids so far, its biases, its grammar."""

    def __init__(self, request: Request, prompt: Prompt, *, vocabulary: int) -> None:
        """vocabulary: ids from 0 to here may be chosen."""
        self.sampling, self.logprobs = request.sampling, request.logprobs
        self._grammar = prompt.grammar
        self._counts: Counter[int] = Counter()
        self._bias = dict(request.logit_bias)
        self._penalised = bool(self.sampling.frequency_penalty or self.sampling.presence_penalty)
        most = min(prompt.limit, vocabulary)
        self._added = _Values(len(self._bias) + (most if self._penalised else 0))
        for token, bias in self._bias.items():
            self._added[token] = bias
        self._seen: _Values | None = None
        if self.sampling.repetition_penalty != 1.0:  # a picture's positions have no id
            seen = {token for token, slot in zip(prompt.ids, prompt.slots, strict=True) if slot < 0}
            self._seen = _Values(len(seen) + most)
            for token in sorted(seen):
                if token < vocabulary:
                    self._seen[token] = 0.0

    @property
    def done(self) -> bool:
        """Whether the grammar lets nothing follow: the answer is over, and no stop token need be waited for."""
        return self._grammar is not None and self._grammar.done

    @property
    def plain(self) -> bool:
        """Whether `adjust` changes nothing."""
        return self._grammar is None and not len(self._added) and self._seen is None

    def push(self, token: int) -> None:
        """Take note of a token that was accepted. A grammar that it breaks fails at the next `adjust`."""
        if self._seen is not None:
            self._seen[token] = 0.0
        if self._penalised:
            self._counts[token] += 1
            self._added[token] = self._bias.get(token, 0.0) + lowered(self._counts[token], self.sampling)
        if self._grammar is not None:
            self._grammar.push(token)

    def adjust(self, logits: Tensor) -> None:
        """Change the logits [V] in place: repetition penalty, then the other penalties and the bias, then the grammar.

        Raises ValueError where the grammar cannot go on.
        """
        if self._seen is not None:
            ids = self._seen.ids.to(logits.device)
            logits[ids] = penalised(logits[ids], self.sampling.repetition_penalty)
        if len(self._added):
            logits[self._added.ids.to(logits.device)] += self._added.values.to(logits.device)
        if self._grammar is not None:
            allowed = self._grammar.allowed()[: len(logits)]
            logits.masked_fill_(~allowed.to(logits.device), -torch.inf)


class Chooser:
    """Chooses the next tokens of answers."""

    def __init__(self, *, vocabulary: int, unsaid: Tensor) -> None:
        """vocabulary: ids from 0 to here may be chosen, except `unsaid` [n] int64."""
        self._vocabulary, self._unsaid = vocabulary, unsaid

    def __call__(
        self, logits: Tensor, choices: Sequence[Choice], positions: Sequence[int]
    ) -> list[tuple[int, Odds | None] | ValueError]:
        """The token of each row of logits [n, V] fp32, and its odds where they were asked for.

        positions: which position each token takes. A row that cannot go on gives the ValueError that says why, and
        the others do not notice. The caller's logits do not change.
        """
        assert len(choices) == len(positions) == len(logits), (len(choices), len(positions), len(logits))
        own = said = logits[:, : self._vocabulary]  # ids beyond the tokenizer's pad the weights and mean nothing
        if len(self._unsaid) or not all(choice.plain for choice in choices):
            said = own.clone()
            said[:, self._unsaid.to(said.device)] = -torch.inf
        failed = self._adjust(said, choices)
        rows = [row for row in range(len(choices)) if row not in failed]
        chosen: dict[int, int] = {}
        if rows:
            some = said if not failed else said[torch.tensor(rows, device=said.device)]
            ids = sample(some, [choices[row].sampling for row in rows], [positions[row] for row in rows])
            chosen = dict(zip(rows, ids.tolist(), strict=True))
        odds = self._odds(own, choices, chosen)
        return [failed[row] if row in failed else (chosen[row], odds.get(row)) for row in range(len(choices))]

    def _adjust(self, said: Tensor, choices: Sequence[Choice]) -> dict[int, ValueError]:
        """Let each row be adjusted, and find those from which nothing can be chosen."""
        failed: dict[int, ValueError] = {}
        for row, choice in enumerate(choices):
            if not choice.plain:
                try:
                    choice.adjust(said[row])
                except ValueError as error:
                    failed[row] = error
        for row, peak in enumerate(said.amax(-1).tolist()):
            if not peak < math.inf:
                got = "NaN" if math.isnan(peak) else "inf"
                failed[row] = NoNumbers(
                    f"logits: got {got}, expected finite numbers; fp16 overflows in some models: choose bf16 or fp32"
                )
            elif row not in failed and peak == -math.inf:
                failed[row] = ValueError("logits: got none above -inf, expected a token; ask in another way")
        return failed

    def _odds(self, own: Tensor, choices: Sequence[Choice], chosen: dict[int, int]) -> dict[int, Odds]:
        """The odds of the rows that ask, from the model's own logits [n, V]."""
        asking = [row for row in chosen if choices[row].logprobs is not None]
        if not asking:
            return {}
        logits = own[torch.tensor(asking, device=own.device)]
        logprobs = logits.log_softmax(-1)
        wanted = torch.tensor([[chosen[row]] for row in asking], device=own.device)
        taken = logprobs.gather(1, wanted)[:, 0].tolist()
        counts = [choices[row].logprobs or 0 for row in asking]
        ids = leading(logits, max(1, *counts))[1][:, : max(counts)]
        values = logprobs.gather(1, ids).tolist()
        found = {}
        for row, count, logprob, tokens, top in zip(asking, counts, taken, ids.tolist(), values, strict=True):
            likely = [(token, value) for token, value in zip(tokens, top, strict=True) if value > -math.inf]
            found[row] = Odds(chosen[row], logprob, tuple(likely[:count]))
        return found


class _Values:
    """A number for each of some ids, as two tensors that grow without being made anew."""

    def __init__(self, room: int) -> None:
        self._ids, self._values = torch.zeros(room, dtype=torch.int64), torch.zeros(room)
        self._places: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __setitem__(self, token: int, value: float) -> None:
        place = self._places.setdefault(token, len(self._places))
        self._ids[place], self._values[place] = token, value

    @property
    def ids(self) -> Tensor:
        return self._ids[: len(self)]

    @property
    def values(self) -> Tensor:
        return self._values[: len(self)]
