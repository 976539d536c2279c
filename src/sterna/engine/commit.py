"""What a step's results change: computed counts, new tokens, forks, ends.

This is the only file that ends samples. Each of a request's `n` samples gets exactly one delta
with a finish reason; when the last one has it the request is finished.
"""

from __future__ import annotations

import time
from typing import Protocol

from sterna.core.errors import SternaError
from sterna.engine.admit import RequestFactory
from sterna.engine.forward import Forward, as_request_error
from sterna.engine.outputs import StepOutputs
from sterna.engine.request import Delta, FinishReason, TokenLogprob
from sterna.engine.runner import Runner
from sterna.engine.sampler import Sampled
from sterna.engine.scheduler import Chunk, Scheduler
from sterna.engine.sequence import RequestState, Sequence, Status
from sterna.engine.stopping import Progress
from sterna.engine.stream import merge_deltas
from sterna.engine.structured import stuck_grammar
from sterna.engine.verify import Draw


class Listener(Protocol):
    """Learns what sequences gain."""

    def extend(self, seq: Sequence, tokens: list[int], num_drafts: int, row: int) -> None:
        """`seq` has gained `tokens`: accepted ones of `num_drafts` drafts, and one more.

        The first of them was drawn from row `row` of the step's output rows, the next from the one
        behind it.
        """
        ...


class Committer:
    """Applies results to sequences and notes what clients must be told."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        factory: RequestFactory,
        outputs: StepOutputs,
        listener: Listener | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._factory = factory
        self._outputs = outputs
        self._listener = listener

    def draws(self, forward: Forward) -> list[Draw]:
        """Who gets a token: each sampling chunk's sequence and the samples forked from it."""
        found: list[Draw] = []
        sampling = (chunk for chunk in forward.chunks if chunk.samples)
        for chunk, row in zip(sampling, forward.logits.rows, strict=True):
            seq = chunk.seq
            found.append(Draw(seq, row, num_drafts=chunk.num_drafts))
            if seq.is_leader:
                found.extend(Draw(child, row, seq) for child in self._new_forks(seq))
        return found

    def advance(self, forward: Forward) -> None:
        """Count what was computed and end what failed."""
        for chunk_idx, chunk in enumerate(forward.chunks):
            chunk.seq.num_computed = chunk.start + chunk.num_committed
            self._scheduler.tables.publish(chunk.seq)
            if chunk_idx in forward.logits.prompt_logprobs:
                _keep_prompt_logprobs(chunk, forward.logits.prompt_logprobs[chunk_idx])
        for chunk, error in forward.failed:
            self.fail(chunk.seq, error)

    def append(self, draws: list[Draw], chosen: list[list[Sampled]]) -> None:
        """Give every draw its tokens; end the samples that are complete."""
        for draw in draws:
            if draw.parent is not None:
                self._scheduler.add_fork(draw.parent, draw.seq)
        now = time.monotonic()
        for draw, choices in zip(draws, chosen, strict=True):
            seq = draw.seq
            if seq.state.first_token is None and choices[0].error is None:
                seq.state.first_token = now
            deltas, error = _push_all(seq, choices)
            if deltas:
                self._keep_tokens(draw, deltas)
            if error is not None:
                self.fail(seq, error)

    def restart(self, seq: Sequence) -> None:
        """Compute a sequence anew whose cache is damaged behind its tokens."""
        if seq.status is Status.RUNNING:
            self._runner.wipe_blocks(self._scheduler.restart_damaged(seq))

    def end_without_tokens(self, draws: list[Draw]) -> None:
        """max_tokens = 0: the prompt was all that was asked for."""
        for draw in draws:
            if draw.parent is not None:
                self._scheduler.add_fork(draw.parent, draw.seq)
            self._end_sample(draw.seq, FinishReason.LENGTH)

    def fail(self, seq: Sequence, error: SternaError) -> None:
        """End a sample by an error, and its future siblings with it; wipe its blocks."""
        damaged = self._scheduler.finish_damaged(seq)
        self._runner.wipe_blocks(damaged)
        reason = FinishReason.ERROR
        self._outputs.add(seq.state, Delta(index=seq.index, finish_reason=reason, error=error))
        if seq.is_leader:
            self._end_unborn(seq.state, reason, error)
        self._finish_request(seq.state)

    def end_request(
        self, state: RequestState, reason: FinishReason, error: SternaError | None
    ) -> None:
        """End all unfinished samples of a request."""
        if state.grammar is not None:
            state.grammar.cancel()
        alive = [seq for seq in state.sequences if seq.status is not Status.FINISHED]
        self._end_unborn(state, reason, error)
        for seq in alive:
            self._scheduler.finish(seq)
            delta = Delta(index=seq.index, text=seq.stop.flush(), finish_reason=reason, error=error)
            self._outputs.add(state, delta)
        self._finish_request(state)

    def _keep_tokens(self, draw: Draw, deltas: list[Delta]) -> None:
        """All but the last of a step's tokens were drafts: their keys and values are cached."""
        seq, delta = draw.seq, merge_deltas(deltas)
        seq.draft.clear()
        if draw.num_drafts:
            seq.num_computed += len(deltas) - 1
            self._scheduler.tables.publish(seq)
            self._scheduler.tables.shrink(seq)
        if self._listener is not None:
            self._listener.extend(seq, list(delta.token_ids), draw.num_drafts, draw.row)
        self._outputs.add(seq.state, delta)
        if delta.finish_reason is not None:
            self._scheduler.finish(seq)
            self._finish_request(seq.state)

    def _end_sample(self, seq: Sequence, reason: FinishReason) -> None:
        self._scheduler.finish(seq)
        self._outputs.add(seq.state, Delta(index=seq.index, finish_reason=reason))
        self._finish_request(seq.state)

    def _end_unborn(
        self, state: RequestState, reason: FinishReason, error: SternaError | None
    ) -> None:
        """Samples that were never forked end with the request."""
        for index in range(len(state.sequences), state.request.params.n):
            self._outputs.add(state, Delta(index=index, finish_reason=reason, error=error))

    def _finish_request(self, state: RequestState) -> None:
        if state.finished is None and state.is_finished:
            state.finished = time.monotonic()

    def _new_forks(self, leader: Sequence) -> list[Sequence]:
        state = leader.state
        for index in range(1, state.request.params.n):
            child = self._factory.new_sequence(state, index)
            if leader.grammar is not None and leader.plan.bitmask is not None:
                child.grammar = leader.grammar.copy()
                child.plan.bitmask = leader.plan.bitmask.copy()
            state.sequences.append(child)
        return state.sequences[1:]


