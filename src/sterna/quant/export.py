"""Quantised weights back to a plain Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sterna.core.errors import QuantizeError
from sterna.core.rundir import refuse_existing, write_atomic
from sterna.model.decoder import Decoder
from sterna.model.load import DTYPES, DTypeName
from sterna.model.save import hf_config, save_tensors
from sterna.model.weights import split_parts
from sterna.quant.linear import quant_modules
from sterna.quant.load import load_quantized
from sterna.quant.sources import small_files, stored_method


def dequantize_folder(source: Path, out: Path, dtype: DTypeName = "float32") -> None:
    """Write the plain weights of a quantised model (GGUF too) under Hugging Face names.

    float32 is exact: each weight is code value * scale in float32, what the reference kernels
    compute with. Other dtypes round once. One shard is in memory at a time. Raises QuantizeError
    when the source is not quantised or `out` is there already.
    """
    if source.suffix != ".gguf" and stored_method(source) is None:
        raise QuantizeError(f"{source}: its weights are not quantised; there is nothing to undo")
    refuse_existing(out, QuantizeError)
    decoder = load_quantized(source, dtype).decoder
    save_tensors(plain_tensors(decoder, DTYPES[dtype]), hf_config(decoder), out)
    for name, text in small_files(source).items():
        write_atomic(out / name, text)


def plain_tensors(decoder: Decoder, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face name and value of every parameter, dequantised one by one."""
    config = decoder.config
    quantised = ((f"{name}.weight", m.quant_weight) for name, m in quant_modules(decoder))
    for own_name, weight in quantised:
        value = weight.dequantize().to(dtype)
        yield from split_parts(own_name, value, config.hf_names, config)
    for own_name, parameter in decoder.named_parameters():
        value = parameter.detach().to(dtype)
        yield from split_parts(own_name, value, config.hf_names, config)
