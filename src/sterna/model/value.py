"""A number a token instead of a vocabulary: reward models and critics.

    v_t = w . hidden_t        float32, w [1, D] kept in float32 whatever the trunk is: eight bits of
                              a bfloat16 do not rank answers

The trunk is a native decoder or a model behind transformers. Folders are Hugging Face's sequence
classification of the family with one label (`model.*`, `score.weight`), which transformers reads.
Its score is that of the last token that is not `pad_token_id`; where a model pads with its EOS that
would be the token before the EOS, so such a `pad_token_id` is left out: transformers then scores
one sequence at a time, at its last token, as here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sterna.core.errors import ModelFileError, UnsupportedModelError
from sterna.kernels import ops
from sterna.kernels.load import load_kernels
from sterna.model.batch import Batch
from sterna.model.config import ModelConfig, as_token_ids, parse_config
from sterna.model.decoder import Decoder
from sterna.model.families import FAMILIES
from sterna.model.hf import HFDecoder, load_hf
from sterna.model.hf_weights import SafetensorsSource
from sterna.model.load import DTYPES, DTypeName, load_model
from sterna.model.save import hf_config, save_tensors
from sterna.model.weights import assign, export
from sterna.parallel.fsdp import full

SCORE = "score.weight"
HEAD_NAME = "value_head.safetensors"  # the score beside the adapter of an adapted trunk
_SUFFIX = "ForSequenceClassification"
_OWN_NAMES = {"Gemma3ForCausalLM": "Gemma3Text" + _SUFFIX}  # where the prefix differs


class ValueModel(nn.Module):
    """A trunk and `score` [1, D]. The trunk's output head goes: it is neither trained nor saved."""

    def __init__(self, trunk: Decoder | HFDecoder) -> None:
        super().__init__()
        _drop_head(trunk)
        self.trunk = trunk
        size = int(trunk.config.hidden_size)
        # Zero: a fresh critic expects nothing, and a fresh reward model prefers nothing.
        self.score = nn.Parameter(torch.zeros(1, size, device=trunk.device))

    @property
    def config(self) -> Any:
        """The trunk's."""
        return self.trunk.config

    def values(self, batch: Batch) -> Tensor:
        """float32: one number a token [T], or for each of batch.output_rows [R]."""
        return ops.logits(self.trunk.hidden(batch).float(), self.score, 1)[:, 0]

    @property
    def reads_shared_keys(self) -> bool:
        """The trunk's."""
        return isinstance(self.trunk, Decoder) and self.trunk.reads_shared_keys

    def head_weight(self) -> Tensor:
        """[1, D]: what the hidden states are multiplied with."""
        return self.score

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.score.device


