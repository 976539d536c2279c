"""A prompt that a group shares is computed once in training: the same bits, the same gradient.

Log-probs of a packed group are those of each completion alone, to the bit, on the CPU. Gradients
are sums in another order: float64 shows that the terms are the same ones, bfloat16 that the
prompt's share is not summed more coarsely than activations are rounded.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sterna.align.learner import values_of
from sterna.align.rollout import Rollout
from sterna.align.score import (
    added_tokens,
    completion_logprobs,
    ended_batch,
    micro_batches,
    scored_batch,
)
from sterna.kernels.load import load_kernels
from sterna.model.config import parse_config
from sterna.model.decoder import Decoder
from sterna.model.swiftkv import new_decoder
from sterna.model.swiftkv_config import SwiftKVConfig, with_swiftkv
from sterna.model.value import ValueModel

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
    "window": {  # shorter than the prompts
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 7,
    },
}  # fmt: skip
# Prompt tokens, and tokens of its completions: none, one, some; groups, one alone, one again.
GROUPS = [(19, (5, 0, 1, 12)), (3, (4,)), (35, (9, 9, 2)), (1, (3, 3))]


def model_of(name: str, dtype: torch.dtype, swift: int = 0) -> Decoder:
    torch.manual_seed(3)
    config = parse_config(TINY | FAMILIES[name], "tiny")
    decoder = new_decoder(with_swiftkv(config, SwiftKVConfig(swift)) if swift else config, dtype)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def rollouts() -> list[Rollout]:
    draw, found = np.random.default_rng(0), []
    for prompt_idx, (size, completions) in enumerate(GROUPS):
        prompt = draw.integers(0, 96, size).astype(np.int32)
        for sample_idx, length in enumerate(completions):
            tokens = draw.integers(0, 96, length).astype(np.int32)
            found.append(
                Rollout(
                    prompt_idx=prompt_idx, sample_idx=sample_idx, prompt=prompt.copy(),
                    completion=tokens, mask=np.ones(length, np.bool_),
                    logprobs=np.zeros(length, np.float32), policy_version=0, is_truncated=False,
                )
            )  # fmt: skip
    return found


def alone(model: Decoder) -> torch.Tensor:
    """Each completion in a batch of its own, with its own prompt."""
    return torch.cat([completion_logprobs(model, [one])[0] for one in rollouts()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("swift", [0, 1])
def test_shared_prompts_change_no_bit(name, dtype, swift):
    if load_kernels().level != "cpu":
        pytest.skip("equal bits are promised by the C++ kernels only")
    model = model_of(name, dtype, swift)
    with torch.no_grad():
        assert torch.equal(completion_logprobs(model, rollouts())[0], alone(model))


# float32: sums of 40 rows in another order. bfloat16: a few roundings of activations' gradients.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_that_of_whole_sequences(name, dtype):
    exact, weights = model_of(name, dtype).double(), torch.linspace(-1, 1, 48).double()
    (alone(exact) * weights).sum().backward()
    model = model_of(name, dtype)
    (completion_logprobs(model, rollouts())[0] * weights).sum().backward()
    for (key, theirs), ours in zip(exact.named_parameters(), model.parameters(), strict=True):
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error <= TOLERANCE[dtype], key


def test_a_prompt_is_in_the_batch_once_and_last_tokens_are_not():
    scored = scored_batch(model_of("llama", torch.float32), rollouts(), torch.device("cpu"))
    # 19 + 4 + 0 + 0 + 11; 3 + 3; 35 + 8 + 8 + 1; 1 + 2 + 2
    assert len(scored.batch.tokens) == 34 + 6 + 52 + 5
    assert len(scored.rows) == 48
    assert scored.batch.context_lens.tolist() == [19, 23, 30, 6, 35, 43, 43, 36, 1, 3, 3]


def test_a_model_that_cannot_share_gets_whole_sequences():
    whole = scored_batch(object(), rollouts(), torch.device("cpu"))
    assert whole.batch.shared is None
    assert len(whole.batch.tokens) == sum(one.num_tokens for one in rollouts())
    model = model_of("llama", torch.float32)
    model.walk = lambda decoder, h, batch: None
    assert scored_batch(model, rollouts(), torch.device("cpu")).batch.shared is None


def test_micro_batches_count_a_shared_prompt_once():
    group = rollouts()[:4]  # 19 prompt tokens, then 5, 0, 1 and 12
    assert [added_tokens(b, a) for a, b in zip([None, *group], group, strict=False)] == [
        24, 0, 1, 12,
    ]  # fmt: skip
    assert [len(part) for part in micro_batches(group, 25)] == [3, 1]
    assert [len(part) for part in micro_batches(group, 37)] == [4]
    each = [rollout.num_tokens for rollout in group]
    apart = micro_batches(group, 37, shares=False)
    assert len(apart) > 1 and max(each) <= 37
    assert all(sum(rollout.num_tokens for rollout in part) <= 37 for part in apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rewards_and_values_of_a_group_are_those_of_each_alone(dtype):
    if load_kernels().level != "cpu":
        pytest.skip("equal bits are promised by the C++ kernels only")
    model, device = ValueModel(model_of("llama", dtype)), torch.device("cpu")
    torch.nn.init.normal_(model.score)

    def rewards(part: list[Rollout]) -> torch.Tensor:
        asked = ended_batch(model, part, device)
        return model.values(asked.batch)[asked.rows]

    with torch.no_grad():
        each = torch.cat([rewards([one]) for one in rollouts()])
        assert torch.equal(rewards(rollouts()), each)
        assert len(each.unique()) == len(each) == len(rollouts())
        each = torch.cat([values_of(model, [one], device) for one in rollouts()])
        assert torch.equal(values_of(model, rollouts(), device), each)
