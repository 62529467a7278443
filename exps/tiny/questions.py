"""Questions about drawn scenes, digits and unknown pictures, each with its one right answer.
Knows no pixels: it reads a scene's list of shapes. Near ties of position are never asked about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from random import Random

import words
from scenes import COLORS, SHAPES, SIZES, Scene, Thing

FAR = 0.3  # centres further apart than this are easy to compare: the same lesson to begin with
GAP = 0.09  # centres nearer than this, along the axis asked about, are a tie
BORDER = 0.06  # centres nearer to the border of two thirds belong to neither
COLUMNS, ROWS = ("left", "", "right"), ("top", "", "bottom")


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and the kind it is scored under."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Phrase:
    """A way to point at shapes: any of size, colour and shape may be left open."""

    size: str = ""
    color: str = ""
    shape: str = ""

    def text(self, *, plural: bool = False) -> str:
        """The phrase without article, e.g. `small red circles`, `red shape`."""
        noun = self.shape or "shape"
        if plural:
            noun += "es" if noun == "cross" else "s"
        return " ".join(part for part in (self.size, self.color, noun) if part)

    def a(self) -> str:
        """With its indefinite article."""
        return f"{words.article(self.text())} {self.text()}"

    def matches(self, scene: Scene) -> list[Thing]:
        """The shapes it fits."""
        return [thing for thing in scene.things if self._fits(thing)]

    def _fits(self, thing: Thing) -> bool:
        return all(
            mine in ("", its) for mine, its in zip(self._parts(), (thing.size, thing.color, thing.shape), strict=True)
        )

    def _parts(self) -> tuple[str, str, str]:
        return self.size, self.color, self.shape


OF_THING = ("SCH", "CH", "CH", "CH", "H", "SH", "C", "SC")  # size, color, sHape: ways to point at a shape


def phrase_of(rng: Random, thing: Thing, ways: tuple[str, ...]) -> Phrase:
    """Points at a shape in one of `ways`."""
    return _masked(rng.choice(ways), thing.size, thing.color, thing.shape)


def phrase_any(rng: Random, ways: tuple[str, ...]) -> Phrase:
    """Points at whatever it happens to, or at nothing."""
    return _masked(rng.choice(ways), rng.choice(SIZES), rng.choice(tuple(COLORS)), rng.choice(SHAPES))


def _masked(way: str, size: str, color: str, shape: str) -> Phrase:
    return Phrase(size if "S" in way else "", color if "C" in way else "", shape if "H" in way else "")


def _unique(rng: Random, scene: Scene, ways: tuple[str, ...]) -> tuple[Phrase, Thing] | None:
    """A phrase that fits exactly one shape, and that shape."""
    for _ in range(12):
        thing = rng.choice(scene.things)
        phrase = phrase_of(rng, thing, ways)
        if len(phrase.matches(scene)) == 1:
            return phrase, thing
    return None


def _near_miss(rng: Random, scene: Scene, ways: tuple[str, ...]) -> Phrase:
    """A phrase that fits nothing, mostly one property away from a shape that is there."""
    while True:
        thing = rng.choice(scene.things)
        size, color, shape = thing.size, thing.color, thing.shape
        change = rng.random()
        if change < 0.4:
            color = rng.choice(tuple(COLORS))
        elif change < 0.8:
            shape = rng.choice(SHAPES)
        elif change < 0.9:
            size = rng.choice(SIZES)
        else:
            color, shape = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
        phrase = _masked(rng.choice(ways), size, color, shape)
        if not phrase.matches(scene):
            return phrase


# One template per line; {r} is a phrase. The first is the plain way to ask.
COLOR_Q = ("What color is the {r}?", "What colour is the {r}?", "Which color does the {r} have?",
           "Tell me the color of the {r}.", "What is the color of the {r}?", "The {r} has which color?")  # fmt: skip
SHAPE_Q = ("What shape is the {r}?", "Which shape is the {r}?", "What is the {r}?", "What kind of shape is the {r}?",
           "Tell me what the {r} is.", "What is the shape of the {r}?")  # fmt: skip
SIZE_Q = ("How big is the {r}?", "What size is the {r}?", "What is the size of the {r}?", "Is the {r} big or small?",
          "Is the {r} small or big?", "How large is the {r}?")  # fmt: skip
COUNT_Q = ("How many {r} are there?", "How many {r} do you see?", "Count the {r}.", "What is the number of {r}?",
           "How many {r} are in the picture?", "How many {r} can you see?")  # fmt: skip
EXIST_Q = ("Is there {r}?", "Do you see {r}?", "Is there {r} in the picture?", "Can you see {r}?",
           "Does the picture show {r}?", "Can you find {r}?")  # fmt: skip
WHERE_Q = ("Where is the {r}?", "Where do you see the {r}?", "Where can I find the {r}?", "In which part is the {r}?",
           "Tell me where the {r} is.", "What is the position of the {r}?")  # fmt: skip
REL_Q = ("Is the {a} {rel} the {b}?", "Is the {a} {rel} the {b} in the picture?", "Do you see the {a} {rel} the {b}?",
         "Does the {a} lie {rel} the {b}?", "Can you see the {a} {rel} the {b}?")  # fmt: skip
REL_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "higher than", "over"),
    "below": ("below", "lower than", "under"),
}
COMPARE_Q = ("Which is {more}, the {a} or the {b}?", "What is {more}, the {a} or the {b}?",
             "Which one is {more}: the {a} or the {b}?")  # fmt: skip
COMPARE_WORDS = {
    "left": ("further left", "more to the left"),
    "right": ("further right", "more to the right"),
    "above": ("higher", "further up"),
    "below": ("lower", "further down"),
}
DIRECTION_Q = ("Seen from the {b}, where is the {a}?", "On which side of the {b} is the {a}?")
SIDE_Q = ("Which shape is {side}?", "What is {side}?", "Which one is {side}?", "Tell me which shape is {side}.",
          "Which object is {side}?", "Name the shape that is {side}.")  # fmt: skip
SIDE_WORDS = {
    "left": ("leftmost", "furthest left", "on the far left"),
    "right": ("rightmost", "furthest right", "on the far right"),
    "above": ("highest", "at the very top", "furthest up"),
    "below": ("lowest", "at the very bottom", "furthest down"),
}
CAPTION_Q = ("What do you see?", "Describe the picture.", "What is in the picture?", "What is this?",
             "Describe what you see.", "What does the picture show?", "Give a caption.",
             "What is shown here?")  # fmt: skip
LIST_Q = (
    "List the shapes {order}.",
    "Name the shapes {order}.",
    "What do you see {order}?",
    "Describe the picture {order}.",
)
DIGIT_Q = ("Which digit is this?", "What digit is this?", "What number is this?", "Which number do you see?",
           "Read the digit.", "What is the digit?", "Which digit do you see?", "Read the number.",
           "What does it say?")  # fmt: skip
IS_DIGIT_Q = ("Is this {a} {d}?", "Is this the digit {d}?", "Is it {a} {d}?", "Do you see {a} {d}?", "Does it say {d}?")
DESCRIBING = {"color": COLOR_Q, "shape": SHAPE_Q, "size": SIZE_Q, "where": WHERE_Q}
WAYS = {
    "color": ("H", "H", "SH", "S"),
    "shape": ("C", "C", "SC", "S"),
    "size": ("CH", "H", "C", "CH"),
    "where": OF_THING,
    "rel": ("CH", "CH", "H", "C", "SCH"),
    "exist": ("CH", "CH", "H", "C", "SCH", "SH", "SC"),
    "count": ("", "", "H", "C", "S", "CH", "SH", "SC"),
}


def ask_color(rng: Random, scene: Scene) -> Asked | None:
    found = _unique(rng, scene, WAYS["color"])
    return found and Asked(rng.choice(COLOR_Q).format(r=found[0].text()), f"It is {found[1].color}.", "color")


def ask_shape(rng: Random, scene: Scene) -> Asked | None:
    found = _unique(rng, scene, WAYS["shape"])
    return found and Asked(rng.choice(SHAPE_Q).format(r=found[0].text()), f"It is a {found[1].shape}.", "shape")


def ask_size(rng: Random, scene: Scene) -> Asked | None:
    found = _unique(rng, scene, WAYS["size"])
    return found and Asked(rng.choice(SIZE_Q).format(r=found[0].text()), f"It is {found[1].size}.", "size")


def ask_count(rng: Random, scene: Scene) -> Asked:
    around = phrase_of(rng, rng.choice(scene.things), WAYS["count"])
    phrase = around if rng.random() < 0.75 else phrase_any(rng, WAYS["count"][2:])
    count = len(phrase.matches(scene))
    answer = (
        f"There are no {phrase.text(plural=True)}."
        if not count
        else f"There is 1 {phrase.text()}."
        if count == 1
        else f"There are {count} {phrase.text(plural=True)}."
    )
    return Asked(rng.choice(COUNT_Q).format(r=phrase.text(plural=True)), answer, "count")


def ask_exist(rng: Random, scene: Scene) -> Asked:
    if rng.random() < 0.5:
        phrase = phrase_of(rng, rng.choice(scene.things), WAYS["exist"])
    else:
        phrase = _near_miss(rng, scene, WAYS["exist"])
    there = "Yes, there is" if phrase.matches(scene) else "No, there is no"
    what = phrase.a() if phrase.matches(scene) else phrase.text()
    return Asked(rng.choice(EXIST_Q).format(r=phrase.a()), f"{there} {what}.", "exist")


def ask_where(rng: Random, scene: Scene) -> Asked | None:
    found = _unique(rng, scene, WAYS["where"])
    if not found:
        return None
    column, row = _third(found[1].x), _third(found[1].y)
    if column is None or row is None:
        return None
    place = f"{ROWS[row]} {COLUMNS[column]}".strip() or "center"
    return Asked(rng.choice(WHERE_Q).format(r=found[0].text()), f"It is at the {place}.", "where")


def _third(value: float) -> int | None:
    """Which third of the picture; None near a border between two."""
    return None if min(abs(value - 1 / 3), abs(value - 2 / 3)) < BORDER else int(3 * value)


def _beyond(thing: Thing, other: Thing, side: str) -> float:
    """How far `thing` lies to that side of the other; negative on the other side."""
    along = thing.x - other.x if side in ("left", "right") else thing.y - other.y
    return -along if side in ("left", "above") else along


def ask_rel(rng: Random, scene: Scene, *, gap: float = GAP) -> Asked | None:
    one, other = _unique(rng, scene, WAYS["rel"]), _unique(rng, scene, WAYS["rel"])
    side = rng.choice(tuple(REL_WORDS))
    if not one or not other or one[1] is other[1] or abs(_beyond(one[1], other[1], side)) < gap:
        return None
    question = rng.choice(REL_Q).format(a=one[0].text(), b=other[0].text(), rel=rng.choice(REL_WORDS[side]))
    return Asked(question, "Yes, it is." if _beyond(one[1], other[1], side) > 0 else "No, it is not.", "rel")


def ask_compare(rng: Random, scene: Scene, *, gap: float = GAP) -> Asked | None:
    """`rel` with a name for an answer: it says more of what went wrong than yes or no."""
    one, other = _unique(rng, scene, WAYS["rel"]), _unique(rng, scene, WAYS["rel"])
    side = rng.choice(tuple(COMPARE_WORDS))
    if not one or not other or one[1] is other[1] or abs(_beyond(one[1], other[1], side)) < gap:
        return None
    more = rng.choice(COMPARE_WORDS[side])
    question = rng.choice(COMPARE_Q).format(more=more, a=one[0].text(), b=other[0].text())
    further = one if _beyond(one[1], other[1], side) > 0 else other
    return Asked(question, f"The {further[0].text()}.", "compare")


def ask_direction(rng: Random, scene: Scene) -> Asked | None:
    """`rel` with all that there is to say: a word for each axis along which the two are apart."""
    one, other = _unique(rng, scene, WAYS["rel"]), _unique(rng, scene, WAYS["rel"])
    if not one or not other or one[1] is other[1]:
        return None
    apart = {side: _beyond(one[1], other[1], side) for side in ("left", "right", "above", "below")}
    said = [f"{REL_WORDS[side][0]} it" for side, by in apart.items() if by >= GAP]
    question = rng.choice(DIRECTION_Q).format(a=one[0].text(), b=other[0].text())
    return Asked(question, f"It is {' and '.join(said)}.", "direction") if said else None


def ask_side(rng: Random, scene: Scene) -> Asked | None:
    side = rng.choice(tuple(SIDE_WORDS))
    order = sorted(scene.things, key=lambda thing: _beyond(thing, scene.things[0], side), reverse=True)
    if len(order) < 2 or _beyond(order[0], order[1], side) < GAP:
        return None
    question = rng.choice(SIDE_Q).format(side=rng.choice(SIDE_WORDS[side]))
    return Asked(question, f"The {order[0].name}.", "side")


def ask_caption(rng: Random, scene: Scene) -> Asked | None:
    text = _listed(scene, "right")
    return text and Asked(rng.choice(CAPTION_Q), text, "caption")


def ask_list(rng: Random, scene: Scene) -> Asked | None:
    """A caption in an order that the question names."""
    side, order = rng.choice(
        (("below", "from top to bottom"), ("below", "from top to bottom"), ("right", "from left to right"))
    )
    text = _listed(scene, side)
    return text and Asked(rng.choice(LIST_Q).format(order=order), text, "list")


def _listed(scene: Scene, side: str) -> str | None:
    """All shapes in order towards `side`; None where two are a tie."""
    order = sorted(scene.things, key=lambda thing: _beyond(thing, scene.things[0], side))
    if any(_beyond(after, before, side) < GAP * 0.75 for before, after in pairwise(order)):
        return None
    names = [f"a {thing.name}" for thing in order]
    text = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    return f"A{text[1:]}."


SCENE_KINDS: dict[str, Callable[[Random, Scene], Asked | None]] = {
    "color": ask_color, "shape": ask_shape, "size": ask_size, "count": ask_count, "exist": ask_exist,
    "where": ask_where, "rel": ask_rel, "side": ask_side, "caption": ask_caption,
}  # fmt: skip


def ask_absent(rng: Random, scene: Scene) -> Asked:
    """About something that is not there; the right answer says so."""
    kind = rng.choice(("color", "shape", "size", "where", "where", "rel"))
    phrase = _near_miss(rng, scene, tuple(way for way in WAYS[kind] if way != "S"))
    if kind == "rel":
        there = phrase_of(rng, rng.choice(scene.things), ("CH", "H"))
        pair = (phrase.text(), there.text()) if rng.random() < 0.5 else (there.text(), phrase.text())
        rel = rng.choice(rng.choice(tuple(REL_WORDS.values())))
        question = rng.choice(REL_Q).format(a=pair[0], b=pair[1], rel=rel)
    else:
        question = rng.choice(DESCRIBING[kind]).format(r=phrase.text())
    return Asked(question, f"There is no {phrase.text()}.", "absent")


def ask_ambiguous(rng: Random, scene: Scene) -> Asked | None:
    """About one of several; the right answer says how many there are."""
    kind = rng.choice(tuple(DESCRIBING))
    phrase = phrase_of(rng, rng.choice(scene.things), tuple(way for way in WAYS[kind] if way != "S"))
    count = len(phrase.matches(scene))
    if count < 2:
        return None
    text = phrase.text(plural=True)
    return Asked(rng.choice(DESCRIBING[kind]).format(r=phrase.text()), f"There are {count} {text}.", "ambiguous")


PLACES_Q = ("Where is everything?", "Say where all shapes are.", "Name all places.", "What is where?")
TENTHS = 10  # a place is told in two of its tenths, to the right and down


def ask_places(rng: Random, scene: Scene) -> Asked:
    """Every shape and its place in tenths, in the order of reading."""
    return Asked(rng.choice(PLACES_Q), f"{told(scene)}.".capitalize(), "places")


def told(scene: Scene) -> str:
    """Every shape and its place in tenths, quarter by quarter of the picture's height."""
    order = sorted(scene.things, key=lambda thing: (int(4 * thing.y), thing.x))
    return ", ".join(f"{thing.name} {int(thing.x * TENTHS)} {int(thing.y * TENTHS)}" for thing in order)


