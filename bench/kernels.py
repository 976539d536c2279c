"""Each CPU kernel against this machine's limits: time, GFLOP/s or GB/s, share of the limit.

    python bench/kernels.py [--threads 2] [--json FILE]

The limits are measured in the same run: streaming reads for bytes, the micro-kernel on operands
that stay in the L1 cache for arithmetic. Results are checked against the reference before any
clock starts. Medians of 9 repeats; on a shared machine leave 5 % for noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sterna.core.machine import fingerprint, num_usable_cpus
from sterna.kernels import cpu_calls, cpu_draft_calls, reference
from sterna.kernels.cpu_backend import CpuBackend

SHAPES = {"qkv": (576, 960), "gate_up": (576, 3072), "down": (1536, 576), "head": (576, 49152)}
ROWS = (1, 4, 8, 16, 32, 128, 512)
HEADS = (9, 3, 64)
# sequences, new tokens each, keys each: decodes of one and many streams, prompt chunks
ATTENTION = ((1, 1, 2000), (32, 1, 160), (8, 1, 1500), (1, 512, 512), (1, 512, 2048))
CACHES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
REPEATS = 9
Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=num_usable_cpus())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    backend = CpuBackend(args.threads)
    limits = {d: arithmetic_limit(backend, d) for d in (torch.bfloat16, torch.float32)}
    bandwidth = read_limit(backend)
    print(fingerprint().line())
    peaks = f"bf16 {limits[torch.bfloat16]:.0f}, fp32 {limits[torch.float32]:.0f} GFLOP/s"
    print(f"isa {backend.kernels.isa}, {args.threads} threads, {bandwidth:.1f} GB/s, {peaks}")
    rows = linear_rows(backend, limits, bandwidth) + attention_rows(backend, limits, bandwidth)
    rows += row_op_rows(backend, bandwidth)
    if args.json:
        result = {"machine": fingerprint().as_dict(), "isa": backend.kernels.isa,
                  "threads": args.threads, "read_gbs": bandwidth, "rows": rows}  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1))


def clock(call: Callable[[], object], inner: int = 1) -> float:
    """Median seconds of one call."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(inner):
            call()
        seconds.append((time.perf_counter() - started) / inner)
    return statistics.median(seconds)


def arithmetic_limit(backend: CpuBackend, dtype: torch.dtype) -> float:
    """GFLOP/s of the micro-kernel on 96 rows x one panel a thread: all in the L1/L2 cache."""
    k, n = 256, 32 * backend.kernels.threads
    x, w = torch.randn(960, k).to(dtype), backend.pack_weight(torch.randn(n, k).to(dtype))
    seconds = clock(lambda: cpu_calls.linear(backend.eager, x, w, None, None, n), 20)
    return 2 * 960 * k * n / seconds / 1e9


