"""The scheduler under random load: it conserves tokens, fills the budget, starves nobody.

No model: a computed chunk advances `num_computed`, a sampled token is 7, a sequence ends after
its `max_output`. Every request must end, whatever the memory.
"""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.engine.kv import BlockPool
from sterna.engine.request import EngineRequest, SamplingParams
from sterna.engine.scheduler import MAX_BYPASS, Scheduler
from sterna.engine.sequence import RequestState, Sequence, Status
from sterna.engine.tables import BlockTables

BLOCK = 16


class World:
    def __init__(self, num_blocks, budget, max_seqs=8, policy="splitfuse", cache=True, drafts=0):
        self.pool = BlockPool(num_blocks, BLOCK)
        self.tables = BlockTables(self.pool, num_blocks, cache)
        self.scheduler = Scheduler(self.tables, budget, max_seqs, policy, max_drafts=drafts)
        self.rng = random.Random(drafts)
        self.num_drafted = 0
        self.alive = []
        self.num_steps = 0
        self.num_preempted = 0
        self.first_chunk = {}
        self.arrival_step = {}
        self.computed = {}

    def add(self, prompt, max_output, priority=0, ready=True):
        order = len(self.arrival_step)
        request = EngineRequest(
            request_id=str(order),
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(),
            priority=priority,
        )
        state = RequestState(request, order, 0.0, np.array(prompt, np.int32), max_output)
        if not ready:
            state.grammar = SimpleNamespace()  # compiling
        seq = Sequence(state, 0, None, None, (priority, order, 0))
        state.sequences.append(seq)
        self.scheduler.add(seq)
        self.alive.append(seq)
        self.arrival_step[seq] = self.num_steps
        self.computed[seq] = 0
        return seq

    def guess(self):
        """Drafts of any length that the sequence may still generate."""
        for seq in self.scheduler.running if self.scheduler.max_drafts else ():
            room = seq.state.max_output - len(seq.output) - 1
            if seq.may_draft and room > 0:
                seq.draft = [7] * self.rng.randint(0, min(room, 40))

    def step(self):
        self.guess()
        step = self.scheduler.schedule()
        self.num_drafted += step.num_draft_tokens
        assert step.num_draft_tokens <= self.scheduler.max_drafts
        assert not any(seq.draft for seq in self.scheduler.waiting)
        self.num_steps += 1
        self.num_preempted += step.num_preempted
        self.tables.copies.clear()
        assert len({chunk.seq for chunk in step.chunks}) == len(step.chunks)
        for chunk in step.chunks:
            self.commit(chunk)
        self.pool.check_integrity([seq.blocks for seq in self.scheduler.running])
        waiting = self.scheduler.waiting
        assert self.scheduler.num_waiting_tokens == sum(s.num_queued_tokens for s in waiting)
        # A fork is queued before it is given its first token.
        assert all(0 <= s.num_tokens - s.num_queued_tokens <= bool(s.index) for s in waiting)
        return step

    def fork(self, leader, count):
        """The samples that share a prompt's blocks, as commit.py makes them."""
        for index in range(1, count):
            child = Sequence(leader.state, index, None, None, (*leader.order[:2], index))
            leader.state.sequences.append(child)
            self.scheduler.add_fork(leader, child)
            child.output.append(7)
            self.alive.append(child)
            self.computed[child] = 0

    def end(self, seq, is_damaged):
        """An abort, or a failed step whose blocks must be wiped."""
        self.alive.remove(seq)
        if not is_damaged:
            self.scheduler.finish(seq)
            return
        wiped = self.scheduler.finish_damaged(seq)
        assert all(self.pool.num_idle((block,)) for block in wiped)

    def commit(self, chunk):
        seq = chunk.seq
        assert seq.status is Status.RUNNING
        assert chunk.start == seq.num_computed
        assert 0 < chunk.num_committed <= seq.num_remaining
        assert chunk.num_drafts == len(seq.draft)
        assert len(seq.blocks) * BLOCK >= chunk.start + chunk.num_tokens
        self.first_chunk.setdefault(seq, self.num_steps)
        self.computed[seq] += chunk.num_committed
        accepted = self.rng.randint(0, chunk.num_drafts)
        seq.num_computed += chunk.num_committed + accepted
        seq.output.extend(seq.draft[:accepted])
        seq.draft.clear()
        if chunk.num_drafts:
            self.tables.shrink(seq)
        self.tables.publish(seq)
        assert chunk.samples == (seq.num_remaining == 0)
        if chunk.samples:
            seq.output.append(7)
            if len(seq.output) >= seq.state.max_output:
                self.scheduler.finish(seq)
                self.alive.remove(seq)

    def run(self, limit=20_000):
        while self.alive:
            assert self.num_steps < limit, "a request does not end"
            step = self.step()
            assert step.chunks, "work is pending but nothing is scheduled"