SPECIAL_KINDS: dict[str, Callable[[Random, Scene], Asked | None]] = {
    "absent": ask_absent, "ambiguous": ask_ambiguous, "list": ask_list, "compare": ask_compare,
    "far": partial(ask_rel, gap=FAR), "places": ask_places, "direction": ask_direction,
}  # fmt: skip


def ask_digit(rng: Random, digit: int) -> Asked:
    """The digit itself, or whether it is some digit."""
    chance = rng.random()
    if chance < 0.75:
        return Asked(rng.choice(DIGIT_Q), f"It is the digit {digit}.", "digit")
    if chance < 0.85:
        return Asked(rng.choice(CAPTION_Q), f"It is the digit {digit}.", "digit")
    guess = digit if rng.random() < 0.5 else rng.randrange(10)
    answer = f"{'Yes' if guess == digit else 'No'}, it is {_a_digit(digit)} {digit}."
    return Asked(_is_digit(rng, guess), answer, "digit")


def _is_digit(rng: Random, digit: int) -> str:
    return rng.choice(IS_DIGIT_Q).format(a=_a_digit(digit), d=digit)


def _a_digit(digit: int) -> str:
    return "an" if digit == 8 else "a"


def about_digits(rng: Random) -> str:
    """A question that only a digit can answer."""
    return rng.choice(DIGIT_Q) if rng.random() < 0.7 else _is_digit(rng, rng.randrange(10))


