"""Prompts of an exact token count, made of random words that are one token each.

A text of n such words is n tokens, so a trace's lengths are realised without encoding each prompt.
Without a tokenizer, short common words come close (the server's usage tells the true count).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Protocol

_WORD = re.compile(rb" [a-z]{3,9}")
# Enough variety that two prompts share no 16-token block by chance; checking more costs time.
_MAX_WORDS = 4096
_COMMON = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member "
    "law car city community name president team minute idea kid body information back parent face"
)


class WordTokenizer(Protocol):
    """What is needed of a tokenizer."""

    vocab_size: int

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to ids."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for."""
        ...


def one_token_words(tokenizer: WordTokenizer) -> tuple[str, ...]:
    """Words of this vocabulary, leading blank included, that stay one token inside a text."""
    found = []
    for token_id in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token_id)
        if _WORD.fullmatch(piece):
            found.append((token_id, piece.decode()))
    random.Random(0).shuffle(found)
    sound = [
        word
        for token_id, word in found[:_MAX_WORDS]
        if tokenizer.encode(word + word, add_special_tokens=False) == [token_id, token_id]
    ]
    return tuple(sound) or common_words()


def common_words() -> tuple[str, ...]:
    """Words that are one token in most vocabularies."""
    return tuple(" " + word for word in _COMMON.split())


class TextSource:
    """Random text by token count; the same key gives the same text."""

    def __init__(self, words: Sequence[str], seed: int | str) -> None:
        self._words = words
        self._seed = seed

    def text(self, num_tokens: int, *key: object) -> str:
        """A text of `num_tokens` tokens, drawn from the seed and `key`."""
        draw = random.Random(f"{self._seed}/{key}")
        return "".join(draw.choices(self._words, k=num_tokens))
