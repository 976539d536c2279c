"""GGUF files as a TensorSource: dequantise, and undo what the converter did to the weights.

The converter of llama.cpp reorders the query and key rows of some architectures, because ggml
rotates neighbouring dims where Hugging Face rotates halves; and it adds 1 to Gemma's norm weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sterna.core.errors import ModelFileError, UnsupportedModelError
from sterna.core.gguf import GGUFFile
from sterna.model.config import ModelConfig
from sterna.model.dequant import SUPPORTED_TYPES, dequantize, dequantize_as


class GGUFSource:
    """Reads tensors of an open GGUF file under its own names."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.label = str(file.path)
        self._file = file
        self._config = config

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """See TensorSource. Raises UnsupportedModelError for a tensor type we cannot decode."""
        info = self._file.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.label}: tensor {name!r} is missing; fetch the file again")
        if info.type not in SUPPORTED_TYPES:
            raise UnsupportedModelError(
                f"{self.label}: tensor {name!r} has type {info.type.name}; supported: "
                f"{', '.join(kind.name for kind in SUPPORTED_TYPES)}"
            )
        raw = torch.from_numpy(self._file.tensor_bytes(name))
        if self._config.family.gguf_adds_one and name.endswith("norm.weight"):
            value = (dequantize(raw, info.type).float() - 1.0).to(dtype).view(info.shape)
        else:
            value = dequantize_as(raw, info.type, dtype).view(info.shape)
        return self._unpermuted(name, value) if self._config.family.gguf_permutes_qk else value

    def _unpermuted(self, name: str, value: Tensor) -> Tensor:
        """Rows [head, pair, half] back to [head, half, pair]."""
        kind = name.split(".")[-2]
        heads = {
            "attn_q": self._config.num_attention_heads,
            "attn_k": self._config.num_key_value_heads,
        }.get(kind)
        if heads is None:
            return value
        pairs = value.reshape(heads, -1, 2, *value.shape[1:])
        return pairs.transpose(1, 2).reshape(value.shape)