def about_shapes(rng: Random, *, kind: str | None = None) -> str:
    """A question that only a drawing of shapes can answer, about nothing in particular."""
    kind = kind or rng.choice(("color", "shape", "size", "count", "exist", "where", "rel", "side"))
    if kind in DESCRIBING:
        return rng.choice(DESCRIBING[kind]).format(r=phrase_any(rng, WAYS[kind]).text())
    if kind == "count":
        return rng.choice(COUNT_Q).format(r=phrase_any(rng, WAYS[kind]).text(plural=True))
    if kind == "exist":
        return rng.choice(EXIST_Q).format(r=phrase_any(rng, WAYS[kind]).a())
    if kind == "side":
        return rng.choice(SIDE_Q).format(side=rng.choice(rng.choice(tuple(SIDE_WORDS.values()))))
    if kind == "caption":
        return rng.choice(CAPTION_Q)
    pair = phrase_any(rng, WAYS["rel"]).text(), phrase_any(rng, WAYS["rel"]).text()
    rel = rng.choice(rng.choice(tuple(REL_WORDS.values())))
    return rng.choice(REL_Q).format(a=pair[0], b=pair[1], rel=rel)


def about_anything(rng: Random) -> str:
    """A question about a picture, of every kind that there is."""
    chance = rng.random()
    if chance < 0.25:
        return about_digits(rng)
    return rng.choice(CAPTION_Q) if chance < 0.45 else about_shapes(rng)
