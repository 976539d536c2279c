"""Finds tool calls in a model's text while it is written.

One parser serves streamed and whole answers: what it reports depends on the text alone, not on how
the text was cut into pieces. Two styles: Hermes, `<tool_call>{"name": ..., "arguments": {...}}
</tool_call>` anywhere in the text, and JSON, where the whole answer is one such object, several, or
a list of them.

Arguments are passed on as they come, so a call is announced as soon as its name and the brace of
its arguments are there. What turns out not to be a call before that point is content, tags and all.
White space between calls is dropped, nothing else is.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from sterna.text.tool_json import (
    BraceScanner,
    Call,
    cannot_be_call,
    is_rest_of_object,
    match_head,
    object_end,
    parse_call,
)
from sterna.text.tool_prompt import CALL_CLOSE, CALL_OPEN


class ToolStyle(StrEnum):
    """How a model writes its calls."""

    HERMES = "hermes"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class ContentText:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; `index` counts the calls of the answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments (JSON text)."""

    index: int
    text: str


ToolEvent = ContentText | CallStart | CallArguments


@dataclass(slots=True)
class ToolCall:
    """A whole call. `arguments` is what the model wrote, not checked against any schema."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class ToolMessage:
    """A whole answer: its content and its calls."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def detect_style(chat_template: str | None) -> ToolStyle:
    """The style that a template teaches. Templates that know no tools get the Hermes prompt."""
    if not chat_template or "tools" not in chat_template or CALL_OPEN in chat_template:
        return ToolStyle.HERMES
    return ToolStyle.JSON


def parse_answer(
    text: str, style: ToolStyle, tool_names: Collection[str] | None = None
) -> ToolMessage:
    """Content and calls of a whole answer."""
    parser = ToolParser(style, tool_names)
    return collect([*parser.push(text), *parser.finish()])


def collect(events: Iterable[ToolEvent]) -> ToolMessage:
    """Join events into the message they make."""
    message = ToolMessage()
    for event in events:
        match event:
            case ContentText(text):
                message.content += text
            case CallStart(_, call_id, name):
                message.calls.append(ToolCall(call_id, name))
            case CallArguments(index, text):
                message.calls[index].arguments += text
    return message


