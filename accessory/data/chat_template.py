"""Templates as Hugging Face's chat templates (jinja), and the template that a folder of theirs is for.
Must not know a tokenizer: BOS and EOS are jinja's variables, other control tokens stand by their text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from accessory.data.template import DIALECTS, PLACE, TEMPLATES, Template, get_template, qualify
from accessory.data.template.derive import agrees, from_jinja
from accessory.data.template.derive_tools import agrees_on_tools, writes_tools
from accessory.data.template.forms import SLOT
from accessory.data.template.sandbox import Jinja
from accessory.data.template.statements import (
    answer_calls,
    around_question,
    around_system,
    begin,
    call,
    define,
    quoted,
    write,
)
from accessory.data.template.writer import Writer
from accessory.dialect.models import find_model

log = logging.getLogger(__name__)

LLAVA = ("llava_1_5", "llava_v1", "vicuna_v1", "mistral_instruct", "chatml_direct", "llava_llama_3", "qwen_1_5")
_ROLES = "{{- raise_exception('Roles must be: perhaps system, then user, assistant, user, assistant, ...') -}}"


def chat_template(template: Template | str, *, picture: str = PLACE) -> str:
    """The jinja that writes what `render` writes; picture: the text of the picture token.

    Messages have a role, a content (text, or a list of parts of type text and image), and perhaps an input as alpaca's
    records. Image parts stand where the template puts a turn's pictures, the picture's text where a text has it. Tools
    are transformers' `tools`, calls an assistant's `tool_calls`, results messages of "tool"; to a template that has no
    way to write tools they are what they were, passed over or refused. Three things cannot be said in jinja: that a
    text which spells a control token or a picture is text all the same, what is learned, and that arguments given as
    text are JSON (a mapping is written as in training, a text as it is). Everything else is, so that
    `apply_chat_template` gives the ids of training and of chat.
    """
    form = get_template(template) if isinstance(template, str) else template
    return "\n".join(_lines(form, picture))


def default_template(
    config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    model_type: str | None = None,
) -> str:
    """The name of the template that a folder was made for, for `get_template`.

    config: of the model; model_type: a name of the table of model types, which goes before all else; chat_template: the
    text beside the tokenizer or processor, if tokenizer_config has none. In this order: what model_type or config say;
    the template of ours that writes what the chat template writes; for LLaVA, the one that writes the same first
    question (chat templates of its folders end answers in ways of their own); the template read off the chat template,
    whose name is its text; the family's. A chat template that cannot be followed is reported, a folder without one is
    a base model's ("none"), unless it is LLaVA's.
    """
    if model_type is not None:
        return qualify(find_model(model_type).template)
    if config.get("template"):
        return qualify(str(config["template"]))
    family = _family(config)
    text = _text((tokenizer_config or {}).get("chat_template")) or chat_template
    if text:
        found = _recognised(text, sees=family is not None)
        if found:
            return found
    if family is None:
        name = str(config.get("_name_or_path", "")).lower()
        family = next((template for word, template in _NAMED.items() if word in name), "none")
    log.info("template: %s, by the model's family", family)
    return family


def writes_the_same(text: str, template: Template | str) -> bool:
    """Whether a chat template writes every conversation as a template does, so that it may stand for it."""
    form = get_template(template) if isinstance(template, str) else template
    try:
        return agrees(Writer(Jinja(text)), form)
    except ValueError:
        return False


def _recognised(text: str, *, sees: bool) -> str | None:
    """The template that writes what a chat template writes; None, with a warning, where none does."""
    ours = {(dialect, name): form for dialect, table in DIALECTS.items() for name, form in table.items()}
    for (dialect, name), form in ours.items():
        if chat_template(form) == text.strip():
            return qualify(name, dialect=dialect)
    try:
        writer = Writer(Jinja(text))
        same = [key for key, form in ours.items() if agrees(writer, form)]
        if same and writes_tools(writer):  # one that writes tools the same, if there is one
            same = [key for key in same if agrees_on_tools(writer, ours[key])] or same
            if not agrees_on_tools(writer, ours[same[0]]) and _has_tools(text):
                return text
        if same:
            return qualify(same[0][1], dialect=same[0][0])
        for name in LLAVA if sees else ():
            if agrees(writer, TEMPLATES[name], opening=True):
                log.info("template: %s, as the folder's chat template opens a conversation", name)
                return name
        from_jinja(text)
    except ValueError as error:
        log.warning("the folder's chat template is not followed: %s", error)
        return None
    return text


def _has_tools(text: str) -> bool:
    """Whether the template read off a chat template has a way to write tools."""
    try:
        return from_jinja(text).tools is not None
    except ValueError:
        return False


def _text(said: Any) -> str | None:
    """The chat template of a tokenizer_config: a text, or the default of several."""
    if isinstance(said, list):
        named = {entry.get("name"): entry.get("template") for entry in said if isinstance(entry, Mapping)}
        said = named.get("default") or next(iter(named.values()), None)
    return said if isinstance(said, str) and said else None


def _family(config: Mapping[str, Any]) -> str | None:
    """LLaVA's template by what its language model is; None for models that do not see."""
    kind = str(config.get("model_type", ""))
    if not kind.startswith("llava"):
        return None
    words = config.get("text_config") or config
    kind = f"{kind} {words.get('model_type', '')}"
    if "mistral" in kind:
        return "mistral_instruct"
    if "qwen" in kind:
        return "qwen_1_5"
    rows = int(words.get("vocab_size", 32000))
    if rows >= 128000:
        return "llava_llama_3"
    return "chatml_direct" if rows >= 64000 else "vicuna_v1"


