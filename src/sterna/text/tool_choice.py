"""`tool_choice`: the JSON schema that leaves the model no answer but a call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sterna.core.errors import RequestError
from sterna.core.lookup import unknown


def tool_names(tools: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The functions' names; RequestError naming the entry that is no function."""
    return tuple(_function(tool, index)["name"] for index, tool in enumerate(tools))


def forced_call_schema(
    tools: Sequence[Mapping[str, Any]], name: str | None = None, *, parallel: bool = True
) -> str:
    """Schema text for `StructuredSpec("json_schema", ...)`: a list of calls of `tools`, at least
    one, of the function `name` only when given, exactly one unless `parallel`.

    Read the answer with `ToolParser(ToolStyle.JSON, tool_names(tools))`. Raises RequestError when
    there is no tool, or none of that name.
    """
    names = tool_names(tools)
    if not names:
        raise RequestError("tool_choice asks for a call, but tools is empty", param="tool_choice")
    if name is not None and name not in names:
        raise RequestError(unknown("tool", name, names), param="tool_choice")
    chosen = [i for i, known in enumerate(names) if name in (None, known)]
    calls = [
        _call_schema(_function(tools[i], i), f"#/items/anyOf/{position}/properties/arguments")
        for position, i in enumerate(chosen)
    ]
    single = name is not None or not parallel
    limits = {"minItems": 1} | ({"maxItems": 1} if single else {})
    return json.dumps({"type": "array", "items": {"anyOf": calls}, **limits})


def _function(tool: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        where = f"tools[{index}]"
        raise RequestError(f"{where} is not a function with a name", param=where)
    return function


def _call_schema(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": _moved(parameters, place),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """The schema as it reads at `place` of another one: local references begin there."""
    if isinstance(schema, Mapping):
        moved = {key: _moved(value, place) for key, value in schema.items()}
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            moved["$ref"] = place + reference[1:]
        return moved
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    return schema
