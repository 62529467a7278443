"""The exam: fresh scenes, held-out handwriting, and everything that must be declined, with the one right answer each.
Knows no model. Its seed is never trained on, and nothing in it is taken from a training pool."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import digits
import parity
import questions
import unknown
import words
from PIL import Image
from scenes import draw_scene, paint
from sklearn.datasets import load_sample_images

SIZE = 256  # pixels: what a person would bring, not what the model was trained on
PER_KIND = 200
PHOTO_KINDS = ("color", "shape", "size", "count", "exist", "where", "rel", "side", "caption", "digit")


@dataclass(frozen=True)
class Case:
    """One question of the exam; `group` is scene, digit, negative or other, `kind` its line in the table."""

    group: str
    kind: str
    picture: Image.Image | None
    question: str
    answer: str


def scenes(seed: int, *, per_kind: int = PER_KIND) -> list[Case]:
    """As many questions of every kind, each about a scene of its own."""
    cases = []
    for kind, ask in questions.SCENE_KINDS.items():
        rng = Random(f"{seed} exam {kind}")
        while sum(case.kind == kind for case in cases) < per_kind:
            scene = draw_scene(rng)
            asked = ask(rng, scene)
            if asked:
                cases.append(Case("scene", kind, paint(scene, SIZE), words.vary(rng, asked.question), asked.answer))
    return cases


def handwriting(seed: int) -> list[Case]:
    """Every held-out digit once, as it is."""
    rng = Random(f"{seed} exam digits")
    return [
        Case(
            "digit",
            "digit",
            digits.clean(ink, SIZE),
            words.vary(rng, rng.choice(questions.DIGIT_Q)),
            f"It is the digit {d}.",
        )
        for ink, d in digits.handwriting(held_out=True)
    ]


def negatives(seed: int, *, per_kind: int = 150) -> list[Case]:
    """What is not there, the wrong question for the picture, other subjects, and photographs."""
    rng = Random(f"{seed} exam negatives")
    hand = digits.handwriting(held_out=True)
    cases = []

    def add(kind: str, picture: Image.Image | None, question: str, answer: str) -> None:
        cases.append(Case("negative", kind, picture, words.vary(rng, question), answer))

    for _ in range(per_kind):
        scene = draw_scene(rng)
        asked = questions.ask_absent(rng, scene)
        add("absent shape", paint(scene, SIZE), asked.question, asked.answer)
    for _ in range(per_kind):
        add("digit question, scene", paint(draw_scene(rng), SIZE), questions.about_digits(rng), words.NOT_DIGIT)
        add(
            "shape question, digit",
            digits.clean(rng.choice(hand)[0], SIZE),
            questions.about_shapes(rng),
            words.NOT_DRAWING,
        )
        off_topic = words.ask_off_topic(rng, nouns=words.FRESH_NOUNS)
        add("off topic, scene", paint(draw_scene(rng), SIZE), off_topic, words.ONLY)
    for photo in load_sample_images().images:
        for kind in PHOTO_KINDS:
            for _ in range(per_kind // 10):
                question = questions.about_digits(rng) if kind == "digit" else questions.about_shapes(rng, kind=kind)
                add("photograph", _crop(rng, Image.fromarray(photo)), question, words.UNKNOWN)
    return cases


def others(seed: int, *, per_kind: int = 100) -> list[Case]:
    """Reported, under no bar: ambiguous questions, empty paper, no picture, talk about itself, generated unknowns."""
    rng = Random(f"{seed} exam others")
    cases = []
    while len(cases) < per_kind:
        scene = draw_scene(rng)
        asked = questions.ask_ambiguous(rng, scene)
        if asked:
            cases.append(Case("other", "ambiguous", paint(scene, SIZE), asked.question, asked.answer))
    for _ in range(per_kind):
        cases.append(
            Case("other", "empty paper", unknown.draw_empty(rng, size=SIZE), questions.about_anything(rng), words.EMPTY)
        )
        cases.append(Case("other", "no picture", None, questions.about_anything(rng), words.NO_PICTURE))
        cases.append(
            Case(
                "other",
                "unknown picture",
                unknown.draw_unknown(rng, size=SIZE),
                questions.about_anything(rng),
                words.UNKNOWN,
            )
        )
        question, answer = words.ask_chat(rng)
        cases.append(Case("other", "about itself", None, question, answer))
    return cases


def parities(seed: int) -> list[Case]:
    """The new task of the finetuning, about every held-out digit."""
    rng = Random(f"{seed} exam parity")
    hand = digits.handwriting(held_out=True)
    return [Case("parity", "parity", digits.clean(ink, SIZE), *parity.ask(rng, digit)) for ink, digit in hand]


def swapped(cases: list[Case]) -> list[Case]:
    """The same questions and answers, each with the picture of the next case (the last: of the first) of its kind."""
    following = {}
    for kind in {case.kind for case in cases}:
        same = [i for i, case in enumerate(cases) if case.kind == kind]
        following |= dict(zip(same, [*same[1:], same[0]], strict=True))
    return [replace(case, group="swapped", picture=cases[following[i]].picture) for i, case in enumerate(cases)]


def _crop(rng: Random, photo: Image.Image) -> Image.Image:
    """A square part of a photograph."""
    side = rng.randint(photo.height // 3, photo.height)
    left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
    return photo.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
