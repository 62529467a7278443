"""The tiny model that ships, and the data it is made from. Fast checks; its exam is exps/tiny/evaluate.py."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from accessory.config import parse
from accessory.data.encode import encode
from accessory.data.feed import Feed, FeedConfig, Source, open_corpus, read_sources
from accessory.data.template import TEMPLATES, Picture, Turn, render
from accessory.data.tokenizer import open_tokenizer
from accessory.train.settings import Settings

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "accessory" / "tiny"
MAKERS = ROOT / "exps" / "tiny"
SLOTS = 18


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of exps/tiny by name."""
    monkeypatch.syspath_prepend(str(MAKERS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_the_folder_is_complete_small_and_16_bit():
    names = {path.name for path in SHIPPED.iterdir()}
    weights = SHIPPED / "consolidated.00-of-01.model.safetensors"
    assert {"config.json", "meta.json", "tokenizer.model", "example.png", weights.name} <= names
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 8_000_000
    assert json.loads((SHIPPED / "meta.json").read_text())["llama_type"] == "llama_qformerv2"
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}


def test_its_sizes_can_be_cut_in_four():
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["n_heads"] % 4 == config["vocab_size"] % 4 == config["hidden_dim"] % 4 == 0
    assert config["template"] in TEMPLATES


def test_a_seed_gives_the_same_scene_and_pixels(maker):
    scenes = maker("scenes")
    one, other = (scenes.draw_scene(Random(5)) for _ in range(2))
    assert one == other
    assert scenes.paint(one, 64).tobytes() == scenes.paint(other, 64).tobytes()


def test_shapes_never_touch_and_stay_inside(maker):
    scenes, rng = maker("scenes"), Random(1)
    for _ in range(200):
        things = scenes.draw_scene(rng).things
        assert all(thing.radius < min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) for thing in things)
        for i, one in enumerate(things):
            for other in things[:i]:
                assert math.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_answers_follow_from_the_scene(maker):
    scenes, questions = maker("scenes"), maker("questions")
    things = tuple(
        scenes.Thing(size, color, shape, x, y, 0.1, 0.0, (0, 0, 0))
        for size, color, shape, x, y in (("big", "red", "star", 0.2, 0.2), ("small", "blue", "circle", 0.8, 0.5))
    )
    scene, rng = scenes.Scene(things, (255, 255, 255)), Random(3)
    answers = {kind: {ask(rng, scene) for _ in range(400)} for kind, ask in questions.SCENE_KINDS.items()}
    said = {kind: {asked.answer for asked in found if asked} for kind, found in answers.items()}
    assert said["color"] == {"It is red.", "It is blue."}
    assert said["where"] == {"It is at the top left.", "It is at the right."}
    assert said["caption"] == {"A big red star and a small blue circle."}
    assert said["side"] == {"The big red star.", "The small blue circle."}
    by_question = {asked.question: asked.answer for found in answers.values() for asked in found if asked}
    assert by_question.get("Is the star left of the circle?", "Yes, it is.") == "Yes, it is."
    assert by_question.get("How many shapes are there?", "There are 2 shapes.") == "There are 2 shapes."


def test_what_is_absent_is_said_to_be_absent(maker):
    scenes, questions, rng = maker("scenes"), maker("questions"), Random(4)
    for _ in range(300):
        scene = scenes.draw_scene(rng)
        words = questions.ask_absent(rng, scene).answer.removeprefix("There is no ").removesuffix(".").split()
        assert not any(set(words) <= {"shape", *thing.name.split()} for thing in scene.things)


def test_held_out_digits_are_the_end_of_the_file(maker):
    digits = maker("digits")
    seen, held = digits.handwriting(held_out=False), digits.handwriting(held_out=True)
    assert len(held) >= 380 and len(seen) + len(held) == 1797
    assert (seen[0][1], held[-1][1]) == (0, 8)


