"""A row of a file to what it means: a conversation, or plain text of which a part is trained.

To add a format: its fields in `config.FIELDS`, its keys in `_SIGNS`, its reader in `_READERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sterna.core.errors import RowError
from sterna.data.config import FIELDS, SourceConfig
from sterna.data.fields import (
    Conversation,
    Plain,
    Row,
    Sample,
    answered,
    exchange,
    objects_of,
    text_of,
    tools_of,
    with_system,
)
from sterna.data.preferences import read_labelled, read_preference, read_prompt

# The keys by which a format is known, in the order of asking.
_SIGNS: tuple[tuple[str, frozenset[str]], ...] = (
    ("chat", frozenset({"messages"})),
    ("sharegpt", frozenset({"conversations"})),
    ("preference", frozenset({"chosen", "rejected"})),
    ("kto", frozenset({"prompt", "completion", "label"})),
    ("prompt_completion", frozenset({"prompt", "completion"})),
    ("alpaca", frozenset({"instruction", "output"})),
    ("text", frozenset({"text"})),
    ("prompts", frozenset({"prompt"})),
)
_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "chatgpt": "assistant", "model": "assistant", "tool": "tool",
    "observation": "tool", "function": "tool", "function_call": "assistant",
}  # fmt: skip


def detect_format(rows: Sequence[Row], fields: Mapping[str, str]) -> str:
    """The format all `rows` (the first few of a source) have; RowError when none fits."""
    known = [frozenset(fields) | frozenset(row) for row in rows]
    for name, signs in _SIGNS:
        if known and all(signs <= keys for keys in known):
            return name
    found = ", ".join(sorted(known[0])) if known else "no row"
    formats = "; ".join(f"{name}: {', '.join(sorted(signs))}" for name, signs in _SIGNS)
    raise RowError(
        f"keys {found} fit no format ({formats}); name one with `format`, and map the keys with "
        '`fields`, such as {prompt = "question", completion = "answer"}'
    )


def read_row(row: Row, format: str, source: SourceConfig, as_chat: bool) -> Sample:
    """What a row says. Raises RowError (without a place) when it is malformed or empty."""
    if not isinstance(row, Mapping):
        raise RowError(f"is a {type(row).__name__}, an object with keys is needed")
    picked = {
        name: value
        for name in FIELDS[format]
        if (value := _pick(row, source.fields.get(name, name), name in source.fields)) is not None
    }
    if format == "prompts":
        own = {source.fields.get(name, name) for name in FIELDS[format]}
        others = {key: value for key, value in row.items() if key not in own}
        return read_prompt(picked, others, source, as_chat)
    return _READERS[format](picked, source, as_chat)


def _pick(row: Row, path: str, is_mapped: bool) -> Any:
    """The value at a dotted path (`instances.0.output`); None when the row has none."""
    if path in row or not is_mapped:
        return row.get(path)
    value: Any = row
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _chat(picked: Row, source: SourceConfig, as_chat: bool) -> Conversation:
    kwargs = picked.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise RowError(f"chat_template_kwargs is a {type(kwargs).__name__}, an object is needed")
    messages = with_system(objects_of(picked, "messages"), source.system)
    return answered(Conversation(messages, tools_of(picked), kwargs))


def _sharegpt(picked: Row, source: SourceConfig, as_chat: bool) -> Conversation:
    turns = objects_of(picked, "conversations")
    messages = [_sharegpt_message(turn, i) for i, turn in enumerate(turns)]
    system = text_of(picked, "system", needed=False) or source.system
    return answered(Conversation(with_system(messages, system), tools_of(picked)))


def _sharegpt_message(turn: Row, i: int) -> dict[str, Any]:
    speaker = turn.get("from", turn.get("role"))
    content = turn.get("value", turn.get("content"))
    if speaker not in _SHAREGPT_ROLES:
        allowed = ", ".join(_SHAREGPT_ROLES)
        raise RowError(f"conversations[{i}].from is {speaker!r} (known: {allowed})")
    if not isinstance(content, str):
        raise RowError(f"conversations[{i}].value is a {type(content).__name__}, text is needed")
    message: dict[str, Any] = {"role": _SHAREGPT_ROLES[speaker], "content": content}
    if speaker == "function_call":
        message |= {"content": "", "tool_calls": _calls(content, i)}
    own = {key: turn[key] for key in ("train", "weight") if turn.get(key) is not None}
    return {**message, **own}


def _calls(text: str, i: int) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RowError(f"conversations[{i}].value is a function_call but no JSON") from error
    calls = value if isinstance(value, list) else [value]
    return [{"type": "function", "function": call} for call in calls]


def _pair(picked: Row, source: SourceConfig, as_chat: bool) -> Sample:
    prompt = picked.get("prompt")
    if isinstance(prompt, list):
        asked = [{**message, "train": False} for message in objects_of(picked, "prompt")]
        messages = [*asked, *objects_of(picked, "completion")]
        return answered(Conversation(with_system(messages, source.system)))
    system = text_of(picked, "system", needed=False) or source.system
    prompt = text_of(picked, "prompt", needed=as_chat)
    return exchange(prompt, text_of(picked, "completion"), system, as_chat)


def _alpaca(picked: Row, source: SourceConfig, as_chat: bool) -> Sample:
    given = text_of(picked, "input", needed=False)
    instruction = text_of(picked, "instruction")
    prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    system = text_of(picked, "system", needed=False) or source.system
    return exchange(prompt if as_chat else f"{prompt}\n\n", text_of(picked, "output"), system,
                     as_chat)  # fmt: skip


def _plain_text(picked: Row, source: SourceConfig, as_chat: bool) -> Plain:
    return Plain("", text_of(picked, "text"))


_READERS: dict[str, Callable[[Row, SourceConfig, bool], Sample]] = {
    "preference": read_preference,
    "kto": read_labelled,
    "chat": _chat,
    "prompt_completion": _pair,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "text": _plain_text,
}
