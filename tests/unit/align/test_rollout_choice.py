"""Which weights rollouts read where the recipe leaves it open."""

from __future__ import annotations

import pytest
import torch

from sterna.align.config import RlRecipe
from sterna.align.rollout_engine import planned_weights, rollout_weights
from sterna.kernels.load import load_kernels
from sterna.model.config import parse_config
from sterna.model.swiftkv import new_decoder
from sterna.model.swiftkv_config import SwiftKVConfig, with_swiftkv

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip


def recipe(max_tokens: int = 16, device: str = "cpu", adapter: bool = False, **rollout) -> RlRecipe:
    return RlRecipe.model_validate({
        "model": {"device": device}, "prompts": {"task": "length"},
        "rollout": {"max_tokens": max_tokens, **rollout},
        **({"adapter": {"rank": 4}} if adapter else {}),
    })  # fmt: skip


# Two steps pay for a copy: shorter completions, a GPU and adapters read the policy's own.
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (recipe(), "packed"),
        (recipe(4), "packed"),
        (recipe(3), "policy"),
        (recipe(device="cuda"), "policy"),
        (recipe(adapter=True), "policy"),
        (recipe(weights="policy"), "policy"),
        (recipe(3, weights="packed"), "packed"),
        (recipe(weights="fp6"), "fp6"),
    ],
)
def test_the_plan(given, wanted):
    assert planned_weights(given) == wanted


def test_a_policy_without_such_a_copy_is_read_as_it_is():
    config = parse_config(TINY, "tiny")
    plain = new_decoder(config, torch.float32)
    swift = new_decoder(with_swiftkv(config, SwiftKVConfig(1)), torch.float32)
    packed = "packed" if load_kernels().level == "cpu" else "policy"
    assert rollout_weights(recipe(), plain) == packed
    assert rollout_weights(recipe(), swift) == "policy"
    assert rollout_weights(recipe(weights="packed"), swift) == "packed"  # refused by the copy
    assert rollout_weights(recipe(weights="policy"), plain) == "policy"
