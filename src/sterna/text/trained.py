"""Which characters of a rendered conversation are trained: the assistant's turns, exactly.

What the model has to write itself follows from the template alone, never from a search for the
answer's text. Three ways, the first that applies:

1. The template marks it: `{% generation %}` blocks.
2. The template is stable: a conversation's rendering begins with that of its first messages. Then
   turn i is what lies between the prompt for it (`messages[:i]` with the generation prompt) and the
   rendering that ends with it. This is what a server sends and what the model has answered.
3. It is not stable (earlier reasoning is dropped, the system prompt moves to the last turn): turn i
   is replaced by a character that occurs nowhere. What differs between the two renderings is the
   turn; where it is not the turn alone, the conversation is refused.

The end-of-turn token belongs to the turn, white space that the template writes after it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sterna.core.errors import RequestError
from sterna.text.chat import MARK_CLOSE, MARK_OPEN, ChatRenderer

TrainOn = Literal["completions", "all", "last"]
Messages = Sequence[Mapping[str, Any]]
# A private-use character: no template writes it, and a conversation that has it is refused.
_PROBE = "\uf8f0"
_ANSWER = {"role": "assistant", "content": _PROBE}
# Keys of a message that are ours and no template's.
_OWN_KEYS = ("train", "weight")


@dataclass(frozen=True, slots=True)
class TrainedText:
    """A rendered conversation; `spans` are the (start, end) character ranges that are trained."""

    text: str
    spans: tuple[tuple[int, int], ...]


def trained_text(
    renderer: ChatRenderer,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None = None,
    train_on: TrainOn = "completions",
    **template_kwargs: Any,
) -> TrainedText:
    """Render a whole conversation and find what is trained.

    A message with `"train": false` or `"weight": 0` is not trained. Raises RequestError when the
    messages are malformed or the template does not let its turns be told apart.
    """
    turns = _Turns(renderer, messages, tools, template_kwargs)
    if train_on == "all":
        return TrainedText(turns.text, ((0, len(turns.text)),))
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    wanted = [i for i in answers[-1:] if train_on == "last"] or answers
    wanted = [i for i in wanted if _is_wanted(messages[i])]
    marked = turns.marked()
    if marked is not None:
        return TrainedText(turns.text, _choose(marked, answers, wanted))
    return TrainedText(turns.text, tuple(turns.span(i) for i in wanted))


def _is_wanted(message: Mapping[str, Any]) -> bool:
    return message.get("train") is not False and message.get("weight") != 0


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    has_text = bool(content.strip() if isinstance(content, str) else content)
    return has_text or bool(message.get("tool_calls"))


def _choose(
    spans: list[tuple[int, int]], answers: list[int], wanted: list[int]
) -> tuple[tuple[int, int], ...]:
    """The marked spans of the wanted answers; one block an answer, unless all are wanted."""
    if answers == wanted:
        return tuple(spans)
    if len(spans) != len(answers):
        raise RequestError(
            f"the chat template marks {len(spans)} generation blocks for {len(answers)} assistant "
            "messages, so single ones cannot be chosen; train on all completions",
            param="messages",
        )
    return tuple(span for span, i in zip(spans, answers, strict=True) if i in wanted)


class _Turns:
    """One conversation under one template."""

    def __init__(
        self,
        renderer: ChatRenderer,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any],
    ) -> None:
        self._renderer = renderer
        self._messages = [
            {k: v for k, v in message.items() if k not in _OWN_KEYS} for message in messages
        ]
        self._tools = tools
        self._kwargs = template_kwargs
        self.text = self._render(self._messages)

    def _render(self, messages: Messages, prompt: bool = False) -> str:
        return self._renderer.render(messages, self._tools, prompt, **self._kwargs)

    def marked(self) -> list[tuple[int, int]] | None:
        """The spans of the template's generation blocks; None if it has none, or none were met
        (a macro or filter swallowed the marks)."""
        if not self._renderer.marks_generation:
            return None
        marked = self._renderer.render_marked(self._messages, self._tools, **self._kwargs)
        pieces = marked.replace(MARK_CLOSE, MARK_OPEN).split(MARK_OPEN)
        if "".join(pieces) != self.text or len(pieces) % 2 == 0:
            return None
        spans, at = [], 0
        for number, piece in enumerate(pieces):
            if number % 2:
                spans.append((at, at + len(piece)))
            at += len(piece)
        return spans or None

    def span(self, i: int) -> tuple[int, int]:
        """The characters of assistant message i, its end of turn included."""
        start, end = self._stable(i) or self._probed(i)
        if not self.text[start:end].strip() and _says_something(self._messages[i]):
            raise self._refusal(i)  # the template drops it
        return start, self._turn_end(start, end)

    def _stable(self, i: int) -> tuple[int, int] | None:
        """Between the prompt for turn i and the rendering up to it, if the text begins so."""
        if i == 0:
            return None
        try:
            prompt = self._render(self._messages[:i], prompt=True)
            is_last = i == len(self._messages) - 1
            whole = self.text if is_last else self._render(self._messages[: i + 1])
        except RequestError:  # templates may refuse a conversation that ends here
            return None
        if not whole.startswith(prompt) or not self.text.startswith(whole):
            return None
        return len(prompt), len(whole)

    def _probed(self, i: int) -> tuple[int, int]:
        """What changes when turn i becomes one unknown character; nothing else may."""
        other = self._render([*self._messages[:i], _ANSWER, *self._messages[i + 1 :]])
        at = other.find(_PROBE)
        tail = other[at + 1 :]
        if at < 0 or _PROBE in tail or not self.text.endswith(tail):
            raise self._refusal(i)
        end = len(self.text) - len(tail)
        ahead = _shared(self.text[:end], other[:at])
        prompt = self._prompt(i)
        start = self.text.rfind(prompt, 0, ahead) + len(prompt) if prompt else -1
        # Between the prompt and the answer the template may write only what it always writes there.
        if prompt and start >= len(prompt) and self._is_opening(prompt, other[start:at]):
            return start, end
        if ahead < at:
            raise self._refusal(i)
        return at, end

    def _prompt(self, i: int) -> str:
        """The generation prompt: what the template adds to ask for turn i."""
        before = self._messages[:i]
        if not before:
            return ""
        try:
            closed, asked = self._render(before), self._render(before, prompt=True)
        except RequestError:
            return ""
        return asked[len(closed) :] if asked.startswith(closed) else ""

    def _is_opening(self, prompt: str, opening: str) -> bool:
        """Whether `opening` (an empty reasoning block, say) is the template's, not a message's."""
        if not opening:
            return True
        lone = self._render([{"role": "user", "content": "?"}, _ANSWER])
        return lone[: lone.find(_PROBE)].endswith(prompt + opening)

    def _turn_end(self, start: int, end: int) -> int:
        """`end` moved to just behind the end-of-turn token, where the template writes one."""
        body = self.text[start:end].rstrip()
        if body.endswith(self._renderer.turn_ends):
            return start + len(body)
        rest = self.text[end:]
        after = rest.lstrip()
        for token in self._renderer.turn_ends:
            if after.startswith(token):
                return end + len(rest) - len(after) + len(token)
        return end

    def _refusal(self, i: int) -> RequestError:
        return RequestError(
            f"the chat template does not let messages[{i}] be told from the text around it; train "
            'on "all", or use a template with {% generation %} blocks',
            param=f"messages[{i}]",
        )


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
