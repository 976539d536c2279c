"""Which suffix tree serves: the C++ one, or without the extension the plain Python one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sterna.core.log import get_logger
from sterna.engine.drafters.suffix_reference import LinearDraft, ReferenceTree, TreeDraft

log = get_logger(__name__)

# How many occurrences a token must have to be believed, divided by the length of the match: see
# suffix_draft.cpp. Fitted by `bench/drafters.py`.
ESCAPE = 4.0
# A node a token and depth in Python: what a long match would tell is given up.
REFERENCE_DEPTH = 8


class SuffixTree(Protocol):
    """All suffixes of many sequences up to a depth, with counts. Numbers name roots, sequences."""

    @property
    def num_nodes(self) -> int:
        """Nodes in use."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory in use."""
        ...

    def add_root(self) -> int:
        """An empty tree beside the others, in the same memory."""
        ...

    def drop_root(self, root: int) -> None:
        """Forget an empty tree."""
        ...

    def add(self, root: int) -> int:
        """An empty sequence under `root`."""
        ...

    def extend(self, seq: int, tokens: Sequence[int] | NDArray[np.int32]) -> None:
        """Append tokens to a sequence."""
        ...

    def remove(self, seq: int) -> None:
        """Take a sequence and all its suffixes out."""
        ...

    def tokens(self, seq: int) -> list[int]:
        """The text of a sequence."""
        ...

    def draft(
        self, root: int, context: Sequence[int], max_tokens: int, min_prob: float
    ) -> LinearDraft:
        """(tokens, probs, score, match_len) of the best continuation of the context's last tokens.

        `probs` are P(token | the ones before), paths below `min_prob` are not followed, `score`
        is the expected number of accepted tokens. No tokens: nothing is likely enough.
        """
        ...

    def draft_tree(
        self, root: int, context: Sequence[int], max_tokens: int, min_prob: float
    ) -> TreeDraft:
        """(tokens, parents, probs, score, match_len): the likeliest paths; parent -1 = context."""
        ...

    def check(self) -> str:
        """What is wrong with the structure, or nothing. Slow: counts everything again."""
        ...


def new_tree(max_depth: int) -> SuffixTree:
    """An empty suffix tree of texts up to `max_depth` tokens."""
    try:
        from sterna.kernels._cpu import SuffixTree as NativeTree
    except ImportError as error:
        _warn_once(str(error))
        return ReferenceTree(min(max_depth, REFERENCE_DEPTH), ESCAPE)
    return NativeTree(max_depth, ESCAPE)


@cache
def _warn_once(reason: str) -> None:
    log.warning("suffix drafts come from the slow reference tree: %s", reason)
