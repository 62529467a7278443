"""Templates by name: a dialect's name, as the same name means different strings to different tools, or a qualified one.
Knows no conversation and no tokenizer.
"""

from __future__ import annotations

import difflib

from accessory.data.template.forms import Template, Tools
from accessory.data.template.llamafactory import LLAMAFACTORY, LLAMAFACTORY_ALIASES
from accessory.data.template.own import OWN, OWN_ALIASES
from accessory.data.template.swift import SWIFT, SWIFT_ALIASES

DIALECTS: dict[str, dict[str, Template]] = {"accessory": OWN, "llamafactory": LLAMAFACTORY, "swift": SWIFT}
"""Templates by dialect and name."""
TEMPLATES = OWN
ALIASES: dict[str, dict[str, str]] = {
    "accessory": OWN_ALIASES,
    "llamafactory": LLAMAFACTORY_ALIASES,
    "swift": SWIFT_ALIASES,
}


def get_template(name: str, *, dialect: str = "accessory") -> Template:
    """The template of a name or an alias; a name with its dialect ("llamafactory/mistral") wins over `dialect`.

    The text of a chat template of Hugging Face's kind (jinja) is a name, too: of the template read off it. Raises
    ValueError that names the nearest, or says why a chat template cannot be read.
    """
    if is_jinja(name):
        from accessory.data.template.derive import from_jinja  # renders text, and so needs this module

        return from_jinja(name)
    dialect, key = _qualified(name, dialect)
    return DIALECTS[dialect][key]


def tools_of(template: Template | str) -> Tools | None:
    """How a template, or the template of a name, writes tools; None: it has no way to. ValueError for no name."""
    return (get_template(template) if isinstance(template, str) else template).tools


def qualify(name: str, *, dialect: str = "accessory") -> str:
    """The name by which any dialect finds this template: bare for accessory's own, else with its dialect."""
    if is_jinja(name):
        return name
    dialect, key = _qualified(name, dialect)
    return key if dialect == "accessory" else f"{dialect}/{key}"


def label(name: str) -> str:
    """A template's name for people; the text of a chat template is not shown."""
    return "of its chat template" if is_jinja(name) else name


def is_jinja(name: str) -> bool:
    """Whether a template's name is the text of a chat template."""
    return "{%" in name or "{{" in name


def _qualified(name: str, dialect: str) -> tuple[str, str]:
    """The dialect and the name in its table."""
    asked = name.strip().lower()
    if "/" in asked:
        dialect, _, asked = asked.partition("/")
    if dialect not in DIALECTS:
        near = difflib.get_close_matches(dialect, DIALECTS, n=1, cutoff=0.4)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"template: got the dialect {dialect!r}, expected one of {', '.join(DIALECTS)}; {guess}choose one of these"
        )
    table, aliases = DIALECTS[dialect], ALIASES[dialect]
    for spelling in (asked, asked.replace("-", "_"), asked.replace("_", "-"), aliases.get(asked)):
        if spelling in table:
            return dialect, spelling
    near = difflib.get_close_matches(asked, [*table, *aliases], n=1, cutoff=0.4)
    guess = f"did you mean {near[0]!r}? " if near else ""
    others = [f"{other}/{asked}" for other in DIALECTS if other != dialect and asked in DIALECTS[other]]
    guess += f"there is {' and '.join(others)}; " if others else ""
    raise ValueError(f"template: got {name!r}, expected one of {', '.join(table)}; {guess}choose one of these")
