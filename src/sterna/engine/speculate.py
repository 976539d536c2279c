"""What to guess in the next step: the best draft of each sequence, as long as its rows pay.

A step of N rows yields W tokens (a decode's next token or a prompt's computed one: they cost the
same) and lasts t(N) seconds (stepcost.py). A draft's token i is worth r_i, the probability that it
and those before it are accepted (trust.py). Rows are added in the order of r_i while they raise

    (W + sum of r) / t(N + rows)

the tokens a second of the whole batch. So a lone request drafts long, a full batch not at all, and
where arithmetic bounds the step (prompts fill the budget) nobody does. The road not taken:
thresholds on batch size and draft length, which are right on one machine for one model.

A guard compares what was gained with the estimates; when drafts do not pay in truth, they pause.
A drafter that raises loses its drafts of that step; one that raises often is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from sterna.core.log import get_logger
from sterna.engine.config import EngineConfig
from sterna.engine.drafters.base import Draft, Drafter
from sterna.engine.request import DraftResult
from sterna.engine.sequence import Sequence as EngineSequence
from sterna.engine.stepcost import StepCost
from sterna.engine.trust import Trust

if TYPE_CHECKING:
    from sterna.engine.scheduler import ScheduledStep, Scheduler

log = get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# Rows are added only for this much more: estimates are no better.
MIN_GAIN = 1.02
# A drafter that raised so often is dropped.
MAX_FAILURES = 8
EMA = 0.05
# Drafted steps behind a verdict of the guard, and for how many steps it pauses (doubled each time).
GUARD_STEPS, PAUSE_STEPS, MAX_PAUSE = 32, 64, 4096


class Guard:
    """Watches the realised gain: tokens a second of drafted steps against estimated plain ones."""

    def __init__(self) -> None:
        self._gained = self._spent = 0.0  # tokens in units of plain steps, seconds in the same
        self._num = 0
        self._pause = PAUSE_STEPS
        self.left = 0

    def note(self, tokens: float, plain_tokens: float, seconds: float, plain_s: float) -> None:
        """Take one drafted step."""
        self._num += 1
        self._gained += tokens / plain_tokens
        self._spent += min(seconds / plain_s, 10.0)
        if self._num < GUARD_STEPS:
            return
        if self._gained < self._spent:
            self.left, self._pause = self._pause, min(2 * self._pause, MAX_PAUSE)
        else:
            self._pause = PAUSE_STEPS
        self._gained = self._spent = self._num = 0

    def is_paused(self) -> bool:
        """Counts down."""
        self.left = max(0, self.left - 1)
        return self.left > 0


class Speculator:
    """The drafters of one engine and the decision between them. Engine thread only."""

    def __init__(
        self, drafters: Sequence[Drafter], config: EngineConfig, cost: StepCost | None = None
    ) -> None:
        self.drafters = list(drafters)
        self.cost = cost or StepCost()
        self.trust = Trust()
        self.guard = Guard()
        self._config = config
        self._failures: dict[str, int] = {}
        self._pending: dict[EngineSequence, Draft] = {}
        self._excluded: set[EngineSequence] = set()
        self._results: list[DraftResult] = []

    def propose(self, scheduler: Scheduler) -> None:
        """Set `draft` of the running decodes for the next step."""
        self._pending.clear()
        decodes = [seq for seq in scheduler.running if seq.may_draft]
        seqs = [seq for seq in decodes if self._limit(seq) > 0]
        if not seqs or self.guard.is_paused():
            return
        others = min(
            scheduler.num_pending_prompt_tokens, max(0, scheduler.token_budget - len(decodes))
        )
        batch = Batch(self.cost, decodes, others)
        if not batch.may_gain(len(seqs), self._config.num_draft_tokens):
            return
        started = time.perf_counter()
        drafts = self._best_drafts(seqs)
        batch.overhead_s = time.perf_counter() - started
        reach = {s: self.trust.reach(s, d.source, d.probs) for s, d in drafts.items()}
        lengths = batch.choose(reach, scheduler.max_drafts)
        for seq, draft in drafts.items():
            seq.draft = draft.tokens[: lengths.get(seq, 0)]
            if seq.draft:
                self._pending[seq] = draft
            else:
                self.trust.fade(seq)

    def start(self, seq: EngineSequence) -> None:
        """See commit.Listener."""
        for drafter in list(self.drafters):
            self._guarded(drafter, drafter.start, seq)

    def extend(self, seq: EngineSequence, tokens: list[int], num_drafts: int) -> None:
        """See commit.Listener."""
        draft = self._pending.pop(seq, None)
        if draft is not None and num_drafts:
            self._note_result(seq, draft, tokens, num_drafts)
        for drafter in list(self.drafters):
            self._guarded(drafter, drafter.extend, seq, tokens)

    def finish(self, seq: EngineSequence) -> None:
        """The sequence has left the scheduler."""
        self._pending.pop(seq, None)
        self._excluded.discard(seq)
        self.trust.forget(seq)
        for drafter in list(self.drafters):
            self._guarded(drafter, drafter.finish, seq)

    def exclude(self, seq: EngineSequence) -> None:
        """No more drafts for a sequence whose drafts broke the model."""
        self._excluded.add(seq)

    def note_step(self, step: ScheduledStep, num_tokens: int, seconds: float) -> None:
        """Take a finished step that gave its decodes `num_tokens` tokens."""
        if step.num_prompt_tokens or not step.num_decode_tokens:
            return
        rows, keys = 0, 0
        plain_keys = 0
        for chunk in step.chunks:
            rows += chunk.num_tokens
            keys += chunk.num_tokens * chunk.start
            plain_keys += chunk.start
        if step.num_draft_tokens:
            plain_s = self.cost.seconds(len(step.chunks), plain_keys)
            self.guard.note(num_tokens, len(step.chunks), seconds, plain_s)
        self.cost.note(rows, keys, seconds)

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
        room = seq.state.max_output - len(seq.output) - 1
        return min(self._config.num_draft_tokens, room)

    def _best_drafts(self, seqs: list[EngineSequence]) -> dict[EngineSequence, Draft]:
        limits = [self._limit(seq) for seq in seqs]
        best: dict[EngineSequence, Draft] = {}
        scores: dict[EngineSequence, float] = {}
        for drafter in list(self.drafters):
            drafts = self._guarded(drafter, drafter.propose, seqs, limits) or []
            for seq, limit, draft in zip(seqs, limits, drafts, strict=False):
                if draft is None or not draft.tokens:
                    continue
                draft = _trimmed(seq, draft, limit)
                score = sum(self.trust.reach(seq, draft.source, draft.probs))
                if score > scores.get(seq, 0.0):
                    best[seq], scores[seq] = draft, score
        return best

    def _note_result(
        self, seq: EngineSequence, draft: Draft, tokens: list[int], num_drafts: int
    ) -> None:
        hits = [a == b for a, b in zip(draft.tokens[:num_drafts], tokens, strict=False)]
        num_accepted = hits.index(False) if False in hits else len(hits)
        self.trust.note(seq, draft.source, draft.probs, hits[: num_accepted + 1])
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


class Batch:
    """The next step without drafts, and how many rows to add."""

    def __init__(self, cost: StepCost, decodes: list[EngineSequence], num_others: int) -> None:
        self._cost = cost
        self._rows = len(decodes) + num_others
        self._keys = sum(seq.num_computed for seq in decodes)
        self._plain_rate = self._rows / cost.seconds(self._rows, self._keys)
        self._mean_keys = self._keys // len(decodes)
        self.overhead_s = 0.0

    def may_gain(self, num_seqs: int, max_length: int) -> bool:
        """Even a draft that is all right pays only where rows are cheap."""
        length = 1
        while length <= max_length:
            rows = num_seqs * length
            seconds = self._cost.seconds(self._rows + rows, self._keys + rows * self._mean_keys)
            if (self._rows + rows) / seconds > MIN_GAIN * self._plain_rate:
                return True
            length *= 2
        return False

    def choose(
        self, reach: dict[EngineSequence, list[float]], max_rows: int
    ) -> dict[EngineSequence, int]:
        """Length of each sequence's draft."""
        order = [(-r, seq.order, seq) for seq, found in reach.items() for r in found]
        order.sort(key=lambda item: item[:2])
        best_rate, best_count = MIN_GAIN * self._plain_rate, 0
        tokens, keys = float(self._rows), self._keys
        for i, (minus_r, _, seq) in enumerate(order[:max_rows]):
            tokens -= minus_r
            keys += seq.num_computed
            seconds = self._cost.seconds(self._rows + i + 1, keys) + self.overhead_s
            if tokens / seconds > best_rate:
                best_rate, best_count = tokens / seconds, i + 1
        lengths: dict[EngineSequence, int] = {}
        for _, _, seq in order[:best_count]:
            lengths[seq] = lengths.get(seq, 0) + 1
        return lengths


def _trimmed(seq: EngineSequence, draft: Draft, limit: int) -> Draft:
    """At most `limit` tokens, and none that the grammar refuses."""
    count = min(len(draft.tokens), limit)
    if seq.grammar is not None:
        count = seq.grammar.validate_prefix(draft.tokens[:count])
    if count == len(draft.tokens):
        return draft
    return Draft(draft.tokens[:count], draft.probs[:count], draft.source)
