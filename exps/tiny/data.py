"""Writes all that training reads, from one seed: pictures as PNG files, rows as JSON lines, the tokenizer.
Knows no model; what it writes follows from its arguments alone."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

if find_spec("accessory") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import parity
import pool as pools
import questions
import vocabulary
import words
from scenes import draw_scene

from accessory.data.template import get_template
from accessory.data.tokenizer import open_tokenizer

log = logging.getLogger("tiny")

TEMPLATE = "tiny"
SLOTS = 18  # positions of a picture
ROOM = 128  # positions of a sequence: cutoff_len of the YAML files

Row = dict[str, Any]


@dataclass
class Amounts:
    """How much of everything; the defaults are the shipped model's."""

    seed: int = 2
    scenes: int = 40_000
    digit_pictures: int = 20_000
    unknowns: int = 4_000
    empties: int = 300
    texts: int = 8_000
    captions: int = 3_000
    looks: int = 10_000  # drawings of the caption stage
    asked: int = 40_000  # drawings of the instruction stage with separate questions
    talks: int = 6_000  # conversations about a drawing
    digits: int = 18_000  # single questions that ask for a digit
    others: int = 40_000  # conversations about a digit, about what is unknown, or without a picture
    parities: int = 6_000


class Writer:
    """Rows about the pictures of a pool; room is counted in the ids of the tokenizer."""

    def __init__(self, pool: pools.Pool, names: list[str], write: Any) -> None:
        self.pool, self.names, self.write = pool, names, write
        self.scenes = pool.where(pools.SCENE)
        self.others = (pool.where(*range(10)), pool.where(pools.UNKNOWN), pool.where(pools.EMPTY))

    def captions(self, rng: Random, count: int) -> Iterator[Row]:
        """A picture and its caption, nothing asked."""
        while count:
            picture = rng.choice(self.scenes)
            caption = pools.caption(self.pool.scenes[picture])
            if caption:
                count -= 1
                yield {"image": self.names[picture], "caption": caption}

    def separate(self, rng: Random, count: int, mix: pools.Mix) -> Iterator[Row]:
        """Questions about one drawing each, so many of them that they fill a sequence behind it."""
        for number in range(count):
            picture, room = self.scenes[number % len(self.scenes)], ROOM - SLOTS - 1
            for question, answer in pools.questions_about(rng, self.pool, picture, mix=mix):
                room -= len(self.write(question, answer))
                if room < 0:
                    break
                yield {"image": self.names[picture], "instruction": question, "output": answer}

    def talks(self, rng: Random, count: int) -> Iterator[Row]:
        """Conversations about one drawing, as long as a sequence."""
        for _ in range(count):
            picture = rng.choice(self.scenes)
            yield self._talk(picture, pools.questions_about(rng, self.pool, picture), turns=99)

    def other_talks(self, rng: Random, count: int) -> Iterator[Row]:
        """Short conversations about a digit, about what is unknown or empty, or without a picture."""
        for _ in range(count):
            kind = rng.choices((0, 1, 2, 3), (62, 16, 4, 18))[0]
            turns = rng.choices((1, 2, 3), (60, 30, 10))[0]
            if kind == 3:
                yield self._talk(None, pools.questions_without_picture(rng), turns=turns)
            else:
                picture = rng.choice(self.others[kind])
                yield self._talk(picture, pools.questions_about(rng, self.pool, picture), turns=turns)

    def digits(self, rng: Random, count: int) -> Iterator[Row]:
        """Which digit it is, asked once."""
        for _ in range(count):
            picture = rng.choice(self.others[0])
            asked = questions.ask_digit(rng, int(self.pool.classes[picture]))
            yield {"image": self.names[picture], "instruction": words.vary(rng, asked.question), "output": asked.answer}

    def parities(self, rng: Random, count: int) -> Iterator[Row]:
        """The new task of the finetuning: whether a digit is even."""
        for _ in range(count):
            picture = rng.choice(self.others[0])
            question, answer = parity.ask(rng, int(self.pool.classes[picture]))
            yield {"image": self.names[picture], "instruction": question, "output": answer}

    def _talk(self, picture: int | None, source: Iterable[tuple[str, str]], *, turns: int) -> Row:
        """So many exchanges as one row, fewer where they do not fit."""
        room, said = ROOM - 1 - (SLOTS if picture is not None else 0), list[Row]()
        for question, answer in source:
            room -= len(self.write(question, answer))
            if room < 0 or not turns:
                break
            turns -= 1
            said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        row: Row = {"conversations": said}
        return row if picture is None else {"image": self.names[picture], **row}


