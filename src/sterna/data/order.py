"""The order of rows, as pure functions of (seed, position): nothing to store, nothing to replay.

A permutation of n rows is a Feistel network over the next power of four, walked until it lands
below n (Black and Rogaway 2002, "cycle walking"): O(1) memory for any n, the same on every
machine and NumPy version, and row i of epoch e is found without the rows before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

_MASK = (1 << 64) - 1
_ROUNDS = 6


def mix(*words: int) -> int:
    """A 64-bit hash of integers (splitmix64, Steele et al. 2014), the only source of chance."""
    state = 0
    for word in words:
        state = (state ^ (word & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def uniform(*words: int) -> float:
    """A number in [0, 1) from integers."""
    return (mix(*words) >> 11) / (1 << 53)


class Permutation:
    """A permutation of range(n) by key."""

    def __init__(self, n: int, key: int) -> None:
        self._n = n
        self._bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self._keys = [mix(key, n, number) for number in range(_ROUNDS)]

    def __call__(self, i: int) -> int:
        """Where i goes; `0 <= i < n`."""
        i = self._once(i)
        while i >= self._n:
            i = self._once(i)
        return i

    def _once(self, i: int) -> int:
        bits = self._bits
        mask = (1 << bits) - 1
        left, right = i >> bits, i & mask
        for key in self._keys:
            left, right = right, left ^ (mix(key ^ right) & mask)
        return left << bits | right


class Blocks:
    """A permutation that stays near: blocks in a permuted order, rows permuted inside buffers.

    `sizes` are the rows of the blocks that are read at once (a Parquet row group, a whole file);
    consecutive `buffer` rows of the block order are permuted among themselves.
    """

    def __init__(
        self, sizes: Sequence[int], buffer: int, key: int, *, shuffle_blocks: bool
    ) -> None:
        self._n = sum(sizes)
        self._buffer = buffer
        self._key = key
        order = Permutation(len(sizes), mix(key, 1))
        turn = [order(i) if shuffle_blocks else i for i in range(len(sizes))]
        starts = [0, *accumulate(sizes)]
        self._first = [starts[block] for block in turn]
        self._ends = list(accumulate(sizes[block] for block in turn))

    def __call__(self, i: int) -> int:
        """The row that comes i-th."""
        low = i - i % self._buffer
        size = min(self._buffer, self._n - low)
        i = low + Permutation(size, mix(self._key, 2, low))(i - low)
        at = bisect_right(self._ends, i)
        return self._first[at] + i - (self._ends[at - 1] if at else 0)
