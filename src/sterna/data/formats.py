"""A row of a file to what it means: a conversation, or plain text of which a part is trained.

To add a format: its fields in `config.FIELDS`, its keys in `_SIGNS`, its reader in `_READERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sterna.core.errors import RowError
from sterna.data.config import FIELDS, SourceConfig

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in OpenAI's shape, for the chat template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plain:
    """Text without a template: `prompt` is read, `completion` is trained."""

    prompt: str
    completion: str


Sample = Conversation | Plain

# The keys by which a format is known, in the order of asking.
_SIGNS: tuple[tuple[str, frozenset[str]], ...] = (
    ("chat", frozenset({"messages"})),
    ("sharegpt", frozenset({"conversations"})),
    ("prompt_completion", frozenset({"prompt", "completion"})),
    ("alpaca", frozenset({"instruction", "output"})),
    ("text", frozenset({"text"})),
)
_CONTENTS = {"tool_calls", "reasoning_content"}  # what a message without content may consist of
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
    if known and {"chosen", "rejected"} <= known[0]:
        raise RowError(f"preference rows ({found}) are not read here; they are for alignment")
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


def _text(picked: Row, name: str, *, needed: bool = True) -> str:
    value = picked.get(name, "")
    if not isinstance(value, str):
        raise RowError(f"{name} is a {type(value).__name__}, text is needed")
    if needed and not value.strip():
        raise RowError(f"{name} is {'empty' if name in picked else 'missing'}")
    return value


def _objects(picked: Row, name: str) -> list[dict[str, Any]]:
    """A list of objects, or the same as JSON text."""
    value = picked.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"{name} is text but no JSON ({error})") from error
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise RowError(f"{name} is {'no list of objects' if name in picked else 'missing'}")
    if not value:
        raise RowError(f"{name} is empty")
    return [dict(item) for item in value]


def _tools(picked: Row) -> list[dict[str, Any]] | None:
    return _objects(picked, "tools") if picked.get("tools") else None


def _with_system(messages: list[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    if not system or messages[0].get("role") in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _chat(picked: Row, source: SourceConfig, as_chat: bool) -> Conversation:
    kwargs = picked.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise RowError(f"chat_template_kwargs is a {type(kwargs).__name__}, an object is needed")
    messages = _with_system(_objects(picked, "messages"), source.system)
    return _answered(Conversation(messages, _tools(picked), kwargs))


def _answered(conversation: Conversation) -> Conversation:
    if not any(message.get("role") == "assistant" for message in conversation.messages):
        raise RowError("no message has the role assistant, so there is nothing to train")
    for i, message in enumerate(conversation.messages):
        if message.get("content") is None and not message.keys() & _CONTENTS:
            raise RowError(f"messages[{i}] has no content and no tool_calls")
    return conversation


def _sharegpt(picked: Row, source: SourceConfig, as_chat: bool) -> Conversation:
    turns = _objects(picked, "conversations")
    messages = [_sharegpt_message(turn, i) for i, turn in enumerate(turns)]
    system = _text(picked, "system", needed=False) or source.system
    return _answered(Conversation(_with_system(messages, system), _tools(picked)))


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
        asked = [{**message, "train": False} for message in _objects(picked, "prompt")]
        messages = [*asked, *_objects(picked, "completion")]
        return _answered(Conversation(_with_system(messages, source.system)))
    system = _text(picked, "system", needed=False) or source.system
    return _exchange(_text(picked, "prompt", needed=as_chat), _text(picked, "completion"), system,
                     as_chat)  # fmt: skip


def _alpaca(picked: Row, source: SourceConfig, as_chat: bool) -> Sample:
    given = _text(picked, "input", needed=False)
    instruction = _text(picked, "instruction")
    prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    system = _text(picked, "system", needed=False) or source.system
    return _exchange(prompt if as_chat else f"{prompt}\n\n", _text(picked, "output"), system,
                     as_chat)  # fmt: skip


def _exchange(prompt: str, completion: str, system: str, as_chat: bool) -> Sample:
    if not as_chat:
        return Plain(f"{system}\n\n{prompt}" if system else prompt, completion)
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]
    return Conversation(_with_system(messages, system))


def _plain_text(picked: Row, source: SourceConfig, as_chat: bool) -> Plain:
    return Plain("", _text(picked, "text"))


_READERS: dict[str, Callable[[Row, SourceConfig, bool], Sample]] = {
    "chat": _chat,
    "prompt_completion": _pair,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "text": _plain_text,
}
