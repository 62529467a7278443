"""Foreign chat templates (jinja) rendered where they can do no harm, as transformers renders them.
Must not know templates of our own. BOS and EOS come out as two characters that no text holds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

BOS_MARK, EOS_MARK = "\ue000", "\ue001"
LONGEST = 1 << 16  # characters of a chat template, and of what it writes
PATIENCE = 2.0  # seconds that writing one conversation may take
STEPS = 1000  # numbers that a template may count through

Messages = Sequence[Mapping[str, Any]]


class Jinja:
    """A chat template ready to write conversations.

    There is no clock: a template that asks for the date only if it can writes the date it was made with.
    """

    def __init__(self, text: str) -> None:
        """Raises ValueError for what is no jinja."""
        from jinja2 import TemplateError

        if len(text) > LONGEST:
            raise ValueError(f"chat template: got {len(text)} characters, expected at most {LONGEST}; name a template")
        environment = _environment()(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation()]
        )
        environment.globals["range"] = _range
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise ValueError(f"chat template: {error}; expected jinja as transformers reads it") from error

    def __call__(self, messages: Messages, *, opened: bool = False, tools: Messages | None = None) -> str:
        """Write a conversation; opened: up to where the answer begins; tools: definitions as OpenAI has them.

        Raises ValueError where the template refuses it.
        """
        values = {"bos_token": BOS_MARK, "eos_token": EOS_MARK, "add_generation_prompt": opened}
        values["tools"] = None if tools is None else json.loads(json.dumps(list(tools)))
        values |= {"messages": json.loads(json.dumps(list(messages))), "documents": None}
        written, begun = "", time.monotonic()
        try:
            for piece in self._template.generate(values):
                written += piece
                if len(written) > LONGEST or time.monotonic() - begun > PATIENCE:
                    raise ValueError("chat template: its text has no end; name a template")
        except ValueError:
            raise
        except Exception as error:  # foreign code: type errors, missing keys, its own refusals
            raise ValueError(f"chat template: {error or type(error).__name__}") from error
        return written


def _environment() -> type:
    """The sandbox, in which no product grows without end."""
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Narrow(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" or not all(isinstance(value, (int, float)) for value in (left, right)):
                raise ValueError(f"chat template: got {operator}, expected no powers and no repeated texts")
            return left * right

    return Narrow


def _range(*bounds: int) -> range:
    counted = range(*bounds)
    if len(counted) > STEPS:
        raise ValueError(f"chat template: got a count of {len(counted)}, expected at most {STEPS}")
    return counted


def _refuse(message: str) -> None:
    raise ValueError(f"chat template: {message}")


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _generation() -> type:
    """The tag by which transformers marks answers; here it writes what it holds."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation
