"""Rollouts and training read the same weights with the same words: equal bits on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.drafts import always_draft

from sterna.align.hybrid import HybridEngine, Sampling
from sterna.align.rollout import rollout_logprobs
from sterna.align.score import completion_logprobs, micro_batches
from sterna.core.errors import TrainError
from sterna.engine.config import EngineConfig
from sterna.kernels.load import load_kernels
from sterna.kernels.scores import Distribution
from sterna.model.load import load_model
from sterna.text.tokenizer import load_tokenizer

_TINY = Path(__file__).parents[1] / "unit" / "train" / "tiny.py"
# A short prompt, one longer than a KV block, one that shares a block with it.
PROMPTS = [[10, 11, 12], list(range(30, 55)), [*range(30, 50), 7, 8]]
SAMPLINGS = [
    Sampling(max_tokens=20),
    Sampling(max_tokens=20, temperature=0.6),
    Sampling(max_tokens=20, temperature=1.3, top_p=0.9),
    Sampling(max_tokens=20, top_k=40, min_p=0.01),
]


@pytest.fixture(autouse=True)
def _native():
    if load_kernels().level != "cpu":
        pytest.skip("equal bits are promised by the C++ kernels only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("align_tiny", _TINY)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    return tiny.write_model(tmp_path_factory.mktemp("hybrid"))


def make(folder, dtype="float32", weights="policy"):
    model = load_model(folder, dtype).decoder
    config = EngineConfig(token_budget=32, num_kv_blocks=64, dtype=dtype, threads=1)
    return model, HybridEngine(model, load_tokenizer(folder), config, weights)


def trained_logprobs(model, rollouts, sampling):
    distribution = Distribution(
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    )
    parts = micro_batches(rollouts, 50)
    assert len(parts) > 1
    with torch.no_grad():
        found = [completion_logprobs(model, part, distribution)[0] for part in parts]
    return torch.cat(found)


def change(model):
    """As an optimizer does: in place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise.to(parameter.dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_rollout_logprobs_are_the_trainers_to_the_bit(folder, dtype, sampling):
    model, hybrid = make(folder, dtype)
    rollouts = hybrid.generate(PROMPTS, 3, sampling, seeds=[1, 2, 3])
    assert [(r.prompt_idx, r.sample_idx) for r in rollouts][:4] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    wanted = trained_logprobs(model, rollouts, sampling)
    assert torch.equal(rollout_logprobs(rollouts), wanted)
    assert wanted.max() <= 0


def test_the_next_rollout_reads_the_new_weights(folder):
    model, hybrid = make(folder)
    before = hybrid.generate(PROMPTS, 2, SAMPLINGS[0], seeds=[5, 6, 7])
    old = trained_logprobs(model, before, SAMPLINGS[0])
    change(model)
    hybrid.publish()
    after = hybrid.generate(PROMPTS, 2, SAMPLINGS[0], seeds=[5, 6, 7])
    assert {r.policy_version for r in before} == {0}
    assert {r.policy_version for r in after} == {1}
    assert torch.equal(rollout_logprobs(after), trained_logprobs(model, after, SAMPLINGS[0]))
    assert not torch.equal(trained_logprobs(model, before, SAMPLINGS[0]), old)


def test_no_prefix_of_an_old_policy_is_found(folder):
    model, hybrid = make(folder)
    hybrid.generate(PROMPTS, 1, SAMPLINGS[0], seeds=[1, 1, 1])
    assert hybrid.engine.pool.num_cached > 0
    change(model)
    hybrid.publish()
    assert hybrid.engine.pool.num_cached == 0


def test_sleep_gives_memory_back_and_changes_nothing(folder):
    _, hybrid = make(folder)
    before = hybrid.generate(PROMPTS, 2, SAMPLINGS[0], seeds=[5, 6, 7])
    hybrid.sleep()
    after = hybrid.generate(PROMPTS, 2, SAMPLINGS[0], seeds=[5, 6, 7])
    assert [r.completion.tolist() for r in before] == [r.completion.tolist() for r in after]
    assert torch.equal(rollout_logprobs(before), rollout_logprobs(after))


def test_a_prompt_does_not_know_its_companions(folder):
    _, hybrid = make(folder)
    together = hybrid.generate(PROMPTS, 2, SAMPLINGS[0], seeds=[5, 6, 7])
    alone = hybrid.generate(PROMPTS[1:2], 2, SAMPLINGS[0], seeds=[6])
    wanted = [r.completion.tolist() for r in together if r.prompt_idx == 1]
    assert [r.completion.tolist() for r in alone] == wanted


def test_weights_may_not_change_under_a_rollout(folder):
    _, hybrid = make(folder)
    from sterna.engine.request import EngineRequest, SamplingParams

    hybrid.engine.add(EngineRequest(request_id="x", prompt_token_ids=(1,), params=SamplingParams()))
    with pytest.raises(TrainError, match="under way"):
        hybrid.publish()
    with pytest.raises(TrainError, match="under way"):
        hybrid.sleep()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_copy_has_the_bits_and_follows_the_policy(folder, dtype):
    model, plain = make(folder, dtype)
    packed = HybridEngine(model, load_tokenizer(folder), plain.engine.config, "packed")
    assert packed.is_exact
    for _ in range(2):
        wanted = plain.generate(PROMPTS, 2, SAMPLINGS[0], seeds=[5, 6, 7])
        found = packed.generate(PROMPTS, 2, SAMPLINGS[0], seeds=[5, 6, 7])
        assert [r.completion.tolist() for r in found] == [r.completion.tolist() for r in wanted]
        assert torch.equal(rollout_logprobs(found), rollout_logprobs(wanted))
        change(model)
        plain.publish()
        packed.publish()
    assert all(parameter.requires_grad for parameter in model.parameters())
    own = {p.data_ptr() for p in model.parameters()}
    matrices = [p for p in packed._served.parameters() if p.dim() == 4]
    assert matrices
    assert all(p.data_ptr() not in own for p in matrices)


def test_six_bit_rollouts_follow_the_policy(folder):
    model, hybrid = make(folder, weights="fp6")
    assert not hybrid.is_exact
    first = hybrid.generate(PROMPTS, 2, SAMPLINGS[0], seeds=[5, 6, 7])
    gap = rollout_logprobs(first) - trained_logprobs(model, first, SAMPLINGS[0])
    assert 0 < gap.abs().mean() < 0.2
    change(model)
    hybrid.publish()
    _, fresh = make(folder, weights="fp6")
    with torch.no_grad():
        for mine, theirs in zip(fresh._copy._policy.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    fresh.publish()
    after = hybrid.generate(PROMPTS, 2, SAMPLINGS[0], seeds=[5, 6, 7])
    wanted = fresh.generate(PROMPTS, 2, SAMPLINGS[0], seeds=[5, 6, 7])
    assert [r.completion.tolist() for r in after] == [r.completion.tolist() for r in wanted]
    assert [r.completion.tolist() for r in after] != [r.completion.tolist() for r in first]


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[2], Sampling(20, temperature=0.3)])
def test_guesses_of_siblings_and_earlier_epochs_change_nothing(folder, sampling, monkeypatch):
    model, plain = make(folder)
    config = EngineConfig(token_budget=64, num_kv_blocks=64, dtype="float32", threads=1)
    guessing = HybridEngine(model, load_tokenizer(folder), config, speculation=True)
    always_draft(guessing.engine, monkeypatch)
    accepted = 0
    for epoch in range(3):  # the last with new weights, for which old completions are worse guesses
        if epoch == 2:
            change(model)
            plain.publish()
            guessing.publish()
        wanted = plain.generate(PROMPTS, 6, sampling, seeds=[1, 2, 3])
        found = guessing.generate(PROMPTS, 6, sampling, seeds=[1, 2, 3])
        assert [r.completion.tolist() for r in found] == [r.completion.tolist() for r in wanted]
        assert torch.equal(rollout_logprobs(found), rollout_logprobs(wanted))
        count = guessing.drafts.take()
        assert count.num_drafted > 0
        accepted += count.num_accepted
        if epoch == 1:  # the same seeds again: what the first epoch said is what is drawn
            assert count.num_accepted > 0.5 * sum(len(r.completion) for r in wanted)
    assert accepted > 0
    guessing.engine.check_integrity()
