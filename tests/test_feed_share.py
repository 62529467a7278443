"""Rows that share a picture: one sequence per picture, the loss of the rows alone, every row once, resumed bitwise.

Must not judge how a model sees.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
from feed_toys import config, picture, write_jsonl
from states import ALONE

from accessory import assemble
from accessory.data.feed import Feed, Source, open_corpus
from accessory.train.joined import Joined

SLOTS = 18  # of the tiny model
QUESTIONS = 7  # about each picture


@pytest.fixture(scope="module")
def bundle():
    return assemble.open_model([assemble.TINY], ranks=ALONE, dtype=torch.float32)


def rows(folder: Path, bundle, *, pictures: int = 5, caption: bool = False, share: bool = True, **more):
    """A corpus of questions about drawings and of text, each picture's rows far apart, and its config."""
    made = []
    for number in range(QUESTIONS * pictures):
        name = f"{number % pictures}.png"
        if number < pictures:
            picture(folder / name, f"#{number * 40 + 10:02x}40{80 + number}")
        answer = "It is red." if number % 3 else "There are 4 small shapes."
        if caption:
            made.append({"image": name, "caption": f"{answer} {number}"})
        else:
            made.append({"image": name, "instruction": f"What is it{' now' * (number % 4)}?", "output": answer})
    if not caption:
        made += [{"instruction": f"Hello {number}!", "output": "Hello!"} for number in range(4)]
    path = write_jsonl(folder / "rows.jsonl", made)
    vision = bundle.vision
    look = {"image_size": vision.image_size, "mean": vision.mean, "std": vision.std}
    own = config(
        Source(str(path), preprocess="caption" if caption else None),
        cache=folder / "cache",
        **{
            "cutoff_len": 80,
            "template": "tiny",
            "pictures": True,
            "slots": SLOTS,
            "share_pictures": share,
            **look,
            **more,
        },
    )
    return open_corpus(own, bundle.tokenizer), own


def feed(found, own, **more) -> Feed:
    return Feed(found, own, **{"batch": 2, "seed": 3, **more})


def epoch(one: Feed):
    return [batches for batches, _ in zip(one, range(one.steps_per_epoch), strict=False)]


def loss(bundle, steps) -> tuple[float, int]:
    """(sum of the losses, targets) over all batches."""
    joined, total, count = Joined(bundle.model).eval(), 0.0, 0
    with torch.no_grad():
        for batches in steps:
            for batch in batches:
                got, targets = joined(**batch.tensors(torch.device("cpu")))
                total, count = total + got.double().item(), count + int(targets)
    return total, count


@pytest.mark.parametrize("caption", [False, True])
def test_the_loss_is_the_token_weighted_mean_of_the_rows_alone(tmp_path, bundle, caption):
    found, own = rows(tmp_path, bundle, caption=caption)
    shared, alone = (
        epoch(feed(found, own)),
        epoch(feed(found, rows(tmp_path, bundle, caption=caption, packing=False)[1])),
    )
    (one, targets), (other, wanted) = loss(bundle, shared), loss(bundle, alone)
    assert targets == wanted == found.targets.sum()
    assert one / targets == pytest.approx(other / wanted, abs=1e-6)
    pixels = [
        sum(len(batch.pixels) for step in steps for batch in step if batch.pixels is not None)
        for steps in (shared, alone)
    ]
    assert pixels[1] == found.picture_count > 1.9 * pixels[0]


def test_the_gradients_are_those_of_the_rows_alone(tmp_path, bundle):
    found, own = rows(tmp_path, bundle)
    one, other = (_gradients(bundle, feed(found, given)) for given in (own, rows(tmp_path, bundle, packing=False)[1]))
    for name, gradient in other.items():
        if not name.endswith("key.bias"):  # moves all scores of a query alike: its gradient is rounding alone
            assert torch.dist(one[name], gradient) < 1e-5 * gradient.norm() + 1e-7, name


def _gradients(bundle, found: Feed) -> dict[str, torch.Tensor]:
    """Of the mean loss of an epoch."""
    targets = int(found.corpus.targets.sum())
    joined = Joined(bundle.model)
    bundle.model.requires_grad_(True)
    for batches in epoch(found):
        for batch in batches:
            (joined(**batch.tensors(torch.device("cpu")))[0] / targets).backward()
    gradients = {name: parameter.grad for name, parameter in bundle.model.named_parameters()}
    bundle.model.requires_grad_(False)
    for parameter in bundle.model.parameters():
        parameter.grad = None
    return gradients


