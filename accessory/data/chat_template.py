"""Templates as Hugging Face's chat templates (jinja), and the template that a folder of theirs is for.
Must not know a tokenizer: BOS and EOS are jinja's variables, other control tokens stand by their text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from accessory.data.template import DIALECTS, PLACE, TEMPLATES, Control, Form, Pictures, Template, get_template, qualify
from accessory.data.template.derive import Writer, agrees, from_jinja
from accessory.data.template.forms import SLOT
from accessory.data.template.sandbox import Jinja
from accessory.dialect.models import find_model

log = logging.getLogger(__name__)

LLAVA = ("llava_1_5", "llava_v1", "vicuna_v1", "mistral_instruct", "chatml_direct", "llava_llama_3", "qwen_1_5")
_ROLES = "{{- raise_exception('Roles must be: perhaps system, then user, assistant, user, assistant, ...') -}}"


def chat_template(template: Template | str, *, picture: str = PLACE) -> str:
    """The jinja that writes what `render` writes; picture: the text of the picture token.

    Messages have a role, a content (text, or a list of parts of type text and image), and perhaps an input as alpaca's
    records. Image parts stand where the template puts a turn's pictures, the picture's text where a text has it. Two
    things cannot be said in jinja: that a text which spells a control token or a picture is text all the same, and
    what is learned. Everything else is, so that `apply_chat_template` gives the ids of training and of chat.
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
        for (dialect, name), form in ours.items():
            if agrees(writer, form):
                return qualify(name, dialect=dialect)
        for name in LLAVA if sees else ():
            if agrees(writer, TEMPLATES[name], opening=True):
                log.info("template: %s, as the folder's chat template opens a conversation", name)
                return name
        from_jinja(text)
    except ValueError as error:
        log.warning("the folder's chat template is not followed: %s", error)
        return None
    return text


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
    yield "{%- for message in messages -%}"
    yield from _read()
    yield "{%- if message['role'] == 'system' -%}"
    yield f"{{%- if not loop.first -%}}{_ROLES}{{%- endif -%}}"
    if form.system is None:
        yield "{%- if ns.text -%}{{- raise_exception('This template has no place for a system text') -}}{%- endif -%}"
    yield "{%- set ns.system = ns.text -%}"
    yield "{%- elif message['role'] == 'user' and ns.turns % 2 == 0 -%}"
    yield "{%- if ns.turns == 0 -%}"
    yield from _begin(form, picture)
    yield "{%- else -%}"
    yield from _write(form.between, picture)
    yield "{%- endif -%}"
    yield from _ask(form, picture)
    if form.opening:
        yield "{%- if add_generation_prompt or not loop.last -%}"
        yield from _write(form.opening, picture)
        yield "{%- endif -%}"
    yield "{%- set ns.turns = ns.turns + 1 -%}"
    yield "{%- elif message['role'] == 'assistant' and ns.turns % 2 == 1 -%}"
    yield from _write(form.answer, picture)
    yield "{%- set ns.turns = ns.turns + 1 -%}"
    if form.end:
        yield "{%- if loop.last -%}"
        yield from _write(form.end, picture)
        yield "{%- endif -%}"
    yield f"{{%- else -%}}{_ROLES}{{%- endif -%}}"
    yield "{%- endfor -%}"


def _read() -> Iterator[str]:
    """Put a message's text and the number of its pictures where the forms find them."""
    yield "{%- set ns.text = '' -%}{%- set ns.pictures = 0 -%}"
    yield "{%- if message['content'] is string -%}{%- set ns.text = message['content'] -%}{%- else -%}"
    yield "{%- for part in message['content'] -%}"
    yield "{%- if part['type'] == 'text' -%}{%- set ns.text = ns.text + part['text'] -%}"
    yield "{%- else -%}{%- set ns.pictures = ns.pictures + 1 -%}{%- endif -%}"
    yield "{%- endfor -%}{%- endif -%}"


def _begin(form: Template, picture: str) -> Iterator[str]:
    """What stands before the first question."""
    if form.system is not None:
        said = _quoted(form.default_system)
        if form.default_system_input is not None:
            said = f"{_quoted(form.default_system_input)} if message['input'] else {said}"
        yield f"{{%- if ns.system is none -%}}{{%- set ns.system = {said} -%}}{{%- endif -%}}"
    yield from _write(form.start, picture)
    if form.system is not None:
        yield "{%- if ns.system -%}"
        yield from _write(form.system, picture, text="ns.system")
        if form.no_system:
            yield "{%- else -%}"
            yield from _write(form.no_system, picture)
        yield "{%- endif -%}"
    yield from _write(form.first, picture)


def _ask(form: Template, picture: str) -> Iterator[str]:
    """A question."""
    if form.user_input is not None:
        yield "{%- if message['input'] -%}"
        yield from _write(form.user_input, picture)
        yield "{%- else -%}"
    else:
        yield "{%- if message['input'] -%}{%- set ns.text = ns.text + '\\n' + message['input'] -%}{%- endif -%}"
    if form.user_system is not None:
        yield "{%- if ns.system and ns.turns == 0 -%}"
        yield from _write(form.user_system, picture)
        yield "{%- else -%}"
    if not any(isinstance(item, str) and SLOT.search(item) for item in form.user):
        yield "{%- if ns.text.strip() -%}{{- raise_exception('This template takes pictures alone') -}}{%- endif -%}"
    yield from _write(form.user, picture)
    if form.user_system is not None:
        yield "{%- endif -%}"
    if form.user_input is not None:
        yield "{%- endif -%}"


def _write(form: Form, picture: str, *, text: str = "ns.text") -> Iterator[str]:
    """Write a form; text: the variable that holds the turn's."""
    slots = {"text": text, "strip": f"{text}.strip()", "rstrip": f"{text}.rstrip()", "input": "message['input']"}
    for item in form:
        if isinstance(item, Pictures):
            shown = _quoted(picture + item.after)
            yield f"{{%- for _ in range(ns.pictures) -%}}{{{{- {shown} -}}}}{{%- endfor -%}}"
            yield "{%- set ns.pictures = 0 -%}"
        elif isinstance(item, Control):
            name = {"bos": "bos_token", "eos": "eos_token"}.get(item.name, _quoted(item.name))
            yield f"{{{{- {name} -}}}}"
        else:
            at, terms = 0, []
            for slot in SLOT.finditer(item):
                terms += [_quoted(item[at : slot.start()])] if slot.start() > at else []
                terms.append(slots[slot[1]])
                at = slot.end()
            terms += [_quoted(item[at:])] if at < len(item) else []
            yield f"{{{{- {' + '.join(terms)} -}}}}"


def _quoted(text: str) -> str:
    """A text as a literal of jinja, which reads backslashes as Python does."""
    escaped = text.encode("unicode_escape").decode("ascii").replace("'", "\\'")
    return f"'{escaped}'"
