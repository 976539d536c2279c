"""The suffix tree in plain Python, a node a token: the specification and the oracle of the C++ one.

Holds, for every sequence and every start, the text from there to its end or to `max_depth` tokens.
The count of a path is the number of (sequence, start) whose text begins with it. Kept simple, it
takes about `max_depth` nodes a token (kernels/cpu/suffix_tree.h: at most two) and serves where the
extension is not built, with a small depth.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

LinearDraft = tuple[list[int], list[float], float, int]
TreeDraft = tuple[list[int], list[int], list[float], float, int]
NODE_BYTES = 250  # measured: a node, its dict and list entries


@dataclass(slots=True, eq=False)
class Node:
    """The end of a path. `children` fall by count; who changes goes in front of its new equals."""

    parent: Node | None = None
    token: int = -1
    depth: int = 0
    count: int = 0
    children: list[Node] = field(default_factory=list)
    by_token: dict[int, Node] = field(default_factory=dict)

    def place(self, child: Node, change: int) -> None:
        """Change a child's count and move it to where it belongs; at 0 it is gone."""
        if child in self.children:
            self.children.remove(child)
        child.count += change
        if child.count == 0:
            del self.by_token[child.token]
            return
        at = (i for i, other in enumerate(self.children) if other.count <= child.count)
        self.children.insert(next(at, len(self.children)), child)

    @property
    def support(self) -> int:
        """Occurrences that go on from here; where the text forks not, those since it last did."""
        if len(self.children) != 1 or self.parent is None:
            return sum(child.count for child in self.children)
        node = self.children[0]
        while node.parent is not None and node.parent.parent and len(node.parent.children) == 1:
            node = node.parent
        return node.count