def test_a_sequence_holds_one_picture_and_each_question_goes_on_from_it(tmp_path, bundle):
    found, own = rows(tmp_path, bundle)
    for step in epoch(feed(found, own)):
        for batch in step:
            for at in range(len(batch.ids)):
                segments, slots = batch.segments[at], batch.slots[at] if batch.slots is not None else None
                assert len(segments) <= 80
                if not (segments == 0).any():
                    continue
                assert segments[: SLOTS + 1].tolist() == [0] * (SLOTS + 1)
                assert (slots >= 0).sum() == SLOTS and (slots[1] % SLOTS == 0)
                for number in range(1, int(segments.max()) + 1):
                    own_positions = batch.positions[at][segments == number]
                    assert own_positions.tolist() == list(range(SLOTS + 1, SLOTS + 1 + len(own_positions)))


def test_a_question_changes_no_logit_of_its_neighbour(tmp_path, bundle):
    found, own = rows(tmp_path, bundle)
    batch = next(b for step in epoch(feed(found, own)) for b in step if (b.segments == 0).any())
    inputs = batch.tensors(torch.device("cpu"))
    at = int((batch.segments == 0).any(1).nonzero()[0])
    changed = {**inputs, "ids": inputs["ids"].clone()}
    changed["ids"][at][batch.segments[at] == 1] += 7
    with torch.no_grad():
        hidden = [_hidden(bundle, given)[at] for given in (inputs, changed)]
    others = batch.segments[at] != 1
    assert torch.equal(hidden[0][others], hidden[1][others]) and not torch.equal(hidden[0], hidden[1])


def _hidden(bundle, inputs):
    features = bundle.model.vision(inputs["pixels"]).flatten(0, 1)
    given = {name: inputs[name] for name in ("segments", "slots")}
    return bundle.model(inputs["ids"], inputs["positions"], features=features, **given)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_an_epoch_has_every_row_once_at_any_dp_size(tmp_path, bundle, dp_size):
    found, own = rows(tmp_path, bundle)
    ranks = [epoch(feed(found, own, dp_size=dp_size, dp_rank=rank)) for rank in range(dp_size)]
    seen = Counter(name for steps in ranks for step in steps for batch in step for name in batch.rows)
    assert seen == Counter(found.where(index) for index in range(len(found)))


def test_a_resumed_run_gets_the_same_batches_bit_by_bit(tmp_path, bundle):
    found, own = rows(tmp_path, bundle)
    first = feed(found, own)
    walk = iter(first)
    for _ in range(3):
        next(walk)
    second = feed(found, own)
    second.restore(first.state())
    for (one,), (other,), _ in zip(walk, second, range(12), strict=False):
        assert one.rows == other.rows and torch.equal(one.ids, other.ids) and torch.equal(one.segments, other.segments)


def test_a_state_without_sharing_is_refused(tmp_path, bundle):
    found, own = rows(tmp_path, bundle, pictures=1)
    state = feed(found, rows(tmp_path, bundle, pictures=1, share=False)[1]).state()
    with pytest.raises(ValueError, match="share_pictures"):
        feed(found, own).restore({**state, "sequences": feed(found, own).sequences})


def test_rows_of_a_picture_that_cannot_be_read_are_all_passed_over(tmp_path, bundle):
    found, own = rows(tmp_path, bundle, pictures=1, on_bad_row="skip")
    (tmp_path / "0.png").write_bytes(b"no picture")
    steps = epoch(feed(found, own))
    skipped = [said for step in steps for batch in step for said in batch.skipped]
    assert len(skipped) == QUESTIONS and sum(batch.targets for step in steps for batch in step) == sum(
        found.targets[-4:]
    )


def test_a_view_shares_among_its_own_rows_only(tmp_path, bundle):
    found, own = rows(tmp_path, bundle)
    part = found.split(9, 0)[0]
    seen = Counter(name for step in epoch(feed(part, own)) for batch in step for name in batch.rows)
    assert seen == Counter(part.where(index) for index in range(len(part)))
