"""Policies that are a frozen base with an adapter, and what else rides on that base.

The reference is the base with the adapter off, so a fresh policy has a KL of exactly 0 to it. A
critic, and a reward model that was trained as an adapter of the same base, share the base's
modules and have an adapter and a score of their own. So all of them together hold the base once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from sterna.align.config import RlRecipe
from sterna.align.experience import PerToken
from sterna.align.rollout import Rollout
from sterna.core.errors import ConfigError, ModelFileError
from sterna.model.decoder import Decoder
from sterna.model.hub import resolve_model
from sterna.model.load import load_model
from sterna.model.peft import CONFIG_NAME, read_peft
from sterna.model.save import hf_config
from sterna.model.value import HEAD_NAME, SCORE, ValueModel, value_hf_config, value_tensors
from sterna.model.weights import split_parts
from sterna.quant.adapted import twin
from sterna.quant.linear import dequantize_decoder
from sterna.quant.load import load_quantized
from sterna.train.adapter import adapted_modules, adapter_off, add_adapter
from sterna.train.adapter_file import adapter_files, load_adapter
from sterna.train.task import Weights, plain_form

# The losses read the head as one matrix, so it and a tied embedding stay plain.
_PLAIN = ("embed_tokens", "lm_head")


def load_policy(recipe: RlRecipe, base: Path, source: Path | None, device: torch.device) -> Decoder:
    """The policy as it starts, or as the checkpoint `source` has it. Errors as the loaders'."""
    settings = recipe.model
    if recipe.adapter is None:
        start = source or base
        return plain_form(load_model(start, settings.dtype, device).decoder, start)
    decoder = load_quantized(base, settings.dtype, device, settings.weights).decoder
    dequantize_decoder(plain_form(decoder, base), _PLAIN)
    if source is not None:
        load_adapter(decoder, source)
    else:
        add_adapter(decoder, recipe.adapter, recipe.run.seed)
    return decoder


def policy_files(recipe: RlRecipe, policy: Decoder) -> Weights:
    """What a checkpoint holds of the policy: the whole model, or its adapter as PEFT's files."""
    if recipe.adapter is not None:
        return Weights((), {}, adapter_files(policy, recipe.model.path))
    names = policy.config.family.hf_names
    tensors = (
        pair
        for own, parameter in policy.named_parameters()
        for pair in split_parts(own, parameter.detach(), names, policy.config)
    )
    return Weights(tensors, hf_config(policy), {})


def value_files(model: ValueModel, base: str) -> Weights:
    """A value model's folder; of an adapted trunk, the adapter on `base` with the score beside."""
    trunk = model.trunk
    if not any(True for _ in adapted_modules(trunk)):
        return Weights(value_tensors(model), value_hf_config(model), {})
    head = save({SCORE: model.score.detach().cpu()}, metadata={"format": "pt"})
    return Weights((), {}, {**adapter_files(trunk, base), HEAD_NAME: head})


def without_adapter(policy: Decoder, scored: PerToken) -> PerToken:
    """`scored`, which asks the policy, with the adapter off: the reference."""

    def reference(rollouts: Sequence[Rollout]) -> torch.Tensor:
        with adapter_off(policy):
            return scored(rollouts)

    return reference


def shares_base(recipe: RlRecipe) -> bool:
    """Whether the critic rides on the policy's base. ConfigError where it cannot and should."""
    asked, path = recipe.critic.shared, recipe.critic.path
    can = recipe.adapter is not None and (
        not path or resolve_model(path) == resolve_model(recipe.model.path)
    )
    if asked and not can:
        raise ConfigError(
            "critic.shared is true, but a critic shares the base of a policy with an [adapter] "
            "and starts from that base; add [adapter] and leave out critic.path",
            param="critic.shared",
        )
    return can if asked is None else asked


def shared_critic(recipe: RlRecipe, policy: Decoder) -> ValueModel:
    """A fresh critic on the policy's base: an adapter of the recipe's kind, and a score of 0."""
    assert recipe.adapter is not None, "shares_base was asked"
    model = ValueModel(twin(policy))
    assert isinstance(model.trunk, Decoder)
    add_adapter(model.trunk, recipe.adapter, recipe.run.seed + 1)
    return model


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds an adapter and not a model."""
    return (path / CONFIG_NAME).is_file()


def shares_policy_base(path: Path, recipe: RlRecipe) -> bool:
    """Whether the adapter in `path` is one of the base that the policy's adapter is on."""
    return recipe.adapter is not None and _base_of(path) == resolve_model(recipe.model.path)


def _base_of(path: Path) -> Path:
    return resolve_model(read_peft(path).config.get("base_model_name_or_path") or "")


def adapted_reward(path: Path, recipe: RlRecipe, policy: Decoder | None) -> ValueModel:
    """The reward model of an adapter's folder, on the policy's base where that is its own.

    Errors as the loaders'; ModelFileError without a score.
    """
    if policy is not None and shares_policy_base(path, recipe):
        trunk = twin(policy)
    else:
        trunk = load_model(_base_of(path), recipe.model.dtype, recipe.model.device).decoder
    model = ValueModel(trunk)
    assert isinstance(model.trunk, Decoder)
    load_adapter(model.trunk, path)
    try:
        model.score.data.copy_(load_file(path / HEAD_NAME)[SCORE])
    except (OSError, KeyError, SafetensorError, RuntimeError) as error:
        raise ModelFileError(
            f"{path / HEAD_NAME}: no score of this model ({error}); give a reward model"
        ) from error
    model.requires_grad_(False)
    return model
