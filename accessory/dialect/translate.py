"""The dialect of a command, chosen once from its words, and all of them translated.

Must not know any tool's words, nor check a value that the settings check.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from accessory.dialect import llamafactory, swift
from accessory.dialect.models import find_model
from accessory.dialect.rules import Sheet, Word, each, is_true

log = logging.getLogger(__name__)

Name = Literal["accessory", "llamafactory", "swift"]
CHOICE, CALLED = "dialect", "called"
"""Words of every verb: whose words and defaults these are; and the name by which the verb was called."""


@dataclass(frozen=True)
class Tool:
    """A tool whose words are understood."""

    title: str
    verbs: Mapping[str, Mapping[str, Word]]
    shared: frozenset[str]
    """Its words under names that are ours too."""
    hints: frozenset[str]
    """Words of ours that nobody else has: they tell the tool where no other word does."""
    finish: Callable[[Sheet], None]

    @property
    def words(self) -> frozenset[str]:
        """All of them."""
        return self.shared.union(*self.verbs.values())

    def of(self, verb: str) -> Collection[str]:
        """Those of one verb."""
        return self.shared.union(self.verbs.get(verb, ()))


TOOLS: dict[str, Tool] = {
    "llamafactory": Tool(
        "LLaMA-Factory", llamafactory.VERBS, llamafactory.SHARED, llamafactory.HINTS, llamafactory.finish
    ),
    "swift": Tool("ms-swift", swift.VERBS, swift.SHARED, swift.HINTS, swift.finish),
}
LISTS = ("dataset", "eval_dataset", "adapter_name_or_path", "lora_target")
LINE = "dialect: {title}, told by its words; its defaults count too"


@dataclass
class Translation:
    """The words of one command as our settings know them."""

    dialect: str
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was accepted without action, a line each."""
    origin: dict[str, str] = field(default_factory=dict)
    """The word that was given for a value; none for a default of the dialect."""


@dataclass(frozen=True)
class Translator:
    """What `config.parse` asks: all words in, all settings out; dialect and notes are logged once, by rank 0."""

    verb: str
    say: bool = True
    names: frozenset[str] = frozenset({CHOICE, CALLED}).union(*(tool.words for tool in TOOLS.values()))

    def __call__(self, words: Mapping[str, Any], known: Collection[str]) -> Translation:
        """Translate and say so. ValueError, in one sentence, for words that contradict each other or cannot be."""
        done = translate(self.verb, words, known=known)
        tool = TOOLS.get(done.dialect)
        # of ours it is said where many words are shared but defaults are not
        lines = [LINE.format(title=tool.title if tool else "Accessory")] if tool or self.verb == "train" else []
        if self.say:
            _say([*lines, *done.notes])
        return done


def translator(verb: str, *, say: bool = True) -> Translator:
    """The translator of a verb, for `config.parse(..., translate=...)`. say: log the dialect and the notes."""
    return Translator(verb, say)


def translate(
    verb: str, words: Mapping[str, Any], *, known: Collection[str], env: Mapping[str, str] = os.environ
) -> Translation:
    """Choose the dialect from the words and translate them all, and its defaults.

    verb: train, predict, infer, chat, export, eval, api, webchat or webui. known: the names of the verb's settings.
    Words that nobody knows are handed on as they are, for whoever refuses them. Raises ValueError.
    """
    name = choose(verb, words, known)
    tool = TOOLS.get(name)
    sheet = Sheet(name, verb, words, known, env)
    table = tool.verbs.get(verb, {}) if tool is not None else {}
    for word, value in words.items():
        if word in (CHOICE, CALLED) or (tool is not None and value is None):
            continue
        if word in table:
            table[word].apply(sheet, word, value)
        elif tool is not None and word not in known and word in tool.words:
            sheet.note(f"{word}: nothing to do, it says nothing about {verb}")
        elif word in known:
            sheet.put(word, value, word)
        else:
            sheet.values[word], sheet.origin[word] = value, word
    _model_type(sheet)
    if tool is not None:
        tool.finish(sheet)
    _lists(sheet)
    if CHOICE in known:
        sheet.values[CHOICE] = "accessory"
    return Translation(name, sheet.values, sheet.notes, sheet.origin)


