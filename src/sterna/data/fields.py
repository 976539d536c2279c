"""What a row can mean, and the checked reading of its fields: shared by the readers of formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sterna.core.errors import RowError

Row = Mapping[str, Any]
_CONTENTS = {"tool_calls", "reasoning_content"}  # what a message without content may consist of


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


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt; `chosen` is preferred, by `margin` where that is known (else 0).

    Each half is the whole exchange; only its completion is trained.
    """

    chosen: Conversation | Plain
    rejected: Conversation | Plain
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Labelled:
    """One answer and whether it is a desirable one."""

    answer: Conversation | Plain
    is_desirable: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked, without an answer; `row` keeps the other columns for rewards."""

    asked: Conversation | Plain
    row: Row


Sample = Conversation | Plain | Pair | Labelled | Prompt


def text_of(picked: Row, name: str, *, needed: bool = True) -> str:
    """The text of a field; RowError for another type, or nothing where it is needed."""
    value = picked.get(name, "")
    if not isinstance(value, str):
        raise RowError(f"{name} is a {type(value).__name__}, text is needed")
    if needed and not value.strip():
        raise RowError(f"{name} is {'empty' if name in picked else 'missing'}")
    return value


def objects_of(picked: Row, name: str) -> list[dict[str, Any]]:
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


def tools_of(picked: Row) -> list[dict[str, Any]] | None:
    """The functions of a conversation, if any."""
    return objects_of(picked, "tools") if picked.get("tools") else None


def with_system(messages: list[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    """The messages, after a system prompt where they bring none."""
    if not system or messages[0].get("role") in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def answered(conversation: Conversation) -> Conversation:
    """The conversation; RowError when it has no answer."""
    if not any(message.get("role") == "assistant" for message in conversation.messages):
        raise RowError("no message has the role assistant, so there is nothing to train")
    for i, message in enumerate(conversation.messages):
        if message.get("content") is None and not message.keys() & _CONTENTS:
            raise RowError(f"messages[{i}] has no content and no tool_calls")
    return conversation


def exchange(prompt: str, completion: str, system: str, as_chat: bool) -> Conversation | Plain:
    """One question and its answer, through the template or as plain text."""
    if not as_chat:
        return Plain(f"{system}\n\n{prompt}" if system else prompt, completion)
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]
    return Conversation(with_system(messages, system))
