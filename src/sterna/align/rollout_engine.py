"""The settings of the engine that makes rollouts, from a recipe."""

from __future__ import annotations

from sterna.align.config import RlRecipe
from sterna.align.hybrid import PACKED, POLICY
from sterna.align.packed import LEAST_STEPS, can_pack
from sterna.engine.config import EngineConfig
from sterna.model.decoder import Decoder

# Blocks beside those of the completions: partly filled ones, and a place for the null block.
_SPARE_BLOCKS = 8
_BLOCK = 16
_MAX_SEQS = 256


def engine_config(recipe: RlRecipe) -> EngineConfig:
    """An engine that holds a step's rollouts at once, where that is not said otherwise."""
    rollout = recipe.rollout
    size = recipe.prompts.max_tokens + rollout.max_tokens
    sequences = rollout.prompts_per_step * rollout.group_size
    tokens = rollout.kv_tokens or size * sequences
    blocks = -(-max(tokens, size) // _BLOCK) + sequences + _SPARE_BLOCKS
    limit = min(sequences, _MAX_SEQS)
    values = {
        "device": recipe.model.device,
        "dtype": recipe.model.dtype,
        "threads": recipe.run.threads,
        "block_size": _BLOCK,
        "num_kv_blocks": blocks,
        "max_num_seqs": limit,
        "token_budget": max(rollout.token_budget, 2 * limit),
        "seed": recipe.run.seed,
    }
    return EngineConfig.model_validate(values)


def rollout_weights(recipe: RlRecipe, policy: Decoder) -> str:
    """`rollout.weights`, "auto" decided: packed where that is faster, else the policy's own.

    Both give the same bits. A rollout takes about as many engine steps as its longest completion
    has tokens.
    """
    planned = planned_weights(recipe)
    is_decided = planned != PACKED or recipe.rollout.weights == PACKED
    return planned if is_decided or can_pack(policy) else POLICY


def planned_weights(recipe: RlRecipe) -> str:
    """As `rollout_weights`, for a policy of plain matrices that is not there yet."""
    asked = recipe.rollout.weights
    if asked != "auto":
        return asked
    is_plain = recipe.model.device == "cpu" and recipe.adapter is None
    return PACKED if is_plain and recipe.rollout.max_tokens >= LEAST_STEPS else POLICY
