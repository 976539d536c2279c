"""Messages to prompt text: the only chat renderer, for training, RL and serving alike.

A chat template is a Jinja program that comes with the model, so it runs in Jinja's sandbox on
plain data, with the names that Hugging Face templates rely on. For any template that transformers
renders, the text is the same to the byte. Sterna adds what templates lack: OpenAI's content parts,
tool arguments as objects, and tools for models whose template does not know them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sterna.core.errors import RequestError
from sterna.core.log import get_logger
from sterna.text.messages import plain_messages
from sterna.text.tokenizer import Tokenizer
from sterna.text.tool_prompt import with_tool_prompt

_log = get_logger(__name__)

# For models that bring no template: readable by a base model as a dialogue.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Marks where the message to be continued ends; the trailing space tells whether a template trims.
_CUT = "STERNA_CONTINUES_HERE "
# Around each `{% generation %}` block of a marked rendering: characters of the private-use area.
MARK_OPEN, MARK_CLOSE = "\uf8f1", "\uf8f2"
_LOOPS_OVER_PARTS = re.compile(r"for\s+\w+\s+in\s+\w+(\.content|\[['\"]content['\"]\])")
_GENERATION = re.compile(r"\{%-?\s*generation\b")
# What a template can raise besides Jinja's own errors: it computes with a client's data.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


class ChatRenderer:
    """Renders conversations for one model. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special_tokens = tokenizer.special_tokens
        if tokenizer.chat_template is None:
            _log.warning(
                "the model has no chat template; messages are rendered as 'role: content' lines"
            )
        self.template = tokenizer.chat_template or PLAIN_TEMPLATE
        self.knows_tools = "tools" in self.template
        self.marks_generation = _GENERATION.search(self.template) is not None
        # How this model's turns end, longest first: `</s>`, `<|im_end|>`.
        ends = {tokenizer.token_text(i) for i in tokenizer.eos_token_ids} - {""}
        self.turn_ends = tuple(sorted(ends, key=len, reverse=True))
        self._keep_parts = _LOOPS_OVER_PARTS.search(self.template) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The prompt for `messages` (OpenAI's shape), BOS included where the template writes one,
        so encode it with `add_special_tokens=False`.

        `continue_final_message` leaves the last message open for the model to go on with; it
        excludes `add_generation_prompt`. `template_kwargs` reach the template as variables.
        Raises RequestError when the messages are not well-formed or the template refuses them.
        """
        plain = self._prepared(messages, tools)
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError(
                    "continue_final_message and add_generation_prompt are both set; choose one",
                    param="continue_final_message",
                )
            _mark_final(plain)
        text = self._run(
            messages=plain,
            tools=None if tools is None else _plain(list(tools)),
            documents=None if documents is None else _plain(list(documents)),
            add_generation_prompt=add_generation_prompt,
            **{**self._special_tokens, **_plain(template_kwargs)},
        )
        return _cut_at_mark(text) if continue_final_message else text

    def render_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """`render` of a whole conversation with MARK_OPEN and MARK_CLOSE around what the template
        puts into `{% generation %}` blocks (`marks_generation` tells whether it has any)."""
        return self._run(
            True,
            messages=self._prepared(messages, tools),
            tools=None if tools is None else _plain(list(tools)),
            documents=None,
            add_generation_prompt=False,
            **{**self._special_tokens, **_plain(template_kwargs)},
        )

    def _prepared(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[dict[str, Any]]:
        plain = plain_messages(messages, keep_parts=self._keep_parts)
        return plain if self.knows_tools else with_tool_prompt(plain, tools)

    def _run(self, marked: bool = False, /, **variables: Any) -> str:
        try:
            template = self._compiled_marked if marked else self._compiled
            return template.render(**variables)
        except _TEMPLATE_FAILURES as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return _environment(_GenerationBlock).from_string(self.template)

    @cached_property
    def _compiled_marked(self) -> jinja2.Template:
        return _environment(_MarkedBlock).from_string(self.template)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training masks; a prompt ignores it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration is a plain set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


class _MarkedBlock(_GenerationBlock):
    """Keeps the block's borders in the text."""

    def _body(self, caller: Macro) -> str:
        return MARK_OPEN + str(caller()) + MARK_CLOSE


def _environment(generation: type[Extension]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face templates expect it; Jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _plain(value: Any) -> Any:
    """The value rebuilt of JSON types, so that a template meets no object with methods.

    Raises RequestError for anything else.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise RequestError(f"a chat template takes JSON data only, got a {type(value).__name__}")


def _mark_final(messages: list[dict[str, Any]]) -> None:
    """Append the mark to the last message's text (the last text part of a list)."""
    final = messages[-1]
    content = final.get("content")
    if isinstance(content, str):
        final["content"] = content + _CUT
        return
    for part in reversed(content or []):
        if "text" in part:
            part["text"] += _CUT
            return
    raise RequestError(
        "continue_final_message is set but the last message has no text to continue",
        param="messages",
    )


def _cut_at_mark(text: str) -> str:
    """The text up to the mark; the message's trailing space is kept iff the template keeps it."""
    position = text.rfind(_CUT.strip())
    if position < 0:
        raise RequestError(
            "the chat template drops the final message, so it cannot be continued",
            param="continue_final_message",
        )
    head = text[:position]
    return head if text[position:].startswith(_CUT) else head.rstrip()
