"""Which tokens a speculator with a small vocabulary drafts: the most frequent of its data."""

from __future__ import annotations

from itertools import islice

import numpy as np

from sterna.core.errors import ConfigError
from sterna.data.loader import Loader
from sterna.data.pack import IGNORE
from sterna.model.hub import resolve_model
from sterna.text.tokenizer import load_tokenizer
from sterna.train.config import Recipe

_MAX_TOKENS = 1_000_000  # orders some ten thousand tokens; seconds of reading


def frequent_tokens(recipe: Recipe) -> tuple[int, ...]:
    """The `distill.draft_vocab` most frequent trained tokens, ascending.

    Ties, and tokens that the data lack, go by id: a BPE vocabulary lists frequent merges first.
    Deterministic. ConfigError when the vocabulary is smaller.
    """
    wanted = recipe.distill.draft_vocab
    tokenizer = load_tokenizer(resolve_model(recipe.model.path))
    if wanted > tokenizer.vocab_size:
        raise ConfigError(
            f"distill.draft_vocab is {wanted:,}, the vocabulary {tokenizer.vocab_size:,}; lower it"
        )
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    with Loader(recipe.data, tokenizer) as loader:
        rows = islice(loader, max(1, _MAX_TOKENS // recipe.data.seq_len))
        for row in rows:
            counts += np.bincount(row.targets[row.targets != IGNORE], minlength=len(counts))
            if counts.sum() >= _MAX_TOKENS:
                break
    order = np.argsort(-counts, kind="stable")[:wanted]
    return tuple(sorted(order.tolist()))
