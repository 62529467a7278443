"""Pictures while training: slots of a micro-batch, seeded crops, damaged and vanished files, workers that die.

Must not judge what a transform computes.
"""

import os
import signal

import numpy as np
import pytest
import torch
from feed_toys import alpaca, config, corpus, picture, write_jsonl

from accessory.data.feed import Feed
from accessory.data.image import load_picture, transform

SEES = {"pictures": True, "slots": 3, "image_size": 8, "image_transform": "resized_center_crop"}


def rows(tmp_path, *, every: int = 2, count: int = 8, **more):
    """A corpus in which every other row has a picture, and its config."""
    made = []
    for number in range(count):
        row = alpaca(number)
        if number % every == 0:
            picture(tmp_path / f"{number}.png", f"#{number * 6 + 10:02x}4080")
            row["image"] = f"{number}.png"
        made.append(row)
    path = write_jsonl(tmp_path / "a.jsonl", made)
    own = config(path, cache=tmp_path / "cache", **{**SEES, **more})
    return corpus(path, cache=tmp_path / "cache", **{**SEES, **more}), own


def feed(found, own, **more):
    return Feed(found, own, **{"batch": 2, "accumulation": 1, "dp_rank": 0, "dp_size": 1, "seed": 0, **more})


def test_slots_name_feature_rows_of_all_pictures_of_the_micro_batch(tmp_path):
    found, own = rows(tmp_path, packing=False)
    (batch,) = next(iter(feed(found, own, batch=4, shuffle=False)))
    assert batch.pixels.shape == (2, 3, 8, 8) and batch.slots.shape == batch.ids.shape
    assert [batch.slots[at][batch.slots[at] >= 0].tolist() for at in range(4)] == [[0, 1, 2], [], [3, 4, 5], []]
    look = transform("resized_center_crop", size=8, mean=own.mean, std=own.std)
    for number, name in enumerate(("0.png", "2.png")):
        assert torch.equal(batch.pixels[number], look(load_picture(tmp_path / name)))
    assert not batch.ids[batch.slots >= 0].any() and (batch.labels[batch.slots >= 0][:-1] == -100).all()


def test_a_micro_batch_without_pictures_has_neither_slots_nor_pixels(tmp_path):
    found, own = rows(tmp_path, packing=False)
    batches = [next(iter(feed(found, own, batch=1, shuffle=False, dp_rank=rank, dp_size=2)))[0] for rank in range(2)]
    assert batches[0].pixels is not None and batches[1].pixels is None and batches[1].slots is None


def test_packed_pictures_keep_their_places(tmp_path):
    found, own = rows(tmp_path, cutoff_len=400)
    seen = 0
    for (batch,) in [step for step, _ in zip(feed(found, own), range(feed(found, own).steps_per_epoch), strict=False)]:
        if batch.pixels is None:
            continue
        used = batch.slots[batch.slots >= 0]
        assert used.tolist() == list(range(3 * len(batch.pixels)))
        seen += len(batch.pixels)
    assert seen == found.picture_count == 4


def test_random_crops_are_a_function_of_seed_epoch_and_row(tmp_path):
    look = {"image_transform": "random_resized_crop", "packing": False}
    found, own = rows(tmp_path, every=1, count=2, **look)
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 256, (40, 40, 3), np.uint8)
        from PIL import Image

        Image.fromarray(noise).save(tmp_path / f"{index}.png")
    walk = iter(feed(found, own, shuffle=False))
    first, second = next(walk)[0].pixels, next(walk)[0].pixels
    pair = [
        next(iter(feed(found, own, shuffle=False, batch=1, dp_rank=rank, dp_size=2)))[0].pixels for rank in range(2)
    ]
    assert torch.equal(first, torch.cat(pair)) and not torch.equal(first, second)
    assert not torch.equal(first, next(iter(feed(found, own, shuffle=False, seed=1)))[0].pixels)
    later = feed(found, own, shuffle=False)
    later.restore({"epoch": 1, "taken": 0})
    assert torch.equal(next(iter(later))[0].pixels, second)


def test_workers_give_the_same_batches_in_the_same_order(tmp_path):
    found, own = rows(tmp_path, count=20, image_transform="random_resized_crop")
    alone, helped = iter(feed(found, own)), iter(feed(found, own, workers=2))
    for _ in range(8):
        for one, other in zip(next(alone), next(helped), strict=True):
            assert one.rows == other.rows and torch.equal(one.ids, other.ids)
            assert (one.pixels is None) == (other.pixels is None)
            assert one.pixels is None or torch.equal(one.pixels, other.pixels)
    helped.close()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_a_picture_that_cannot_be_read_is_an_error_with_its_row(tmp_path, workers, how):
    found, own = rows(tmp_path)
    broken = tmp_path / "2.png"
    broken.unlink() if how == "gone" else broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a\.jsonl:3: picture .*2\.png: .*on_bad_row skip"):
        for _, _step in zip(range(8), feed(found, own, workers=workers), strict=False):
            pass


@pytest.mark.parametrize("workers", [0, 1])
def test_under_skip_its_row_teaches_nothing_and_is_counted(tmp_path, workers):
    found, own = rows(tmp_path, on_bad_row="skip", packing=False)
    (tmp_path / "2.png").write_bytes(b"no picture")
    one = feed(found, own, batch=8, workers=workers, shuffle=False)
    walk = iter(one)
    (batch,) = next(walk)
    assert (
        (batch.labels[2] == -100).all() and not batch.pixels[1].any() and batch.targets == batch.labels.ne(-100).sum()
    )
    assert one.skipped == 1 == one.state()["skipped"] and "2.png" in batch.skipped[0]
    next(walk)
    assert one.skipped == 2
    walk.close()


def test_a_worker_that_dies_is_an_error_that_names_rows_and_not_a_wait(tmp_path):
    found, own = rows(tmp_path, every=1, count=40, packing=False)
    walk = iter(feed(found, own, workers=1))
    next(walk)
    import multiprocessing

    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"a worker died with signal 9 .* on the pictures of .*a\.jsonl:"):
        for _ in range(60):
            next(walk)


def test_pictures_of_an_adapters_prompt_are_one_per_row_and_rows_stand_alone(tmp_path):
    found, own = rows(tmp_path, slots=0)
    (batch,) = next(iter(feed(found, own, batch=4, shuffle=False)))
    assert batch.segments is None and batch.slots[:, 0].tolist() == [0, -1, 1, -1] and len(batch.pixels) == 2
    two = alpaca(1) | {"images": ["0.png", "2.png"]}
    with pytest.raises(ValueError, match="got 2 pictures, expected one"):
        corpus(write_jsonl(tmp_path / "b.jsonl", [two]), cache=tmp_path / "cache", **{**SEES, "slots": 0})


def test_pixels_have_the_type_that_is_asked_for(tmp_path):
    found, own = rows(tmp_path)
    assert next(iter(feed(found, own, pixels_dtype=torch.bfloat16)))[0].pixels.dtype == torch.bfloat16