def read_limit(backend: CpuBackend) -> float:
    """GB/s of one row through 512 MiB of weights: far larger than any cache here."""
    k, n = 2048, 131072
    w = torch.zeros(n // 32, k // 2, 32, 2, dtype=torch.bfloat16)
    x = torch.zeros(1, k, dtype=torch.bfloat16)
    seconds = clock(lambda: cpu_calls.linear(backend.eager, x, w, None, None, n))
    return w.numel() * 2 / seconds / 1e9


def report(name: str, seconds: float, flops: float, num_bytes: float, limit_s: float) -> Row:
    share = limit_s / seconds
    print(f"{name:42} {seconds * 1e6:10.1f} us {flops / seconds / 1e9:8.1f} GFLOP/s "
          f"{num_bytes / seconds / 1e9:7.1f} GB/s {share:6.1%} of the limit")  # fmt: skip
    return {"name": name, "us": seconds * 1e6, "gflops": flops / seconds / 1e9,
            "gbs": num_bytes / seconds / 1e9, "share": share}  # fmt: skip


def linear_rows(backend: CpuBackend, limits: dict[torch.dtype, float], gbs: float) -> list[Row]:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, (k, n) in SHAPES.items():
            # enough copies of the weight that it comes from memory, as it does in a decode step
            copies = max(1, int(96e6 / (k * n * dtype.itemsize)))
            plain = torch.randn(n, k).to(dtype)
            weights = [backend.pack_weight(plain) for _ in range(copies)]
            for rows in ROWS:
                if name == "head" and rows > 32:
                    continue
                x = torch.randn(rows, k).to(dtype)
                check(backend, x, plain, weights[0], n)
                seconds = clock(lambda: stream(backend, x, weights, n)) / copies  # noqa: B023
                flops, size = 2.0 * rows * k * n, k * n * dtype.itemsize
                limit = max(flops / limits[dtype] / 1e9, size / gbs / 1e9)
                label = f"linear {name} {k}x{n} {str(dtype)[6:]} rows {rows}"
                found.append(report(label, seconds, flops, size, limit))
    return found


def stream(backend: CpuBackend, x: Tensor, weights: list[Tensor], n: int) -> None:
    for w in weights:
        cpu_calls.linear(backend.eager, x, w, None, None, n)


def check(backend: CpuBackend, x: Tensor, plain: Tensor, packed: Tensor, n: int) -> None:
    """Validate, then time."""
    got = cpu_calls.linear(backend.eager, x, packed, None, None, n).float()
    want = reference.linear(x, plain, None, None, n).float()
    assert (got - want).abs().max() <= want.abs().max() * 2**-7, "kernel differs from reference"


def attention_rows(backend: CpuBackend, limits: dict[torch.dtype, float], gbs: float) -> list[Row]:
    heads, kv_heads, dim = HEADS
    dtype, size, found = torch.bfloat16, 16, []
    for (seqs, new, context), kind in itertools.product(ATTENTION, CACHES):
        width = -(-context // size)
        blocks = seqs * width + 1
        cache = filled_cache(backend, blocks, size, CACHES[kind])
        q = torch.randn(seqs * new, heads * dim).to(dtype)
        tables = (1 + torch.arange(seqs * width)).int().view(seqs, width)
        starts = (torch.arange(seqs + 1) * new).int()
        lens = torch.full((seqs,), context).int()
        args = (q, cache, tables, starts, lens, heads, kv_heads, dim, size, 0.125)
        seconds = clock(lambda: cpu_calls.paged_attention(backend.eager, *args), 5)  # noqa: B023
        visible = sum(context - new + i + 1 for i in range(new)) * seqs
        flops = 4.0 * visible * heads * dim
        read = float(cache.nbytes // blocks * seqs * context // size)
        limit = max(flops / limits[dtype] / 1e9, read / gbs / 1e9)
        label = f"attention {kind} {seqs} x {new} queries, {context} keys"
        found.append(report(label, seconds, flops, read, limit))
    return found


def filled_cache(backend: CpuBackend, blocks: int, size: int, kind: torch.dtype) -> Tensor:
    heads, kv_heads, dim = HEADS
    cache = backend.new_kv_cache(blocks, size, kv_heads, dim, kind, torch.device("cpu"))
    qkv = torch.randn(blocks * size, (heads + 2 * kv_heads) * dim).bfloat16()
    slots = torch.arange(blocks * size)
    tail = (1e-5, False, heads, kv_heads, dim, cache, slots, size)
    cpu_calls.rope(backend.eager, qkv, slots.int(), None, None, None, *tail)
    return cache


def row_op_rows(backend: CpuBackend, gbs: float) -> list[Row]:
    found = []
    for rows in (1, 512):
        x, w = torch.randn(rows, 576).bfloat16(), torch.ones(576).bfloat16()
        size = 2.0 * x.numel() * 2
        for name, call in (
            ("rms_norm", lambda: cpu_calls.rms_norm(backend.eager, x, w, 1e-5)),  # noqa: B023
            ("silu", lambda: cpu_calls.activate(backend.eager, x, "silu")),  # noqa: B023
        ):
            seconds = clock(call, 20)
            label = f"{name} 576 bf16 rows {rows}"
            found.append(report(label, seconds, 0.0, size, size / gbs / 1e9))
        found.append(bulk_store_row(backend, gbs, rows))
    return found + draft_op_rows(backend, gbs)


def draft_op_rows(backend: CpuBackend, gbs: float) -> list[Row]:
    """A speculator's own ops: an lstm cell of width 576, the largest of 6,144 logits."""
    found = []
    for rows in (1, 8):
        z, cell = torch.randn(rows, 4 * 576).bfloat16(), torch.randn(rows, 576).bfloat16()
        norms = [torch.ones(576).bfloat16() for _ in range(4)]
        logits = torch.randn(rows, 6144)
        for name, size, call in (
            ("draft_cell lstm 576 bf16", 14.0 * rows * 576,
             lambda: cpu_draft_calls.draft_cell(backend.eager, z, cell, *norms, 1e-6)),  # noqa: B023
            ("pick 6144", 4.0 * logits.numel(),
             lambda: cpu_draft_calls.pick(backend.eager, logits, None)),  # noqa: B023
        ):  # fmt: skip
            seconds = clock(call, 20)
            found.append(report(f"{name} rows {rows}", seconds, 0.0, size, size / gbs / 1e9))
    return found


def bulk_store_row(backend: CpuBackend, gbs: float, rows: int) -> Row:
    """SwiftKV: keys and values of 15 layers at once."""
    _, kv_heads, dim = HEADS
    kv = torch.randn(rows, 15 * 2 * kv_heads * dim).bfloat16()
    caches = [filled_cache(backend, rows // 16 + 2, 16, torch.bfloat16) for _ in range(15)]
    slots, nothing = torch.arange(rows) + 16, [None] * 15
    table = torch.rand(rows + 16, dim)
    args = (kv, slots.int(), [table] * 15, nothing, 1e-5, False, kv_heads, dim, caches, slots, 16)
    seconds = clock(lambda: cpu_calls.store_kv(backend.eager, *args), 20)
    size = 2.0 * kv.numel() * 2
    return report(f"store_kv 15 layers, {rows} tokens", seconds, 0.0, size, size / gbs / 1e9)


if __name__ == "__main__":
    main()