_NAMED = {
    "vicuna": "vicuna_v1",
    "llama-2-7b-chat": "llama2",
    "llama-2-13b-chat": "llama2",
    "llama-2-70b-chat": "llama2",
}


def _lines(form: Template, picture: str) -> Iterator[str]:
    """Statements, one a line; each eats the white space around it, so that lines and indents write nothing."""
    silent = "none" if form.system is not None else "''"
    yield f"{{%- set ns = namespace(system={silent}, text='', pictures=0, turns=0) -%}}"
    yield from define(form)
    yield "{%- for message in messages -%}"
    yield from _read(form)
    yield "{%- if message['role'] == 'system' -%}"
    yield f"{{%- if not loop.first -%}}{_ROLES}{{%- endif -%}}"
    if form.system is None:
        yield "{%- if ns.text -%}{{- raise_exception('This template has no place for a system text') -}}{%- endif -%}"
    yield "{%- set ns.system = ns.text -%}"
    yield "{%- elif message['role'] == 'user' and ns.turns % 2 == 0 -%}"
    yield "{%- if ns.turns == 0 -%}"
    yield from _begin(form, picture)
    yield "{%- else -%}"
    yield from write(form.between, picture)
    yield "{%- endif -%}"
    yield from _ask(form, picture)
    yield from _open(form, picture)
    yield "{%- set ns.turns = ns.turns + 1 -%}"
    if form.tools is not None:
        yield "{%- elif message['role'] == 'assistant' and message['tool_calls'] and ns.turns % 2 and ns.call != 1 -%}"
        yield from call(form, form.tools, picture)
        yield from _end(form, picture)
        yield "{%- elif message['role'] == 'tool' and ns.call > 0 -%}"
        yield from answer_calls(form, form.tools, picture)
        yield "{%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' -%}"
        yield from _open(form, picture)
        yield "{%- endif -%}"
    waits = "" if form.tools is None else " and ns.call != 1"
    yield f"{{%- elif message['role'] == 'assistant' and ns.turns % 2 == 1{waits} -%}}"
    yield from write(form.answer, picture)
    yield "{%- set ns.turns = ns.turns + 1 -%}"
    yield from _end(form, picture)
    if form.tools is not None:
        yield "{%- set ns.call = 0 -%}"
    yield f"{{%- else -%}}{_ROLES}{{%- endif -%}}"
    yield "{%- endfor -%}"


def _open(form: Template, picture: str) -> Iterator[str]:
    """What opens an answer."""
    if form.opening:
        yield "{%- if add_generation_prompt or not loop.last -%}"
        yield from write(form.opening, picture)
        yield "{%- endif -%}"


def _end(form: Template, picture: str) -> Iterator[str]:
    """What stands after the last answer."""
    if form.end:
        yield "{%- if loop.last -%}"
        yield from write(form.end, picture)
        yield "{%- endif -%}"


def _read(form: Template) -> Iterator[str]:
    """Put a message's text and the number of its pictures where the forms find them."""
    silent = "" if form.tools is None else "{%- elif message['tool_calls'] and not message['content'] -%}"
    yield "{%- set ns.text = '' -%}{%- set ns.pictures = 0 -%}"
    yield f"{{%- if message['content'] is string -%}}{{%- set ns.text = message['content'] -%}}{silent}{{%- else -%}}"
    yield "{%- for part in message['content'] -%}"
    yield "{%- if part['type'] == 'text' -%}{%- set ns.text = ns.text + part['text'] -%}"
    yield "{%- else -%}{%- set ns.pictures = ns.pictures + 1 -%}{%- endif -%}"
    yield "{%- endfor -%}{%- endif -%}"


def _begin(form: Template, picture: str) -> Iterator[str]:
    """What stands before the first question."""
    if form.system is not None:
        said = quoted(form.default_system)
        if form.default_system_input is not None:
            said = f"{quoted(form.default_system_input)} if message['input'] else {said}"
        yield f"{{%- if ns.system is none -%}}{{%- set ns.system = {said} -%}}{{%- endif -%}}"
    yield from begin(form, picture)
    if form.system is not None:
        around, told = around_system(form)
        yield f"{{%- if ns.system{told} -%}}"
        yield from write(form.system, picture, text="ns.system", around=around)
        if form.no_system:
            yield "{%- else -%}"
            yield from write(form.no_system, picture)
        yield "{%- endif -%}"
    yield from write(form.first, picture)


def _ask(form: Template, picture: str) -> Iterator[str]:
    """A question."""
    around = around_question(form)
    if form.user_input is not None:
        yield "{%- if message['input'] -%}"
        yield from write(form.user_input, picture, around=around)
        yield "{%- else -%}"
    else:
        yield "{%- if message['input'] -%}{%- set ns.text = ns.text + '\\n' + message['input'] -%}{%- endif -%}"
    if form.user_system is not None:
        yield f"{{%- if (ns.system{around_system(form)[1]}) and ns.turns == 0 -%}}"
        yield from write(form.user_system, picture, around=around)
        yield "{%- else -%}"
    if not any(isinstance(item, str) and SLOT.search(item) for item in form.user):
        yield "{%- if ns.text.strip() -%}{{- raise_exception('This template takes pictures alone') -}}{%- endif -%}"
    yield from write(form.user, picture, around=around)
    if form.user_system is not None:
        yield "{%- endif -%}"
    if form.user_input is not None:
        yield "{%- endif -%}"
