"""The process that tools run in: reads a JSON line, answers with one. Standard library only.

    {"load": ["file.py:name", ...]}             {"tools": [schema, ...]}
    {"name": ..., "arguments": {...} or text}   {"result": text}
    anything that goes wrong                    {"error": text}

What tools print goes to standard error. The process ends with its input.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_MAX_CHARS = 200_000  # of a result; what the model gets of it is cut to tokens later
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The function as OpenAI's `tools` describe one: from its name, docstring and annotations."""
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        properties[name] = json_type(hints.get(name, str))
        if parameter.default is parameter.empty:
            required.append(name)
    described = {
        "name": function.__name__,
        "description": (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " "),
        "parameters": {"type": "object", "properties": properties, "required": required},
    }
    return {"type": "function", "function": described}


def json_type(hint: Any) -> dict[str, Any]:
    """The JSON schema of an annotation; {} (anything) for what JSON has no word for."""
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [json_type(each) for each in inner]}
    if hint in (list, tuple) or origin in (list, tuple, Sequence):
        return {"type": "array", **({"items": json_type(inner[0])} if inner else {})}
    return {"type": "object"} if hint is dict or origin in (dict, Mapping) else {}


def load(place: str) -> Callable[..., Any]:
    """The function of `file.py:name`. ValueError with what is wrong."""
    file, _, name = place.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise ValueError(f"{place!r} names no Python file; a tool is given as file.py:name")
    spec = importlib.util.spec_from_file_location(f"tool_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file; a tool is given as file.py:name")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {name}")
    found: Callable[..., Any] = function
    return found


def answer(request: Mapping[str, Any], functions: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    """The reply to one request; `functions` is filled by a load."""
    try:
        if "load" in request:
            found = [load(place) for place in request["load"]]
            functions.update({function.__name__: function for function in found})
            return {"tools": [schema_of(function) for function in found]}
        function, given = functions[request["name"]], request["arguments"]
        result = function(**given) if isinstance(given, dict) else function(given)
    except Exception as error:  # noqa: BLE001 - whatever a user's function raises is its answer
        return {"error": f"{type(error).__name__}: {error}"[:_MAX_CHARS]}
    text = result if isinstance(result, str) else json.dumps(result, default=str)
    return {"result": text[:_MAX_CHARS]}


def main() -> None:
    """Serve standard input until it ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    functions: dict[str, Callable[..., Any]] = {}
    for line in sys.stdin:
        # ASCII: a lone surrogate in a result would not be UTF-8.
        replies.write(json.dumps(answer(json.loads(line), functions)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
