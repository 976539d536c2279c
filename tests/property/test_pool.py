"""BlockPool against a model: random operations never lose, double or corrupt a block."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sterna.engine.kv import BlockPool, block_key, root_key

NUM_BLOCKS = 24


class Model:
    """The pool with its operations, and what must be true written down naively."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.pool = BlockPool(NUM_BLOCKS, 16)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # block -> key published for it, while valid
        self.num_keys = 0

    def step(self) -> None:
        name = self.rng.choice(
            ["allocate", "allocate", "free", "fork", "publish", "match", "forget"]
        )
        getattr(self, name)()

    def allocate(self) -> None:
        count = self.rng.randint(0, 8)
        free = self.pool.num_free
        blocks = self.pool.allocate(count)
        if count > free:
            assert blocks is None
            assert self.pool.num_free == free
            return
        assert blocks is not None
        held = {block for table in self.tables for block in table}
        assert len(set(blocks)) == count
        assert not held & set(blocks)
        assert 0 not in blocks
        for block in blocks:
            self.content.pop(block, None)  # evicted
        self.tables.append(blocks)

    def free(self) -> None:
        if self.tables:
            self.pool.free(self.tables.pop(self.rng.randrange(len(self.tables))))

    def fork(self) -> None:
        if self.tables:
            table = list(self.rng.choice(self.tables))
            self.pool.share(table)
            self.tables.append(table)

    def publish(self) -> None:
        blocks = [block for table in self.tables for block in table if block not in self.content]
        if blocks:
            block = self.rng.choice(blocks)
            self.num_keys += 1
            key = self.num_keys.to_bytes(16, "big")
            self.pool.publish(block, key)
            self.content[block] = key

    def match(self) -> None:
        """Everything published and not evicted is found, and can be held again."""
        if not self.content:
            return
        block = self.rng.choice(list(self.content))
        assert self.pool.match([self.content[block], b"never published"]) == [block]
        if self.rng.random() < 0.5:
            self.pool.share([block])
            self.tables.append([block])

    def forget(self) -> None:
        if self.content and self.rng.random() < 0.2:
            block = self.rng.choice(list(self.content))
            key = self.content.pop(block)
            self.pool.forget([block])
            assert self.pool.match([key]) == []

    def check(self) -> None:
        self.pool.check_integrity(self.tables)
        held = {block for table in self.tables for block in table}
        assert self.pool.num_free == NUM_BLOCKS - 1 - len(held)
        assert self.pool.num_cached == len(self.content)


@pytest.mark.parametrize("seed", range(4))
def test_25000_random_operations(seed):
    model = Model(seed)
    for _ in range(25_000):
        model.step()
        if model.rng.random() < 0.05:
            model.check()
    for table in model.tables:
        model.pool.free(table)
    model.tables = []
    model.check()
    assert model.pool.num_free == NUM_BLOCKS - 1


def test_eviction_is_lru_and_eats_a_prefix_from_its_tail():
    pool = BlockPool(5, 16)
    first, second = pool.allocate(2), pool.allocate(2)
    keys = {block: bytes([block]) * 16 for block in (*first, *second)}
    for block, key in keys.items():
        pool.publish(block, key)
    pool.free(first)
    pool.free(second)
    evicted = [pool.allocate(1)[0] for _ in range(4)]
    assert evicted == [first[1], first[0], second[1], second[0]]


def test_blank_blocks_are_taken_before_cached_ones():
    pool = BlockPool(4, 16)
    cached, blank = pool.allocate(2), pool.allocate(1)
    for block in cached:
        pool.publish(block, bytes([block]) * 16)
    pool.free(cached)
    pool.free(blank)
    assert pool.allocate(1) == blank
    assert pool.num_cached == 2


def test_freeing_twice_is_caught():
    pool = BlockPool(4, 16)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.free(blocks)


def test_keys_name_the_whole_prefix_salt_and_rope_table():
    tokens = np.arange(16, dtype=np.int32)
    roots = [root_key("", 0), root_key("a", 0), root_key("", 4096)]
    keys = {block_key(root, tokens) for root in roots}
    keys |= {block_key(key, tokens) for key in list(keys)}
    assert len(keys) == 6
    assert block_key(roots[0], tokens) != block_key(roots[0], tokens[::-1].copy())