def test_training_writes_the_ids_that_the_renderer_writes(maker):
    vocabulary, pool, rng = maker("vocabulary"), maker("pool"), Random(6)
    tokenizer = open_tokenizer(SHIPPED / "tokenizer.model")
    template = TEMPLATES[json.loads((SHIPPED / "config.json").read_text())["template"]]
    write = vocabulary.writer(template, tokenizer)
    for _, (question, answer) in zip(range(100), pool.scene_questions(rng), strict=False):
        turns = [
            Turn("user", question, pictures=1),
            Turn("assistant", answer),
            Turn("user", question),
            Turn("assistant", answer),
        ]
        parts = render(template, turns, open_answer=False)
        assert isinstance(parts[1], Picture)
        encoded = encode(parts, tokenizer, slots_per_picture=[SLOTS])
        exchange = write(question, answer)
        assert encoded.ids == [tokenizer.bos_id] + [0] * SLOTS + [token for token, _ in exchange] * 2
        assert encoded.supervised == [False] * (1 + SLOTS) + [supervised for _, supervised in exchange] * 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Everything that data.py writes, at the smallest size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(MAKERS))
        data = importlib.import_module("data")
        folder = tmp_path_factory.mktemp("tiny") / "data"
        data.write_all(folder, data.Amounts(**{name: 4 for name in vars(data.Amounts()) if name != "seed"}))
    return folder


def test_the_data_is_whole_and_its_pictures_are_there(made):
    rows = {path.stem: [json.loads(line) for line in path.open()] for path in made.glob("*.jsonl")}
    assert rows.keys() == {"text", "captions", "looks", "questions", "talks", "digits", "others", "parity"}
    shown = {row["image"] for kind in rows.values() for row in kind if "image" in row}
    assert shown and all((made / name).is_file() for name in shown)
    assert all(row["output"] in ("The digit is even.", "The digit is odd.") for row in rows["parity"])


def test_the_questions_about_a_drawing_fill_one_sequence_behind_it(made, maker):
    eyes, data = maker("eyes"), maker("data")
    look = {"image_size": eyes.VISION.image_size, "mean": eyes.VISION.mean, "std": eyes.VISION.std}
    source = Source(str(made / "questions.jsonl"))
    config = FeedConfig(
        (source,),
        template="tiny",
        cutoff_len=data.ROOM,
        slots=SLOTS,
        pictures=True,
        share_pictures=True,
        cache_dir=str(made / "cache"),
        workers=0,
        **look,
    )
    rows = open_corpus(config, open_tokenizer(made / "tokenizer.model"))
    feed = Feed(rows, config, batch=4, seed=0)
    (batch,) = next(iter(feed))
    assert feed.sequences == len(batch.pixels) == 4 and len(rows) > 12
    assert (batch.segments[:, : SLOTS + 1] == 0).all() and data.SLOTS == SLOTS


@pytest.mark.parametrize("stage", ["pretrain", "caption", "instruct", "parity"])
def test_the_settings_of_a_stage_are_settings_of_training(stage, monkeypatch):
    monkeypatch.setenv("TINY_DATA", "data")
    monkeypatch.chdir(ROOT)
    settings = parse(Settings, [str(MAKERS / f"{stage}.yaml")], prog="train")
    settings.check()
    assert read_sources(settings.dataset) and settings.cutoff_len in (128, 256)


def test_swapping_keeps_questions_and_changes_every_picture(maker):
    exam = maker("exam")
    cases = exam.scenes(1, per_kind=3)
    for case, swap in zip(cases, exam.swapped(cases), strict=True):
        assert (case.question, case.answer) == (swap.question, swap.answer)
        assert case.picture is not swap.picture


def test_muon_makes_singular_values_alike(maker):
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(maker("muon").orthogonal(x).float())
    assert 0.6 < values.min() and values.max() < 1.3


def test_the_example_is_a_picture():
    with Image.open(SHIPPED / "example.png") as image:
        assert image.size == (256, 256)


@pytest.mark.slow
def test_the_whole_script_runs_at_its_smallest_size(tmp_path):
    amounts = {"scenes": 40, "digit_pictures": 20, "unknowns": 10, "empties": 4, "texts": 40, "captions": 20}
    amounts |= {"looks": 40, "asked": 40, "talks": 10, "digits": 20, "others": 40, "parities": 40}
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "TINY_AMOUNTS": " ".join(f"--{name} {count}" for name, count in amounts.items()),
        "TINY_EYES": "--steps 2 --batch 8 --threads 1",
        "TINY_TRAIN": "max_steps=2 warmup_steps=1 per_device_train_batch_size=2",
    }
    command = ["bash", str(MAKERS / "run.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr[-3000:]  # the exam is not passed, and all before it went well
    assert "0 differ" in done.stdout and "even or odd, before" in done.stdout and "MISSED" in done.stdout
    assert (tmp_path / "out" / "instruct" / "config.json").is_file()
