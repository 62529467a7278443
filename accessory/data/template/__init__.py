"""Prompt templates as data, and the one renderer of a conversation for training, chat and serving.
Knows no tokenizer: control tokens go out by name, pictures by number, text as text."""

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
    Turn,
    tagged,
)
from accessory.data.template.names import ALIASES, DIALECTS, TEMPLATES, get_template, is_jinja, label, qualify
from accessory.data.template.render import render

__all__ = [
    "ALIASES",
    "BOS",
    "DIALECTS",
    "EOS",
    "PLACE",
    "TEMPLATES",
    "Control",
    "Form",
    "Part",
    "Picture",
    "Pictures",
    "Template",
    "Text",
    "Turn",
    "get_template",
    "is_jinja",
    "label",
    "qualify",
    "render",
    "tagged",
]
