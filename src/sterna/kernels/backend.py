"""What a back end decides besides its kernels: the layout of packed weights and of the KV cache.

The kernels themselves hang on PyTorch's dispatcher. These two layouts cannot: a cache is made
before any op runs. The registry below is process-wide for the same reason the dispatcher is: a
kernel registered for a device serves every engine of the process, so its layouts must too.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sterna.kernels.kv_codes import row_elems


class KernelBackend(Protocol):
    """The layouts of one device's kernels."""

    name: str

    def new_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Zeros [num_blocks, 2, elements]; the inner layout is ours. int8 and float8_e4m3fn
        caches are quantised (kernels/kv_codes.py) and hold the scales too.
        """
        ...

    def pack_weight(self, weight: Tensor, gated: bool = False, out: Tensor | None = None) -> Tensor:
        """[N, K] to the 4-D layout of the kernels, into `out` if given; or `weight` itself."""
        ...

    def unpack_weight(
        self, packed: Tensor, out_features: int, in_features: int, gated: bool = False
    ) -> Tensor:
        """The [N, K] weight that `pack_weight` took; a size of 0 leaves that dim's padding on."""
        ...

    def gated_backward(self, grad: Tensor, sums: Tensor, activation: str) -> Tensor | None:
        """The gradient [T, 2 I] of act(gate) * up by both, or None: no kernel for these."""
        ...

    def gated_with_sums(
        self, x: Tensor, weight: Tensor, activation: str, out_features: int
    ) -> tuple[Tensor, Tensor] | None:
        """`gated_linear` of a plain weight and its sums [T, 2 I], or None: no kernel for these."""
        ...

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
        """The gradient [T, (H + 2 G) * C] of packed attention, or None: no kernel for these."""
        ...


class ReferenceBackend:
    """Plain weights; cache blocks laid out [2, num_kv_heads, block_size, head_dim (+ scale)]."""

    name = "reference"

    def new_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """See KernelBackend."""
        size = num_kv_heads * block_size * row_elems(head_dim, dtype)
        return torch.zeros(num_blocks, 2, size, dtype=dtype, device=device)

    def pack_weight(self, weight: Tensor, gated: bool = False, out: Tensor | None = None) -> Tensor:
        """See KernelBackend."""
        return weight

    def unpack_weight(
        self, packed: Tensor, out_features: int, in_features: int, gated: bool = False
    ) -> Tensor:
        """See KernelBackend."""
        return packed

    def gated_backward(self, grad: Tensor, sums: Tensor, activation: str) -> Tensor | None:
        """See KernelBackend."""
        return None

    def gated_with_sums(
        self, x: Tensor, weight: Tensor, activation: str, out_features: int
    ) -> tuple[Tensor, Tensor] | None:
        """See KernelBackend."""
        return None

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
        """See KernelBackend."""
        return None


_REFERENCE = ReferenceBackend()
_by_device: dict[str, KernelBackend] = {}


def use_backend(device_type: str, backend: KernelBackend) -> None:
    """Let `backend` own the layouts of tensors on `device_type` ("cpu", "cuda")."""
    _by_device[device_type] = backend


def backend_for(device_type: str) -> KernelBackend:
    """The back end whose layouts hold on `device_type`; the reference when none was set."""
    return _by_device.get(device_type, _REFERENCE)


def plain_weight(
    weight: Tensor, out_features: int, in_features: int, gated: bool = False
) -> Tensor:
    """`weight` as [N, K]: itself when plain, unpacked by its back end when packed (4-D)."""
    if weight.dim() == 2:
        return weight
    backend = backend_for(weight.device.type)
    return backend.unpack_weight(weight, out_features, in_features, gated)
