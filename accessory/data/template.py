"""Prompt templates as data, and the one renderer of a conversation for training, chat and serving.
Knows no tokenizer: control tokens go out by name, pictures by number, text as text.

A form is a tuple of strings, `Control`s and `Pictures`. In a string, {text} stands for the turn's text, {strip} for the
same without blanks around it, {rstrip} without blanks after it, {input} for the turn's input; nothing else is replaced.
What a user types is never looked at: it cannot become a control token or a picture.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: who speaks, the text, and how many pictures (user turns only) come with it."""

    role: str
    text: str
    pictures: int = 0
    input: str = ""
    """The second field of an alpaca record: what the instruction is to be applied to."""


@dataclass(frozen=True)
class Control:
    """A control token by its text, or "bos" or "eos"."""

    name: str
    supervised: bool = False


@dataclass(frozen=True)
class Text:
    """Plain text; neighbouring texts are one run and are tokenised together."""

    text: str
    supervised: bool = False


@dataclass(frozen=True)
class Picture:
    """The place of a picture, numbered over the conversation."""

    index: int


Part = Control | Text | Picture


@dataclass(frozen=True)
class Pictures:
    """In a form: all pictures of the turn, each followed by a text."""

    after: str = ""


Form = tuple[str | Control | Pictures, ...]

BOS, EOS = Control("bos"), Control("eos")
_SLOT = re.compile(r"\{(text|strip|rstrip|input)\}")


@dataclass(frozen=True)
class Template:
    """How a conversation is written: start, system, first; user, opening, answer per exchange with `between` them; end.

    The answer is all that is supervised. A user turn's pictures go to the first `Pictures` met: in `start` or `between`
    before the turn, else in `user`. A prompt for an answer ends after `opening`.
    """

    user: Form
    answer: Form
    start: Form = (BOS,)
    first: Form = ()
    opening: Form = ()
    between: Form = ()
    end: Form = ()
    system: Form | None = None
    """None: the template has no place for a system turn."""
    default_system: str = ""
    """Said where the conversation has no system turn; an empty system turn says nothing."""
    default_system_input: str | None = None
    """The same where the first user turn has an input."""
    user_input: Form | None = None
    """A user turn with an input; None: the input follows the text on a new line."""
    user_system: Form | None = None
    """The first user turn after a system text; None: as any other."""
    stops: tuple[str, ...] = ()
    """Strings that end an answer and are no part of it."""
    stop_controls: tuple[str, ...] = ("eos",)
    """Control tokens that end an answer, where the tokenizer has them."""


def get_template(name: str, *, dialect: str = "accessory") -> Template:
    """The template of a name or an alias; ValueError names the nearest."""
    if dialect not in DIALECTS:
        raise ValueError(f"dialect: got {dialect!r}, expected one of {', '.join(DIALECTS)}; choose one of these")
    table, aliases = DIALECTS[dialect], ALIASES.get(dialect, {})
    key = name.strip().lower()
    for spelling in (key, key.replace("-", "_"), aliases.get(key)):
        if spelling in table:
            return table[spelling]
    near = difflib.get_close_matches(key, [*table, *aliases], n=1, cutoff=0.4)
    guess = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"template: got {name!r}, expected one of {', '.join(table)}; {guess}choose one of these")


def render(template: Template | str, turns: Sequence[Turn], *, open_answer: bool = True) -> list[Part]:
    """Write a conversation as parts.

    open_answer: the last turn is the user's and the parts end where the answer begins (inference); False: it is the
    assistant's and all answers are supervised (training). The parts of a prompt are the beginning of the parts of the
    same conversation answered. Raises ValueError for turns that no template can write in order.
    """
    form = get_template(template) if isinstance(template, str) else template
    system, turns = _check(form, turns, open_answer=open_answer)
    parts = _Parts()
    first = turns[0]
    if system is None and form.system is not None:
        with_input = first.input and form.default_system_input is not None
        system = form.default_system_input if with_input else form.default_system
    parts.pictures = first.pictures
    parts.add(form.start, "")
    if system:
        parts.add(form.system or (), system)
    parts.add(form.first, "")
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            parts.add(form.answer, turn.text, supervised=True)
            continue
        if number:
            parts.pictures = turn.pictures
            parts.add(form.between, "")
        parts.add(*_user(form, turn, after_system=bool(system) and number == 0))
        parts.add(form.opening, "")
        assert not parts.pictures, f"a form has no place for {parts.pictures} pictures: {form}"
    if not open_answer:
        parts.add(form.end, "")
    return parts.done


