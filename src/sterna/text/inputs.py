"""Texts and pairs of texts to token ids in batches, for models that read whole texts at once.

`tokenizers` encodes a batch on all cores and gives up Python's lock meanwhile, so tokenising runs
beside computing. Truncation is the library's own, on a copy of the tokenizer: its setting is part
of the object, and others use the original.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as Backend

from sterna.core.errors import ContextLengthError, RequestError
from sterna.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class EncodedText:
    """One text's tokens. types: which half of a pair each belongs to, None = all the first."""

    ids: Sequence[int]
    types: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.ids)


class InputEncoder:
    """Encodes for one model whose texts hold at most `max_tokens`. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, is_lowercased: bool = False) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._is_lowercased = is_lowercased
        self._lock = threading.Lock()

    def texts(self, texts: Sequence[str], truncate: int | None = None) -> list[EncodedText]:
        """One a text. truncate: cut to so many tokens, -1 = to max_tokens; None = refuse longer.

        Raises ContextLengthError for a text that is too long and RequestError for one that is not
        Unicode or holds no token at all.
        """
        texts = [text.lower() for text in texts] if self._is_lowercased else texts
        if truncate is not None:
            found = [EncodedText(e.ids) for e in self._cut(texts, truncate)]
        elif len(texts) == 1:  # no thread pool for a single one
            found = [EncodedText(self.tokenizer.encode(texts[0]))]
        else:
            found = [EncodedText(ids) for ids in self.tokenizer.encode_batch(texts)]
        self._check(found)
        return found

    def pairs(
        self, pairs: Sequence[tuple[str, str]], truncate: int | None = None
    ) -> list[EncodedText]:
        """One a pair, with token types; as `texts`. The longer half is cut first."""
        if self._is_lowercased:
            pairs = [(a.lower(), b.lower()) for a, b in pairs]
        if truncate is None:
            encoded = _encoded(self._copy, pairs)
        else:
            encoded = self._cut(pairs, truncate)
        found = [EncodedText(e.ids, e.type_ids) for e in encoded]
        self._check(found)
        return found

    def check_ids(self, ids: Sequence[int], vocab_size: int) -> EncodedText:
        """A client's own token ids; RequestError when one is not in the vocabulary."""
        bad = next((i for i in ids if not 0 <= i < vocab_size), None)
        if bad is not None:
            raise RequestError(
                f"token id {bad} is not in the vocabulary of {vocab_size:,}", param="input"
            )
        text = EncodedText(ids)
        self._check([text])
        return text

    @cached_property
    def _copy(self) -> Any:
        return Backend.from_str(self.tokenizer.to_json())

    @cached_property
    def _cutting_copy(self) -> Any:
        return Backend.from_str(self.tokenizer.to_json())

    def _cut(self, inputs: Sequence[Any], truncate: int) -> list[Any]:
        limit = self.max_tokens if truncate == -1 else truncate
        if not 1 <= limit <= self.max_tokens:
            raise RequestError(
                f"truncate_prompt_tokens is {truncate}; use -1 (the model's limit) or 1 to "
                f"{self.max_tokens:,}",
                param="truncate_prompt_tokens",
            )
        special = self._cutting_copy.num_special_tokens_to_add(isinstance(inputs[0], tuple))
        if limit <= special:
            raise _too_few(limit, special)
        with self._lock:
            self._cutting_copy.enable_truncation(limit)
            return _encoded(self._cutting_copy, inputs)

    def _check(self, texts: Sequence[EncodedText]) -> None:
        for i, text in enumerate(texts):
            if not text.ids:
                raise RequestError(f"input {i} has no tokens; give a text", param="input")
            if len(text) > self.max_tokens:
                raise ContextLengthError(
                    f"input {i} has {len(text):,} tokens, the model takes {self.max_tokens:,}; "
                    "shorten it, or set truncate_prompt_tokens to -1 to cut it",
                    param="input",
                )


def _encoded(backend: Any, inputs: Sequence[Any]) -> list[Any]:
    try:
        return list(backend.encode_batch_fast(list(inputs)))
    except (TypeError, UnicodeEncodeError) as error:
        raise RequestError(
            "the text holds lone surrogates (half of a UTF-16 pair); send valid Unicode"
        ) from error


def _too_few(limit: int, special: int) -> RequestError:
    return RequestError(
        f"truncate_prompt_tokens is {limit}; the model's own special tokens alone are {special}",
        param="truncate_prompt_tokens",
    )
