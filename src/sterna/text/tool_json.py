"""Reading one tool call, `{"name": ..., "arguments": {...}}`, from text that may be incomplete."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

# A name longer than this is no function's (OpenAI allows 64); it bounds the work of a retry.
MAX_NAME = 256
_STRING = rf'"((?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{{4}})){{1,{MAX_NAME}}})"'
_GAP = r"[ \t\r\n]{0,64}"
# The usual order, name first: the arguments can be streamed from their opening brace on.
_NAME = rf'\{{{_GAP}"name"{_GAP}:{_GAP}{_STRING}{_GAP},'
_HEAD = re.compile(rf'{_NAME}{_GAP}"(?:arguments|parameters)"{_GAP}:{_GAP}(?=\{{)')
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)["\\]')
_NO_KEY = re.compile(r'\{\s*[^\s"]')
_CALL_KEYS = frozenset(("name", "arguments", "parameters", "type", "function", "id"))
_STRUCTURE = re.compile(r'[{}"]|\\.?', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call: the function's name and its arguments as JSON text."""

    name: str
    arguments: str


def match_head(text: str) -> tuple[str, int] | None:
    """(name, where the arguments' brace is) if `text` begins with a call up to that brace."""
    found = _HEAD.match(text)
    if found is None:
        return None
    name = str(json.loads(f'"{found.group(1)}"'))
    return (name, found.end()) if _is_unicode(name) else None


def cannot_be_call(text: str) -> bool:
    """Whether an object that begins like `text` is certainly no call, by its first key."""
    if _NO_KEY.match(text):
        return True
    key = _FIRST_KEY.match(text)
    return key is not None and key.group(1) not in _CALL_KEYS


def parse_call(text: str) -> Call | None:
    """The call that `text` holds, whatever the order of its keys; None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name or not _is_unicode(name):
        return None
    arguments = _arguments_text(value.get("arguments", value.get("parameters")))
    return None if arguments is None else Call(name, arguments)


def is_rest_of_object(text: str) -> bool:
    """Whether `text` can follow a value inside an object: `, "id": 3}`."""
    try:
        json.loads('{"_":0' + text)
    except (ValueError, RecursionError):
        return False
    return True


def _arguments_text(value: Any) -> str | None:
    if value is None:
        return "{}"
    if isinstance(value, dict):
        text = json.dumps(value, ensure_ascii=False)
        return text if _is_unicode(text) else json.dumps(value)
    if isinstance(value, str):  # arguments as JSON text, OpenAI's own way
        try:
            return value if isinstance(json.loads(value), dict) else None
        except (ValueError, RecursionError):
            return None
    return None


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON escapes can spell and UTF-8 cannot."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


class BraceScanner:
    """Finds the end of a JSON object that arrives in pieces. Braces in strings do not count."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def scan(self, piece: str) -> int | None:
        """Index just after the closing brace, or None when the piece ends before it."""
        start = 0
        if self._escaped and piece:
            self._escaped = False
            start = 1
        for token in _STRUCTURE.finditer(piece, start):
            mark = token.group()
            if mark.startswith("\\"):
                self._escaped = len(mark) == 1  # the escaped character is in the next piece
            elif mark == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if mark == "{" else -1
                if self._depth == 0:
                    return token.end()
        return None


def object_end(text: str, depth: int = 0) -> int | None:
    """Index after the object that `text` begins with (or is `depth` braces deep in), or None."""
    return BraceScanner(depth).scan(text)
