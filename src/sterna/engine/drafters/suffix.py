"""Drafts from text seen before: the request's own, and past answers of the same tenant.

SuffixDecoding (arXiv 2411.04975). Each request has a tree of its prompt and its samples' outputs;
one more tree holds outputs of current and past requests, never prompts, with a root a tenant
(`cache_salt`), so that no draft tells one tenant what another was answered. The trees are those of
suffix_tree.h; `bench/drafters.py` measures what they cost and what is accepted. They are brought up
to date when a proposal is asked for, so a drafter that is not asked costs nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from sterna.core.errors import DraftCacheError
from sterna.core.log import get_logger
from sterna.engine.drafters.base import Draft
from sterna.engine.drafters.store import Stored, load_outputs, put_aside, save_outputs
from sterna.engine.drafters.tree import SuffixTree, new_tree
from sterna.engine.sequence import RequestState, Sequence

log = get_logger(__name__)


@dataclass(slots=True)
class OwnText:
    """The tree of one request. The first sample continues the prompt's sequence in it."""

    tree: SuffixTree
    root: int
    prompt: int
    is_prompt_taken: bool = False
    num_samples: int = 0


@dataclass(slots=True)
class Track:
    """Where a sample's text is kept, and how much of its output is there."""

    own: OwnText
    own_seq: int
    tenant: bytes
    past_seq: int | None = None
    num_seen: int = 0


@dataclass(slots=True)
class PastOutputs:
    """Outputs by tenant, the oldest finished ones dropped first when memory is short."""

    max_depth: int
    max_bytes: int
    tree: SuffixTree = field(init=False)
    roots: dict[bytes, int] = field(default_factory=dict)
    num_outputs: dict[bytes, int] = field(default_factory=dict)  # with open ones
    finished: deque[tuple[bytes, int]] = field(default_factory=deque)  # (tenant, sequence)

    def __post_init__(self) -> None:
        self.tree = new_tree(self.max_depth)

    def add(self, tenant: bytes) -> int:
        """A new output of a tenant."""
        if tenant not in self.roots:
            self.roots[tenant] = self.tree.add_root()
        self.num_outputs[tenant] = self.num_outputs.get(tenant, 0) + 1
        return self.tree.add(self.roots[tenant])

    def finish(self, tenant: bytes, seq: int) -> None:
        """The output is complete; it may be dropped when its time comes."""
        self.finished.append((tenant, seq))
        while self.finished and self.tree.num_bytes > self.max_bytes:
            self.drop(*self.finished.popleft())

    def drop(self, tenant: bytes, seq: int) -> None:
        """Forget an output, and a tenant with its last one."""
        self.tree.remove(seq)
        self.num_outputs[tenant] -= 1
        if not self.num_outputs[tenant]:
            self.tree.drop_root(self.roots.pop(tenant))
            del self.num_outputs[tenant]

    def stored(self) -> list[Stored]:
        """The finished outputs, oldest first."""
        return [Stored(tenant, self.tree.tokens(seq)) for tenant, seq in self.finished]


