"""Bytes to a request body, with errors a person can act on."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sterna.core.errors import RequestError
from sterna.core.lookup import nearest
from sterna.server import schema

BodyT = TypeVar("BodyT", bound=schema.Body)

# Pydantic's names for a union's options in error locations, beside class names and tuple[...].
_OPTIONS = ("str", "int", "none", "dict")
# Its messages begin with a subject ("Input should", "Tuple should"); ours have one already.
_SUBJECT = re.compile(r"^(Input|String|Tuple|Dictionary) (?=should )")
# Values are quoted in messages, but a body of megabytes is not repeated.
_MAX_NAME = 64
_SHOW = reprlib.Repr()
_SHOW.maxlevel, _SHOW.maxdict, _SHOW.maxlist, _SHOW.maxtuple = 3, 4, 4, 4
_SHOW.maxstring = _SHOW.maxother = _SHOW.maxlong = 60


def parse_body(kind: type[BodyT], raw: bytes) -> BodyT:
    """Validate `raw` as `kind`; raises RequestError that names the field at fault."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        # The traceback holds the whole body; the message is all that is needed.
        raise _explain(kind, error.errors(include_url=False)) from None


def _explain(kind: type[schema.Body], errors: Sequence[ErrorDetails]) -> RequestError:
    first = errors[0]
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first['msg'].partition(': ')[2]}")
    if not first["loc"]:
        return RequestError(f"the body must be a JSON object: {first['msg']}")
    same_field = [error for error in errors if error["loc"][0] == first["loc"][0]]
    unknown = next((error for error in same_field if error["type"] == "extra_forbidden"), None)
    # Of an object of a type we do not know, all fields are unknown: the type is what is at fault.
    kinds = {error["loc"][:-1] for error in same_field if error["loc"][-1] == "type"}
    if unknown is not None and unknown["loc"][:-1] not in kinds:
        return _unknown_field(kind, unknown)
    # Each option of a union reports; the one that got deepest is what the client meant.
    param = _param(max(same_field, key=lambda error: len(_names(error["loc"])))["loc"])
    deepest = [error for error in same_field if _param(error["loc"]) == param]
    return RequestError(f"{param}: {_reasons(kind, deepest)}", param=param)


def _unknown_field(kind: type[schema.Body], error: ErrorDetails) -> RequestError:
    name = str(error["loc"][-1])[:_MAX_NAME]
    known = kind.model_fields if len(error["loc"]) == 1 else _nested_names()
    hint = nearest(name, known)
    meant = f"did you mean {hint!r}?" if hint else "see GET /docs for the known fields"
    param = _param(error["loc"])
    return RequestError(f"unknown field {_SHOW.repr(name)}; {meant}", param=param)


def _nested_names() -> set[str]:
    kinds: tuple[type[schema.Body], ...] = (
        schema.FunctionCall,
        schema.FunctionSpec,
        schema.JSONSchemaFormat,
        schema.Message,
        schema.NamedTool,
        schema.ResponseFormat,
        schema.StreamOptions,
        schema.StructuredOutputs,
        schema.TextPart,
        schema.Tool,
        schema.ToolCall,
    )
    fields = (field for kind in kinds for field in kind.model_fields.items())
    return {info.alias or name for name, info in fields}


def _reasons(kind: type[schema.Body], errors: Sequence[ErrorDetails]) -> str:
    refused = errors[0]
    if refused["type"] == "none_required":
        info = kind.model_fields.get(str(refused["loc"][0]))
        return f"cannot be honoured: {info.description if info else 'leave it out'}"
    if refused["type"] == "missing":
        return "is required"
    if refused["type"] == "value_error":  # in our own words
        return str(refused["msg"]).removeprefix("Value error, ")
    messages = dict.fromkeys(_SUBJECT.sub("", error["msg"]) for error in errors)
    return f"{_SHOW.repr(refused['input'])} is not allowed; it {', or '.join(messages)}"


def _param(loc: tuple[int | str, ...]) -> str:
    """`("messages", 0, "content", "str")` -> `messages[0].content`."""
    text = str(loc[0])[:_MAX_NAME]
    for part in _names(loc)[1:]:
        text += f"[{part}]" if isinstance(part, int) else f".{part[:_MAX_NAME]}"
    return text


def _names(loc: tuple[int | str, ...]) -> list[int | str]:
    """The parts of a location that the client wrote, without the names of union options."""
    return [loc[0], *(part for part in loc[1:] if not _is_option(part))]


def _is_option(part: int | str) -> bool:
    if isinstance(part, int):
        return False
    return part in _OPTIONS or part[:1].isupper() or "[" in part or "-" in part
