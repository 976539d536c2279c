"""Who runs in the next step: Dynamic SplitFuse (arXiv 2401.08671), and whole-prompt to compare.

Dynamic SplitFuse. A step computes at most `token_budget` tokens. Every running sequence with one
token left (a decode) gets it first; the rest of the budget is filled exactly with prompt chunks,
cut where necessary. So a step's duration is nearly constant and decodes never wait for a prompt.
A step without decodes has nobody to delay: it may fill the wider `idle_budget`, where long prompts
run faster (fewer walks over their own keys).

Who gets the prompt share R of a step:
  1. the oldest unfinished prompt gets ceil(R / 2);
  2. what is left goes to the shortest remaining prompts first, within a priority.
Rule 2 lets a short question overtake a document; rule 1 keeps the document moving.

Drafts. A decode may carry guesses of its next tokens (`Sequence.draft`, see speculate.py): its
chunk is then 1 + num_drafts rows, all of them output rows. Draft rows come out of the decodes'
share of the budget, after every decode has its row: they delay no decode, and prompts keep
R >= B/4. They take blocks that are free beyond one for each running sequence, so a draft preempts
nobody; what finds no place is cut off.

Order is (priority, arrival, sample), a total order that never changes.

Why it cannot deadlock. (a) A sequence whose prompt + max_tokens exceeds the pool is refused by
`Engine.add`, so each sequence fits the pool alone. (b) A sequence gets blocks for its whole prompt
when it is admitted or is not admitted, so unfinished prompts never wait for blocks. (c) A decode
without a block preempts the running sequence that is last in the order, possibly itself; so the
first running sequence is never preempted unless it is the only one, and then by (a) all its blocks
exist. It makes progress each step until it ends, then the next is first. (d) When nothing runs,
the first ready sequence of the queue is admitted without headroom, and by (a) it fits.

Starvation bound. Decodes and their drafts take at most 3/4 of the budget B (`max_running`,
`_add_drafts`), so R >= B/4 and the oldest prompt computes at least B/8 tokens a step. A request
that fits the free memory and finds a free place therefore gets its first chunk after at most
N + 8 A / B steps, where N requests with A prompt tokens are ahead of it in the order, however many
requests arrive after it and however long the others generate or guess. A request that does not fit
the free memory may be overtaken by at most MAX_BYPASS later admissions; then nobody is admitted
before it until it fits. Drafts take no new block while a request could be admitted.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sterna.engine.sequence import Sequence, Status
from sterna.engine.tables import BlockTables

# Later sequences that may be admitted while an earlier one waits for memory. Two full default
# batches: enough to keep the machine busy, few enough to bound the wait.
MAX_BYPASS = 128
# Share of the budget that decodes may take; the rest keeps prompts moving.
MAX_DECODE_SHARE = 0.75


class Chunk(NamedTuple):
    """Tokens `start .. start + num_tokens` of `seq`. `samples`: the next token is drawn from it.

    The last `num_drafts` of them are guesses; with the one before they are the output rows.
    A named tuple like all data made once a token: 0.3 us where a frozen dataclass takes 1.2.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool
    num_drafts: int = 0

    @property
    def num_committed(self) -> int:
        """Tokens that are no guesses."""
        return self.num_tokens - self.num_drafts

    def without_drafts(self) -> Chunk:
        """The same work, nothing guessed."""
        return self._replace(num_tokens=self.num_committed, num_drafts=0)


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """The work of one forward, decodes first."""

    chunks: tuple[Chunk, ...]
    num_decode_tokens: int
    num_prompt_tokens: int
    num_preempted: int
    token_budget: int  # what bounded this step
    num_draft_tokens: int = 0


def _by_order(seq: Sequence) -> tuple[int, int, int]:
    return seq.order


