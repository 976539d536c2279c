"""Packing: whole documents, nothing lost, positions from 0, fullest row first."""

from __future__ import annotations

import numpy as np
import pytest

from sterna.data.pack import IGNORE, NO_SOURCE, Document, best_fit, filler, greedy, join, pack


def document(*tokens, source=0):
    tokens = np.array(tokens, np.int32)
    return Document(tokens, np.append(tokens[1:], IGNORE).astype(np.int32), source)


def test_join_sets_borders_positions_and_sources():
    row = join([document(5, 6, 7), document(8), document(9, 10, source=2)])
    assert row.tokens.tolist() == [5, 6, 7, 8, 9, 10]
    assert row.targets.tolist() == [6, 7, IGNORE, IGNORE, 10, IGNORE]
    assert row.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert row.starts.tolist() == [0, 3, 4, 6]
    assert row.sources == (0, 0, 2)
    assert row.num_targets == 3
    assert {a.dtype for a in (row.tokens, row.targets, row.positions, row.starts)} == {
        np.dtype(np.int32)
    }


def test_filler_trains_nothing():
    row = filler()
    assert row.num_targets == 0 and row.sources == (NO_SOURCE,) and row.starts.tolist() == [0, 1]


def test_best_fit_takes_the_fullest_row_with_room():
    # 6 and 5 open rows of 10 (rooms 4 and 5); 4 goes where exactly 4 are free, 3 beside the 5.
    assert best_fit([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]
    assert best_fit([10, 10], 10) == [[0], [1]]
    assert best_fit([], 10) == []


def test_greedy_keeps_the_order():
    assert greedy([6, 5, 4, 3], 10) == [[0], [1, 2], [3]]


def test_none_is_a_row_a_document():
    rows = pack([document(1, 2), document(3, 4)], 10, "none")
    assert [row.tokens.tolist() for row in rows] == [[1, 2], [3, 4]]


def test_best_fit_fills_chat_lengths():
    # Log-normal lengths of median 250, as instructions with answers have, in rows of 2,048.
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 4000).astype(int).clip(8, 2048)
    fill = {f: lengths.sum() / 2048 / len(f(lengths.tolist(), 2048)) for f in (best_fit, greedy)}
    assert fill[best_fit] > 0.995
    assert fill[greedy] < 0.95  # what best_fit is for


@pytest.mark.parametrize("method", ["best_fit", "greedy", "none"])
def test_too_long_a_document_is_our_own_fault(method):
    with pytest.raises(AssertionError):
        pack([document(1, 2, 3)], 2, method)
