"""Rows of preferences: two answers to compare, one with a label, or a prompt alone.

The answers of a preference are texts or messages after `prompt`, or whole conversations that begin
alike: messages (UltraFeedback), or one text whose turns begin with "\\n\\nHuman:" and
"\\n\\nAssistant:" (Anthropic's HH). What both begin with is then the prompt; it ends before an
assistant's message.
"""

from __future__ import annotations

import json
import re
from typing import Any

from sterna.core.errors import RowError
from sterna.data.config import SourceConfig
from sterna.data.fields import (
    Conversation,
    Labelled,
    Pair,
    Plain,
    Prompt,
    Row,
    answered,
    exchange,
    objects_of,
    text_of,
    tools_of,
    with_system,
)

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_SPEAKERS = {role: name for name, role in _ROLES.items()}
Messages = list[dict[str, Any]]


def read_preference(picked: Row, source: SourceConfig, as_chat: bool) -> Pair:
    """`prompt` (may be missing), `chosen`, `rejected`, `margin`."""
    margin = picked.get("margin", 0.0)
    if not isinstance(margin, int | float):
        raise RowError(f"margin is a {type(margin).__name__}, a number is needed")
    chosen, rejected = (_as_messages(picked, name) for name in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        halves = [_answer(picked, name, source, as_chat) for name in ("chosen", "rejected")]
        return Pair(halves[0], halves[1], float(margin))
    if chosen[0].get("role") == "assistant":
        begun = _prompt_messages(picked) or [{"role": "user", "content": text_of(picked, "prompt")}]
    else:
        begun, chosen, rejected = _parted(chosen, rejected)
    if not as_chat and _is_dialogue(picked):
        return Pair(_dialogue(begun, chosen), _dialogue(begun, rejected), float(margin))
    rest = (tools_of(picked), _system(picked, source))
    better, worse = _conversation(begun, chosen, *rest), _conversation(begun, rejected, *rest)
    return Pair(better, worse, float(margin))


def read_labelled(picked: Row, source: SourceConfig, as_chat: bool) -> Labelled:
    """`prompt`, `completion`, and `label`: true where the answer is a desirable one."""
    label = picked.get("label")
    if not isinstance(label, bool) and label not in (0, 1):
        raise RowError(f"label is {label!r}, true or false is needed")
    return Labelled(_answer(picked, "completion", source, as_chat), bool(label))


def read_prompt(picked: Row, others: Row, source: SourceConfig, as_chat: bool) -> Prompt:
    """`prompt`, text or messages; `others` are the row's other columns."""
    begun = _prompt_messages(picked)
    system = _system(picked, source)
    if begun is None:
        words = text_of(picked, "prompt")
        if not as_chat:
            return Prompt(Plain(f"{system}\n\n{words}" if system else words, ""), others)
        begun = [{"role": "user", "content": words}]
    return Prompt(Conversation(with_system(begun, system), tools_of(picked)), others)


def _answer(picked: Row, name: str, source: SourceConfig, as_chat: bool) -> Conversation | Plain:
    """Prompt and the answer in field `name`, both texts or both messages."""
    begun, end = _prompt_messages(picked), picked.get(name)
    system = _system(picked, source)
    if begun is not None and isinstance(end, str) and not _is_json_list(end):
        return _conversation(
            begun, [{"role": "assistant", "content": text_of(picked, name)}], None, system
        )
    if isinstance(end, list) or (isinstance(end, str) and _is_json_list(end)):
        asked = begun or [{"role": "user", "content": text_of(picked, "prompt")}]
        return _conversation(asked, objects_of(picked, name), tools_of(picked), system)
    if "prompt" not in picked and name != "completion":
        raise RowError(
            "chosen and rejected are texts without a prompt; give `prompt`, messages, or turns "
            'that begin with "\\n\\nHuman:" and "\\n\\nAssistant:"'
        )
    return exchange(text_of(picked, "prompt", needed=as_chat), text_of(picked, name), system,
                    as_chat)  # fmt: skip


def _system(picked: Row, source: SourceConfig) -> str:
    return text_of(picked, "system", needed=False) or source.system


def _is_json_list(value: str) -> bool:
    return value.lstrip().startswith('[{"')


def _prompt_messages(picked: Row) -> Messages | None:
    """The prompt as messages; None for a text, or none."""
    prompt = picked.get("prompt")
    if isinstance(prompt, str) and not _is_json_list(prompt):
        return None
    return None if prompt is None else objects_of(picked, "prompt")


def _is_dialogue(picked: Row) -> bool:
    return isinstance(picked.get("chosen"), str) and "prompt" not in picked


def _as_messages(picked: Row, name: str) -> Messages | None:
    """A field's messages: as they are, or of Anthropic's text; None for any other text."""
    value = picked.get(name)
    if isinstance(value, list) or (isinstance(value, str) and _is_json_list(value)):
        return objects_of(picked, name)
    words = text_of(picked, name)
    if "prompt" in picked or not _TURN.match(words):
        return None
    pieces = _TURN.split(words)[1:]
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": _ROLES[who], "content": said.strip()} for who, said in pairs]


def _parted(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """The shared prompt and what follows it in each; RowError where there is none."""
    k = 0
    while k < min(len(chosen), len(rejected)) - 1 and chosen[k] == rejected[k]:
        k += 1
    while k > 0 and not chosen[k].get("role") == rejected[k].get("role") == "assistant":
        k -= 1
    if k == 0:
        raise RowError("chosen and rejected do not begin with one prompt that both answer")
    return chosen[:k], chosen[k:], rejected[k:]


def _conversation(begun: Messages, end: Messages, tools: Any, system: str) -> Conversation:
    """The prompt, which is not trained, and the answer."""
    answered(Conversation(end))
    asked = [{**message, "train": False} for message in begun]
    return Conversation(with_system([*asked, *end], system), tools)


def _dialogue(begun: Messages, end: Messages) -> Plain:
    """Anthropic's text again, for a model without a template."""
    if len(end) != 1:
        raise RowError(
            "chosen and rejected part before their last answer, which plain text cannot tell; use "
            "a model with a chat template"
        )
    said = "".join(f"\n\n{_SPEAKERS[str(m['role'])]}: {m['content']}" for m in begun)
    return Plain(f"{said}\n\nAssistant:", f" {end[0]['content']}")


def prompt_text(sample: Any) -> str:
    """What tells prompts apart by content: what is said before the first answer, without system
    prompts. Of a text without a prompt, all of it."""
    match sample:
        case Pair():
            return prompt_text(sample.chosen)
        case Labelled():
            return prompt_text(sample.answer)
        case Prompt():
            return prompt_text(sample.asked)
        case Plain():
            return (sample.prompt or sample.completion).strip()
    said: list[str] = []
    for message in sample.messages:
        if message.get("role") == "assistant":
            break
        if message.get("role") not in ("system", "developer"):
            said.append(_content(message.get("content")))
    return "\n\n".join(said).strip()


def _content(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