class ReferenceTree:
    """The interface of `_cpu.SuffixTree`."""

    def __init__(self, max_depth: int, escape: float) -> None:
        if not 2 <= max_depth <= 1024:
            raise ValueError(f"max_depth is {max_depth}; allowed is 2 to 1024")
        self._max_depth = max_depth
        self._escape = escape
        self._roots: dict[int, Node] = {}
        self._seqs: dict[int, tuple[Node, list[int]]] = {}
        self._num_made = 0
        self.num_nodes = 0  # without roots
        self.num_tokens = 0

    @property
    def num_bytes(self) -> int:
        """Memory in use, estimated."""
        return self.num_nodes * NODE_BYTES

    def add_root(self) -> int:
        """An empty tree beside the others; its number."""
        self._num_made += 1
        self._roots[self._num_made] = Node()
        return self._num_made

    def drop_root(self, root: int) -> None:
        """Forget an empty tree."""
        if self._roots[root].children:
            raise ValueError("a root with sequences stays")
        del self._roots[root]

    def add(self, root: int) -> int:
        """An empty sequence under `root`; its number."""
        self._num_made += 1
        self._seqs[self._num_made] = (self._roots[root], [])
        return self._num_made

    def extend(self, seq: int, tokens: Sequence[int] | NDArray[np.int32]) -> None:
        """Append tokens to a sequence."""
        root, text = self._seqs[seq]
        for token in map(int, tokens):
            text.append(token)
            for start in range(max(0, len(text) - self._max_depth), len(text)):
                self._count(root, text[start:])
        self.num_tokens += len(tokens)

    def remove(self, seq: int) -> None:
        """Take a sequence and all its suffixes out."""
        root, text = self._seqs.pop(seq)
        for start in range(len(text)):
            path = [root]
            for token in text[start : start + self._max_depth]:
                path.append(path[-1].by_token[token])
            for parent, child in pairwise(path):
                parent.place(child, -1)
                self.num_nodes -= child.count == 0
        self.num_tokens -= len(text)

    def tokens(self, seq: int) -> list[int]:
        """The text of a sequence."""
        return list(self._seqs[seq][1])

    def draft(
        self, root: int, context: Sequence[int], max_tokens: int, min_prob: float
    ) -> LinearDraft:
        """(tokens, probs, score, match_len) of the best continuation; see suffix_draft.cpp."""
        best: LinearDraft = ([], [], 0.0, 0)
        for node in self._places(root, context):
            draft = self._walk(node, max_tokens, min_prob)
            if draft[0] and draft[2] >= best[2]:
                best = draft
        return best

    def draft_tree(
        self, root: int, context: Sequence[int], max_tokens: int, min_prob: float
    ) -> TreeDraft:
        """(tokens, parents, probs, score, match_len): the likeliest paths; parent -1 = context."""
        best: TreeDraft = ([], [], [], 0.0, 0)
        for node in self._places(root, context):
            draft = self._branch(node, max_tokens, min_prob)
            if draft[0] and draft[3] >= best[3]:
                best = draft
        return best

    def check(self) -> str:
        """What is wrong, or nothing: everything is counted again."""
        again = ReferenceTree(self._max_depth, self._escape)
        roots = {id(root): again.add_root() for root in self._roots.values()}
        for root, text in self._seqs.values():
            again.extend(again.add(roots[id(root)]), text)
        for root in self._roots.values():
            fault = _difference(root, again._roots[roots[id(root)]])
            if fault:
                return fault
        return "" if again.num_nodes == self.num_nodes else "nodes are lost"

    def _count(self, root: Node, path: Sequence[int]) -> None:
        """One more occurrence of `path`, whose beginning is counted already."""
        node = root
        for token in path[:-1]:
            node = node.by_token[token]
        child = node.by_token.get(path[-1])
        if child is None:
            child = node.by_token[path[-1]] = Node(node, path[-1], node.depth + 1)
            self.num_nodes += 1
        node.place(child, 1)

    def _places(self, root: int, context: Sequence[int]) -> list[Node]:
        """Ends of the context's suffixes with a continuation; of equal support the longest."""
        found: list[Node] = []
        for length in range(1, min(len(context), self._max_depth - 1) + 1):
            node: Node | None = self._roots[root]
            for token in context[len(context) - length :]:
                node = node.by_token.get(token) if node else None
            if node is None or not node.children:
                break
            if found and found[-1].support == node.support:
                found.pop()
            found.append(node)
        return found

    def _prob(self, node: Node, child: Node) -> float:
        total = node.support
        count = child.count if len(node.children) > 1 else total
        return count / (total + self._escape / node.depth)

    def _walk(self, node: Node, max_tokens: int, min_prob: float) -> LinearDraft:
        tokens: list[int] = []
        probs: list[float] = []
        path, score, match_len = 1.0, 0.0, node.depth
        while len(tokens) < max_tokens and node.children:
            child = node.children[0]
            prob = self._prob(node, child)
            path *= prob
            if path < min_prob:
                break
            tokens.append(child.token)
            probs.append(prob)
            score += path
            node = child
        return tokens, probs, score, match_len

    def _branch(self, start: Node, max_tokens: int, min_prob: float) -> TreeDraft:
        tokens: list[int] = []
        parents: list[int] = []
        probs: list[float] = []
        score = 0.0
        queue: list[tuple[float, int, float, int, Node, int]] = []
        num_offered = 0

        def offer(node: Node, child_idx: int, above: float, parent: int) -> None:
            nonlocal num_offered
            if child_idx < len(node.children):
                path = above * self._prob(node, node.children[child_idx])
                if path >= min_prob:
                    heapq.heappush(queue, (-path, num_offered, above, parent, node, child_idx))
                    num_offered += 1

        offer(start, 0, 1.0, -1)
        while len(tokens) < max_tokens and queue:
            negative, _, above, parent, node, child_idx = heapq.heappop(queue)
            child = node.children[child_idx]
            tokens.append(child.token)
            parents.append(parent)
            probs.append(self._prob(node, child))
            score -= negative
            offer(child, 0, -negative, len(tokens) - 1)
            offer(node, child_idx + 1, above, parent)
        return tokens, parents, probs, score, start.depth


def _difference(node: Node, other: Node) -> str:
    """Of two trees that should have equal counts, and children in falling order."""
    counts = [child.count for child in node.children]
    if counts != sorted(counts, reverse=True):
        return "children are out of order"
    if {c.token: c.count for c in node.children} != {c.token: c.count for c in other.children}:
        return "counts are wrong"
    pairs = ((child, other.by_token[child.token]) for child in node.children)
    return next((fault for a, b in pairs if (fault := _difference(a, b))), "")