class Scheduler:
    """Owns the queue and the running list; both are sorted by `Sequence.order`."""

    def __init__(
        self,
        tables: BlockTables,
        token_budget: int,
        max_num_seqs: int,
        policy: Literal["splitfuse", "whole-prompt"] = "splitfuse",
        max_drafts: int = 0,
    ) -> None:
        """`max_drafts`: draft rows in one step, as many as there is memory for their logits."""
        self.tables = tables
        self.max_drafts = max_drafts
        # Called with each sequence that has left, for whatever reason.
        self.on_finish: list[Callable[[Sequence], None]] = []
        self.token_budget = self.idle_budget = token_budget
        self.max_running = max_running(token_budget, max_num_seqs)
        self.policy = policy
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_waiting_tokens = 0  # prompt and recomputed tokens of the queue
        self._num_preempted = 0

    def add(self, seq: Sequence) -> None:
        """Queue a sequence (new, or preempted)."""
        seq.status = Status.WAITING
        insort(self.waiting, seq, key=_by_order)
        seq.num_queued_tokens = seq.num_tokens
        self.num_waiting_tokens += seq.num_queued_tokens

    def add_fork(self, parent: Sequence, child: Sequence) -> None:
        """Start a sample from its sibling's blocks, or queue it when no place is free."""
        if len(self.running) >= self.max_running:
            self.add(child)
            return
        self.tables.fork(parent, child)
        child.status = Status.RUNNING
        insort(self.running, child, key=_by_order)

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence and give its blocks back."""
        self._leave(seq)
        self.tables.release(seq)

    def finish_damaged(self, seq: Sequence) -> list[int]:
        """Remove a failed sequence; returns the blocks whose content must be wiped."""
        self._leave(seq)
        return self.tables.release_damaged(seq)

    def restart_damaged(self, seq: Sequence) -> list[int]:
        """Queue a running sequence to be computed anew; returns the blocks to be wiped."""
        self.running.remove(seq)
        damaged = self.tables.release_damaged(seq)
        self.add(seq)
        return damaged

    def set_token_budget(
        self, token_budget: int, max_num_seqs: int, idle_budget: int | None = None
    ) -> None:
        """Change the budget between steps; `idle_budget` is at least as wide, None = the same."""
        self.token_budget = token_budget
        self.idle_budget = max(token_budget, idle_budget or 0)
        self.max_running = max_running(token_budget, max_num_seqs)

    @property
    def num_pending_prompt_tokens(self) -> int:
        """Tokens, of prompts mostly, that could fill the next step beside the decodes."""
        running = sum(seq.num_remaining for seq in self.running if seq.num_remaining > 1)
        may_admit = len(self.running) < self.max_running
        return running + (self.num_waiting_tokens if may_admit else 0)

    def schedule(self) -> ScheduledStep:
        """Choose the chunks of the next step and give them their blocks."""
        self._num_preempted = 0
        budget = self.token_budget
        if self.policy == "whole-prompt":
            chunks = self._whole_prompts() or self._add_drafts(self._decodes())
        else:
            chunks = self._add_drafts(self._decodes())
            budget = self.token_budget if chunks else self.idle_budget
            chunks += self._prompt_chunks(budget - sum(chunk.num_tokens for chunk in chunks))
        return self._as_step(chunks, budget)

    def _as_step(self, chunks: list[Chunk], budget: int) -> ScheduledStep:
        num_drafts = sum(chunk.num_drafts for chunk in chunks)
        num_decodes = sum(chunk.num_committed == 1 and bool(chunk.seq.output) for chunk in chunks)
        num_prompt = sum(chunk.num_tokens for chunk in chunks) - num_drafts - num_decodes
        return ScheduledStep(
            tuple(chunks), num_decodes, num_prompt, self._num_preempted, budget, num_drafts
        )

    def _leave(self, seq: Sequence) -> None:
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
        elif seq.status is Status.WAITING:
            self._dequeue(seq)
        seq.status = Status.FINISHED
        seq.draft.clear()
        for hook in self.on_finish:
            hook(seq)

    def _dequeue(self, seq: Sequence) -> None:
        self.waiting.remove(seq)
        self.num_waiting_tokens -= seq.num_queued_tokens

    def _decodes(self) -> list[Chunk]:
        """One token for every running sequence that needs just one, oldest first."""
        chunks = []
        for seq in list(self.running):
            if seq.status is not Status.RUNNING or seq.num_remaining != 1:
                continue  # preempted by an earlier one, or a prompt
            if self._make_room(seq):
                chunks.append(Chunk(seq, seq.num_computed, 1, True))
        return chunks

    def _add_drafts(self, decodes: list[Chunk]) -> list[Chunk]:
        """Lengthen decodes by their drafts as far as budget, rows and free blocks reach."""
        left = min(int(self.token_budget * MAX_DECODE_SHARE) - len(decodes), self.max_drafts)
        # Beside a queue drafts make do with the blocks that are held already.
        may_grow = not (self.waiting and self._may_admit())
        keep_free = len(self.running) if may_grow else self.tables.pool.num_blocks
        for i, chunk in enumerate(decodes):
            seq = chunk.seq
            if not seq.draft:
                continue
            asked = min(len(seq.draft), left) if seq.may_draft else 0
            count = self.tables.extend_slots(seq, asked, keep_free) if asked > 0 else 0
            del seq.draft[count:]
            left -= count
            decodes[i] = Chunk(seq, chunk.start, 1 + count, samples=True, num_drafts=count)
        return decodes

    def _make_room(self, seq: Sequence) -> bool:
        """A writable slot for `seq`, at the expense of later sequences; False if it yielded."""
        while not self.tables.ensure_slot(seq):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.tables.release(seq)
        self._num_preempted += 1
        seq.draft.clear()
        self.add(seq)

    def _prompt_chunks(self, budget: int) -> list[Chunk]:
        """Fill `budget` tokens: half for the oldest prompt, the rest by shortest remaining."""
        # After a preemption admission would only take back the blocks that were just freed.
        queue = [seq for seq in self.waiting if seq.is_ready] if self._may_admit() else []
        partial = [seq for seq in self.running if seq.num_remaining > 1]
        if budget <= 0 or not (partial or queue):
            return []
        taken: dict[Sequence, int] = {}
        by_age = sorted(partial + queue, key=_by_order)
        half = -(-budget // 2)
        left = budget - next(filter(None, (self._take(seq, half, taken) for seq in by_age)), 0)
        for seq in sorted(by_age, key=lambda s: (s.order[0], s.num_remaining, s.order)):
            if left <= 0:
                break
            left -= self._take(seq, left, taken)
        return [_chunk(seq, count) for seq, count in taken.items()]

    def _may_admit(self) -> bool:
        return self._num_preempted == 0 and len(self.running) < self.max_running

    def _take(self, seq: Sequence, limit: int, taken: dict[Sequence, int]) -> int:
        """Give `seq` up to `limit` more tokens of this step; 0 when it cannot be admitted."""
        if seq.status is Status.WAITING and not self._admit(seq):
            return 0
        already = taken.get(seq, 0)
        count = min(limit, seq.num_remaining - already)
        if count > 0:
            taken[seq] = already + count
        return count

    def _whole_prompts(self) -> list[Chunk]:
        """Prompts uncut, in order, up to the budget; the first one whatever its length."""
        chunks: list[Chunk] = []
        left = self.token_budget
        for seq in [seq for seq in self.waiting if seq.is_ready]:
            if chunks and (seq.num_tokens > left or not self._admit(seq)):
                break
            if not chunks and not self._admit(seq):
                break
            chunks.append(_chunk(seq, seq.num_remaining))
            left -= seq.num_remaining
        return chunks

    def _admit(self, seq: Sequence) -> bool:
        """Move `seq` from the queue to the running list if a place and the memory are free."""
        if len(self.running) >= self.max_running:
            return False
        blocked = [s for s in self.waiting if s.num_bypassed and s.order < seq.order]
        if any(s.num_bypassed >= MAX_BYPASS for s in blocked):
            return False
        # One block a running sequence: else its next block would preempt what was just admitted.
        if not self.tables.admit(seq, headroom=len(self.running)):
            seq.num_bypassed = max(seq.num_bypassed, 1)
            return False
        for earlier in blocked:
            earlier.num_bypassed += 1
        self._dequeue(seq)
        seq.num_bypassed = 0
        seq.status = Status.RUNNING
        insort(self.running, seq, key=_by_order)
        return True


def max_running(token_budget: int, max_num_seqs: int) -> int:
    """Sequences that may run at once, so that decodes leave a share of the budget to prompts."""
    return max(1, min(max_num_seqs, int(token_budget * MAX_DECODE_SHARE)))


def _chunk(seq: Sequence, count: int) -> Chunk:
    return Chunk(seq, seq.num_computed, count, samples=count == seq.num_remaining)
