"""The C++ kernels behind PyTorch's dispatcher, and the layouts they want.

Packed weight: panels of 32 output features, [N / 32, K / P, 32, P] with P = 2 elements a dot
step for bfloat16 and 1 for float32, zero padded; a gated weight is the panels of its gate, then
those of up. KV cache: see kernels/cpu/args.h.

The kernels serve float32 and bfloat16. What they do not serve (float16; an odd number of input
features in bfloat16, where pairs do not come out) runs the reference.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sterna.core.errors import KernelError
from sterna.core.machine import num_usable_cpus
from sterna.kernels import (
    _cpu,
    cpu_calls,
    cpu_draft_calls,
    cpu_encoder_calls,
    cpu_lora_calls,
    cpu_quant_calls,
)
from sterna.kernels.backend import use_backend
from sterna.kernels.kv_codes import row_elems
from sterna.kernels.optable import OPS, library
from sterna.kernels.tiles import TILE_ROWS, WIDTHS

_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_PANEL = _cpu.PANEL
_CALLS = (
    cpu_calls.CALLS
    | cpu_quant_calls.QUANT_CALLS
    | cpu_encoder_calls.ENCODER_CALLS
    | cpu_draft_calls.DRAFT_CALLS
    | cpu_lora_calls.LORA_CALLS
)
# GGUF's numbers of its 32-element block types: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
BLOCK_TYPES = (2, 3, 6, 7, 8)
# Ops that take plain weights in training, and whether those are gated. From this many rows on a
# weight is packed for the call (4 % of a training step of 1,024 tokens); the kernel packs a panel
# at a time for fewer. The copy is not kept: a version counter does not see every way of writing
# (FSDP gathers into the same storage), and an old weight is the worst of errors.
_PLAIN_GATED = {"linear": False, "gated_linear": True, "logits": False}
_PACK_ROWS = 32
_SLOPES = ("silu", "gelu_tanh")  # activations whose gradient has a kernel
_PARTIAL_BYTES = 256 << 20
_SLACK_ELEMS = 64  # vector loads may read past the last head when head_dim is no multiple of 16
_TRAIN_BLOCK = 16  # block size of the throw-away cache of `attention`


class EagerSink:
    """Runs a call at once on PyTorch memory."""

    tape = None

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def kind(self, x: Tensor) -> int:
        """Eager calls count the rows they are given: how many tokens the step has is unknown."""
        return 1

    def empty(self, rows: int, cols: int, dtype: torch.dtype, kind: int) -> Tensor:
        """See Sink."""
        return torch.empty(rows, cols, dtype=dtype)

    def counts(self, rows: int, seqs: int) -> tuple[int, int, int]:
        """See Sink. The tokens of a call that counts them (encoders) are the rows it is given."""
        return rows, rows, seqs


class CpuBackend:
    """The layouts of the C++ kernels and the threads that run them."""

    name = "cpu"

    def __init__(self, threads: int, isa: str = "") -> None:
        self.eager = EagerSink(_cpu.Kernels(threads, isa))
        self._local = threading.local()

    @property
    def sink(self) -> cpu_calls.Sink:
        """Where this thread's calls go: they run at once, unless a tape is being recorded."""
        sink: cpu_calls.Sink = getattr(self._local, "sink", self.eager)
        return sink

    @contextmanager
    def sending_to(self, sink: cpu_calls.Sink) -> Iterator[None]:
        """Within the block, this thread's calls go to `sink`."""
        self._local.sink = sink
        try:
            yield
        finally:
            del self._local.sink

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block, this thread runs its calls by itself, at once.

        For threads of low priority: holding the pool, one of them would keep the engine waiting
        for as long as the system puts it aside.
        """
        with self.sending_to(EagerSink(_cpu.Kernels(1, self.kernels.isa))):
            yield

    @property
    def kernels(self) -> Any:
        """The C++ `Kernels`: a thread pool and one instruction set."""
        return self.eager.kernels

    def set_threads(self, threads: int) -> None:
        """Replace the thread pool; calls already under way keep theirs."""
        if threads != self.kernels.threads:
            self.eager.kernels = _cpu.Kernels(threads, self.kernels.isa)

    def new_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """See KernelBackend. Raises KernelError for a block size that is no multiple of 16."""
        if block_size % 16:
            raise KernelError(f"KV block of {block_size} tokens; use a multiple of 16")
        size = num_kv_heads * block_size * row_elems(head_dim, dtype)
        flat = _lazy_zeros(num_blocks * 2 * size + _SLACK_ELEMS, dtype)
        return flat[: num_blocks * 2 * size].view(num_blocks, 2, size)

    def pack_weight(self, weight: Tensor, gated: bool = False, out: Tensor | None = None) -> Tensor:
        """See KernelBackend."""
        if not _is_served(weight.dtype, weight.shape[1]):
            return weight
        halves = weight.chunk(2) if gated else (weight,)
        panels = -(-halves[0].shape[0] // _PANEL)
        pair = _pair(weight.dtype)
        shape = (panels * len(halves), weight.shape[1] // pair, _PANEL, pair)
        packed = torch.empty(shape, dtype=weight.dtype) if out is None else out
        for half, part in zip(halves, packed.chunk(len(halves)), strict=True):
            plain = half.contiguous()
            size = (*plain.shape, plain.element_size())
            self.kernels.pack(plain.data_ptr(), part.data_ptr(), *size)
        return packed

    def dequantize(self, blocks: Tensor, block_type: int, dtype: torch.dtype) -> Tensor | None:
        """GGUF blocks [num_blocks, bytes] uint8 -> [num_blocks * 32] of `dtype`.

        None when there is no kernel for that type (see BLOCK_TYPES) or dtype.
        """
        if block_type not in BLOCK_TYPES or dtype not in cpu_calls.DTYPES:
            return None
        plain = blocks.contiguous()
        out = torch.empty(plain.shape[0] * 32, dtype=dtype)
        is_bf16 = int(dtype == torch.bfloat16)
        args = (plain.data_ptr(), out.data_ptr(), plain.shape[0], block_type, is_bf16)
        self.kernels.dequantize(*args)
        return out

    def unpack_weight(
        self, packed: Tensor, out_features: int, in_features: int, gated: bool = False
    ) -> Tensor:
        """See KernelBackend."""
        parts = packed.chunk(2) if gated else (packed,)
        rows = out_features // len(parts) if out_features else 0
        plain = [part.permute(0, 2, 1, 3).reshape(-1, _columns(part)) for part in parts]
        return torch.cat([p[: rows or None, : in_features or None] for p in plain])

    def gated_backward(self, grad: Tensor, sums: Tensor, activation: str) -> Tensor | None:
        """See KernelBackend."""
        if sums.dtype not in cpu_calls.DTYPES or activation not in _SLOPES:
            return None
        grad, sums = grad.contiguous(), sums.contiguous()
        out = torch.empty_like(sums)
        self.kernels.gated_grad(
            grad.data_ptr(), sums.data_ptr(), out.data_ptr(), len(grad),
            cpu_calls.DTYPES[sums.dtype], grad.shape[1], cpu_calls.ACTIVATIONS[activation],
        )  # fmt: skip
        return out

    def gated_with_sums(
        self, x: Tensor, weight: Tensor, activation: str, out_features: int
    ) -> tuple[Tensor, Tensor] | None:
        """See KernelBackend."""
        if weight.dim() != 2 or not _is_served(x.dtype, x.shape[1]):
            return None
        x = x.contiguous()
        sums = torch.empty(len(x), 2 * out_features, dtype=x.dtype)
        ready = self.pack_weight(weight, True) if len(x) >= _PACK_ROWS else weight.contiguous()
        out = cpu_calls.gated_linear(self.eager, x, ready, activation, out_features, sums)
        return out, sums

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
        if qkv.dtype not in cpu_calls.DTYPES:
            return None
        num_heads, kv_heads, dim = heads
        tokens, width = len(qkv), _cpu.attention_grad_width(dim)
        # Every query head adds to key sums of its own, which are added up at the end, as long as
        # these are small: 9 heads of 3 groups keep two threads busier than 3 do.
        group = num_heads // kv_heads
        parts = group if 8 * tokens * num_heads * width <= _PARTIAL_BYTES else 1
        qkv, grad, starts = qkv.contiguous(), grad.contiguous(), query_starts.contiguous()
        out = torch.empty_like(qkv)
        partial = torch.empty(2, kv_heads, parts, tokens, width)
        self.kernels.attention_grad(
            qkv.data_ptr(), grad.data_ptr(), starts.data_ptr(), out.data_ptr(), partial.data_ptr(),
            cpu_calls.DTYPES[qkv.dtype], num_heads, kv_heads, dim, parts, window, tokens,
            len(starts) - 1, scale, softcap,
        )  # fmt: skip
        d_kv = partial[..., :dim].sum(2) if parts > 1 else partial[:, :, 0, :, :dim]
        out[:, num_heads * dim :] = d_kv.permute(2, 0, 1, 3).reshape(tokens, -1)
        return out


def register() -> CpuBackend:
    """Put every kernel under the dispatcher's CPU key and own the CPU layouts."""
    backend = CpuBackend(num_usable_cpus())
    use_backend("cpu", backend)
    for op in OPS:
        kernel = _kernel(backend, op.name, op.reference)
        library().impl(op.name, kernel, "CPU")
    return backend


