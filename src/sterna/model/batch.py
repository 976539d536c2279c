"""The flat Batch: the only thing a model ever sees.

T tokens of S sequences are packed without padding. A packed training row, a SplitFuse step that
mixes prompt chunks with decodes, a draft to verify and an embedding request are all this type;
there is no `is_prefill`. Training has `kv=None`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVView:
    """Where this batch's keys and values live in the paged cache.

    B is the width of the block table. Unused table entries hold 0, which is a valid block that
    no sequence owns (the null block), so a kernel may read it but never depends on its content.
    """

    # One opaque cache tensor a layer, or a group of layers (SwiftKV): see kernels.ops.new_kv_cache
    layers: tuple[Tensor, ...]
    block_tables: Tensor  # [S, B] int32
    slots: Tensor  # [T] int64   block * block_size + offset where each new token's K/V is written
    block_size: int


@dataclass(frozen=True, slots=True)
class SharedKeys:
    """Which rows of a training batch its sequences see, where several share a prefix.

    Sequence s sees the rows `rows[starts[s] : starts[s + 1]]`, in this order: those of its prefix,
    which another sequence owns and computes, then its own.
    """

    rows: Tensor  # [K] int32
    starts: Tensor  # [S + 1] int32


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of S sequences, packed without padding."""

    tokens: Tensor  # [T] int32
    positions: Tensor  # [T] int32   rope (or learned-position) row of each token
    query_starts: Tensor  # [S + 1] int32   where each sequence's new tokens begin
    context_lens: Tensor  # [S] int32   cached + new tokens
    output_rows: Tensor | None = None  # [R] int32   rows whose hidden state is wanted; None = all
    kv: KVView | None = None
    # [S + 1] int32   where each sequence's output rows begin in [0, R]. In serving only (None in
    # training): there the output rows of a sequence are the last rows of its chunk, or none.
    output_starts: Tensor | None = None
    shared: SharedKeys | None = None  # in training only; None = each sequence sees itself

    @property
    def row_starts(self) -> Tensor:
        """[S + 1] int32: where each sequence's rows begin among those of the output."""
        if self.output_rows is None:
            return self.query_starts
        assert self.output_starts is not None, "a batch to serve says whose its output rows are"
        return self.output_starts
