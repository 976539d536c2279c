"""How many KV blocks fit, and which context length they allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sterna.core.errors import ConfigError
from sterna.core.log import get_logger
from sterna.core.machine import available_memory_bytes
from sterna.engine.config import EngineConfig

log = get_logger(__name__)

# Settings that make a cache of one byte an element; see kernels/kv_codes.py.
QUANTISED_KV = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}

# Share of the free memory taken when nothing is configured. On a CPU the machine is shared with
# other programs; a GPU is usually ours alone, but activations need room too.
CPU_SHARE, CUDA_SHARE = 0.25, 0.8
# On a CPU more than this only makes the process look large: 2 GiB hold 93,000 tokens of a 135M
# model and 16,000 of an 8B one.
CPU_MAX_BYTES = 2 << 30
# Where the system does not tell its free memory.
FALLBACK_BYTES = 512 << 20


class ModelSizes(Protocol):
    """The numbers of a ModelConfig that the engine's sizes follow from."""

    @property
    def vocab_size(self) -> int:
        """Rows of the logits."""
        ...

    @property
    def num_positions(self) -> int:
        """Longest sequence the model's positions cover."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        ...


class SizedModel(Protocol):
    """A decoder with its config."""

    @property
    def config(self) -> ModelSizes:
        """The model's sizes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        ...

    def new_kv_layers(
        self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """One zeroed cache tensor a layer, blocks along dimension 0; None = the model's dtype."""
        ...


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What the model allows and the memory holds."""

    vocab_size: int
    max_model_len: int  # prompt + completion tokens
    num_kv_blocks: int  # the null block included
    eos_ids: frozenset[int] = frozenset()


def engine_shape(decoder: SizedModel, config: EngineConfig) -> EngineShape:
    """Sizes for `decoder`. ConfigError when a configured length fits the model or KV cache not."""
    if (config.max_model_len or 0) > decoder.config.num_positions:
        raise ConfigError(
            f"max_model_len is {config.max_model_len:,}, the model's positions end at "
            f"{decoder.config.num_positions:,}; lower it",
            param="max_model_len",
        )
    num_blocks = config.num_kv_blocks or _blocks_in_memory(decoder, config)
    longest = (num_blocks - 1) * config.block_size
    max_model_len = config.max_model_len or decoder.config.num_positions
    if config.max_model_len is not None and max_model_len > longest:
        raise ConfigError(
            f"max_model_len is {max_model_len:,}, the KV cache holds {longest:,} tokens; "
            "lower it or raise kv_cache_bytes (num_kv_blocks)",
            param="max_model_len",
        )
    if max_model_len > longest:
        log.warning("context cut from %d to the %d tokens of the KV cache", max_model_len, longest)
    return EngineShape(
        vocab_size=decoder.config.vocab_size,
        max_model_len=min(max_model_len, longest),
        num_kv_blocks=num_blocks,
        eos_ids=frozenset(decoder.config.eos_token_ids),
    )


def kv_dtype(decoder: SizedModel, config: EngineConfig) -> torch.dtype:
    """The dtype of the KV cache. ConfigError for a plain one that is not the model's."""
    asked = config.kv_cache_dtype
    if asked == "auto":
        return decoder.dtype
    if asked in QUANTISED_KV:
        return QUANTISED_KV[asked]
    computes = str(decoder.dtype).removeprefix("torch.")
    if asked != computes:
        raise ConfigError(
            f"kv_cache_dtype is {asked}, the model computes in {computes}; "
            f"use auto, fp8 or int8, or set dtype to {asked}",
            param="kv_cache_dtype",
        )
    return decoder.dtype


def _blocks_in_memory(decoder: SizedModel, config: EngineConfig) -> int:
    """Blocks for the configured or available bytes."""
    layers = decoder.new_kv_layers(1, config.block_size, kv_dtype(decoder, config))
    block_bytes = sum(layer.nbytes for layer in layers)
    num_bytes = config.kv_cache_bytes or _available_bytes(config.device)
    num_blocks = num_bytes // block_bytes
    if num_blocks < 2:
        raise ConfigError(
            f"{num_bytes:,} bytes of KV cache hold {num_blocks} blocks of {block_bytes:,} bytes; "
            "at least 2 are needed: raise kv_cache_bytes or lower block_size",
            param="kv_cache_bytes",
        )
    return num_blocks


def _available_bytes(device: str) -> int:
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * CUDA_SHARE)
    free = available_memory_bytes()
    return min(int(free * CPU_SHARE), CPU_MAX_BYTES) if free else FALLBACK_BYTES
