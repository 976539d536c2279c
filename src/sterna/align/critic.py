"""PPO's critic: a trunk of any family with a value for every token."""

from __future__ import annotations

from pathlib import Path

import torch

from sterna.core.errors import ConfigError
from sterna.model.load import DTypeName
from sterna.model.value import ValueModel, load_value_model
from sterna.text.tokenizer import Tokenizer, load_tokenizer


def load_critic(
    path: Path, dtype: DTypeName, device: torch.device, tokenizer: Tokenizer
) -> ValueModel:
    """A reward model, or a language model with a fresh head, as a critic to be trained.

    ConfigError for a tokenizer that is not the policy's: its token ids would mean other words.
    """
    check_tokenizer(path, tokenizer, "critic.path")
    return load_value_model(path, dtype, device)


def check_tokenizer(path: Path, tokenizer: Tokenizer, param: str) -> None:
    """ConfigError unless the model in `path` reads the same token ids as `tokenizer`."""
    other = load_tokenizer(path)
    if other.to_json() != tokenizer.to_json():
        raise ConfigError(
            f"{path} has another tokenizer than the policy, so the policy's token ids would mean "
            "other words to it; give a model with the same tokenizer",
            param=param,
        )