def _user(form: Template, turn: Turn, *, after_system: bool) -> tuple[Form, str, str]:
    """The form of a user turn, its text and its input."""
    if turn.input and form.user_input is not None:
        return form.user_input, turn.text, turn.input
    text = f"{turn.text}\n{turn.input}" if turn.input else turn.text
    chosen = form.user_system if after_system and form.user_system is not None else form.user
    if text.strip() and not any(isinstance(item, str) and _SLOT.search(item) for item in chosen):
        raise ValueError(
            f"template: got the text {text[:40]!r}, expected pictures alone; choose another template for it"
        )
    return chosen, text, ""


def _check(form: Template, turns: Sequence[Turn], *, open_answer: bool) -> tuple[str | None, list[Turn]]:
    """Split off the system text (None: no system turn); the rest is user, assistant, user, ... in order."""
    for turn in turns:
        if turn.role not in ("system", "user", "assistant"):
            near = {"human": "user", "gpt": "assistant", "bot": "assistant"}.get(turn.role)
            guess = f"did you mean {near!r}?" if near else "rename it"
            raise ValueError(f"role: got {turn.role!r}, expected 'system', 'user' or 'assistant'; {guess}")
        if turn.pictures < 0 or (turn.pictures and turn.role != "user"):
            raise ValueError(
                f"pictures: got {turn.pictures} in a turn of the {turn.role}, expected 0 or more in user turns only; "
                "move them to a user turn"
            )
    rest = list(turns)
    system = rest.pop(0).text if rest and rest[0].role == "system" else None
    if system and form.system is None:
        raise ValueError(
            f"template: got the system text {system[:40]!r}, expected none, as this template has no place for it; "
            "put it into the user's text or choose another template"
        )
    for number, turn in enumerate(rest):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            hint = "a system turn can only be the first one" if turn.role == "system" else "join or reorder the turns"
            raise ValueError(f"conversation: got {turn.role!r} as turn {number + 1}, expected {expected!r}; {hint}")
    last, hint = ("user", "drop the last answer") if open_answer else ("assistant", "add the answer to learn")
    if not rest or rest[-1].role != last:
        got = f"an end by {rest[-1].role!r}" if rest else "no turns"
        hint = hint if rest else "add a user turn"
        raise ValueError(f"conversation: got {got}, expected an end by {last!r}; {hint}")
    return system, rest


class _Parts:
    """Parts written so far, and the pictures of the turn that still wait for a place."""

    def __init__(self) -> None:
        self.done: list[Part] = []
        self.pictures = 0
        self._placed = 0

    def add(self, form: Form, text: str, second: str = "", *, supervised: bool = False) -> None:
        values = {"text": text, "strip": text.strip(), "rstrip": text.rstrip(), "input": second}
        for item in form:
            if isinstance(item, Pictures):
                for _ in range(self.pictures):
                    self.done.append(Picture(self._placed))
                    self._text(item.after, supervised=supervised)
                    self._placed += 1
                self.pictures = 0
            elif isinstance(item, Control):
                self.done.append(replace(item, supervised=supervised))
            else:
                self._text(_SLOT.sub(lambda slot: values[slot[1]], item), supervised=supervised)

    def _text(self, text: str, *, supervised: bool) -> None:
        """Append to the run, one part per stretch of equal supervision."""
        last = self.done[-1] if self.done else None
        if isinstance(last, Text) and last.supervised == supervised:
            self.done[-1] = Text(last.text + text, supervised)
        elif text:
            self.done.append(Text(text, supervised))


_TASK = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request"
_PAIRED = f"{_TASK}, paired with an input that provides further context. {_WRITE}."
_CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_START_HEADER, _END_HEADER, _EOT = Control("<|start_header_id|>"), Control("<|end_header_id|>"), Control("<|eot_id|>")
_IM_START, _IM_END = Control("<|im_start|>"), Control("<|im_end|>")

