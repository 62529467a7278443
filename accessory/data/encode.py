"""Parts of a conversation to token ids, feature slots and supervision.
Knows no template: what is written comes as parts, from `template.render` or by hand.

Each run of text between control tokens or pictures is tokenised once and whole, because pieces that are encoded apart
give other ids; what is supervised follows from character places afterwards.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from accessory.data.template import BOS, Control, Part, Picture, Template, Text
from accessory.data.tokenizer import After, Tokenizer


@dataclass(frozen=True)
class Encoded:
    """A conversation as numbers; the lists have one entry per position."""

    ids: list[int]
    """Token ids, 0 where a picture stands."""
    slots: list[int]
    """-1, or the row of the features of all pictures of this conversation, in their order."""
    supervised: list[bool]
    """Whether the model is to learn to say this token."""
    text: str
    """The conversation for human eyes: control tokens by name, pictures as <picture 0>. Never tokenised."""
    head: int = 0
    """Leading positions that truncation keeps: BOS, and pictures before it."""


def encode(
    parts: Sequence[Part], tokenizer: Tokenizer, *, slots_per_picture: Sequence[int] = (), before_bos: bool = False
) -> Encoded:
    """Encode parts.

    slots_per_picture: how many feature rows each picture fills, in the order of their numbers. before_bos: pictures
    that directly follow the first BOS go before it. A token that straddles the beginning of an answer belongs to the
    answer. BOS is left out where the tokenizer has none. Raises ValueError if pictures and slots do not match, or a
    control token is unknown.
    """
    _check_pictures(parts, slots_per_picture)
    parts = settle(_pictures_first(parts) if before_bos else parts, tokenizer)
    first_row = [sum(slots_per_picture[:i]) for i in range(len(slots_per_picture))]
    out = Encoded([], [], [], "".join(_shown(part) for part in parts))
    head = 0
    after: After = ""
    for run in _runs(parts):
        if isinstance(run, Picture):
            count = slots_per_picture[run.index]
            _extend(out, [0] * count, [False] * count, first_row[run.index])
            after = "picture"
        elif isinstance(run, Control):
            after = "bos" if run.name == "bos" and not out.ids else "control"
            if run.name == "bos" and all(slot >= 0 for slot in out.slots):
                head = len(out.ids) + 1
            _extend(out, [tokenizer.control(run.name)], [run.supervised])
        else:
            _extend(out, *_encode_run(run, tokenizer, after))
    return Encoded(out.ids, out.slots, out.supervised, out.text, head)


def settle(parts: Sequence[Part], tokenizer: Tokenizer) -> list[Part]:
    """The parts as a tokenizer has them: no BOS where it has none, and markers that it does not know as text."""
    settled: list[Part] = []
    for part in parts:
        if isinstance(part, Control) and part.name == "bos" and tokenizer.bos_id is None:
            continue
        if isinstance(part, Control) and part.text and not tokenizer.has(part.name):
            part = Text(part.name, part.supervised)
        settled.append(part)
    return settled


def begins_run(parts: Sequence[Part], tokenizer: Tokenizer) -> bool:
    """Whether a text after these (settled) parts begins a run that the tokenizer puts a space before."""
    if not parts:
        return tokenizer.prefixes("")
    if isinstance(parts[-1], Text):
        return False
    bos = len(parts) == 1 and parts[0] == BOS
    return tokenizer.prefixes("picture" if isinstance(parts[-1], Picture) else "bos" if bos else "control")


def truncate_left(encoded: Encoded, *, limit: int) -> Encoded:
    """Shorten to `limit` positions by dropping the oldest text after BOS; BOS and every picture stay, whole.

    Raises ValueError if they and one token of text do not fit.
    """
    surplus = len(encoded.ids) - limit
    if surplus <= 0:
        return encoded
    text = [i for i in range(encoded.head, len(encoded.ids)) if encoded.slots[i] < 0]
    if surplus >= len(text):
        fixed = len(encoded.ids) - len(text)
        raise ValueError(
            f"conversation: got a window of {limit} positions, expected at least {fixed + 1} for BOS, pictures and one "
            "token of text; give fewer pictures, ask for a shorter answer or raise max_seq_len"
        )
    gone = set(text[:surplus])
    kept = [i for i in range(len(encoded.ids)) if i not in gone]
    ids, slots, supervised = ([row[i] for i in kept] for row in (encoded.ids, encoded.slots, encoded.supervised))
    return Encoded(ids, slots, supervised, encoded.text, encoded.head)


def stop_ids(template: Template, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end an answer: the template's stop controls that the tokenizer has; ValueError if it has none."""
    found = set()
    unknown: ValueError | None = None
    for name in template.stop_controls:
        try:
            found.add(tokenizer.control(name))
        except ValueError as error:
            unknown = unknown or error
    if not found and unknown is not None:
        raise unknown
    return frozenset(found)


def _pictures_first(parts: Sequence[Part]) -> Sequence[Part]:
    """Pictures that directly follow a first BOS, then BOS, then the rest."""
    if not parts or parts[0] != BOS:
        return parts
    stop = next((at for at, part in enumerate(parts[1:], start=1) if not isinstance(part, Picture)), len(parts))
    return [*parts[1:stop], parts[0], *parts[stop:]]


def _extend(out: Encoded, ids: list[int], supervised: list[bool], row: int | None = None) -> None:
    """Append positions; row: the feature row of the first one."""
    out.ids.extend(ids)
    out.supervised.extend(supervised)
    out.slots.extend([-1] * len(ids) if row is None else range(row, row + len(ids)))


def _runs(parts: Sequence[Part]) -> Iterator[Control | Picture | list[Text]]:
    """Control tokens, pictures, and between them all text as one list."""
    run: list[Text] = []
    for part in parts:
        if isinstance(part, Text):
            run.append(part)
            continue
        if run:
            yield run
            run = []
        yield part
    if run:
        yield run


def _encode_run(run: list[Text], tokenizer: Tokenizer, after: After) -> tuple[list[int], list[bool]]:
    """Ids of one run of text, and which of them touch supervised characters; after: what stands before it."""
    starts, at = [], 0
    for part in run:
        starts.append(at)
        at += len(part.text)
    ids, supervised = [], []
    for token, start, stop in tokenizer.spans("".join(part.text for part in run), after=after):
        low = bisect.bisect_right(starts, min(start, at - 1)) - 1
        high = bisect.bisect_left(starts, max(stop, start + 1), low + 1)
        ids.append(token)
        supervised.append(any(part.supervised for part in run[low:high]))
    return ids, supervised


def _check_pictures(parts: Sequence[Part], slots_per_picture: Sequence[int]) -> None:
    """Every picture has its slots and every slots count its picture, once."""
    numbers = sorted(part.index for part in parts if isinstance(part, Picture))
    if numbers != list(range(len(slots_per_picture))):
        raise ValueError(
            f"pictures: got {len(slots_per_picture)} pictures for {len(numbers)} places in the conversation (numbers "
            f"{numbers}), expected one for each; set the turns' `pictures` to what is supplied"
        )
    if any(count < 1 for count in slots_per_picture):
        raise ValueError(f"slots_per_picture: got {list(slots_per_picture)}, expected 1 or more each; ask the encoder")


def _shown(part: Part) -> str:
    if isinstance(part, Text):
        return part.text
    if isinstance(part, Picture):
        return f"<picture {part.index}>"
    return f"<{part.name}>" if part.name in ("bos", "eos") else part.name
