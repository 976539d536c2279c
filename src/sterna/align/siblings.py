"""Drafts for rollouts: what siblings of the group and earlier epochs of a prompt have said.

One suffix tree (arXiv 2411.04975) holds all completions of a run, each behind the end of its
prompt, so a match that reaches into the prompt finds the same prompt's completions of this group
and of steps before, and a shorter one what is common to all. There is one user, so nothing is
kept apart. Old completions come from older weights: guesses, which verification keeps where the
policy draws them itself (engine/verify.py), so tokens and log-probs are those of plain decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from sterna.engine.drafters.base import Draft
from sterna.engine.drafters.tree import new_tree
from sterna.engine.request import StepStats
from sterna.engine.sequence import Sequence

MAX_DEPTH = 64
_CONTEXT = MAX_DEPTH // 2  # the rest of the depth is for the draft
# Paths less likely are not drafted; the speculator weighs the others.
_MIN_PROB = 0.03
_MAX_BYTES = 256 << 20  # about two million tokens


class SiblingDrafter:
    """See the module. The oldest finished completions are dropped beyond `max_bytes`."""

    name = "siblings"

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._tree = new_tree(MAX_DEPTH)
        self._root = self._tree.add_root()
        self._max_bytes = max_bytes
        self._open: dict[Sequence, tuple[int, int]] = {}  # its text in the tree, output seen
        self._finished: deque[int] = deque()

    @property
    def num_tokens(self) -> int:
        """Tokens in memory."""
        return self._tree.num_tokens

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft | None]:
        """See Drafter."""
        return [self._propose(*each) for each in zip(seqs, limits, strict=True)]

    def finish(self, seq: Sequence) -> None:
        """See Drafter: the completion stays for those to come."""
        if seq.output:
            self._finished.append(self._follow(seq))
        elif seq in self._open:
            self._finished.append(self._open[seq][0])
        self._open.pop(seq, None)
        while self._finished and self._tree.num_bytes > self._max_bytes:
            self._tree.remove(self._finished.popleft())

    def _follow(self, seq: Sequence) -> int:
        """Its text in the tree, up to date. The group's first sample brings the whole prompt, the
        others its end.
        """
        text, seen = self._open.get(seq, (None, 0))
        if text is None:
            text = self._tree.add(self._root)
            prompt = seq.state.prompt
            self._tree.extend(text, prompt if seq.index == 0 else prompt[-_CONTEXT:])
        self._tree.extend(text, seq.output[seen:])
        self._open[seq] = (text, len(seq.output))
        return text

    def _propose(self, seq: Sequence, limit: int) -> Draft | None:
        if limit <= 0:
            return None
        self._follow(seq)
        context = seq.output[-_CONTEXT:]
        if len(context) < _CONTEXT:
            context = seq.state.prompt[len(context) - _CONTEXT :].tolist() + context
        tokens, probs, _, _ = self._tree.draft(self._root, context, limit, _MIN_PROB)
        return Draft(tokens, probs, self.name) if tokens else None


@dataclass(slots=True)
class DraftCount:
    """What speculation did since it was last asked."""

    num_drafted: int = 0
    num_accepted: int = 0

    def note(self, stats: StepStats) -> None:
        """Take an engine step."""
        for draft in stats.drafts:
            self.num_drafted += draft.num_tokens
            self.num_accepted += draft.num_accepted

    def take(self) -> DraftCount:
        """The counts, which begin anew."""
        found = DraftCount(self.num_drafted, self.num_accepted)
        self.num_drafted = self.num_accepted = 0
        return found
