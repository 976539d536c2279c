"""What the two readers (GGUF and Hugging Face folder) hand to the Tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer as Backend

# How chat models spell "my turn is over". A model may name another token as its EOS (the end of a
# document) and leave this one to the template, so it is looked up there.
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|eot|>",
    "<end_of_turn>",
    "<turn|>",
    "<|endofturn|>",
    "<|end_of_turn|>",
    "<|return|>",
)


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """What a model's files say about its tokenizer. `special_tokens` maps roles to token texts,
    for example `{"bos_token": "<s>"}`; chat templates read them."""

    backend: Backend
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)


def turn_end_ids(backend: Backend, chat_template: str | None) -> tuple[int, ...]:
    """Ids of the end-of-turn tokens that the template writes and the vocabulary knows."""
    if not chat_template:
        return ()
    ids = (backend.token_to_id(token) for token in TURN_ENDS if token in chat_template)
    return tuple(token_id for token_id in ids if token_id is not None)


def unique(ids: list[int]) -> tuple[int, ...]:
    """The ids in order, each once."""
    return tuple(dict.fromkeys(ids))