class ToolParser:
    """The parser of one answer. Push text as it comes, then finish once.

    In JSON style an object is a call only if its name is among `tool_names` (None: any name), as an
    answer may well be JSON of its own.
    """

    def __init__(self, style: ToolStyle, tool_names: Collection[str] | None = None) -> None:
        self._names = tool_names if style is ToolStyle.JSON else None
        self._reads_tags = style is ToolStyle.HERMES
        self._state: Callable[[bool], bool] = (
            self._between_tags if self._reads_tags else self._json_start
        )
        self._buffer = ""
        self._gap = ""  # taken from the buffer, dropped if a call follows and content if not
        self._in_list = False
        self._after_call = False
        self._num_calls = 0
        self._scanner = BraceScanner()
        self._events: list[ToolEvent] = []

    def push(self, text: str) -> list[ToolEvent]:
        """Take more text; returns what became certain."""
        self._buffer += text
        return self._run(False)

    def finish(self) -> list[ToolEvent]:
        """The text is complete; returns the rest."""
        return self._run(True)

    # Each state looks at the buffer and returns True to go on in the (new) state, or False to wait
    # for more text. Decisions rest on the first characters that allow them, never on how many
    # characters happen to be there, or streaming would differ from not streaming.

    def _run(self, final: bool) -> list[ToolEvent]:
        while self._state(final):
            pass
        events, self._events = self._events, []
        return events

    def _content(self, text: str) -> None:
        if text:
            self._events.append(ContentText(text))
            self._after_call = False

    def _start_call(self, name: str) -> None:
        call_id = f"call_{secrets.token_hex(12)}"
        self._events.append(CallStart(self._num_calls, call_id, name))
        self._num_calls += 1
        self._gap = ""
        self._after_call = True

    def _whole_call(self, call: Call) -> None:
        self._start_call(call.name)
        self._events.append(CallArguments(self._num_calls - 1, call.arguments))

    def _go(self, state: Callable[[bool], bool], rest: str | None = None) -> bool:
        """Change the state, with `rest` as the buffer from now on."""
        self._state = state
        if rest is not None:
            self._buffer = rest
        return True

    def _not_a_call(self) -> bool:
        """What was held back as the start of a call is content."""
        held, self._gap = self._gap, ""
        if not self._reads_tags:
            return self._go(self._all_content, held + self._buffer)
        self._content(held)
        return self._go(self._between_tags)

    def _is_known(self, name: str) -> bool:
        return self._names is None or name in self._names

    def _arguments(self, final: bool) -> bool:
        """Inside the arguments' braces."""
        if not self._buffer:
            return False
        end = self._scanner.scan(self._buffer)
        piece = self._buffer[:end]
        self._events.append(CallArguments(self._num_calls - 1, piece))
        self._buffer = self._buffer[len(piece) :]
        return end is not None and self._go(self._after_arguments)

    def _begin_arguments(self, name: str, rest: str) -> bool:
        self._start_call(name)
        self._scanner = BraceScanner()
        return self._go(self._arguments, rest)

    def _after_arguments(self, final: bool) -> bool:
        """Between the arguments' closing brace and the call's."""
        close = self._close_tag if self._reads_tags else self._json_next
        rest = self._buffer.lstrip()
        if not rest:
            return final and self._go(close)
        if rest[0] == "}":
            return self._go(close, rest[1:])
        if rest[0] != ",":
            return self._go(close)
        end = object_end(rest, depth=1)  # more keys after the arguments
        if end is None and not final:
            return False
        if end is not None and is_rest_of_object(rest[:end]):
            return self._go(close, rest[end:])
        return self._not_a_call()

    # Hermes style

    def _between_tags(self, final: bool) -> bool:
        position = self._buffer.find(CALL_OPEN)
        if position < 0:
            self._content_but_tag(final)
            return False
        text = self._buffer[:position]
        self._content(text.rstrip())
        self._gap = text[len(text.rstrip()) :] + CALL_OPEN
        return self._go(self._in_tag, self._buffer[position + len(CALL_OPEN) :])

    def _content_but_tag(self, final: bool) -> None:
        """Let the buffer out, but for what may belong to a tag: its first characters and the white
        space before it."""
        if final:
            if not (self._after_call and self._buffer.isspace()):
                self._content(self._buffer)
            self._buffer = ""
            return
        text = self._buffer[: len(self._buffer) - _overlap(self._buffer, CALL_OPEN)].rstrip()
        self._content(text)
        self._buffer = self._buffer[len(text) :]

    def _in_tag(self, final: bool) -> bool:
        close = self._buffer.find(CALL_CLOSE)
        inside = self._buffer if close < 0 else self._buffer[:close]
        is_whole = final or close >= 0
        call = inside.lstrip()
        if call and call[0] != "{":
            return self._not_a_call()
        if head := match_head(call):
            name, brace = head
            return self._begin_arguments(name, self._buffer[len(inside) - len(call) + brace :])
        if not is_whole:
            return False
        if parsed := parse_call(call):
            self._whole_call(parsed)
            return self._go(self._close_tag, self._buffer[len(inside) :])
        return self._not_a_call()

    def _close_tag(self, final: bool) -> bool:
        rest = self._buffer.lstrip()
        if rest.startswith(CALL_CLOSE):
            return self._go(self._between_tags, rest[len(CALL_CLOSE) :])
        if not CALL_CLOSE.startswith(rest):
            return self._go(self._between_tags)
        if final:
            self._buffer = ""  # cut off inside the tag: the call itself is whole
        return False

    # JSON style

    def _json_start(self, final: bool) -> bool:
        rest = self._buffer.lstrip()
        if not rest:
            return final and self._go(self._all_content)
        lead = self._buffer[: len(self._buffer) - len(rest)]
        if rest[0] == "[":
            self._in_list = True
            self._gap = lead + "["
            return self._go(self._json_item, rest[1:])
        self._gap = lead
        return self._go(self._json_item, rest)

    def _json_item(self, final: bool) -> bool:
        """Before the brace of a call."""
        rest = self._buffer.lstrip()
        if not rest and not final:
            return False
        if not rest and self._after_call:  # cut off after a separator
            return self._go(self._all_content)
        if not rest.startswith("{"):
            return self._not_a_call()
        self._gap += self._buffer[: len(self._buffer) - len(rest)]
        return self._go(self._json_call, rest)

    def _json_call(self, final: bool) -> bool:
        """From the brace of a call on."""
        if head := match_head(self._buffer):
            name, brace = head
            if not self._is_known(name):
                return self._not_a_call()
            return self._begin_arguments(name, self._buffer[brace:])
        if cannot_be_call(self._buffer):
            return self._not_a_call()
        end = object_end(self._buffer)
        if end is None:
            return final and self._not_a_call()
        call = parse_call(self._buffer[:end])
        if call is None or not self._is_known(call.name):
            return self._not_a_call()
        self._whole_call(call)
        return self._go(self._json_next, self._buffer[end:])

    def _json_next(self, final: bool) -> bool:
        """After a call: another one, the end of the list or content."""
        rest = self._buffer.lstrip()
        if not rest:
            return final and self._go(self._all_content)
        separators = "," if self._in_list else ",;"
        if rest[0] in separators:
            self._gap = self._buffer[: len(self._buffer) - len(rest)] + rest[0]
            return self._go(self._json_item, rest[1:])
        if self._in_list:
            return self._go(self._all_content, rest[1:] if rest[0] == "]" else None)
        self._gap = ""
        return self._go(self._json_item if rest[0] == "{" else self._all_content)

    def _all_content(self, final: bool) -> bool:
        if not (self._after_call and (not self._buffer or self._buffer.isspace())):
            self._content(self._buffer)
            self._buffer = ""
        elif final:
            self._buffer = ""
        return False


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` are the beginning of `tag`."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0
