"""Orders are permutations, differ by key and stay the same for ever."""

from __future__ import annotations

import numpy as np
import pytest

from sterna.data.order import Blocks, Permutation, mix, uniform


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 1025])
@pytest.mark.parametrize("key", [0, 1, 2**63])
def test_permutation(n, key):
    order = Permutation(n, key)
    assert sorted(map(order, range(n))) == list(range(n))


def test_permutations_look_random():
    n = 2000
    first, second = ([Permutation(n, key)(i) for i in range(n)] for key in (1, 2))
    # Correlations of random permutations are N(0, 1/n): 5 sigma is 0.11.
    assert abs(np.corrcoef(first, range(n))[0, 1]) < 0.11
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.11
    # Every place gives each of three rows about equally often (mean 1000, sigma 26).
    counts = np.bincount([Permutation(3, key)(0) for key in range(3000)], minlength=3)
    assert np.all(abs(counts - 1000) < 130)


def test_the_order_is_part_of_the_contract():
    # A resumed run depends on these numbers: they must not change between versions.
    assert [Permutation(10, 7)(i) for i in range(10)] == [8, 9, 7, 0, 3, 1, 5, 6, 4, 2]
    assert mix(1, 2) == 0xBCD9DBB49673066B
    assert 0 <= uniform(1, 2) < 1


def test_blocks_keep_near():
    sizes = [10, 20, 5, 40]
    for shuffle_blocks in (True, False):
        order = Blocks(sizes, 8, 3, shuffle_blocks=shuffle_blocks)
        rows = [order(i) for i in range(sum(sizes))]
        assert sorted(rows) == list(range(75))
        assert rows != list(range(75))
    assert all(abs(row - i) < 8 for i, row in enumerate(rows))  # the last: blocks in file order