class SuffixDrafter:
    """See the module docstring. Memory: `max_bytes` for past outputs (0 = none are kept), and about
    130 bytes a token of the requests in flight.

    Paths below `min_prob` are not drafted: far below what pays, for the speculator corrects the
    probabilities by what is accepted, and in text that is copied they prove too low.

    `path`: where past outputs are kept over restarts. `identity` names the model and tokenizer
    they belong to; a file of another one, or a damaged one, is put aside as `*.refused` with a
    warning, and the drafter starts empty.
    """

    name = "suffix"

    def __init__(
        self,
        *,
        max_depth: int = 64,
        max_bytes: int = 256 << 20,
        min_prob: float = 0.03,
        path: Path | None = None,
        identity: str = "",
    ) -> None:
        self._max_depth = max_depth
        self._max_context = max_depth // 2  # the rest of the depth is for the draft
        self._min_prob = min_prob
        self._path = path
        self._identity = identity
        self._own: dict[RequestState, OwnText] = {}
        self._tracks: dict[Sequence, Track] = {}
        self._past = PastOutputs(max_depth, max_bytes) if max_bytes else None
        if path is not None and self._past is not None:
            self._load(path, self._past)

    @property
    def num_past_tokens(self) -> int:
        """Tokens of past outputs in memory."""
        return self._past.tree.num_tokens if self._past else 0

    @property
    def num_bytes(self) -> int:
        """Memory of past outputs and of the requests in flight."""
        own = sum(own.tree.num_bytes for own in self._own.values())
        return own + (self._past.tree.num_bytes if self._past else 0)

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft | None]:
        """See Drafter: the better of what the request's text and past outputs suggest."""
        return [
            self._propose(seq, limit) if limit > 0 else None
            for seq, limit in zip(seqs, limits, strict=True)
        ]

    def finish(self, seq: Sequence) -> None:
        """See Drafter: its output is kept among the past ones. 0.2 us a token."""
        track = self._tracks.pop(seq, None)
        if track is not None:
            track.own.num_samples -= 1
            if not track.own.num_samples:
                del self._own[seq.state]
        if self._past is None or not (track or seq.output):
            return
        tenant = _tenant(seq)
        past_seq = track.past_seq if track else None
        if past_seq is None:
            past_seq = self._past.add(tenant)
        self._past.tree.extend(past_seq, seq.output[track.num_seen if track else 0 :])
        end = self._past.finish if seq.output else self._past.drop
        end(tenant, past_seq)

    def save(self) -> None:
        """Keep the past outputs in the file, if there is one. A failure to write is logged."""
        if self._path is None or self._past is None:
            return
        try:
            save_outputs(self._path, self._identity, self._past.stored())
        except OSError as error:
            log.warning("past outputs are not kept in %s: %s", self._path, error)

    def check_integrity(self) -> None:
        """Assert that all trees are sound; for tests, slow."""
        trees = [own.tree for own in self._own.values()] + ([self._past.tree] if self._past else [])
        for tree in trees:
            fault = tree.check()
            assert not fault, fault

    def _track_of(self, seq: Sequence) -> Track:
        """Up to date."""
        track = self._tracks.get(seq)
        if track is None:
            own = self._own.get(seq.state)
            if own is None:
                own = self._own[seq.state] = self._new_own(seq.state)
            own.num_samples += 1
            tenant = _tenant(seq)
            past_seq = self._past.add(tenant) if self._past else None
            track = Track(own, self._own_seq(own, seq), tenant, past_seq)
            self._tracks[seq] = track
        new = seq.output[track.num_seen :]
        track.num_seen = len(seq.output)
        track.own.tree.extend(track.own_seq, new)
        if self._past is not None and track.past_seq is not None:
            self._past.tree.extend(track.past_seq, new)
        return track

    def _new_own(self, state: RequestState) -> OwnText:
        tree = new_tree(self._max_depth)
        root = tree.add_root()
        prompt = tree.add(root)
        tree.extend(prompt, state.prompt)
        return OwnText(tree, root, prompt)

    def _own_seq(self, own: OwnText, seq: Sequence) -> int:
        """Another sample's text begins with the prompt's end: what its first matches need."""
        if not own.is_prompt_taken:
            own.is_prompt_taken = True
            return own.prompt
        other = own.tree.add(own.root)
        own.tree.extend(other, seq.state.prompt[-self._max_context :])
        return other

    def _propose(self, seq: Sequence, limit: int) -> Draft | None:
        track = self._track_of(seq)
        context = self._context(seq)
        own = track.own
        best = own.tree.draft(own.root, context, limit, self._min_prob)
        if self._past is not None:
            past = self._past.tree.draft(
                self._past.roots[track.tenant], context, limit, self._min_prob
            )
            if past[2] > best[2]:
                best = past
        return Draft(best[0], best[1], self.name) if best[0] else None

    def _context(self, seq: Sequence) -> list[int]:
        """The last tokens of prompt and output."""
        context = seq.output[-self._max_context :]
        lacking = self._max_context - len(context)
        if lacking:
            context = seq.state.prompt[-lacking:].tolist() + context
        return context

    def _load(self, path: Path, past: PastOutputs) -> None:
        if not path.exists():
            return
        try:
            stored = load_outputs(path, self._identity)
        except DraftCacheError as error:
            log.warning("%s; %s; starting without past outputs", error, put_aside(path))
            return
        for output in stored:
            seq = past.add(output.tenant)
            past.tree.extend(seq, output.tokens)
            past.finish(output.tenant, seq)
        log.info("%d past outputs, %d tokens, from %s", len(stored), self.num_past_tokens, path)


def _tenant(seq: Sequence) -> bytes:
    """Whose text it is: outputs of one tenant never tell another anything."""
    return blake2b(seq.state.salt.encode(), digest_size=16).digest()
