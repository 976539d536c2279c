"""Model FLOPs of a step: what the mathematics needs, so that MFU is comparable between systems.

    dense       2 N a token forward, 2 N backward to the activations, 2 N_t to the trained weights
    attention   2 n^2 H C a layer and document of n tokens (causal: half of all pairs), times 3

N counts weights of matrix products (the head too, an embedding table that is only looked up not).
Nothing recomputed is counted (PaLM, arXiv 2204.02311, appendix B, made causal). Windows count the
pairs inside.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from sterna.data.pack import PackedRow


class FlopCounter:
    """Model FLOPs of rows for one model."""

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        matrices = [p for name, p in model.named_parameters() if _is_multiplied(name, p, model)]
        trained = sum(p.numel() for p in matrices if p.requires_grad)
        self._per_token = 4 * sum(p.numel() for p in matrices) + 2 * trained
        heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._per_pair = 3 * 4 * heads * int(head_dim)
        layers = int(config.num_hidden_layers)
        self._windows = getattr(config, "layer_windows", None) or (0,) * layers

    def of(self, rows: Sequence[PackedRow]) -> float:
        """FLOPs of forward and backward of the rows."""
        tokens = sum(len(row.tokens) for row in rows)
        lengths = np.concatenate([np.diff(row.starts) for row in rows]).astype(np.float64)
        pairs = sum(_pairs(lengths, window) for window in self._windows)
        return float(self._per_token * tokens + self._per_pair * pairs)


def _is_multiplied(name: str, parameter: nn.Parameter, model: nn.Module) -> bool:
    if parameter.dim() < 2:
        return False
    head: Any = model.head_weight  # a method, which nn.Module's typing hides
    is_table = "embed" in name.rsplit(".", 2)[0] or "wte" in name or "wpe" in name
    return not is_table or parameter is head()


def _pairs(lengths: np.ndarray[Any, np.dtype[np.float64]], window: int) -> float:
    """Query-key pairs of causal attention over documents of these lengths."""
    if window:
        inside = np.minimum(lengths, window)
        return float((inside * (inside + 1) / 2 + (lengths - inside) * window).sum())
    return float((lengths * (lengths + 1) / 2).sum())


def measure_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """FLOP/s of a large matrix product on this device: the best of repetitions for `seconds`."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