def _push_all(seq: Sequence, choices: list[Sampled]) -> tuple[list[Delta], SternaError | None]:
    """Append tokens up to the sample's end or the first error; what each did."""
    deltas: list[Delta] = []
    for choice in choices:
        if choice.error is not None:
            return deltas, choice.error
        try:
            delta = _push(seq, choice)
        except Exception as error:  # noqa: BLE001 - text or grammar of one sample, others go on
            return deltas, as_request_error(error)
        deltas.append(delta)
        if delta.finish_reason is not None:
            break
    return deltas, None


def _push(seq: Sequence, choice: Sampled) -> Delta:
    token_id = choice.token_id
    seq.output.append(token_id)
    progress = seq.stop.push(token_id)
    if seq.grammar is not None and progress.finish_reason is None:
        progress = _follow_grammar(seq, token_id, progress)
    return Delta(
        index=seq.index,
        token_ids=(token_id,),
        text=progress.text,
        logprobs=None if choice.logprob is None else (choice.logprob,),
        finish_reason=progress.finish_reason,
        stop_reason=progress.stop_reason,
    )


def _follow_grammar(seq: Sequence, token_id: int, progress: Progress) -> Progress:
    assert seq.grammar is not None, "only called for sequences with a grammar"
    if not seq.grammar.accept(token_id):
        raise stuck_grammar(seq.grammar)
    if not seq.grammar.is_finished:
        return progress
    end = seq.stop.finish_grammar()
    return Progress(progress.text + end.text, end.finish_reason, end.stop_reason)


def _keep_prompt_logprobs(chunk: Chunk, found: list[TokenLogprob]) -> None:
    """Row i of a chunk scored prompt token start + i + 1; the first token has no score."""
    kept = chunk.seq.state.prompt_logprobs
    if kept is not None:
        first = chunk.start + 1
        kept[first : first + len(found)] = found