def texts(rng: Random, count: int) -> Iterator[Row]:
    """Pretraining text: a scene in words, each shape with its place in tenths, and questions about it."""
    for _ in range(count):
        scene = draw_scene(rng)
        things = [replace(thing, x=_tenth(thing.x), y=_tenth(thing.y)) for thing in scene.things]
        scene = replace(scene, things=tuple(things))
        lines = [f"Picture: {questions.told(scene)}"]
        source = pools.questions_of(rng, scene, mix=pools.SCENE_MIX)
        for _ in range(6):
            question, answer = next(source)
            lines.append(f"Human: {question}\nAssistant: {answer}")
        if rng.random() < 0.3:
            question, answer = next(pools.questions_without_picture(rng))
            lines = [f"Human: {question}\nAssistant: {answer}"]
        yield {"text": "\n".join(lines)}


def _tenth(value: float) -> float:
    """The middle of its tenth."""
    return (int(value * questions.TENTHS) + 0.5) / questions.TENTHS


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """JSON lines."""
    with path.open("w") as out:
        count = 0
        for row in rows:
            out.write(json.dumps(row, separators=(",", ":")) + "\n")
            count += 1
    log.info("%s: %d rows", path.name, count)


def main() -> None:
    """Parse the few flags, and write everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    for name, value in vars(Amounts()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = vars(parser.parse_args())
    out, started = args.pop("out"), time.time()
    amounts = Amounts(**args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out {out}: the folder is not empty; name another or remove it")
    write_all(out, amounts)
    log.info("data: %.0f s", time.time() - started)


def write_all(out: Path, amounts: Amounts) -> None:
    """Tokenizer, pictures, and a file of rows for each stage of training."""
    (out / "pictures").mkdir(parents=True)
    vocabulary.train_tokenizer(out / "tokenizer.model", seed=amounts.seed)
    tokenizer = open_tokenizer(out / "tokenizer.model")
    counts = {name: getattr(amounts, name) for name in ("scenes", "digit_pictures", "unknowns", "empties")}
    pool = pools.build(amounts.seed, **counts, folder=out / "pictures")
    pool.save(out / "pool")
    names = [f"pictures/{name}.png" for name in pool.names]
    writer = Writer(pool, names, vocabulary.writer(get_template(TEMPLATE), tokenizer))

    def dice(name: str) -> Random:
        return Random(f"{amounts.seed} {name}")

    write_rows(out / "text.jsonl", texts(dice("text"), amounts.texts))
    write_rows(out / "captions.jsonl", writer.captions(dice("captions"), amounts.captions))
    write_rows(out / "looks.jsonl", writer.separate(dice("looks"), amounts.looks, pools.LOOK_MIX))
    write_rows(out / "questions.jsonl", writer.separate(dice("questions"), amounts.asked, pools.SCENE_MIX))
    write_rows(out / "talks.jsonl", writer.talks(dice("talks"), amounts.talks))
    write_rows(out / "digits.jsonl", writer.digits(dice("digits"), amounts.digits))
    write_rows(out / "others.jsonl", writer.other_talks(dice("others"), amounts.others))
    write_rows(out / "parity.jsonl", writer.parities(dice("parity"), amounts.parities))


if __name__ == "__main__":
    main()
