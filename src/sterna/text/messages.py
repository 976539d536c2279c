"""OpenAI messages in the shape that chat templates were written for.

Templates expect `content` to be a string and tool arguments to be objects; OpenAI's wire also has
lists of content parts, null content and arguments as JSON text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sterna.core.errors import RequestError


def plain_messages(
    messages: Sequence[Mapping[str, Any]], *, keep_parts: bool = False
) -> list[dict[str, Any]]:
    """Copies of the messages with text content and parsed tool arguments.

    `keep_parts` leaves lists of parts as lists, for templates that walk them. Raises RequestError
    naming the message that is not an object with a role, or has a part that is not text.
    """
    if not messages:
        raise RequestError("messages is empty; send at least one message", param="messages")
    return [_plain_message(message, index, keep_parts) for index, message in enumerate(messages)]


def _plain_message(message: Mapping[str, Any], index: int, keep_parts: bool) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} is not an object with a string `role`", param=where)
    plain = copy.deepcopy(dict(message))
    content = plain.get("content")
    if isinstance(content, list):
        texts = [_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        # Lines, as other servers join parts: two parts are two paragraphs, not one word.
        plain["content"] = content if keep_parts else "\n".join(texts)
    elif content is not None and not isinstance(content, str):
        kind = type(content).__name__
        raise RequestError(f"{where}.content is a {kind}; send text or text parts", param=where)
    calls = plain.get("tool_calls")
    if content is None and not calls:
        plain["content"] = ""
    if calls:
        plain["tool_calls"] = [_plain_call(call, where) for call in calls]
    return plain


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, Mapping):
        if part.get("type") in ("text", "input_text") and isinstance(part.get("text"), str):
            return str(part["text"])
        if part.get("type") == "refusal" and isinstance(part.get("refusal"), str):
            return str(part["refusal"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RequestError(
        f"{where} is of type {kind!r}; this model reads text parts only", param=where
    )


def _plain_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where}.tool_calls holds a call without function.name", param=where)
    return {**call, "function": {**function, "arguments": _arguments(function)}}


def _arguments(function: Mapping[str, Any]) -> Any:
    """The arguments as an object; text that is none (a cut-off call) stays text."""
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments
