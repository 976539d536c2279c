"""A trunk of any family with one number for every token: reward models and critics.

    v_t = score . h_t          h the trunk's final normed hidden state, score [1, D] without bias

A folder is the sequence-classification one of the family, as transformers writes and reads it
(`LlamaForSequenceClassification`, num_labels 1, `score.weight`); there a text's number is that of
its last token. The head is kept and computed in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sterna.core.errors import ModelFileError, UnsupportedModelError
from sterna.kernels.load import load_kernels
from sterna.model.batch import Batch
from sterna.model.config import parse_config
from sterna.model.decoder import Decoder
from sterna.model.hf_weights import SafetensorsSource
from sterna.model.load import DTYPES, DTypeName, load_model
from sterna.model.save import hf_config
from sterna.model.weights import assign, split_parts

_LM, _CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
SCORE = "score.weight"


class ValueModel(nn.Module):
    """`trunk` is trained with the head; its own LM head is not used."""

    def __init__(self, trunk: Decoder) -> None:
        super().__init__()
        self.trunk = trunk
        hidden = trunk.config.hidden_size
        # Zero: a fresh critic expects nothing, and a fresh reward model prefers nothing.
        self.score = nn.Parameter(torch.zeros(1, hidden, device=trunk.device))
        if trunk.lm_head is not None:
            trunk.lm_head.requires_grad_(False)

    @property
    def config(self) -> Any:
        """The trunk's."""
        return self.trunk.config

    def values(self, batch: Batch) -> Tensor:
        """float32: one number a token [T], or for each of batch.output_rows [R]."""
        return F.linear(self.trunk.hidden(batch).float(), self.score)[:, 0]


def load_value_model(
    path: Path, dtype: DTypeName = "bfloat16", device: torch.device | str = "cpu"
) -> ValueModel:
    """A classification folder with one label, or a language model that gets a fresh head.

    Raises the errors of `load_model`; UnsupportedModelError for a folder with several labels.
    """
    config_path = path / "config.json"
    if not (path.is_dir() and config_path.exists() and _is_classifier(config_path)):
        trunk = load_model(path, dtype, device).decoder
        if trunk.config.swiftkv is not None:
            raise UnsupportedModelError(
                f"{path}: a SwiftKV model cannot be a reward or value model; give the model that "
                "it was made of"
            )
        return ValueModel(trunk)
    load_kernels()
    values = json.loads(config_path.read_text())
    (name, *_) = values["architectures"]
    source = SafetensorsSource(path)
    base = {**values, "architectures": [name.removesuffix(_CLASSIFIER) + _LM]}
    # No LM head is stored, so none may be asked for.
    config = replace(parse_config(base, str(config_path)), tie_word_embeddings=True)
    trunk = Decoder(config, DTYPES[dtype], "meta", rope_device=device)
    assign(trunk, source, config.family.hf_names, torch.device(device))
    model = ValueModel(trunk)
    score = source.read(SCORE, torch.float32)
    if score.shape != model.score.shape:
        raise UnsupportedModelError(
            f"{path}: its head has shape {tuple(score.shape)}, a reward or value has "
            f"{tuple(model.score.shape)}: one label"
        )
    with torch.no_grad():
        model.score.copy_(score)
    return model


def value_tensors(model: ValueModel) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor): the trunk without its LM head, and the head."""
    names, config = model.trunk.config.family.hf_names, model.trunk.config
    for name, parameter in model.trunk.named_parameters():
        if not name.startswith("lm_head."):
            yield from split_parts(name, parameter.detach(), names, config)
    yield SCORE, model.score.detach()


def value_hf_config(model: ValueModel) -> dict[str, Any]:
    """The config.json of a value model; see the module."""
    values = hf_config(model.trunk)
    family = model.trunk.config.family
    return {
        **values,
        "architectures": [family.architecture.removesuffix(_LM) + _CLASSIFIER],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }


def _is_classifier(path: Path) -> bool:
    try:
        names = json.loads(path.read_text()).get("architectures") or [""]
    except ValueError as error:
        raise ModelFileError(f"{path}: not valid JSON ({error})") from error
    return str(names[0]).endswith(_CLASSIFIER)
