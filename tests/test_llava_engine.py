"""An engine over LLaVA: pictures of any size, several or none, together, in pieces, over ranks, never cut.

Must not judge features; test_llava_encoder does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_toys import ONE, opened, picture
from llava_toys import NEXT, PLAIN, SHAPES, TOWER, look_of, pictures, write_model
from PIL import Image

from accessory.assemble import Bundle
from accessory.data.template import Turn
from accessory.dist import Ranks
from accessory.engine import Engine, Request, Result
from accessory.engine.prompt import Prompter, WindowError
from spawn import run_ranks

GEN = 6


def raw(text: str, **options) -> Request:
    return Request(text, template="none", **{"max_gen_len": GEN, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture(scope="module")
def bundle(folder) -> Bundle:
    return opened(folder)


def answers(bundle: Bundle, requests: list[Request], **options) -> list[list[int]]:
    with Engine(bundle, ONE, **{"rows": 4, **options}) as engine:
        return [result.ids for result in engine.generate(requests)]


def greedy(bundle: Bundle, request: Request) -> list[int]:
    """The answer by the model itself: one forward over everything, no cache."""
    prompt = Prompter(bundle, window=bundle.config.max_seq_len)(request)
    features = None if prompt.pixels is None else bundle.model.vision(prompt.pixels, prompt.order)
    ids, slots = list(prompt.ids), list(prompt.slots)
    said: list[int] = []
    while len(said) < GEN:
        row = torch.tensor([ids])
        given = {} if features is None else {"features": features, "slots": torch.tensor([slots])}
        with torch.no_grad():
            logits = bundle.model.output(bundle.model(row, torch.arange(len(ids))[None], **given)[0, -1:])
        token = int(logits[0, : bundle.tokenizer.size].argmax())
        if token in prompt.stop_ids:
            break
        said.append(token)
        ids, slots = [*ids, token], [*slots, -1]
    return said


def conversation() -> Request:
    """Pictures in the first and the last turn, none between."""
    images = pictures()
    turns = [
        Turn("user", "the quick", pictures=2),
        Turn("assistant", "a fox"),
        Turn("user", "brown fox"),
        Turn("assistant", "the"),
        Turn("user", "what is it?", pictures=1),
    ]
    return Request(turns, pictures=[images[2], images[0], images[1]], template="alpaca", max_gen_len=GEN)


def test_pictures_of_the_issue_have_the_answers_together_that_each_has_alone(tmp_path):
    vision = replace(
        NEXT, image_size=336, grid_pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    )
    vision = replace(vision, tower_args={**TOWER, "embed_dim": 16, "depth": 2, "num_heads": 1})
    bundle = opened(write_model(tmp_path / "model", vision, max_seq_len=2048))
    sizes, counts = [(336, 336), (1920, 1080), (3000, 500)], [1176, 1948, 1452]
    images = [picture(number, (16, 16)).resize(size) for number, size in enumerate(sizes)]
    requests = [raw("what is it?", pictures=[image], max_gen_len=3) for image in images]
    with Engine(bundle, ONE, rows=3) as engine:
        blind = engine.length(raw("what is it?"))
        assert [engine.length(request) - blind for request in requests] == counts
        alone = [engine.generate([request])[0] for request in requests]
        assert engine.generate(requests) == alone
    assert [result.prompt_tokens - blind for result in alone] == counts


def test_a_batch_with_several_pictures_one_and_none_answers_as_each_alone(bundle):
    requests = [
        raw("what is it?", pictures=pictures()),
        raw("the quick brown fox"),
        raw("what is it?", pictures=pictures()[1:2]),
        conversation(),
    ]
    alone = [answers(bundle, [request])[0] for request in requests]
    assert answers(bundle, requests) == alone == [greedy(bundle, request) for request in requests]
    assert len({tuple(ids) for ids in alone}) == 4


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_a_prompt_in_pieces_has_the_same_answer(bundle, chunk):
    requests = [conversation(), raw("what is it?", pictures=pictures()[:2])]
    requests = requests[1:] if chunk == 1 else requests
    assert answers(bundle, requests, prefill_chunk=chunk) == answers(bundle, requests)


def test_every_picture_makes_a_difference(bundle):
    images = pictures()
    said = [answers(bundle, [raw("what is it?", pictures=given)])[0] for given in ([], images[:1], images[1:2], images)]
    assert len({tuple(ids) for ids in said}) == 4


def test_slots_count_the_rows_of_all_pictures_in_the_order_of_the_turns(bundle):
    prompt = Prompter(bundle, window=512)(conversation())
    images = pictures()
    counts = look_of(NEXT).count([images[2].size, images[0].size, images[1].size])
    assert [slot for slot in prompt.slots if slot >= 0] == list(range(sum(counts))) == list(range(len(prompt.order)))
    assert len(prompt.pixels) == 4 + 3 + 5 and prompt.pixels.shape[1:] == (3, 56, 56)


def test_a_prompt_that_is_shortened_keeps_every_slot(bundle):
    images = pictures()
    whole = raw("the quick brown fox " * 30, pictures=images, overlong="truncate")
    prompt = Prompter(bundle, window=280)(whole)
    assert prompt.dropped > 0 and len(prompt.ids) == 280 - GEN
    assert [slot for slot in prompt.slots if slot >= 0] == list(range(sum(look_of(NEXT).count(SHAPES))))
    with pytest.raises(WindowError, match=r"expected at least \d+ for BOS, pictures and one token"):
        Prompter(bundle, window=100)(whole)
    with pytest.raises(WindowError, match=r"got \d{3} tokens, expected at most 99"):
        Prompter(bundle, window=100)(replace(whole, overlong="error"))


@pytest.mark.parametrize("orientation", ["keep", "apply"])
def test_slots_are_counted_for_the_picture_as_it_is_turned(bundle, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1, (300, 50)).save(tmp_path / "a.png", exif=exif)
    prompt = Prompter(bundle, window=512, orientation=orientation)(raw("x", pictures=[tmp_path / "a.png"]))
    size = (300, 50) if orientation == "keep" else (50, 300)
    assert sum(slot >= 0 for slot in prompt.slots) == look_of(NEXT).slots(*size) == len(prompt.order)


def test_a_transform_that_is_named_makes_one_tile_of_each_picture(bundle):
    prompt = Prompter(bundle, window=512, image_transform="padded_resize")(raw("x", pictures=pictures()))
    assert len(prompt.pixels) == 3 and len(prompt.order) == 3 * 17
    with pytest.raises(ValueError, match="image_transform: got 'square'"):
        Prompter(bundle, window=512, image_transform="square")


def test_llava_1_5_takes_any_picture_as_one_tile(tmp_path):
    bundle = opened(write_model(tmp_path / "model", PLAIN))
    request = raw("what is it?", pictures=pictures())
    prompt = Prompter(bundle, window=512)(request)
    assert prompt.order is None and len(prompt.pixels) == 3
    assert sum(slot >= 0 for slot in prompt.slots) == 3 * 16
    assert answers(bundle, [request]) == [greedy(bundle, request)]


def job(ranks: Ranks, folder: Path) -> list[Result] | None:
    with Engine(opened(folder, ranks), ranks, rows=3, prefill_chunk=40) as engine:
        if not ranks.leader:
            return engine.follow()
        images = pictures()
        given = [images, [], images[:1], images[2:]]
        return engine.generate([raw("what is it?", pictures=some) for some in given] + [conversation()])


def test_two_ranks_share_the_tiles_and_give_the_same_answers(folder):
    expected = job(ONE, folder)
    assert len({tuple(result.ids) for result in expected}) == 5
    assert run_ranks(job, 2, folder) == [expected, None]