def _kernel(backend: CpuBackend, name: str, reference: Callable[..., Tensor | None]) -> Any:
    if name == "attention":
        return _attention_kernel(backend, reference)
    if name == "shared_attention":
        return _shared_attention_kernel(backend, reference)
    call = _CALLS[name]

    def kernel(*args: Any) -> Tensor | None:
        sink = backend.sink
        is_eager = sink is backend.eager
        if not _serves(name, args, check=is_eager):
            if not is_eager:
                raise KernelError(f"{name} runs the reference on {args[0].dtype} of this width")
            return reference(*args)
        ready = [a.contiguous() if isinstance(a, Tensor) else a for a in args]
        if is_eager and _is_packed_here(name, ready):
            ready[1] = backend.pack_weight(ready[1], _PLAIN_GATED[name])
        return call(sink, *ready)

    return kernel


def _is_packed_here(name: str, args: list[Any]) -> bool:
    return name in _PLAIN_GATED and args[1].dim() == 2 and len(args[0]) >= _PACK_ROWS


def _serves(name: str, args: tuple[Any, ...], check: bool) -> bool:
    if name == "embed":
        if check:
            _check_tokens(args[0], _table_rows(args[1]))
        return _is_served(args[1].dtype, args[2])
    if name == "embed_norm":
        if check:
            _check_tokens(args[0], args[1].shape[0])
            _check_positions(args[2], args[3])
        return args[1].dtype in cpu_calls.DTYPES
    if name == "bidirectional_attention":
        return _is_served(args[0].dtype, args[4])
    if name == "quant_embed":
        if check:
            _check_tokens(args[0], args[1].shape[0] * TILE_ROWS)
        return args[-1] in cpu_calls.DTYPES and _is_tiled(args[1:])
    if name.startswith("quant_"):
        return args[0].dtype in cpu_calls.DTYPES and _is_tiled(args[1:])
    in_features = args[0].shape[1] if name in ("linear", "gated_linear", "logits") else 0
    return _is_served(args[0].dtype, in_features)


