"""Block tables: how sequences get, share, copy and give back KV blocks.

The scheduler decides who runs; this file does what that means for the BlockPool. All operations
are all-or-nothing: a False leaves the pool and the sequence as they were.
"""

from __future__ import annotations

import numpy as np

from sterna.engine.kv import NULL_BLOCK, BlockPool, block_key, root_key
from sterna.engine.sequence import Sequence


class BlockTables:
    """Owns the pool and the tables of all sequences.

    `copies` are (from, to) block pairs that the runner must carry out, in order, before the next
    forward (copy-on-write of forked samples).
    """

    def __init__(self, pool: BlockPool, max_blocks: int, enable_prefix_cache: bool) -> None:
        self.pool = pool
        self.max_blocks = max_blocks  # width of a block table
        self.enable_prefix_cache = enable_prefix_cache
        self.copies: list[tuple[int, int]] = []

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.pool.block_size)

    def admit(self, seq: Sequence, headroom: int) -> bool:
        """Give a waiting sequence blocks for all its tokens, the cached prefix included.

        False when fewer than `headroom` blocks would stay free. On success `num_computed` is the
        length of the cached prefix; at least one token is always left to compute, because its
        logits are what the next token is sampled from.
        """
        prefix = self._match(seq)
        fresh = self.num_blocks_for(seq.num_tokens) - len(prefix)
        if fresh + self.pool.num_idle(prefix) + headroom > self.pool.num_free:
            return False
        self.pool.share(prefix)
        blocks = self.pool.allocate(fresh)
        assert blocks is not None, "counted above"
        seq.num_computed = len(prefix) * self.pool.block_size
        seq.table = np.zeros(self.max_blocks, np.int32)
        self._extend(seq, prefix + blocks)
        return True

    def ensure_slot(self, seq: Sequence) -> bool:
        """Make the slot of the next token writable: a new block, or a copy of a shared one."""
        block_idx = seq.num_computed // self.pool.block_size
        if block_idx == len(seq.blocks):
            fresh = self.pool.allocate(1)
            if fresh is None:
                return False
            self._extend(seq, fresh)
            return True
        return not self.pool.is_shared(seq.blocks[block_idx]) or self._copy(seq, block_idx)

    def extend_slots(self, seq: Sequence, count: int, keep_free: int) -> int:
        """Make up to `count` slots after the next token's writable, and leave `keep_free` blocks.

        Only after `ensure_slot`. Returns how many slots there are now; takes no other's block.
        """
        size = self.pool.block_size
        wanted = self.num_blocks_for(seq.num_computed + 1 + count) - len(seq.blocks)
        fresh = self.pool.allocate(max(0, min(wanted, self.pool.num_free - keep_free)))
        assert fresh is not None, "counted above"
        self._extend(seq, fresh)
        return min(count, len(seq.blocks) * size - seq.num_computed - 1)

    def shrink(self, seq: Sequence) -> None:
        """Give back the blocks behind the last computed token: those of rejected drafts."""
        kept = self.num_blocks_for(seq.num_computed)
        extra = seq.blocks[kept:]
        if extra:
            assert seq.table is not None, "a sequence with blocks has a table"
            self.pool.free(extra)
            seq.table[kept : len(seq.blocks)] = NULL_BLOCK
            del seq.blocks[kept:]

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` share all blocks of `parent`; the first to write the last one copies it."""
        self.pool.share(parent.blocks)
        child.num_computed = parent.num_computed
        child.keys = list(parent.keys)
        child.num_published = parent.num_published
        child.table = np.zeros(self.max_blocks, np.int32)
        self._extend(child, parent.blocks)

    def publish(self, seq: Sequence) -> None:
        """Offer the blocks that are full and computed to others."""
        full = seq.num_computed // self.pool.block_size
        if full <= seq.num_published or not self.enable_prefix_cache:
            return
        keys = self._keys(seq, full)
        for block_idx in range(seq.num_published, full):
            self.pool.publish(seq.blocks[block_idx], keys[block_idx])
        seq.num_published = full

    def release(self, seq: Sequence) -> None:
        """Give all blocks back; their content stays findable until it is evicted."""
        self.pool.free(seq.blocks)
        seq.blocks = []
        seq.table = None
        seq.num_computed = 0
        seq.num_published = 0

    def release_damaged(self, seq: Sequence) -> list[int]:
        """Like `release`, but nobody may find the content. Returns blocks that nobody holds."""
        blocks = list(seq.blocks)
        self.pool.forget(blocks)
        self.release(seq)
        return [block for block in blocks if self.pool.num_idle((block,))]

    def _match(self, seq: Sequence) -> list[int]:
        if not self.enable_prefix_cache or seq.skips_prefix_cache:
            return []
        return self.pool.match(self._keys(seq, (seq.num_tokens - 1) // self.pool.block_size))

    def _keys(self, seq: Sequence, count: int) -> list[bytes]:
        size = self.pool.block_size
        keys = seq.keys
        for block_idx in range(len(keys), count):
            state = seq.state
            root = (state.salt, state.rope_offset, state.adapter_serial)
            parent = keys[-1] if keys else root_key(*root)
            keys.append(block_key(parent, seq.tokens(block_idx * size, size)))
        return keys[:count]

    def _extend(self, seq: Sequence, blocks: list[int]) -> None:
        assert seq.table is not None, "a sequence with blocks has a table"
        start = len(seq.blocks)
        seq.blocks.extend(blocks)
        seq.table[start : len(seq.blocks)] = blocks

    def _copy(self, seq: Sequence, block_idx: int) -> bool:
        fresh = self.pool.allocate(1)
        if fresh is None:
            return False
        assert seq.table is not None, "a sequence with blocks has a table"
        old = seq.blocks[block_idx]
        self.copies.append((old, fresh[0]))
        self.pool.free([old])
        seq.blocks[block_idx] = fresh[0]
        seq.table[block_idx] = fresh[0]
        return True
