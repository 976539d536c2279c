"""The paged KV cache's bookkeeping: which block belongs to whom. No tensor lives here.

A block holds the keys and values of `block_size` consecutive tokens of one sequence, in all
layers. A block is in exactly one of three states:

    held      refs > 0   in the table of one or more sequences (shared prefixes, forked samples)
    cached    refs = 0, has a key   nobody holds it, but its content can be found by `match`
    blank     refs = 0, no key      nothing worth keeping

Cached and blank blocks together are the free list. Blank blocks are handed out first, then cached
ones, least recently used first. A sequence's blocks are freed last block first, so that eviction
eats a cached prefix from its tail and what remains is still a prefix.

A key names the content: blake2b(parent key, the block's tokens), with the tenant's salt in the
root, so equal keys mean equal prefixes. 16 bytes: two different prefixes collide with probability
2^-64 after 2^32 blocks, and a tenant cannot aim for a collision as with Python's `hash`.

Block 0 is the null block: it fills unused entries of block tables and is never handed out.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

NULL_BLOCK = 0
_KEY_BYTES = 16


def root_key(salt: str, rope_offset: int, adapter: int = 0) -> bytes:
    """Parent key of a sequence's first block.

    `salt` separates tenants; `rope_offset` separates the LongRope tables, and `adapter` (its
    serial, 0 = none) the adapters, whose keys and values differ for equal tokens.
    """
    data = f"{rope_offset}|{salt}".encode()
    person = adapter.to_bytes(8, "little")  # no salt can spell it
    return hashlib.blake2b(data, digest_size=_KEY_BYTES, person=person).digest()


def block_key(parent: bytes, tokens: NDArray[np.int32]) -> bytes:
    """Key of a full block of int32 `tokens` that follows the prefix named `parent`."""
    return hashlib.blake2b(parent + tokens.tobytes(), digest_size=_KEY_BYTES).digest()


class BlockPool:
    """Reference counts, keys and the free list of `num_blocks` blocks (block 0 included)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}; the pool needs at least 2 blocks")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._refs[NULL_BLOCK] = 1
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out when nobody holds any."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds; cached ones count, they are evicted on demand."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks whose content `match` can find, held or not."""
        return len(self._key_of)

    def is_shared(self, block: int) -> bool:
        """More than one sequence holds `block`: it must be copied before it is written."""
        return self._refs[block] > 1

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, or None (and nothing taken) when fewer are free."""
        if count > len(self._free):
            return None
        return [self._take_oldest() for _ in range(count)]

    def share(self, blocks: Iterable[int]) -> None:
        """Hold `blocks` once more. Cached blocks leave the free list."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Give up one hold on each block of a table, last block first."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} is freed twice"
            assert block != NULL_BLOCK, "the null block is never held by a sequence"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._put_back(block)

    def publish(self, block: int, key: bytes) -> None:
        """Name a held block's content. The first block to publish a key keeps it."""
        assert self._refs[block] > 0, f"block {block} is published but not held"
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of `keys`. The caller must `share` them to hold."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are in the free list (sharing them uses up that many)."""
        return sum(self._refs[block] == 0 for block in blocks)

    def forget(self, blocks: Iterable[int]) -> None:
        """Drop the keys of `blocks`, so that damaged content is never found again."""
        for block in blocks:
            self._drop_key(block)
            if self._refs[block] == 0:
                self._free.move_to_end(block, last=False)

    def clear_cache(self) -> None:
        """Forget all content (new weights make old keys and values worthless)."""
        self.forget(list(self._key_of))

    def check_integrity(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Assert every invariant of this file; with `tables`, that they hold exactly the refs.

        For tests: O(num_blocks).
        """
        assert self._refs[NULL_BLOCK] == 1, "the null block changed hands"
        assert NULL_BLOCK not in self._free, "the null block is free"
        for block in range(1, self.num_blocks):
            assert self._refs[block] >= 0, f"block {block} has negative refs"
            is_free = block in self._free
            assert is_free == (self._refs[block] == 0), f"block {block} is lost or doubled"
        assert len(self._key_of) == len(self._block_of), "keys and blocks do not pair up"
        for block, key in self._key_of.items():
            assert self._block_of[key] == block, f"block {block} lost its key"
        if tables is not None:
            self._check_refs(tables)

    def _check_refs(self, tables: Iterable[Sequence[int]]) -> None:
        held = Counter(block for table in tables for block in table)
        for block in range(1, self.num_blocks):
            assert self._refs[block] == held[block], (
                f"block {block} has {self._refs[block]} refs but is in {held[block]} tables"
            )

    def _take_oldest(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._drop_key(block)
        self._refs[block] = 1
        return block

    def _put_back(self, block: int) -> None:
        self._free[block] = None
        if block not in self._key_of:
            self._free.move_to_end(block, last=False)

    def _drop_key(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
