"""Prompt templates as data, and the one renderer of a conversation for training, chat and serving.
Knows no tokenizer: control tokens go out by name, pictures by number, text as text."""

from accessory.data.template.calls import CallDelta, CallReader
from accessory.data.template.demand import demand
from accessory.data.template.forms import (
    BOS,
    EOS,
    PLACE,
    Control,
    Form,
    Part,
    Picture,
    Pictures,
    Template,
    Text,
    Tools,
    Turn,
    tagged,
)
from accessory.data.template.names import (
    ALIASES,
    DIALECTS,
    TEMPLATES,
    get_template,
    is_jinja,
    label,
    qualify,
    tools_of,
)
from accessory.data.template.render import render
from accessory.data.template.tools import read_calls, read_tools

__all__ = [
    "ALIASES",
    "BOS",
    "DIALECTS",
    "EOS",
    "PLACE",
    "TEMPLATES",
    "CallDelta",
    "CallReader",
    "Control",
    "Form",
    "Part",
    "Picture",
    "Pictures",
    "Template",
    "Text",
    "Tools",
    "Turn",
    "demand",
    "get_template",
    "is_jinja",
    "label",
    "qualify",
    "read_calls",
    "read_tools",
    "render",
    "tagged",
    "tools_of",
]
