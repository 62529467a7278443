"""Who speaks in messages of other programs, which tools are called there, and which result is of which call.

Must not know rows, pictures, templates or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from accessory.data.template import Turn, read_calls

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "function_call": "function",
    "tool_call": "function",
    "function": "function",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""Our roles by other programs' names."""


def speaker(entry: Mapping[str, Any]) -> str | None:
    """Our role of a message's role (or from); None for one that nobody has.

    A function that has a name beside it is OpenAI's former role of a result, any other calls.
    """
    who = entry.get("from", entry.get("role"))
    role = ROLES.get(who.strip().lower()) if isinstance(who, str) else None
    return "tool" if role == "function" and who.strip().lower() == "function" and entry.get("name") else role


def calls_in(entry: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """The calls of an assistant's message in the words of a function turn, and their ids in order, none where one of
    them has none; None where it calls nothing. ValueError for calls that are none."""
    calls = entry.get("tool_calls") or entry.get("function_call")
    if not calls:
        return None
    listed = calls if isinstance(calls, list) else [calls]
    ids = [call["id"] for call in listed if isinstance(call, Mapping) and isinstance(call.get("id"), str)]
    return read_calls(calls), ids if len(set(ids)) == len(listed) else []


def ordered(messages: Sequence[Any]) -> list[Any]:
    """Messages with the results of calls in the order of the calls, where ids on both sides tell it.

    ValueError where ids do not match one to one.
    """
    done: list[Any] = []
    calls: list[str] = []
    at = 0
    while at < len(messages):
        results: list[Mapping[str, Any]] = []
        for entry in messages[at:]:
            if not isinstance(entry, Mapping) or speaker(entry) != "tool":
                break
            results.append(entry)
        done += _matched(calls, results)
        at += len(results)
        if at < len(messages):
            entry = messages[at]
            calls = (calls_in(entry) or ("", []))[1] if isinstance(entry, Mapping) else []
            done.append(entry)
            at += 1
    return done


def _matched(calls: Sequence[str], results: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results of some calls in the order of these."""
    answered = [entry.get("tool_call_id") for entry in results]
    if not calls or not all(isinstance(name, str) for name in answered) or not answered:
        return results
    wrong = next((name for name in answered if name not in calls or answered.count(name) > 1), None)
    if wrong is not None:
        raise ValueError(
            f"tool_call_id: got {wrong!r:.60}, expected one result for each of {', '.join(calls)[:200]}; mend it"
        )
    missing = next((name for name in calls if name not in answered), None)
    if missing is not None:
        raise ValueError(f"tool_call_id: got no result for the call {missing!r:.60}, expected one; add it")
    return sorted(results, key=lambda entry: calls.index(entry["tool_call_id"]))


def gathered(turns: Sequence[Turn]) -> list[Turn]:
    """Calls that stand in turns of their own, as ms-swift has them, as one turn, with what was said before them."""
    done: list[Turn] = []
    for turn in turns:
        before = done[-1] if done else None
        if turn.role == "function" and before is not None and before.role == "assistant":
            done[-1] = replace(turn, preface=before.text)
        elif turn.role == "function" and before is not None and before.role == "function" and not turn.preface:
            done[-1] = replace(before, text=f"{before.text[:-1]}, {turn.text[1:]}")
        else:
            done.append(turn)
    return done
