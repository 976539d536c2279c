"""How a policy writes a call, and how the answer is put behind what it wrote.

    chat    the model family's own: calls are read by the parser that the server uses, answers are
            `tool` messages of the chat template
    plain   for models without one: `<call>name text</call>` is answered by `<result>...</result>`,
            and the completion goes on behind it

Tokens in, tokens out: `reply` gives the tokens to append. What the model wrote is never rendered
or tokenised again, so its log-probs stay those of the tokens it chose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sterna.align.tools.toolbox import ToolRequest, ToolResult
from sterna.core.errors import ConfigError, RequestError
from sterna.text.chat import ChatRenderer
from sterna.text.tokenizer import Tokenizer
from sterna.text.tools import detect_style, parse_answer

CALL, CALL_END = "<call>", "</call>"
RESULT, RESULT_END = "<result>", "</result>"
_CUT_NOTE = " [cut]"
# Stands for what the model wrote, in a conversation that is rendered for what follows it.
_TURN = "STERNA_TURN"


class ToolProtocol(Protocol):
    """One way of calling."""

    stop: tuple[str, ...]  # strings that end a turn, beside the end tokens

    def calls(self, text: str) -> list[ToolRequest]:
        """The calls of a turn; none: the completion is finished."""
        ...

    def reply(
        self, calls: Sequence[ToolRequest], results: Sequence[ToolResult], last_token: int
    ) -> list[int]:
        """The tokens between a turn that ended in `last_token` and the policy's next one."""
        ...


class ChatProtocol:
    """Calls and answers of the chat template."""

    stop: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer, names: Sequence[str], max_tokens: int) -> None:
        """ConfigError when the template cannot put an answer behind a turn. `max_tokens`: of an
        answer; what is longer is cut."""
        self._tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer)
        self._style = detect_style(tokenizer.chat_template)
        self._names = tuple(names)
        self._max_tokens = max_tokens
        try:
            self._after_turn([{"role": "tool", "content": "1", "name": "f", "tool_call_id": "c"}])
        except RequestError as error:
            raise ConfigError(
                f"the chat template has no place for a tool's answer ({error.message}); set "
                'rollout.tool_protocol = "plain"',
                param="rollout.tool_protocol",
            ) from error

    def calls(self, text: str) -> list[ToolRequest]:
        """See ToolProtocol."""
        found = parse_answer(text, self._style, self._names).calls
        return [ToolRequest(call.name, _object(call.arguments), call.id) for call in found]

    def reply(
        self, calls: Sequence[ToolRequest], results: Sequence[ToolResult], last_token: int
    ) -> list[int]:
        """See ToolProtocol."""
        messages = [
            {
                "role": "tool",
                "name": call.name,
                "tool_call_id": call.id,
                "content": cut(result.text, self._tokenizer, self._max_tokens),
            }
            for call, result in zip(calls, results, strict=True)
        ]
        text = self._after_turn(messages)
        if last_token in self._tokenizer.eos_token_ids:
            text = text.removeprefix(self._tokenizer.token_text(last_token))
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _after_turn(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """What the template writes behind an assistant's turn that such messages answer."""
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": _TURN}]
        text = self._renderer.render([*before, *messages], None)
        _, mark, after = text.partition(_TURN)
        if not mark:
            raise RequestError("the chat template leaves the assistant's turn out")
        return after


class PlainProtocol:
    """Marks in the text; one call a turn, whose argument is the text after the name."""

    stop: tuple[str, ...] = (CALL_END,)

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    def calls(self, text: str) -> list[ToolRequest]:
        """See ToolProtocol."""
        head, end, _ = text.rpartition(CALL_END)
        _, begin, call = head.rpartition(CALL)
        if not (begin and end):
            return []
        name, _, argument = call.strip().partition(" ")
        return [ToolRequest(name, argument.strip())]

    def reply(
        self, calls: Sequence[ToolRequest], results: Sequence[ToolResult], last_token: int
    ) -> list[int]:
        """See ToolProtocol."""
        text = cut(results[0].text, self._tokenizer, self._max_tokens)
        return self._tokenizer.encode(f"{RESULT}{text}{RESULT_END}", add_special_tokens=False)


def cut(text: str, tokenizer: Tokenizer, max_tokens: int) -> str:
    """The text's first `max_tokens` tokens, with a note where there were more."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) <= max_tokens:
        return text
    return tokenizer.decode(tokens[:max_tokens], False).rstrip("\ufffd") + _CUT_NOTE


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