def choose(verb: str, words: Mapping[str, Any], known: Collection[str]) -> str:
    """The dialect: what `dialect` says, else whose word was used that is not ours, else a hint, else ours.

    ValueError where words of two tools, which nobody shares, stand side by side.
    """
    given = words.get(CHOICE)
    if given is not None and given not in ("accessory", *TOOLS):
        raise ValueError(f"{CHOICE}: got {given!r}, expected one of accessory, {', '.join(TOOLS)}")
    foreign = [word for word in words if word not in known and word not in (CHOICE, CALLED)]
    owners = {word: _owners(verb, word) for word in foreign}
    told = {names[0]: word for word, names in reversed(owners.items()) if len(names) == 1}
    if given is not None:
        others = [word for name, word in told.items() if name != given]
        if others and given != "accessory":
            raise ValueError(f"{others[0]}: got it with dialect {given}, which has no such word; drop one of them")
        if owned := [word for word, names in owners.items() if names] if given == "accessory" else []:
            raise ValueError(f"{owned[0]}: got it with dialect accessory, which has no such word; see --help")
        return str(given)
    if len(told) > 1:
        names = " beside ".join(f"{word} ({TOOLS[name].title}'s)" for name, word in told.items())
        raise ValueError(f"dialect: got {names}, expected the words of one tool; use those of one")
    if told:
        return next(iter(told))
    shared = [names for names in owners.values() if names]
    hints = {name for name, tool in TOOLS.items() for word in tool.hints if words.get(word) is not None}
    if "swift" in hints or CALLED in words:  # other names of verbs are swift's
        return "swift"
    if hints:
        return next(iter(hints))
    return shared[0][0] if shared else "accessory"


def _owners(verb: str, word: str) -> list[str]:
    """The tools that have a word for this verb, else those that have it at all."""
    here = [name for name, tool in TOOLS.items() if word in tool.of(verb)]
    return here or [name for name, tool in TOOLS.items() if word in tool.words]


def pending(verb: str, words: Mapping[str, Any]) -> str:
    """The verb that words ask for by themselves: train with do_predict is predict, export with a number of bits is
    quantise; else the verb itself."""
    if verb == "train" and words.get("do_predict") is not None and is_true(words["do_predict"], "do_predict"):
        return "predict"
    bits = words.get("export_quantization_bit") or words.get("quant_bits")
    return "quantise" if verb == "export" and str(bits or 0) not in ("0", "none") else verb


def _model_type(sheet: Sheet) -> None:
    """model_type chooses weights and template where nobody names them."""
    name = sheet.values.get("model_type")
    if name is None:
        return
    row = find_model(str(name))
    if not (sheet.values.get("model_name_or_path") or sheet.values.get("ckpt_dir")):
        sheet.values["model_name_or_path"] = [row.hub]
    if not sheet.values.get("template"):
        sheet.values["template"] = row.template


def _lists(sheet: Sheet) -> None:
    """Lists may be one text with commas; a path that exists keeps its own."""
    for name in LISTS:
        value = sheet.values.get(name)
        items = value if isinstance(value, (list, tuple)) else [value]
        if name in sheet.values and any(isinstance(item, str) and "," in item for item in items):
            parts: list[str] = []
            for item in items:
                parts += [item] if os.path.exists(item) or item.startswith(("[", "{")) else each(item)
            sheet.values[name] = parts


def _say(lines: list[str]) -> None:
    """Log lines, once for the whole job, also before anybody has set up logging."""
    if not lines or (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") != "0":
        return
    handler = None
    if not log.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    level, _ = log.level, log.setLevel(logging.INFO)
    for line in lines:
        log.info("%s", line)
    log.setLevel(level)
    if handler is not None:
        log.removeHandler(handler)
