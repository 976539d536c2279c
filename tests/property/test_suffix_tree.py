"""The C++ suffix tree does what the plain Python one does, draft by draft, and stays sound.

Few distinct tokens and a small depth make every rare event frequent: splits, merges, leaves that
change hands, sequences that repeat themselves, ends inside edges.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.engine.drafters.suffix_reference import ReferenceTree

_cpu = pytest.importorskip("sterna.kernels._cpu", reason="the extension is not built")
ESCAPE = 2.0

OPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 1)),
        st.tuples(st.just("extend"), st.integers(0, 9), st.lists(st.integers(0, 2), max_size=9)),
        st.tuples(st.just("remove"), st.integers(0, 9)),
    ),
    max_size=40,
)


class Pair:
    """Both trees, driven alike."""

    def __init__(self, max_depth):
        self.native = _cpu.SuffixTree(max_depth, ESCAPE)
        self.plain = ReferenceTree(max_depth, ESCAPE)
        self.roots = [(self.native.add_root(), self.plain.add_root()) for _ in range(2)]
        self.seqs = []  # (number there, number here)

    def apply(self, op):
        if op[0] == "add":
            a, b = self.roots[op[1]]
            self.seqs.append((self.native.add(a), self.plain.add(b)))
        elif self.seqs:
            a, b = self.seqs[op[1] % len(self.seqs)]
            if op[0] == "extend":
                self.native.extend(a, op[2])
                self.plain.extend(b, op[2])
            else:
                self.native.remove(a)
                self.plain.remove(b)
                self.seqs.remove((a, b))

    def check(self):
        assert self.native.check() == ""
        assert self.native.num_tokens == self.plain.num_tokens

    def compare(self, context, limit, min_prob):
        for a, b in self.roots:
            args = (context, limit, min_prob)
            assert self.native.draft(a, *args) == self.plain.draft(b, *args)
            assert self.native.draft_tree(a, *args) == self.plain.draft_tree(b, *args)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([2, 3, 5, 8]), OPS, st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_every_draft_is_the_references(max_depth, ops, context):
    pair = Pair(max_depth)
    for op in ops:
        pair.apply(op)
        pair.check()
        pair.compare(context, 6, 0.1)
        if pair.seqs:
            own = pair.plain.tokens(pair.seqs[-1][1])
            if own:  # what an engine asks: the end of a sequence that is in the tree
                pair.compare(own, 6, 0.1)
    # a draft tree without limits is the whole tree below the context
    pair.compare(context, 10_000, 0.0)
    for a, b in pair.seqs:
        assert list(pair.native.tokens(a)) == pair.plain.tokens(b)
    assert pair.plain.check() == ""


@settings(max_examples=50, deadline=None)
@given(OPS)
def test_an_emptied_tree_has_only_its_roots(ops):
    pair = Pair(4)
    for op in ops:
        pair.apply(op)
    while pair.seqs:
        pair.apply(("remove", 0))
    pair.check()
    assert pair.native.num_nodes == 2
    assert pair.native.num_tokens == 0
    for root, _ in pair.roots:
        pair.native.drop_root(root)
    assert pair.native.num_nodes == 0


def test_expected_drafts_of_a_text_that_repeats_itself():
    tree = _cpu.SuffixTree(16, ESCAPE)
    root = tree.add_root()
    seq = tree.add(root)
    tree.extend(seq, [1, 2, 3, 4, 5, 6, 1, 2, 3])
    tokens, probs, score, match_len = tree.draft(root, [1, 2, 3], 3, 0.0)
    assert (tokens, match_len) == ([4, 5, 6], 3)
    # the edge was entered twice (the context itself is the second), so 2 / (2 + escape / m)
    assert probs == pytest.approx([2 / (2 + 2 / 3), 2 / (2 + 2 / 4), 2 / (2 + 2 / 5)])
    expected, path = 0.0, 1.0
    for prob in probs:
        path *= prob
        expected += path
    assert score == pytest.approx(expected)


def test_ties_go_to_the_recent_and_counts_win_over_them():
    tree = _cpu.SuffixTree(8, ESCAPE)
    root = tree.add_root()
    for text in ([7, 1], [7, 2], [7, 3]):
        tree.extend(tree.add(root), text)
    assert tree.draft(root, [7], 1, 0.0)[0] == [3]
    tree.extend(tree.add(root), [7, 1])
    assert tree.draft(root, [7], 1, 0.0)[0] == [1]
    tokens, parents, *_ = tree.draft_tree(root, [7], 9, 0.0)
    assert (tokens, parents) == ([1, 3, 2], [-1, -1, -1])


def test_unknown_numbers_are_refused():
    tree = _cpu.SuffixTree(8, ESCAPE)
    root = tree.add_root()
    seq = tree.add(root)
    tree.extend(seq, [1])
    for call in (
        lambda: tree.add(99),
        lambda: tree.add(root + 1),  # a node, but no root
        lambda: tree.extend(seq + 1, [1]),
        lambda: tree.remove(seq + 1),
        lambda: tree.drop_root(root),
        lambda: _cpu.SuffixTree(1, ESCAPE),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.slow
def test_a_million_operations_leave_it_sound():
    """Texts of shared phrases come, grow side by side and go; sound at every 50,000th operation."""
    random_ = random.Random(5)
    phrases = [[random_.randrange(500) for _ in range(random_.randrange(2, 40))] for _ in range(60)]
    tree = _cpu.SuffixTree(64, ESCAPE)
    root = tree.add_root()
    seqs = []
    for step in range(1_000_000):
        kind = random_.random()
        if kind < 0.01 or not seqs:
            seqs.append(tree.add(root))
        elif kind < 0.02 and len(seqs) > 50:
            tree.remove(seqs.pop(random_.randrange(len(seqs))))
        elif kind < 0.2:
            tree.extend(random_.choice(seqs), random_.choice(phrases))
        elif kind < 0.9:
            tree.extend(random_.choice(seqs), [random_.randrange(500)])
        else:
            phrase = random_.choice(phrases)
            tokens, probs, *_ = tree.draft(root, phrase, 16, 0.1)
            assert len(tokens) == len(probs)
        if step % 50_000 == 0:
            assert tree.check() == ""
    for seq in seqs:
        tree.remove(seq)
    assert tree.check() == ""
    assert tree.num_nodes == 1
