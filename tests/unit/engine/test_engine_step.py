"""The engine on the fake decoder: what it must say is computed without it."""

from __future__ import annotations

import random
import time

import pytest

from sterna.core.errors import ContextLengthError, DeadlineError, RequestError, StepError
from sterna.engine.request import FinishReason


def prompts(count, seed=0, longest=120):
    rng = random.Random(seed)
    return [[rng.randrange(90) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("policy", ["splitfuse", "whole-prompt"])
@pytest.mark.parametrize("budget", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("num_blocks", [20, 200])
def test_greedy_is_the_models_own(harness, greedy, policy, budget, num_blocks):
    # 20 blocks hold one and a half long requests: this row preempts all the time.
    h = harness(policy=policy, token_budget=budget, num_blocks=num_blocks, max_model_len=256)
    given = prompts(9, seed=budget)
    for i, prompt in enumerate(given):
        h.add(str(i), prompt, max_tokens=40)
    h.run()
    for i, prompt in enumerate(given):
        assert h.tokens(str(i)) == greedy(prompt, 40)
    assert h.engine.num_free_blocks == num_blocks - 1


def test_budget_is_filled_exactly_while_prompts_wait(harness):
    h = harness(token_budget=48, num_blocks=400)
    for i in range(6):
        h.add(str(i), [i + 1] * 200, max_tokens=20, ignore_eos=True)
    seen = []
    h.engine.on_step.append(seen.append)
    h.run()
    while_prompts = [s for s in seen if s.num_waiting or s.num_prompt_tokens]
    full = [s.num_decode_tokens + s.num_prompt_tokens for s in while_prompts[:-1]]
    assert full == [48] * len(full)
    assert sum(s.num_prompt_tokens for s in seen) == 6 * 200
    assert sum(s.num_decode_tokens for s in seen) == 6 * 19


def test_only_steps_without_decodes_fill_the_idle_budget(harness, greedy):
    h = harness(token_budget=48, num_blocks=400)
    h.engine.set_token_budget(48, 160)
    seen = []
    h.engine.on_step.append(seen.append)
    prompt = [i % 50 for i in range(400)]
    h.add("long", prompt, max_tokens=5)
    h.run()
    h.add("decoding", [7] * 10, max_tokens=60, ignore_eos=True)
    h.engine.step()
    h.add("late", prompt[::-1], max_tokens=5)
    h.run()
    assert [s.num_prompt_tokens for s in seen[:3]] == [160, 160, 80]
    assert {s.token_budget for s in seen if s.num_decode_tokens} == {48}
    assert all(s.num_decode_tokens + s.num_prompt_tokens <= s.token_budget for s in seen)
    assert h.tokens("long") == greedy(prompt, 5)


def test_prefix_cache_hits_and_changes_nothing(harness, greedy):
    h = harness()
    shared = list(range(70))
    h.add("a", [*shared, 1, 2], max_tokens=5)
    h.run()
    h.add("b", [*shared, 3], max_tokens=5)
    h.add("other tenant", [*shared, 3], max_tokens=5, cache_salt="x")
    h.run()
    assert h.outputs["a"][0].num_cached_tokens == 0
    assert h.outputs["b"][0].num_cached_tokens == 64
    assert h.outputs["other tenant"][0].num_cached_tokens == 0
    assert h.tokens("b") == h.tokens("other tenant") == greedy([*shared, 3], 5)


def test_the_last_prompt_token_is_always_computed(harness, greedy):
    h = harness()
    prompt = list(range(64))  # exactly four blocks
    for name in ("a", "b"):
        h.add(name, prompt, max_tokens=3)
        h.run()
    assert h.outputs["b"][0].num_cached_tokens == 48
    assert h.tokens("b") == greedy(prompt, 3)


def test_a_completion_is_cached_for_the_next_turn(harness, greedy):
    h = harness()
    h.add("a", range(30), max_tokens=40, ignore_eos=True)
    h.run()
    turn = [*range(30), *h.tokens("a"), 5]
    h.add("b", turn, max_tokens=3)
    h.run()
    assert h.outputs["b"][0].num_cached_tokens == 64  # of 71; the last output token is not stored
    assert h.tokens("b") == greedy(turn, 3)


@pytest.mark.parametrize("num_blocks", [14, 200])
@pytest.mark.parametrize("max_num_seqs", [2, 16])
def test_samples_fork_after_one_prompt(harness, num_blocks, max_num_seqs):
    h = harness(num_blocks=num_blocks, max_model_len=200, max_num_seqs=max_num_seqs)
    h.add("a", range(40), n=5, max_tokens=30, temperature=1.0, seed=3, ignore_eos=True)
    h.run()
    samples = [h.tokens("a", index) for index in range(5)]
    assert len({tuple(s) for s in samples}) == 5
    for index in range(5):
        assert h.end("a", index).finish_reason is FinishReason.LENGTH
    if num_blocks == 200 and max_num_seqs == 16:
        assert sum(tokens for tokens, _ in h.decoder.steps) == 40 + 5 * 29
    lone = harness(num_blocks=200)
    lone.add("a", range(40), n=5, max_tokens=30, temperature=1.0, seed=3, ignore_eos=True)
    assert [lone.run().tokens("a", index) for index in range(5)] == samples


def test_same_seed_same_tokens_whatever_else_runs(harness):
    alone = harness()
    alone.add("a", range(20), temperature=1.0, seed=11, max_tokens=60, ignore_eos=True)
    alone.run()
    crowd = harness(num_blocks=14, max_model_len=200, token_budget=16)
    for i, prompt in enumerate(prompts(5, seed=4, longest=60)):
        crowd.add(str(i), prompt, temperature=1.0, max_tokens=60, ignore_eos=True)
    crowd.add("a", range(20), temperature=1.0, seed=11, max_tokens=60, ignore_eos=True)
    seen = []
    crowd.engine.on_step.append(seen.append)
    crowd.run()
    assert sum(s.num_preempted for s in seen) > 0
    assert crowd.tokens("a") == alone.tokens("a")


def test_nan_logits_end_only_their_request(harness, fake_decoder, greedy):
    h = harness(fake_decoder(poison={95}))
    h.add("bad", [1, 2, 95], max_tokens=5)
    h.add("good", [1, 2, 3], max_tokens=5)
    h.run()
    assert h.end("bad").finish_reason is FinishReason.ERROR
    assert isinstance(h.end("bad").error, StepError)
    assert h.tokens("good") == greedy([1, 2, 3], 5)


def test_a_step_that_raises_ends_only_the_culprit(harness, fake_decoder, greedy):
    h = harness(fake_decoder(explode={95}))
    given = prompts(4, seed=8)
    for i, prompt in enumerate(given):
        h.add(str(i), prompt, max_tokens=10)
    h.step()
    h.add("bad", [1, 95], n=3, max_tokens=5)
    h.run()
    for index in range(3):
        assert isinstance(h.end("bad", index).error, StepError)
    for i, prompt in enumerate(given):
        assert h.tokens(str(i)) == greedy(prompt, 10)


def test_abort_frees_the_blocks_at_once(harness):
    h = harness()
    h.add("a", range(60), n=3, max_tokens=100, ignore_eos=True)
    h.step()
    h.step()
    assert h.engine.num_free_blocks < h.engine.pool.num_usable
    last = h.engine.abort("a")
    assert last.is_finished
    assert {d.finish_reason for d in last.deltas} == {FinishReason.ABORT}
    assert sorted(d.index for d in last.deltas) == [0, 1, 2]
    assert h.engine.num_free_blocks == h.engine.pool.num_usable
    assert h.engine.abort("a") is None
    assert h.step() == []


def test_abort_of_a_queued_request_answers_all_samples(harness):
    h = harness()
    h.add("a", range(60), n=3)
    last = h.engine.abort("a")
    assert sorted(d.index for d in last.deltas) == [0, 1, 2]


def test_deadline(harness):
    h = harness()
    h.add("a", range(10), max_tokens=400, ignore_eos=True, deadline_s=0.05)
    h.step()
    time.sleep(0.06)
    h.step()
    assert h.end("a").finish_reason is FinishReason.ABORT
    assert isinstance(h.end("a").error, DeadlineError)
    assert not h.engine.has_work


def test_eos_and_length_and_zero_tokens(harness, greedy):
    h = harness(num_blocks=300)
    given = prompts(30, seed=1, longest=20)
    for i, prompt in enumerate(given):
        h.add(str(i), prompt, max_tokens=60)
    h.add("zero", [1, 2], max_tokens=0, n=2)
    h.run()
    ends = set()
    for i, prompt in enumerate(given):
        expected = greedy(prompt, 60)
        assert h.tokens(str(i)) == expected
        end = h.end(str(i)).finish_reason
        assert end is (FinishReason.STOP if expected[-1] == 96 else FinishReason.LENGTH)
        ends.add(end)
    assert ends == {FinishReason.STOP, FinishReason.LENGTH}
    assert [h.end("zero", i).finish_reason for i in range(2)] == [FinishReason.LENGTH] * 2
    assert h.tokens("zero") == []


def test_context_limit_bounds_an_open_completion(harness):
    h = harness(max_model_len=100)
    h.add("a", range(90), max_tokens=None, ignore_eos=True)
    h.run()
    assert len(h.tokens("a")) == 10
    assert h.end("a").finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("prompt", "params", "error", "said"),
    [
        ([], {}, RequestError, "empty"),
        ([1, 97], {}, RequestError, "token id 97"),
        ([2**70], {}, RequestError, "token id"),
        (range(95), {"max_tokens": 10}, ContextLengthError, "max_tokens"),
        ([1] * 101, {}, ContextLengthError, "shorten"),
        ([1], {"temperature": -1}, RequestError, "temperature"),
        ([1], {"temperature": float("nan")}, RequestError, "temperature"),
        ([1], {"n": 10**6}, RequestError, "n is"),
        ([1], {"logit_bias": {97: 1.0}}, RequestError, "logit_bias"),
        ([1], {"stop": ("",)}, RequestError, "stop"),
        ([1], {"logprobs": 21}, RequestError, "logprobs"),
    ],
)
def test_refused_requests_name_the_field_and_queue_nothing(harness, prompt, params, error, said):
    h = harness(max_model_len=100)
    with pytest.raises(error, match=said):
        h.add("a", prompt, **params)
    assert not h.engine.has_work


def test_a_request_beyond_the_pool_is_refused(harness):
    h = harness(num_blocks=4, max_model_len=512)
    with pytest.raises(ContextLengthError, match="KV cache holds 48"):
        h.add("a", [1] * 40, max_tokens=9)
    h.add("b", [1] * 40, max_tokens=8, ignore_eos=True)
    h.run()
    assert len(h.tokens("b")) == 8


def test_prompt_logprobs_in_chunks_equal_whole(harness):
    found = []
    for budget in (7, 300):
        h = harness(token_budget=budget)
        h.add("warm", range(50), max_tokens=1)
        h.run()
        h.add("a", range(50), max_tokens=2, prompt_logprobs=2, logprobs=1)
        h.run()
        found.append(h.outputs["a"][0].prompt_logprobs)
        assert all(o.prompt_logprobs is None for o in h.outputs["a"][1:])
    assert found[0] == found[1]
    assert found[0][0] is None
    assert [entry.token_id for entry in found[0][1:]] == list(range(1, 50))
    assert all(len(entry.top) == 2 for entry in found[0][1:])


def test_priority_runs_first_and_yields_last(harness):
    h = harness(max_num_seqs=1)
    h.add("low", range(10), max_tokens=3, priority=5)
    h.add("high", range(10), max_tokens=3, priority=-5)
    h.run()
    low, high = h.outputs["low"][0].timing, h.outputs["high"][0].timing
    assert high.scheduled < low.scheduled


def test_a_failing_hook_is_a_failed_forward(harness, greedy):
    h = harness()

    def fault(chunks):
        if any(chunk.seq.state.request.request_id == "bad" for chunk in chunks):
            raise MemoryError("injected")

    h.engine.on_forward.append(fault)
    h.add("bad", [1, 2], max_tokens=5)
    h.add("good", [3, 4], max_tokens=5)
    h.run()
    assert isinstance(h.end("bad").error, StepError)
    assert h.tokens("good") == greedy([3, 4], 5)