def _is_served(dtype: torch.dtype, in_features: int) -> bool:
    return dtype in cpu_calls.DTYPES and not (dtype == torch.bfloat16 and in_features % 2)


def _is_tiled(weight: tuple[Any, ...]) -> bool:
    """Whether the kernels read this flat weight: rows that choose their format have 6 bits."""
    _, scales, table, row_formats, bits, group_size = weight[:6]
    return (
        bits in WIDTHS
        and group_size in (0, 32, 64, 128)
        and table.dtype == torch.float32
        and scales.dtype in cpu_quant_calls.SCALE_KINDS
        and (row_formats is None or bits == 6)
    )


def _table_rows(table: Tensor) -> int:
    return int(table.shape[0] * (table.shape[2] if table.dim() == 4 else 1))


def _check_tokens(tokens: Tensor, vocab: int) -> None:
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
        raise KernelError(f"token ids must lie in [0, {vocab})")


def _check_positions(positions: Tensor, table: Tensor | None) -> None:
    limit = 0 if table is None else table.shape[0]
    if (
        limit > 1
        and positions.numel()
        and not 0 <= int(positions.min()) <= int(positions.max()) < limit
    ):
        raise KernelError(f"positions must lie in [0, {limit})")


def _attention_kernel(backend: CpuBackend, reference: Callable[..., Tensor | None]) -> Any:
    """Varlen attention on the paged kernel, through a cache that lives for one call.

    So training and serving share the code that computes attention, to the bit.
    """

    def kernel(
        qkv: Tensor,
        query_starts: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor | None:
        heads = (num_heads, num_kv_heads, head_dim)
        if not _is_served(qkv.dtype, head_dim):
            return reference(qkv, query_starts, *heads, scale, window, softcap)
        cache = _KeyCache(backend, qkv.contiguous(), query_starts, heads)
        return cache.attend(cache.queries, query_starts, (scale, window, softcap))

    return kernel


def _shared_attention_kernel(backend: CpuBackend, reference: Callable[..., Tensor | None]) -> Any:
    """As `_attention_kernel`: keys and values are stored once a sequence, a row asks once."""

    def kernel(
        qkv: Tensor,
        query_starts: Tensor,
        key_rows: Tensor,
        key_starts: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor | None:
        heads, keys = (num_heads, num_kv_heads, head_dim), (key_rows, key_starts)
        if not _is_served(qkv.dtype, head_dim):
            return reference(qkv, query_starts, *keys, *heads, scale, window, softcap)
        qkv = qkv.contiguous()
        cache = _KeyCache(backend, qkv.index_select(0, key_rows), key_starts, heads)
        return cache.attend(qkv, query_starts, (scale, window, softcap))

    return kernel


class _KeyCache:
    """The keys and values of sequences side by side in a paged cache, for one call."""

    def __init__(
        self, backend: CpuBackend, qkv: Tensor, starts: Tensor, heads: tuple[int, int, int]
    ) -> None:
        """qkv [K, (H + 2G) * C] contiguous, `starts` [S + 1] of its sequences."""
        self._sink, self._heads = backend.eager, heads
        self._tables, slots, num_blocks = _identity_paging(starts)
        shape = (num_blocks, _TRAIN_BLOCK, *heads[1:])
        self._cache = backend.new_kv_cache(*shape, qkv.dtype, qkv.device)
        self._lens = starts.diff().contiguous()
        where = (slots, None, None, None, 0.0, False, *heads, self._cache, slots, _TRAIN_BLOCK)
        self.queries = cpu_calls.rope(self._sink, qkv, *where)

    def attend(self, q: Tensor, query_starts: Tensor, options: tuple[float, int, float]) -> Tensor:
        """q [T, H * C or wider], the last rows of each sequence -> [T, H * C]."""
        paged = (self._tables, query_starts.contiguous(), self._lens, *self._heads, _TRAIN_BLOCK)
        return cpu_calls.paged_attention(self._sink, q, self._cache, *paged, *options)


def _identity_paging(query_starts: Tensor) -> tuple[Tensor, Tensor, int]:
    """Block tables [S, B], slots [T] and the block count of sequences laid out one by one."""
    starts = query_starts.to(torch.int64)
    lens = starts[1:] - starts[:-1]
    blocks = (lens + _TRAIN_BLOCK - 1) // _TRAIN_BLOCK
    first = torch.cumsum(blocks, 0) - blocks + 1  # block 0 is the null block
    width = max(int(blocks.max()) if len(blocks) else 0, 1)
    tables = (first[:, None] + torch.arange(width)[None, :]).to(torch.int32)
    num_blocks = int(blocks.sum()) + 1
    tables = torch.where(tables < num_blocks, tables, 0).contiguous()
    begin = torch.repeat_interleave(first * _TRAIN_BLOCK - starts[:-1], lens)
    slots = begin + torch.arange(int(lens.sum()), dtype=torch.int64)
    return tables, slots, num_blocks


def _lazy_zeros(num_elems: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory when they are first written; `torch.zeros` touches every page.

    A cache of 2 GiB costs 0.5 s of start-up that way. No large pages: each is cleared at its first
    touch, 1.6 ms on a virtual machine, and a prompt touches new ones in every layer (512 tokens:
    312 -> 358 ms).
    """
    memory = mmap.mmap(-1, max(num_elems * dtype.itemsize, 1), flags=_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype, count=num_elems)


def _pair(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 1


def _columns(packed: Tensor) -> int:
    return int(packed.shape[1] * packed.shape[3])
