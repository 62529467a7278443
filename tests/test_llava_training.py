"""LLaVA in training: gradients over ranks that share the tiles, and rows of data whose pictures have different counts.

Must not judge pixels or features; test_llava_tiles and test_llava_encoder do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_toys import ONE, opened
from engine_toys import picture as noise
from feed_toys import alpaca, config, tokenizer, write_jsonl
from llava_toys import NEXT, PLAIN, SHAPES, look_of, write_model
from trainee_toys import SIZES, Case, toy, train, whole

from accessory.assemble import TINY, read_spec
from accessory.checkpoint import open_folders
from accessory.data.feed import Corpus, Feed, Stream, open_corpus
from accessory.data.feed.fit import Fitter
from accessory.data.image import load_picture
from accessory.data.template import Turn
from accessory.dist import Ranks
from accessory.engine import Request
from accessory.engine.prompt import Prompter
from accessory.train.joined import Joined
from accessory.train.plan import plan
from accessory.train.settings import Settings
from accessory.train.start import plan_spec
from spawn import run_ranks

FULL = Case(config={"vision": NEXT.to_dict()}, settings={"train_vision": "full"}, pictures=True, steps=3)
LORA = FULL.but(settings={"finetuning_type": "lora", "train_projector": "lora", "train_vision": "lora"})
LOOK = look_of(NEXT)


def on_rank(ranks: Ranks, cases: list[Case]) -> list[Any]:
    return [train(ranks, case) for case in cases]


@pytest.mark.parametrize("tp", [2, 1])
def test_two_ranks_of_either_kind_train_as_one_does(tp):
    cases = [FULL, LORA]
    references = on_rank(ONE, [case.but(accumulation=2 // tp) for case in cases])
    found = run_ranks(on_rank, 2, cases, tp=tp)
    for number, (case, expected) in enumerate(zip(cases, references, strict=True)):
        ours = [of_rank[number] for of_rank in found]
        for one in ours:
            assert one.losses == pytest.approx(expected.losses, abs=1e-5)
            assert one.norms == pytest.approx(expected.norms, rel=1e-4)
        grads, wanted = whole([one.grads for one in ours]), whole([expected.grads])
        assert grads.keys() == wanted.keys()
        for name, grad in wanted.items():
            torch.testing.assert_close(grads[name], grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
            seen = case is FULL or name.endswith("lora_b.weight")
            assert grad.abs().max() > 0 or not (seen and name.startswith("vision.")) or name.endswith("k.bias"), name


def test_what_no_row_depends_on_is_not_trained():
    model, parts = toy(FULL, ONE.shard)
    unread = {f"vision.{name}" for name in model.vision.unread}
    assert unread and not unread & parts.names and "vision.image_newline" in parts.names


# ---- rows of data


def rows(folder: Path, *, count: int = 6) -> Path:
    """Questions about pictures of all shapes, some about two of them, some about none."""
    made = []
    for number in range(count):
        row: dict[str, Any] = alpaca(number)
        names = [f"{number}-{other}.png" for other in range(number % 3)]
        for other, name in enumerate(names):
            noise(number + 10 * other, SHAPES[(number + other) % 3]).save(folder / name)
        made.append(row | ({"images": names} if names else {}))
    return write_jsonl(folder / "rows.jsonl", made)


def settings(folder: Path, path: Path, vision=NEXT, **more: Any):
    look = look_of(vision)
    return config(
        path,
        cache=folder / "cache",
        **{"pictures": True, "slots": look.each, "tiles": look, "cutoff_len": 400, **more},
    )


def opening(folder: Path, **more: Any) -> tuple[Corpus, Any]:
    own = settings(folder, rows(folder), **more)
    return open_corpus(own, tokenizer()), own


def test_slots_of_a_row_are_counted_by_the_headers_of_its_pictures(tmp_path):
    found, _ = opening(tmp_path)
    assert found.picture_count == 6 and found.tile_count > 6 * 3
    for index in range(len(found)):
        row = found.row(index)
        assert row.sizes == tuple(load_picture(path).size for path in row.pictures)
        assert row.slots[row.slots >= 0].tolist() == list(range(sum(LOOK.count(row.sizes))))
        assert found.example(index, tokenizer()).count("<picture") == len(row.pictures)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_micro_batch_holds_all_tiles_and_the_order_of_their_rows(tmp_path, packing, workers):
    found, own = opening(tmp_path, packing=packing)
    feed = Feed(found, own, batch=6, seed=0, shuffle=False, workers=workers)
    (batch,) = next(iter(feed))
    named = {row.where: row for row in (found.row(index) for index in range(len(found)))}
    paths = [path for where in batch.rows for path in named[where].pictures]
    images = [load_picture(path) for path in paths]
    assert torch.equal(batch.pixels, torch.cat([LOOK.pixels(image) for image in images]))
    assert batch.order.tolist() == LOOK.order([image.size for image in images]).tolist()
    assert sorted(batch.slots[batch.slots >= 0].tolist()) == list(range(len(batch.order)))
    assert batch.tensors(torch.device("cpu"))["order"] is batch.order


def test_a_stream_gives_the_rows_of_a_corpus(tmp_path):
    found, own = opening(tmp_path, packing=False)
    one = next(iter(Feed(found, own, batch=6, seed=0, shuffle=False)))[0]
    other = next(iter(Stream(own, tokenizer(), batch=6, seed=0, shuffle=False)))[0]
    for name in ("ids", "slots", "pixels", "order", "labels"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_the_loss_of_rows_together_is_that_of_each_alone(tmp_path):
    bundle = opened(write_model(tmp_path / "model"))
    path = rows(tmp_path)
    losses = []
    for batch, packing in ((1, False), (6, False), (6, True)):
        own = settings(tmp_path, path, packing=packing)
        feed = Feed(open_corpus(own, bundle.tokenizer), own, batch=batch, seed=0)
        total = targets = 0.0
        with torch.no_grad():
            for (micro,), _ in zip(feed, range(feed.steps_per_epoch), strict=False):
                loss, count = Joined(bundle.model)(**micro.tensors(torch.device("cpu")))
                total, targets = total + float(loss), targets + int(count)
        losses.append((total, targets))
    for total, targets in losses[1:]:
        assert targets == losses[0][1] and total == pytest.approx(losses[0][0], rel=1e-5)


def test_training_and_the_engine_see_the_same_prompt(tmp_path):
    bundle = opened(write_model(tmp_path / "model"))
    own = settings(tmp_path, rows(tmp_path), packing=False)
    found = open_corpus(own, bundle.tokenizer)
    for index in range(len(found)):
        talk, row = found.conversation(index), found.row(index)
        prompt = Prompter(bundle, window=512)(Request(talk.turns[:-1], talk.pictures, talk.template))
        assert row.ids[: len(prompt.ids)].tolist() == prompt.ids
        assert row.slots[: len(prompt.ids)].tolist() == prompt.slots


def test_rows_about_one_picture_share_it(tmp_path):
    noise(1, SHAPES[1]).save(tmp_path / "a.png")
    noise(2, SHAPES[0]).save(tmp_path / "b.png")
    made = [{"image": "ab"[number % 2] + ".png", "instruction": f"q{number}", "output": "a fox"} for number in range(8)]
    path = write_jsonl(tmp_path / "rows.jsonl", made)
    bundle = opened(write_model(tmp_path / "model"))
    sums, tiles = [], []
    for share in (True, False):
        own = settings(tmp_path, path, share_pictures=share, packing=share, template="tiny")
        feed = Feed(open_corpus(own, bundle.tokenizer), own, batch=8, seed=0)
        (batch,) = next(iter(feed))
        with torch.no_grad():
            sums.append(float(Joined(bundle.model)(**batch.tensors(torch.device("cpu")))[0]))
        tiles.append(len(batch.pixels))
    assert tiles == [LOOK.tiles(*SHAPES[0]) + LOOK.tiles(*SHAPES[1]), 4 * tiles[0]]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


@pytest.mark.parametrize("orientation", ["keep", "apply"])
def test_slots_are_counted_for_pictures_as_they_are_turned(tmp_path, orientation):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 8
    noise(1, (300, 50)).save(tmp_path / "a.png", exif=exif)
    path = write_jsonl(tmp_path / "rows.jsonl", [alpaca(1) | {"image": "a.png"}])
    own = settings(tmp_path, path, orientation=orientation)
    found = open_corpus(own, tokenizer())
    size = (300, 50) if orientation == "keep" else (50, 300)
    assert found.row(0).sizes == (size,)
    (batch,) = next(iter(Feed(found, own, batch=1, seed=0)))
    assert len(batch.pixels) == LOOK.tiles(*size) and len(batch.order) == LOOK.slots(*size)


def test_pictures_are_counted_before_a_row_is_shortened_and_never_cut(tmp_path):
    counts = LOOK.count(SHAPES)
    own = settings(tmp_path, tmp_path, cutoff_len=sum(counts) + 60)
    turns = [
        Turn("user", "the quick brown fox " * 20, pictures=2),
        Turn("assistant", "a fox " * 20),
        Turn("user", "what is it? " * 20, pictures=1),
        Turn("assistant", "the quick " * 20),
    ]
    fitted = Fitter(own, tokenizer()).fit(turns, "tiny", counts)
    assert fitted.positions > own.cutoff_len >= len(fitted.encoded.ids)
    assert [slot for slot in fitted.encoded.slots if slot >= 0] == list(range(sum(counts)))


def test_a_row_whose_pictures_leave_no_room_says_how_much_it_needs(tmp_path):
    noise(1, SHAPES[1]).save(tmp_path / "a.png")
    path = write_jsonl(tmp_path / "rows.jsonl", [alpaca(1) | {"image": "a.png"}])
    own = settings(tmp_path, path, cutoff_len=64, overlong="error")
    count = LOOK.slots(*SHAPES[1])
    with pytest.raises(
        ValueError, match=rf"rows\.jsonl:1: has more than cutoff_len 64 positions: \d+, {count} of them"
    ):
        open_corpus(own, tokenizer())


def test_a_picture_that_changed_since_it_was_counted_is_told_and_never_fed(tmp_path):
    found, own = opening(tmp_path, packing=False)
    noise(5, (90, 40)).save(tmp_path / "1-0.png")
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:2: picture .*1-0\.png: got 90 x 40 pixels, expected the 190 x 107"
    ):
        next(iter(Feed(found, own, batch=6, seed=0, shuffle=False)))
    skipping = replace(own, on_bad_row="skip")
    (batch,) = next(iter(Feed(found, skipping, batch=6, seed=0, shuffle=False)))
    assert len(batch.skipped) == 1 and (batch.labels[1] == -100).all()
    assert len(batch.pixels) == found.tile_count and not batch.pixels[:5].any() and batch.pixels[5:].any()


def test_a_picture_that_is_none_is_refused_with_its_row_before_any_step(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    path = write_jsonl(tmp_path / "rows.jsonl", [alpaca(1) | {"image": "a.png"}, alpaca(2)])
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: picture .*a\.png: got a file that is none of"):
        open_corpus(settings(tmp_path, path), tokenizer())
    found = open_corpus(settings(tmp_path, path, on_bad_row="skip"), tokenizer())
    assert len(found) == 1 and found.report["bad"] == 1


def test_a_cache_belongs_to_what_decides_the_counts(tmp_path):
    path = rows(tmp_path)
    makings = {
        "tiles": settings(tmp_path, path),
        "other grids": settings(tmp_path, path, replace(NEXT, compat="hf", grid_pinpoints=NEXT.grid_pinpoints[::2])),
        "flat": settings(tmp_path, path, replace(NEXT, merge="flat")),
        "turned": settings(tmp_path, path, orientation="apply"),
        "one tile": settings(tmp_path, path, PLAIN),
    }
    caches = tmp_path / "cache"
    for number, own in enumerate(makings.values(), start=1):
        open_corpus(own, tokenizer())
        assert len(list(caches.glob("*.rows"))) == number
    colours = settings(tmp_path, path, replace(NEXT, mean=(0.5, 0.5, 0.5)))
    for own in (*makings.values(), colours, settings(tmp_path, path, replace(PLAIN, aspect="crop"))):
        open_corpus(own, tokenizer())
    assert len(list(caches.glob("*.rows"))) == len(makings)


def test_one_tile_with_a_newline_has_a_slot_for_it(tmp_path):
    found, own = opening(tmp_path, packing=False)
    vision = replace(PLAIN, merge="spatial_unpad")
    own = settings(tmp_path, tmp_path / "rows.jsonl", vision, packing=False)
    found = open_corpus(own, tokenizer())
    assert (found.row(2).slots >= 0).sum() == 2 * 17
    (batch,) = next(iter(Feed(found, own, batch=6, seed=0, shuffle=False)))
    assert len(batch.pixels) == 6 and (batch.order == -1).sum() == 6 and len(batch.order) == 6 * 17


def test_the_plan_of_a_run_counts_tiles_and_shares_them_among_ranks():
    spec = read_spec({**SIZES, "max_seq_len": 400, "vision": NEXT.to_dict()}, llama_type="llava")
    wanted = Settings(finetuning_type="full", train_vision="full", cutoff_len=400, per_device_train_batch_size=2)
    alone, shared = (
        plan(replace(wanted, tensor_parallel_size=tp), spec, world=tp, device="cpu", dtype=torch.float32)
        for tp in (1, 2)
    )
    assert alone.batch["pixels"] == shared.batch["pixels"] == (2 * 5, 3, 56, 56)
    assert 0.4 < shared.device["activations"] / alone.device["activations"] < 0.9


def test_whose_tiling_is_followed_is_settled_for_llavas_and_refused_for_others(tmp_path):
    llava = open_folders(write_model(tmp_path / "llava" / "model"))
    for compat in ("llava", "hf"):
        spec = plan_spec(Settings(anyres_compat=compat, cutoff_len=128), llava, None)
        assert spec.vision.compat == compat
    with pytest.raises(ValueError, match="anyres_compat: got hf, expected a LLaVA to train with it; drop it"):
        plan_spec(Settings(anyres_compat="hf"), open_folders(TINY), None)