def value_tensors(model: ValueModel) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, whole tensor): the trunk without its LM head, and the score."""
    trunk = model.trunk
    if isinstance(trunk, Decoder):
        yield from export(trunk, trunk.config.family.hf_names)
    else:
        head = {id(parameter) for parameter in _own_head(trunk)}
        for name, parameter in trunk.model.named_parameters():
            if id(parameter) not in head:
                yield name, full(parameter.detach()).contiguous()
    yield SCORE, model.score.detach().contiguous()


def value_hf_config(model: ValueModel) -> dict[str, Any]:
    """The config.json of a value model; see the module."""
    trunk = model.trunk
    if isinstance(trunk, Decoder):
        config = hf_config(trunk)
        config["tie_word_embeddings"] = trunk.config.hf.get("tie_word_embeddings", False)
        architecture = _classifier(trunk.config.family.architecture)
    else:
        config, architecture = trunk.model.config.to_dict(), _foreign_name(trunk)
    pads_with_eos = config.get("pad_token_id") in as_token_ids(config.get("eos_token_id"))
    return {
        **config,
        "architectures": [architecture],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": None if pads_with_eos else config.get("pad_token_id"),
    }


def save_value_model(model: ValueModel, folder: Path) -> None:
    """Write the Hugging Face folder; OSError for a full disk."""
    save_tensors(value_tensors(model), value_hf_config(model), folder)


def load_value_model(
    path: Path,
    dtype: DTypeName = "bfloat16",
    device: torch.device | str = "cpu",
    backend: str = "native",
) -> ValueModel:
    """A value model's folder, or any language model with a fresh score.

    `backend` "hf" runs the trunk behind transformers. Errors as `load_model`; ModelFileError and
    UnsupportedModelError also for another number of labels than one.
    """
    device = torch.device(device)
    if not is_value_folder(path):
        trunk: Any = (
            load_hf(path, dtype, device)
            if backend == "hf"
            else load_model(path, dtype, device).decoder
        )
        if getattr(trunk.config, "swiftkv", None) is not None:
            raise UnsupportedModelError(
                f"{path}: a SwiftKV model cannot be a reward or value model; give the model that "
                "it was made of"
            )
        return ValueModel(trunk)
    _check_labels(path)
    is_foreign = backend == "hf"
    model = ValueModel((load_hf if is_foreign else _native_trunk)(path, dtype, device))
    weight = SafetensorsSource(path).read(SCORE, torch.float32)
    if weight.shape != model.score.shape:
        raise ModelFileError(
            f"{path}: {SCORE} has shape {tuple(weight.shape)}, the config asks for "
            f"{tuple(model.score.shape)}"
        )
    model.score.data.copy_(weight)
    return model


def is_value_folder(path: Path) -> bool:
    """Whether a folder holds a sequence classification model."""
    names = _read_config(path).get("architectures") or [""]
    return str(names[0]).endswith(_SUFFIX)


def is_native_value_folder(path: Path) -> bool:
    """Whether a sequence classification model is of a native family."""
    names = _read_config(path).get("architectures") or [""]
    return str(names[0]) in {_classifier(family.architecture) for family in FAMILIES}


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise ModelFileError(f"{file}: not valid JSON ({error}); fetch it again") from error
    return found


def _check_labels(path: Path) -> None:
    labels = _read_config(path).get("id2label") or {"0": "", "1": ""}  # transformers' default
    if len(labels) != 1:
        raise UnsupportedModelError(
            f"{path}: a classifier of {len(labels)} labels; a reward or value model has one"
        )


def value_config(path: Path) -> ModelConfig:
    """The sizes of a value model's trunk, whose head is gone. Errors as `load_value_model`."""
    values = _read_config(path)
    classifier = str(values["architectures"][0])
    causal = {_classifier(family.architecture): family.architecture for family in FAMILIES}
    if classifier not in causal:
        raise UnsupportedModelError(
            f"{path}: {classifier} is of no native family ({', '.join(causal)}); use backend = hf"
        )
    config = parse_config({**values, "architectures": [causal[classifier]]}, str(path))
    return replace(config, tie_word_embeddings=True)


def _native_trunk(path: Path, dtype: DTypeName, device: torch.device) -> Decoder:
    load_kernels()
    config = value_config(path)
    decoder = Decoder(config, DTYPES[dtype], "meta", rope_device=device)
    assign(decoder, SafetensorsSource(path), config.family.hf_names, device)
    return decoder


def _classifier(architecture: str) -> str:
    default = architecture.removesuffix("ForCausalLM") + _SUFFIX
    return _OWN_NAMES.get(architecture, default)


def _foreign_name(trunk: HFDecoder) -> str:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES,
    )

    kind = trunk.model.config.model_type
    if kind not in NAMES:
        raise UnsupportedModelError(
            f"transformers has no sequence classification for {kind}, so a reward model of it "
            "could not be saved; choose another trunk"
        )
    return str(NAMES[kind])


def _drop_head(trunk: Decoder | HFDecoder) -> None:
    if isinstance(trunk, Decoder):
        trunk.lm_head = None
        return
    _foreign_name(trunk)
    for parameter in _own_head(trunk):
        parameter.requires_grad_(False)


def _own_head(trunk: HFDecoder) -> list[nn.Parameter]:
    """Parameters of the output head that are not the embedding's."""
    tied = trunk.model.get_input_embeddings().weight
    return [p for p in trunk.model.get_output_embeddings().parameters() if p is not tied]
