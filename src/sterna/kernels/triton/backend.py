"""The Triton kernels behind PyTorch's dispatcher; Triton itself is imported at the first call.

They serve CUDA devices and, where TRITON_INTERPRET=1 makes Triton an interpreter, the CPU: slow,
but the same code, which is how it is tested without a GPU. Other ops, float64, weights and the KV
cache stay as the reference has them.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from torch import Tensor

from sterna.kernels import reference
from sterna.kernels.backend import ReferenceBackend, use_backend
from sterna.kernels.optable import library

OPS = ("attention", "shared_attention")


class TritonBackend(ReferenceBackend):
    """The reference's layouts, and a gradient of packed attention."""

    name = "triton"

    def attention_backward(
        self,
        grad: Tensor,
        qkv: Tensor,
        query_starts: Tensor,
        heads: tuple[int, int, int],
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor | None:
        """See KernelBackend; None for float64."""
        from sterna.kernels.triton import attention as kernels

        if qkv.dtype not in kernels.DTYPES:
            return None
        return kernels.backward(grad, qkv.contiguous(), query_starts, heads, scale, window, softcap)


def is_interpreted() -> bool:
    """Whether Triton runs as an interpreter on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """Why the kernels cannot run at all; None when Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch's CUDA builds; pip install triton)"
    return None


def register(device_type: str) -> None:
    """Serve "cuda", or "cpu" by the interpreter. Once a process."""
    library().impl("attention", _attention, device_type.upper())
    library().impl("shared_attention", _shared_attention, device_type.upper())
    use_backend(device_type, TritonBackend())


def _attention(
    qkv: Tensor,
    query_starts: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    from sterna.kernels.triton import attention as kernels

    heads = (num_heads, num_kv_heads, head_dim)
    if qkv.dtype not in kernels.DTYPES:
        return reference.attention(qkv, query_starts, *heads, scale, window, softcap)
    return kernels.forward(qkv.contiguous(), query_starts, heads, scale, window, softcap)


def _shared_attention(
    qkv: Tensor, query_starts: Tensor, key_rows: Tensor, key_starts: Tensor, *options: Any
) -> Tensor:
    """Through `attention`, prefixes once a sequence; only their rows of the result are dropped."""
    whole = _attention(qkv.index_select(0, key_rows), key_starts, *options)
    return whole.index_select(0, reference.own_keys(query_starts, key_starts))
