"""Messages and texts to prompt token ids, without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from sterna.core.errors import RequestError
from sterna.server.schema import Message, Tool

if TYPE_CHECKING:
    from sterna.text.chat import ChatRenderer
    from sterna.text.tokenizer import Tokenizer

_T = TypeVar("_T")

# Characters; about 1 ms of tokenizing. Shorter texts are done in place, longer in a thread.
_INLINE_CHARS = 4096
# What the template writes around each message.
_PER_MESSAGE = 32
_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)
# OpenAI's clients send a reply's fields back; these say nothing to a template.
_UNUSED = {"refusal", "annotations", "audio", "function_call"}


class PromptBuilder:
    """Renders and tokenizes for one model."""

    def __init__(self, tokenizer: Tokenizer, renderer: ChatRenderer) -> None:
        self.tokenizer = tokenizer
        self._renderer = renderer

    async def text_ids(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a plain text."""

        def encode() -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

        return tuple(await _run(len(text), encode))

    async def chat_ids(
        self,
        messages: tuple[Message, ...],
        tools: tuple[Tool, ...] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        add_special_tokens: bool = False,
    ) -> tuple[int, ...]:
        """Token ids of a conversation; the template brings the special tokens itself."""
        if clash := _RESERVED & set(template_kwargs or ()):
            raise RequestError(
                f"{', '.join(sorted(clash))} is a field of the request, not of the template",
                param="chat_template_kwargs",
            )
        # The default is a prompt for the answer, unless the last message is to be continued.
        wants_prompt = add_generation_prompt or (
            add_generation_prompt is None and not continue_final_message
        )

        def build() -> list[int]:
            text = self._renderer.render(
                [_plain(message) for message in messages],
                [tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
                add_generation_prompt=wants_prompt,
                continue_final_message=continue_final_message,
                **(template_kwargs or {}),
            )
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

        return tuple(await _run(_size(messages, tools, template_kwargs), build))

    async def decode(self, token_ids: tuple[int, ...]) -> str:
        """The text of `token_ids`; RequestError when an id is not in the vocabulary."""
        size = self.tokenizer.vocab_size
        if max(token_ids, default=0) >= size:
            raise RequestError(
                f"token id {max(token_ids)} is not in the vocabulary of {size:,}", param="tokens"
            )

        def decode() -> str:
            return self.tokenizer.decode(token_ids, skip_special_tokens=False)

        return await _run(len(token_ids), decode)


async def _run(size: int, work: Callable[[], _T]) -> _T:
    return work() if size <= _INLINE_CHARS else await asyncio.to_thread(work)


def _plain(message: Message) -> dict[str, Any]:
    plain = message.model_dump(mode="json", exclude_none=True, exclude=_UNUSED)
    # Templates know no "developer", which OpenAI defines as the successor of "system".
    return plain | {"role": "system"} if message.role == "developer" else plain


def _size(
    messages: tuple[Message, ...], tools: tuple[Tool, ...] | None, variables: dict[str, Any] | None
) -> int:
    """Characters to render, roughly; schemas and variables are not measured but taken as long."""
    if tools or variables:
        return _INLINE_CHARS + 1
    return sum(_PER_MESSAGE + _num_chars(message) for message in messages)


def _num_chars(message: Message) -> int:
    content = message.content or ""
    return len(content) if isinstance(content, str) else sum(len(part.text) for part in content)
