"""Tools for models whose chat template does not know them.

Such a template would drop the tools without a word. Instead the system message describes them, and
calls and results are written into the text in Hermes style, which `tools.ToolParser` reads back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"

_INSTRUCTIONS = (
    "You can call these functions. Each line is the JSON schema of one:\n{schemas}\n"
    "To call a function, answer with a JSON object that has its name and arguments, in tags:\n"
    '{open}\n{{"name": "function name", "arguments": {{"argument": "value"}}}}\n{close}'
)


def with_tool_prompt(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The messages with tools described and tool traffic written out as text."""
    written = [_as_text(message) for message in messages]
    if not tools:
        return written
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    prompt = _INSTRUCTIONS.format(schemas=schemas, open=CALL_OPEN, close=CALL_CLOSE)
    if written[0]["role"] in ("system", "developer"):
        return [_prefixed(written[0], prompt), *written[1:]]
    return [{"role": "system", "content": prompt}, *written]


def _prefixed(system: dict[str, Any], prompt: str) -> dict[str, Any]:
    content = system["content"]
    if isinstance(content, list):
        return {**system, "content": [*content, {"type": "text", "text": f"\n\n{prompt}"}]}
    return {**system, "content": f"{content}\n\n{prompt}"}


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        result = f"<tool_response>\n{_flat(message.get('content'))}\n</tool_response>"
        return {"role": "user", "content": result}
    if message.get("tool_calls"):
        calls = [_call_text(call["function"]) for call in message["tool_calls"]]
        return {
            "role": message["role"],
            "content": "\n".join([_flat(message.get("content")), *calls]).strip(),
        }
    return message


def _flat(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content)
    return content or ""


def _call_text(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{CALL_OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{CALL_CLOSE}"
