"""What to guess in the next step: the best draft of each sequence, as long as its rows pay.

A step of N rows yields W tokens (a decode's next token or a prompt's computed one: they cost the
same) and lasts t(N) seconds (stepcost.py). A draft's token i is worth r_i, the probability that it
and those before it are accepted (trust.py). Rows are added in the order of r_i while they raise

    (W + sum of r) / t(N + rows)

the tokens a second of the whole batch. So a lone request drafts long, a full batch not at all, and
where arithmetic bounds the step (prompts fill the budget) nobody does. The road not taken:
thresholds on batch size and draft length, which are right on one machine for one model.

Whether a drafter is asked at all, and how much its rows may cost, its account says: measured times
against tokens that came true (account.py). One that is not asked does nothing: drafters read what
they missed at the next proposal. A drafter that raises loses its drafts of that step; one that
raises often is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from torch import Tensor

from sterna.core.log import get_logger
from sterna.engine.account import Books, Size
from sterna.engine.config import EngineConfig
from sterna.engine.draft_rows import Batch, Offer
from sterna.engine.drafters.base import Draft, Drafter, ReadsHidden
from sterna.engine.request import DraftResult
from sterna.engine.sequence import Sequence as EngineSequence
from sterna.engine.stepcost import StepCost
from sterna.engine.trust import Trust

if TYPE_CHECKING:
    from sterna.engine.scheduler import ScheduledStep, Scheduler

log = get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# A drafter that raised so often is dropped.
MAX_FAILURES = 8
# A step counts as no longer than so many plain ones: the rest is a pause of the machine.
MAX_STEP = 20.0
# One in so many plain steps refines the cost model.
REFINE_EVERY = 8


class Speculator:
    """The drafters of one engine and the decision between them. Engine thread only."""

    def __init__(
        self, drafters: Sequence[Drafter], config: EngineConfig, cost: StepCost | None = None
    ) -> None:
        self.drafters = list(drafters)
        self.cost = cost or StepCost()
        self.trust = Trust()
        self.books = Books([drafter.name for drafter in drafters])
        self._config = config
        self._failures: dict[str, int] = {}
        self._pending: dict[EngineSequence, Draft] = {}
        self._excluded: set[EngineSequence] = set()
        self._results: list[DraftResult] = []
        self._hidden: Tensor | None = None
        self._rows: dict[EngineSequence, int] = {}  # of `_hidden`: each one's last token's
        self._readers = {d.name: d for d in drafters if isinstance(d, ReadsHidden)}
        self._observers = [d for d in self.drafters if self._observes(d)]
        # Of the next step: seconds of asking, draft rows and gained tokens by drafter.
        self._asked_s = 0.0
        self._drafted: dict[str, int] = {}
        self._gained: dict[str, int] = {}
        self._ahead: dict[EngineSequence, int] = {}  # tokens gained in that step
        self._batch: Batch | None = None  # the one that `_drafted` is of
        self._num_plain = 0

    def propose(self, scheduler: Scheduler) -> None:
        """Set `draft` of the running decodes for the next step."""
        started = time.perf_counter()
        self._asked_s = 0.0
        if self._drafted:
            self._pending.clear()
            self._drafted, self._gained, self._ahead = {}, {}, {}
        decodes = [seq for seq in scheduler.running if seq.may_draft]
        size = self.books.at(len(decodes))
        if not decodes or size.must_be_plain() or size.is_broke():
            return
        others = min(
            scheduler.num_pending_prompt_tokens, max(0, scheduler.token_budget - len(decodes))
        )
        is_queue = bool(scheduler.waiting)
        batch = Batch(self.cost, decodes, others, size.factor, size.overhead_s, is_queue)
        row_s = batch.rows_s(1)
        due = [d for d in self.drafters if size.accounts[d.name].affords(row_s, batch.plain_s)]
        if not due:
            return
        seqs = [seq for seq in decodes if self._limit(seq) > 0]
        least = batch.least()
        if not seqs or least >= max(batch.worth(seq) for seq in seqs):
            return
        spent = self._draft(due, seqs, batch, least, scheduler.max_drafts)
        self._asked_s = time.perf_counter() - started
        shared_s = (self._asked_s - sum(spent.values())) / len(due)
        for drafter in due:
            seconds = spent.get(drafter.name, 0.0) + shared_s
            size.accounts[drafter.name].note_ask(seconds, batch.plain_s)

    def see(self, hidden: Tensor | None) -> None:
        """The hidden states of a step's output rows, before its tokens are committed."""
        self._hidden = hidden
        self._rows.clear()

    def extend(self, seq: EngineSequence, tokens: list[int], num_drafts: int, row: int) -> None:
        """See commit.Listener."""
        if num_drafts and (draft := self._pending.pop(seq, None)) is not None:
            self._note_result(seq, draft, tokens, num_drafts)
        if not self._readers or self._hidden is None:
            return
        self._rows[seq] = row + len(tokens) - 1
        for observer in self._observers:
            states = self._hidden[row : row + len(tokens)]
            self._guarded(observer, self._readers[observer.name].observe, seq, states)

    def finish(self, seq: EngineSequence) -> None:
        """The sequence has left the scheduler."""
        self._pending.pop(seq, None)
        self._rows.pop(seq, None)
        self._excluded.discard(seq)
        self.trust.forget(seq)
        for drafter in list(self.drafters):
            self._guarded(drafter, drafter.finish, seq)

    def exclude(self, seq: EngineSequence) -> None:
        """No more drafts for a sequence whose drafts broke the model."""
        self._excluded.add(seq)

    def note_step(self, step: ScheduledStep, seconds: float, forward_s: float) -> None:
        """Take a finished step; the model took `forward_s` of its `seconds`."""
        count = len(step.chunks)
        keys = sum(chunk.start for chunk in step.chunks)
        size = self.books.at(count)
        model_s = self.cost.unlevelled(count, keys)
        plain_s = size.factor * model_s + size.overhead_s
        size.allow(seconds, plain_s)
        if step.num_prompt_tokens or not step.num_decode_tokens:
            self._settle(size, step, None)
        elif step.num_draft_tokens:
            own_s = min(seconds - self._asked_s, MAX_STEP * plain_s)
            self._settle(size, step, own_s - plain_s)
            size.note_drafted()
            rows = count + step.num_draft_tokens
            all_keys = sum(chunk.num_tokens * chunk.start for chunk in step.chunks)
            self.cost.note(rows, all_keys, forward_s, has_drafts=True)
        else:
            size.note_plain(forward_s, seconds - forward_s - self._asked_s, model_s)
            self._num_plain += 1
            if self._num_plain % REFINE_EVERY == 0:
                self.cost.note(count, keys, forward_s)

    def take_results(self) -> tuple[DraftResult, ...]:
        """Drafts verified since the last call."""
        found, self._results = tuple(self._results), []
        return found

    def _limit(self, seq: EngineSequence) -> int:
        """Tokens that may be drafted: none beyond what the sequence may still generate."""
        asked = seq.state.request.params.speculation
        is_on = not self._config.speculation_opt_in if asked is None else asked
        if not is_on or seq in self._excluded:
            return 0
        return min(self._config.num_draft_tokens, seq.num_left - 1)

    def _observes(self, drafter: Drafter) -> bool:
        reader = self._readers.get(drafter.name)
        return reader is not None and reader.observes

    def _draft(
        self,
        due: list[Drafter],
        seqs: list[EngineSequence],
        batch: Batch,
        least: float,
        max_rows: int,
    ) -> dict[str, float]:
        """Set the sequences' drafts. Returns how long each drafter took."""
        self._batch = batch
        drafts, offers, spent = self._best_drafts(due, seqs, batch, least)
        batch.overhead_s = sum(spent.values())
        accounts = self.books.at(batch.num_decodes).accounts
        left_s = {name: a.balance - spent.get(name, 0.0) for name, a in accounts.items()}
        lengths = batch.choose(offers, max_rows, left_s)
        for seq, draft in drafts.items():
            seq.draft = draft.tokens[: lengths.get(seq, 0)]
            if seq.draft:
                self._pending[seq] = draft
                drafted = self._drafted.get(draft.source, 0)
                self._drafted[draft.source] = drafted + len(seq.draft)
            else:
                self.trust.fade(seq)
        return spent

    def _best_drafts(
        self, due: list[Drafter], seqs: list[EngineSequence], batch: Batch, least: float
    ) -> tuple[dict[EngineSequence, Draft], dict[EngineSequence, Offer], dict[str, float]]:
        """Each sequence's best draft, what it is worth, and seconds by drafter."""
        limits = [self._limit(seq) for seq in seqs]
        best: dict[EngineSequence, Draft] = {}
        offers: dict[EngineSequence, Offer] = {}
        scores: dict[EngineSequence, float] = {}
        spent: dict[str, float] = {}
        for drafter in due:
            asked = self._limits_of(drafter, seqs, limits, scores)
            if not any(asked):
                continue
            started = time.perf_counter()
            drafts = self._guarded(drafter, drafter.propose, seqs, asked) or []
            for seq, limit, draft in zip(seqs, limits, drafts, strict=False):
                if draft is None or not draft.tokens:
                    continue
                # Some rows of a step are dearer than others, so half as likely may pay.
                reach = self.trust.reach(
                    seq, draft.source, draft.probs, 0.5 * least / batch.worth(seq)
                )
                if not reach or reach[0] * batch.worth(seq) < least:
                    continue
                draft = _trimmed(seq, draft, limit)
                del reach[len(draft.tokens) :]
                score = sum(reach)
                if score > scores.get(seq, 0.0):
                    best[seq], scores[seq] = draft, score
                    offers[seq] = Offer(reach, draft.source)
            spent[drafter.name] = time.perf_counter() - started
        return best, offers, spent

    def _limits_of(
        self,
        drafter: Drafter,
        seqs: list[EngineSequence],
        limits: list[int],
        scores: dict[EngineSequence, float],
    ) -> list[int]:
        """0 for those that have more already than this drafter could give."""
        reader = self._readers.get(drafter.name)
        if reader is None:
            return limits
        reader.read(self._hidden, self._rows)
        most = reader.num_drafts
        pairs = zip(seqs, limits, strict=True)
        return [0 if scores.get(seq, 0.0) >= most else limit for seq, limit in pairs]

    def _settle(self, size: Size, step: ScheduledStep, rows_s: float | None) -> None:
        """Book what drafts saved, less the `rows_s` they took; None = beside prompts, whose plain
        step nobody knows: as estimated.
        """
        total = sum(self._drafted.values())
        if not total or self._batch is None:
            return
        batch = self._batch
        if rows_s is None:
            rows_s = batch.rows_s(step.num_draft_tokens)
        lefts = [(chunk.seq.num_left, self._ahead.get(chunk.seq, 0)) for chunk in step.chunks]
        saved_s = batch.saved_s(lefts) / max(sum(self._gained.values()), 1)
        for name, count in self._drafted.items():
            gain_s = saved_s * self._gained.get(name, 0) - rows_s * count / total
            size.accounts[name].note_gain(gain_s, batch.plain_s)

    def _note_result(
        self, seq: EngineSequence, draft: Draft, tokens: list[int], num_drafts: int
    ) -> None:
        hits = [a == b for a, b in zip(draft.tokens[:num_drafts], tokens, strict=False)]
        num_accepted = hits.index(False) if False in hits else len(hits)
        self.trust.note(seq, draft.source, draft.probs, hits[: num_accepted + 1])
        self._ahead[seq] = len(tokens) - 1
        self._gained[draft.source] = self._gained.get(draft.source, 0) + len(tokens) - 1
        self._results.append(DraftResult(draft.source, num_drafts, num_accepted))

    def _guarded(
        self, drafter: Drafter, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        try:
            return call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a guess must not fail a request
            self._note_failure(drafter, error)
            return None

    def _note_failure(self, drafter: Drafter, error: Exception) -> None:
        count = self._failures[drafter.name] = self._failures.get(drafter.name, 0) + 1
        # Not the message: a KeyError's would be a sequence with its prompt.
        log.warning("drafter %s failed (%s)", drafter.name, type(error).__name__)
        if count >= MAX_FAILURES and drafter in self.drafters:
            self.drafters.remove(drafter)
            log.error("drafter %s failed %d times and is off", drafter.name, count)


def _trimmed(seq: EngineSequence, draft: Draft, limit: int) -> Draft:
    """At most `limit` tokens, and none that the grammar refuses."""
    count = min(len(draft.tokens), limit)
    if seq.grammar is not None:
        count = seq.grammar.validate_prefix(draft.tokens[:count])
    if count == len(draft.tokens):
        return draft
    return Draft(draft.tokens[:count], draft.probs[:count], draft.source)
