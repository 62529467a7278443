"""One token for each answer from a step's logits: penalties, biases, odds, failures, and rows that never meet."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from engine_toys import ONE, opened, write_model

from accessory.engine import Engine, Odds, Request
from accessory.engine.choose import Choice, Chooser
from accessory.engine.prompt import Prompt
from accessory.model import Sampling

SIZE = 50
NONE = torch.tensor([], dtype=torch.int64)


class Fixed:
    """A grammar that allows these ids, and breaks when there are none."""

    done = False

    def __init__(self, *ids: int) -> None:
        self.ids, self.pushed = list(ids), list[int]()

    def allowed(self) -> torch.Tensor:
        if not self.ids:
            raise ValueError("regex: the answer cannot go on (a limit was reached); simplify the grammar")
        return torch.zeros(SIZE + 9, dtype=torch.bool).index_fill(0, torch.tensor(self.ids), True)

    def push(self, token: int) -> None:
        self.pushed.append(token)


def choice(
    request: Request | None = None, *, prompt: tuple[int, ...] = (1, 2), grammar: Any = None, **sampling
) -> Choice:
    """The state of a request whose prompt has these ids; the last of them stands for a picture."""
    slots = [-1] * (len(prompt) - 1) + [0]
    made = Prompt(
        ids=list(prompt),
        slots=slots,
        pixels=None,
        order=None,
        keys=np.zeros(len(prompt), dtype=np.int64),
        limit=20,
        stop_ids=frozenset(),
        text=cast(Any, None),
        dropped=0,
        grammar=grammar,
    )
    return Choice(request or Request("", sampling=Sampling(**sampling)), made, vocabulary=SIZE)


def chosen(logits: torch.Tensor, *choices: Choice, unsaid: torch.Tensor = NONE) -> list:
    return Chooser(vocabulary=SIZE, unsaid=unsaid)(logits, choices, [7] * len(choices))


def row(**values: float) -> torch.Tensor:
    """Logits [1, 50] of zeros but for these, such as t3=2.0."""
    logits = torch.zeros(1, SIZE)
    for name, value in values.items():
        logits[0, int(name[1:])] = value
    return logits


def test_ids_beyond_the_vocabulary_and_unsaid_ones_are_never_chosen() -> None:
    logits = torch.zeros(1, SIZE + 14)
    logits[0, SIZE:] = 9.0
    logits[0, [3, 4]] = torch.tensor([2.0, 1.0])
    kept = logits.clone()
    assert chosen(logits, choice(), unsaid=torch.tensor([3])) == [(4, None)]
    assert logits.equal(kept), "the caller's logits must not change"


def test_a_frequency_penalty_counts_the_answers_tokens_and_not_the_prompts() -> None:
    one = choice(frequency_penalty=0.5)
    logits = row(t1=2.0, t5=1.2)
    assert chosen(logits, one) == [(1, None)], "1 is in the prompt alone"
    one.push(1)
    assert chosen(logits, one) == [(1, None)]
    one.push(1)
    assert chosen(logits, one) == [(5, None)], "2.0 - 2 * 0.5 < 1.2"


def test_a_presence_penalty_counts_once() -> None:
    one = choice(presence_penalty=0.5)
    one.push(1)
    one.push(1)
    one.push(1)
    assert chosen(row(t1=2.0, t5=1.4), one) == [(1, None)]
    assert chosen(row(t1=2.0, t5=1.6), one) == [(5, None)]


def test_a_negative_frequency_penalty_raises_what_was_said() -> None:
    one = choice(frequency_penalty=-1.0)
    one.push(9)
    one.push(9)
    assert chosen(row(t5=1.9), one) == [(9, None)]


def test_a_repetition_penalty_sees_prompt_and_answer_but_no_picture() -> None:
    one = choice(prompt=(1, 2, 3), repetition_penalty=2.0)
    assert chosen(row(t1=3.0, t4=2.0), one) == [(4, None)]
    assert chosen(row(t3=3.0, t4=2.0), one) == [(3, None)], "a picture stands there, not the token 3"
    one.push(4)
    assert chosen(row(t3=1.5, t4=2.0), one) == [(3, None)]


def test_a_bias_moves_a_logit_and_a_hundred_decides() -> None:
    assert chosen(row(t1=2.0), choice(Request("", logit_bias={5: 2.5}))) == [(5, None)]
    assert chosen(row(t1=50.0), choice(Request("", logit_bias={5: 100.0}))) == [(5, None)]
    assert chosen(row(t1=50.0, t6=0.1), choice(Request("", logit_bias={1: -100}))) == [(6, None)]


def test_bias_and_penalties_add_up() -> None:
    request = Request("", logit_bias={5: 3.0}, sampling=Sampling(frequency_penalty=1.0, presence_penalty=1.0))
    one = choice(request)
    one.push(5)
    assert chosen(row(t1=0.9), one) == [(5, None)]
    assert chosen(row(t1=1.1), one) == [(1, None)]


def test_odds_are_the_models_own_whatever_bends_the_choice() -> None:
    logits = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(4))
    request = Request(
        "", logprobs=3, logit_bias={11: 100}, sampling=Sampling(temperature=1.5, top_k=2, frequency_penalty=2)
    )
    [(token, odds)] = chosen(logits, choice(request), unsaid=torch.tensor([0]))
    own = logits[0].double().log_softmax(-1)
    ranks = own.argsort(descending=True)[:3].tolist()
    assert token == 11 and isinstance(odds, Odds) and odds.token == 11
    assert odds.logprob == pytest.approx(float(own[11]), abs=1e-5)
    assert [token for token, _ in odds.top] == ranks
    assert [value for _, value in odds.top] == pytest.approx(own[ranks].tolist(), abs=1e-5)


def test_only_rows_that_ask_get_odds_and_each_as_many_as_it_asked_for() -> None:
    logits = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(4))
    counts = (None, 0, 20, 5)
    found = [odds for _, odds in chosen(logits, *(choice(Request("", logprobs=count)) for count in counts))]
    assert [None if odds is None else len(odds.top) for odds in found] == [None, 0, 20, 5]
    assert all(odds is None or not odds.top or odds.top[0] == (odds.token, odds.logprob) for odds in found)


def test_of_equal_odds_the_lowest_ids_come_first() -> None:
    [(_, odds)] = chosen(torch.zeros(1, SIZE), choice(Request("", logprobs=4)))
    assert [token for token, _ in odds.top] == [0, 1, 2, 3]
    assert odds.logprob == pytest.approx(-math.log(SIZE))


def test_a_grammar_allows_what_it_allows_whatever_the_bias() -> None:
    request = Request("", logit_bias={1: 100})
    grammar = Fixed(8, 9)
    one = choice(request, grammar=grammar)
    assert chosen(row(t9=0.5), one) == [(9, None)]
    one.push(9)
    assert grammar.pushed == [9]


def test_a_grammar_that_fails_ends_its_own_request_alone() -> None:
    logits = row(t3=1.0).expand(3, -1)
    broken = choice(Request("", logprobs=2), grammar=Fixed())
    first, wrong, last = chosen(logits, choice(Request("", logprobs=0)), broken, choice(temperature=1.0, top_k=1))
    assert first[0] == last[0] == 3 and first[1] is not None
    assert isinstance(wrong, ValueError) and "cannot go on" in str(wrong)


def test_a_row_from_which_nothing_can_be_chosen_is_an_error_of_that_row() -> None:
    logits = torch.zeros(3, SIZE)
    logits[0, 4], logits[2] = math.inf, -math.inf
    high, fine, low = chosen(logits, choice(), choice(), choice(temperature=1.0))
    assert fine == (0, None)
    assert isinstance(high, ValueError) and "got inf, expected finite" in str(high)
    assert isinstance(low, ValueError) and "got none above -inf" in str(low)


def test_all_rows_may_fail() -> None:
    assert [type(one) for one in chosen(torch.zeros(2, SIZE), *(choice(grammar=Fixed()) for _ in range(2)))] == [
        ValueError,
        ValueError,
    ]


def mixed(number: int) -> Choice:
    """Requests of all kinds."""
    kinds: list[dict] = [
        {},
        {"logprobs": 5},
        {"logit_bias": {number: 3.0, 17: -100}, "logprobs": 1},
        {"sampling": Sampling(temperature=0.8, top_p=0.9, seed=number)},
        {"sampling": Sampling(temperature=1.3, seed=number, frequency_penalty=0.7), "logprobs": 20},
        {"sampling": Sampling(temperature=0.5, top_k=7, repetition_penalty=1.3, seed=number)},
        {"sampling": Sampling(temperature=2.0, min_p=0.1, presence_penalty=1.0, seed=number)},
    ]
    grammar = Fixed(*range(number, SIZE, 3)) if number % 4 == 3 else None
    one = choice(Request("", **kinds[number % len(kinds)]), grammar=grammar, prompt=(number, 1, 2))
    for token in (number, number, 40):
        one.push(token)
    return one


def test_a_row_alone_is_the_row_in_a_batch_of_sixteen() -> None:
    made = torch.Generator().manual_seed(0)
    chooser = Chooser(vocabulary=SIZE, unsaid=torch.tensor([5, 6]))
    for step in range(20):
        logits = torch.randn(16, SIZE + 3, generator=made) * 3
        together = chooser(logits, [mixed(n) for n in range(16)], [step + n for n in range(16)])
        for n in range(16):
            assert chooser(logits[n : n + 1], [mixed(n)], [step + n]) == together[n : n + 1]
        some = [14, 3, 8]
        assert chooser(logits[some], [mixed(n) for n in some], [step + n for n in some]) == [together[n] for n in some]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("odds") / "model"
    return Engine(opened(write_model(folder, "llama", sees=False, vocab_size=448)), ONE)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0, frequency_penalty=1.0, seed=3)])
def test_an_answers_odds_are_those_of_reading_it(engine, sampling: Sampling) -> None:
    request = Request("the fox", template="none", max_gen_len=9, logprobs=2, sampling=sampling)
    answer = engine.submit(request)
    events = []
    while answer.result is None:
        events += engine.step()
    result = answer.result
    assert len(result.odds) == len(result.ids) and [odds.token for odds in result.odds] == result.ids
    assert [event.odds for event in events][: len(result.ids)] == result.odds == answer.odds
    prompt = engine.prepare(request).ids
    own = engine.logits([*prompt, *result.ids]).double().log_softmax(-1)[len(prompt) - 1 : -1]
    for odds, row in zip(result.odds, own, strict=True):
        assert odds.logprob == pytest.approx(float(row[odds.token]), abs=1e-4)
        assert [value for _, value in odds.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"logprobs": 21}, "logprobs: got 21, expected none, or a number from 0 to 20"),
        ({"logprobs": -1}, "logprobs: got -1"),
        ({"logit_bias": {-1: 1.0}}, "got token id -1, expected 0 to 399"),
        ({"logit_bias": {400: 1.0}}, "got token id 400, expected 0 to 399"),
        ({"logit_bias": {3: 100.5}}, "got 100.5 for token 3, expected -100 to 100"),
        ({"logit_bias": {3: math.nan}}, "got nan for token 3"),
        ({"logit_bias": {3: -math.inf}}, "got -inf for token 3"),
        ({"stops": [""]}, "stops: got an empty string"),
    ],
)
def test_requests_that_mean_nothing_are_refused(engine, wrong: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        engine.prepare(Request("x", **wrong))


def test_ignored_stops_are_ordinary_tokens(engine) -> None:
    stop = engine.generate([Request("the fox", template="none", max_gen_len=1)])[0].ids
    request = Request("the fox", template="none", max_gen_len=6, stop_ids=stop, stops=("e", " "))
    assert engine.generate([request])[0].ids == []
    result = engine.generate([Request("the fox", template="none", max_gen_len=6, stop_ids=stop, ignore_stops=True)])[0]
    assert len(result.ids) == 6 and result.ids[:1] == stop and result.finish == "length"