# Alpaca was trained on single exchanges. Here a later exchange starts after the EOS of the answer, with a blank line
# and without a second preamble: an answer ends as it always did, and training on dialogs writes the same.
_ALPACA = Template(
    start=(BOS, Pictures()),
    system=("{text}\n\n",),
    default_system=f"{_TASK}. {_WRITE}.",
    default_system_input=_PAIRED,
    user=("### Instruction:\n{text}\n\n### Response:",),
    user_input=("### Instruction:\n{text}\n\n### Input:\n{input}\n\n### Response:",),
    answer=("{text}", EOS),
    between=(Pictures(), "\n\n"),
)
_VICUNA = Template(
    system=("{text} ",),
    default_system=_CURIOUS.format("user"),
    user=("USER: ", Pictures("\n"), "{text}"),
    opening=(" ASSISTANT:",),
    answer=(" {text}", EOS),
)

_ACCESSORY: dict[str, Template] = {
    "alpaca": _ALPACA,
    # The signal "\n###" that ends an answer is learned with it; EOS closes the conversation and is not.
    "dialog": Template(
        start=(BOS, Pictures()),
        system=("{text}\n\n",),
        default_system=_CURIOUS.format("human"),
        first=("###",),
        user=(" Human: ", Pictures(), "{text}\n###"),
        opening=(" Assistant:",),
        answer=(" {text}\n###",),
        end=(EOS,),
        stops=("\n###",),
    ),
    "shortqa": replace(
        _ALPACA,
        default_system=f"{_TASK}. {_WRITE} using a single word or phrase.",
        default_system_input=None,
        user_input=None,
    ),
    "qg": Template(
        start=(BOS, Pictures()),
        user=("Generate a question whose answer is:\n{text}\n\nQuestion:\n",),
        answer=("{text}", EOS),
        between=(Pictures(), "\n\n"),
    ),
    "caption": Template(start=(BOS, Pictures()), user=(), answer=("{text}", EOS), between=(Pictures(),)),
    "none": Template(start=(BOS, Pictures()), user=("{text}",), answer=("{text}", EOS), between=(Pictures(),)),
    # The model that ships with the package.
    "tiny": Template(
        start=(BOS, Pictures()),
        user=("Human: {text}\n",),
        opening=("Assistant:",),
        answer=(" {text}", EOS),
        between=(Pictures(),),
    ),
    "vicuna_v1": _VICUNA,
    "llava_v1": replace(_VICUNA, default_system=_CURIOUS.format("human")),
    "llama2": Template(
        start=(BOS, "[INST] "),
        system=("<<SYS>>\n{text}\n<</SYS>>\n\n",),
        user=(Pictures("\n"), "{strip} [/INST]"),
        user_system=(Pictures("\n"), "{rstrip} [/INST]"),
        answer=(" {strip} ", EOS),
        between=(BOS, "[INST] "),
    ),
    "llama3": Template(
        system=(_START_HEADER, "system", _END_HEADER, "\n\n{strip}", _EOT),
        user=(_START_HEADER, "user", _END_HEADER, "\n\n", Pictures("\n"), "{strip}", _EOT),
        opening=(_START_HEADER, "assistant", _END_HEADER, "\n\n"),
        answer=("{strip}", _EOT),
        stop_controls=("<|eot_id|>", "<|eom_id|>", "eos"),
    ),
    "chatml": Template(
        start=(),
        system=(_IM_START, "system\n{text}", _IM_END, "\n"),
        user=(_IM_START, "user\n", Pictures("\n"), "{text}", _IM_END, "\n"),
        opening=(_IM_START, "assistant\n"),
        answer=("{text}", _IM_END),
        between=("\n",),
        end=("\n",),
        stop_controls=("<|im_end|>", "eos"),
    ),
}

DIALECTS: dict[str, dict[str, Template]] = {"accessory": _ACCESSORY}
"""Templates by dialect and name: the same name may mean different strings to different tools."""
TEMPLATES = DIALECTS["accessory"]
ALIASES: dict[str, dict[str, str]] = {
    "accessory": {
        "###": "dialog",
        "default": "dialog",
        "v1": "dialog",
        "conversation": "dialog",
        "vicuna": "vicuna_v1",
        "llava": "llava_v1",
        "llama-2": "llama2",
        "llama2-chat": "llama2",
        "llama-2-chat": "llama2",
        "llama-3": "llama3",
        "llama3-instruct": "llama3",
        "raw": "none",
    }
}