@pytest.mark.parametrize("policy", ["splitfuse", "whole-prompt"])
@pytest.mark.parametrize("seed", range(6))
def test_every_request_ends_under_random_load(policy, seed):
    rng = random.Random(seed)
    num_blocks = rng.choice([12, 20, 60])
    world = World(num_blocks, rng.choice([3, 16, 64]), rng.choice([1, 4, 16]), policy)
    longest = (num_blocks - 1) * BLOCK
    for _ in range(rng.randint(1500, 2500)):
        if rng.random() < 0.12 and len(world.alive) < 40:
            num_prompt = rng.randint(1, longest - 1)
            shared = (
                [1] * num_prompt if rng.random() < 0.5 else rng.choices(range(99), k=num_prompt)
            )
            max_output = rng.randint(1, min(60, longest - num_prompt))
            world.add(shared, max_output, priority=rng.choice([0, 0, 1]))
        if world.alive and rng.random() < 0.02:
            seq = world.alive.pop(rng.randrange(len(world.alive)))
            world.scheduler.finish(seq)  # an abort
        if world.alive:
            assert world.step().chunks
    world.run()
    assert world.pool.num_free == world.pool.num_usable
    assert not world.scheduler.waiting
    assert not world.scheduler.running


@pytest.mark.parametrize("drafts", [0, 24])
@pytest.mark.parametrize("policy", ["splitfuse", "whole-prompt"])
def test_twenty_five_thousand_random_operations_each(policy, drafts):
    """Arrivals, forks, aborts, failures and changes of the budget among steps; 10^5 in all."""
    rng = random.Random(policy)
    world = World(30, 16, 8, policy, drafts=drafts)
    longest = 29 * BLOCK
    counts = dict.fromkeys(("add", "fork", "abort", "fail", "budget", "step"), 0)
    while sum(counts.values()) < 25_000:
        kinds = ["add", "abort", "fail", "budget", "fork", "step"]
        (kind,) = rng.choices(kinds, (8, 2, 1, 1, 6, 82))
        started = [s for s in world.alive if len(s.output) == 1 and s.status is Status.RUNNING]
        # Only a leader that has just drawn its first token, and has no siblings yet, forks.
        started = [s for s in started if len(s.state.sequences) == 1 and s.num_remaining == 1]
        if kind == "add" and len(world.alive) < 24:
            shared = rng.random() < 0.5
            count = rng.randint(1, longest - 1)
            prompt = [1] * count if shared else rng.choices(range(99), k=count)
            world.add(prompt, rng.randint(1, min(60, longest - count)), rng.choice((0, 0, 1)))
        elif kind in ("abort", "fail") and world.alive:
            world.end(rng.choice(world.alive), is_damaged=kind == "fail")
        elif kind == "budget":
            world.scheduler.set_token_budget(rng.choice((2, 16, 64)), rng.choice((1, 8, 16)))
        elif kind == "fork" and started:
            world.fork(started[0], rng.randint(2, 4))
        elif kind == "step" and world.alive:
            assert world.step().chunks
        else:
            continue
        counts[kind] += 1
    assert min(counts.values()) > 50, counts
    assert world.num_preempted > 50
    assert (world.num_drafted > 1000) == (drafts > 0)
    world.run(limit=world.num_steps + 20_000)
    assert world.pool.num_free == world.pool.num_usable
    assert not world.scheduler.waiting and not world.scheduler.running


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 300), min_size=1, max_size=20),
    budget=st.integers(2, 200),
)
def test_tokens_are_conserved_and_the_budget_is_filled(prompts, budget):
    """Without memory pressure each token is computed once, in full steps while prompts wait."""
    world = World(2000, budget, 64, cache=False)
    for i, length in enumerate(prompts):
        world.add([i % 90] * length, 3)
    while world.alive:
        places = world.scheduler.max_running - len(world.scheduler.running)
        backlog = sum(s.num_remaining for s in world.scheduler.running)
        # The shortest may be admitted first and take the places.
        backlog += sum(sorted(s.num_remaining for s in world.scheduler.waiting)[:places])
        step = world.step()
        num_tokens = step.num_decode_tokens + step.num_prompt_tokens
        assert num_tokens <= budget
        assert num_tokens >= min(budget, backlog)
    assert sum(world.computed.values()) == sum(prompts) + 2 * len(prompts)
    assert world.num_preempted == 0


