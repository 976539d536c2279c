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
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

from torch import Tensor

from sterna.core.log import get_logger
from sterna.engine.asking import Asking
from sterna.engine.config import EngineConfig
from sterna.engine.draft_rows import Batch
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
# So many drafted steps, then one without: what drafts are to be better than is measured, too.
PLAIN_EVERY = 128
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
        self._hidden: Tensor | None = None
        self._asking: dict[str, Asking] = {}
        self._asked_s = 0.0  # how long drafters took before this step
        self._num_drafted_steps = 0  # since one without drafts
        self._batch: Batch | None = None  # the last one that drafts were asked for

    def propose(self, scheduler: Scheduler) -> None:
        """Set `draft` of the running decodes for the next step."""
        self._pending.clear()
        self._asked_s = 0.0
        decodes = [seq for seq in scheduler.running if seq.may_draft]
        seqs = [seq for seq in decodes if self._limit(seq) > 0]
        if not seqs or self.guard.is_paused() or self._num_drafted_steps >= PLAIN_EVERY:
            return
        others = min(
            scheduler.num_pending_prompt_tokens, max(0, scheduler.token_budget - len(decodes))
        )
        batch = Batch(self.cost, decodes, others)
        if not batch.may_gain(len(seqs), self._config.num_draft_tokens):
            return
        started = time.perf_counter()
        self._batch = batch
        drafts = self._best_drafts(seqs)
        batch.overhead_s = self._asked_s = time.perf_counter() - started
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

    def see(self, hidden: Tensor | None) -> None:
        """The hidden states of a step's output rows, before its tokens are committed."""
        self._hidden = hidden

    def extend(self, seq: EngineSequence, tokens: list[int], num_drafts: int, row: int) -> None:
        """See commit.Listener."""
        draft = self._pending.pop(seq, None)
        if draft is not None and num_drafts:
            self._note_result(seq, draft, tokens, num_drafts)
        for drafter in list(self.drafters):
            reader = _reader(drafter)
            if reader is not None and self._hidden is not None:
                states = self._hidden[row : row + len(tokens)]
                self._guarded(drafter, reader.observe, seq, states)
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
        has_drafts = bool(step.num_draft_tokens)
        self._num_drafted_steps = self._num_drafted_steps + 1 if has_drafts else 0
        own_s = max(seconds - self._asked_s, 0.5 * seconds)
        self.cost.note(rows, keys, own_s, has_drafts=has_drafts)

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
            asked = self._limits_of(drafter, seqs, limits, scores)
            drafts = self._ask(drafter, seqs, asked) if any(asked) else []
            for seq, limit, draft in zip(seqs, limits, drafts, strict=False):
                if draft is None or not draft.tokens:
                    continue
                draft = _trimmed(seq, draft, limit)
                score = sum(self.trust.reach(seq, draft.source, draft.probs))
                if score > scores.get(seq, 0.0):
                    best[seq], scores[seq] = draft, score
        return best

    def _limits_of(
        self,
        drafter: Drafter,
        seqs: list[EngineSequence],
        limits: list[int],
        scores: dict[EngineSequence, float],
    ) -> list[int]:
        """0 for those that have more already than this drafter could give, all 0 in a pause."""
        if not self._asking.setdefault(drafter.name, Asking()).is_due():
            return [0] * len(seqs)
        reader = _reader(drafter)
        if reader is None:
            return limits
        most = reader.num_drafts
        pairs = zip(seqs, limits, strict=True)
        return [0 if scores.get(seq, 0.0) >= most else limit for seq, limit in pairs]

    def _ask(
        self, drafter: Drafter, seqs: list[EngineSequence], limits: list[int]
    ) -> list[Draft | None]:
        assert self._batch is not None, "set by propose"
        started = time.perf_counter()
        drafts = self._guarded(drafter, drafter.propose, seqs, limits) or []
        seconds = time.perf_counter() - started
        self._asking[drafter.name].note_ask(seconds, self._batch.plain_s)
        return drafts

    def _note_result(
        self, seq: EngineSequence, draft: Draft, tokens: list[int], num_drafts: int
    ) -> None:
        hits = [a == b for a, b in zip(draft.tokens[:num_drafts], tokens, strict=False)]
        num_accepted = hits.index(False) if False in hits else len(hits)
        self.trust.note(seq, draft.source, draft.probs, hits[: num_accepted + 1])
        if self._batch is not None:
            gain = self._batch.gain_s(num_drafts, num_accepted)
            self._asking.setdefault(draft.source, Asking()).note_gain(gain)
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


def _reader(drafter: Drafter) -> ReadsHidden | None:
    """isinstance of a protocol takes microseconds, and this is asked for every token."""
    return cast(ReadsHidden, drafter) if hasattr(drafter, "observe") else None


def _trimmed(seq: EngineSequence, draft: Draft, limit: int) -> Draft:
    """At most `limit` tokens, and none that the grammar refuses."""
    count = min(len(draft.tokens), limit)
    if seq.grammar is not None:
        count = seq.grammar.validate_prefix(draft.tokens[:count])
    if count == len(draft.tokens):
        return draft
    return Draft(draft.tokens[:count], draft.probs[:count], draft.source)