@pytest.mark.parametrize("drafts", [0, 200])
def test_first_chunk_bound_under_adversarial_arrivals(drafts):
    """N + 8 A / B steps, though shorter prompts arrive in every step and generate for long."""
    budget = 64
    for num_ahead in (0, 1, 5):
        world = World(100_000, budget, 1000, drafts=drafts)
        ahead = [world.add([1] * 700, 2000) for _ in range(num_ahead)]
        victim = world.add([2] * 900, 10)
        bound = num_ahead + 8 * sum(s.num_tokens for s in ahead) / budget
        while victim not in world.first_chunk:
            # Places stay free for the victim: max_running bounds the decodes.
            if len(world.scheduler.running) < world.scheduler.max_running - 8:
                world.add([3] * 20, 2000)
            world.step()
        assert world.first_chunk[victim] <= math.ceil(bound) + 1


def test_the_oldest_prompt_gets_half_and_short_ones_overtake():
    world = World(1000, 64)
    document = world.add([1] * 2000, 5)
    world.step()
    question = world.add([2] * 30, 5)
    step = world.step()
    counts = {chunk.seq: chunk.num_tokens for chunk in step.chunks}
    assert counts == {document: 34, question: 30}


def test_drafts_take_no_more_than_the_decodes_share():
    world = World(1000, 64, drafts=200)
    decoding = [world.add([i] * 10, 4000) for i in range(4)]
    for _ in range(2):
        world.step()
    world.add([9] * 5000, 1)
    for _ in range(50):
        step = world.step()
        assert {chunk.seq for chunk in step.chunks} >= set(decoding)
        assert step.num_decode_tokens + step.num_draft_tokens <= 48
        assert step.num_prompt_tokens == 64 - 4 - step.num_draft_tokens
    assert world.num_drafted > 50


def test_drafts_preempt_nobody_and_hold_no_block_for_long():
    """7 blocks: room for both requests, not for drafts beside them."""
    world = World(8, 64, 8, cache=False, drafts=200)
    for i in range(2):
        world.add([i] * 20, 30)
    while world.alive:
        world.step()
        for seq in world.scheduler.running:
            assert len(seq.blocks) == world.tables.num_blocks_for(seq.num_computed)
    assert world.num_preempted == 0
    assert world.num_drafted > 0


def test_decodes_always_run_beside_prompts():
    world = World(1000, 64)
    decoding = [world.add([i] * 10, 400) for i in range(4)]
    for _ in range(2):
        world.step()
    world.add([9] * 5000, 1)
    for _ in range(50):
        step = world.step()
        assert {chunk.seq for chunk in step.chunks} >= set(decoding)
        assert step.num_decode_tokens == 4
        assert step.num_prompt_tokens == 60


def test_a_request_that_does_not_fit_is_overtaken_a_bounded_number_of_times():
    world = World(64, 64, 8, cache=False)
    world.add([1] * 100, 10)
    world.step()
    large = world.add([2] * 950, 5)  # 60 of 63 blocks: fits only alone
    num_later = 0
    while large not in world.first_chunk:
        assert world.num_steps < 5000
        if len(world.scheduler.waiting) < 4:
            world.add([3] * 40, 20)
            num_later += 1
        world.step()
    overtaken = sum(s.order > large.order for s in world.first_chunk if s is not large)
    assert overtaken <= MAX_BYPASS + 8
    assert num_later > MAX_BYPASS  # the load was there


def test_compiling_grammars_are_skipped_not_waited_for():
    world = World(100, 64)
    compiling = world.add([1] * 10, 3, ready=False)
    other = world.add([2] * 10, 3)
    assert [chunk.seq for chunk in world.step().chunks] == [other]
    compiling.state.grammar = None
    assert compiling in {chunk.seq for chunk in world.step().chunks}


def test_preemption_takes_the_last_and_keeps_its_output():
    world = World(10, 64, 8, cache=False)
    first = world.add([1] * 60, 60)
    last = world.add([2] * 50, 60)
    for _ in range(50):
        if not world.num_preempted:
            world.step()
    assert last.status is Status.WAITING
    assert first.status is Status.RUNNING
    assert last.output and not last.blocks
    kept = list(last.output)
    world.run()
    assert last.output[: len(kept)] == kept


def test_whole_prompt_takes_prompts_uncut_before_decodes():
    world = World(1000, 64, policy="whole-prompt")
    world.add([1] * 10, 50)
    world.step()
    long = world.add([2] * 500, 5)
    step = world.step()
    assert [(chunk.seq, chunk.num_tokens) for chunk in step.chunks] == [(long, 500)]
    assert world.step().num_decode_tokens == 2
