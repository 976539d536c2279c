"""Quantised linears against this machine's limits and against the bf16 kernel.

    python bench/quant_kernels.py [--threads 1 2] [--formats fp6 fp6-g128] [--rows 1 8 512]
                                  [--shapes gate_up down] [--int8] [--json FILE]

Each call reads another copy of its weight, 140 MB in all, so weights come from memory as they do
in a decode step; the calls are recorded on a tape and replayed, as in the engine. A result is
checked against the reference before any clock starts. Medians of 21 repeats; bf16 is timed beside
each shape, because the bandwidth of a shared machine drifts (here between 43 and 85 GB/s). The
share is of max(bytes / measured bandwidth, products / measured peak); int8 has twice the peak. With
one thread, instructions a cycle are printed too where the machine has hardware counters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels import arithmetic_limit
from perf_counters import Counters, open_counters
from sterna.core.machine import fingerprint, num_usable_cpus
from sterna.kernels import _cpu, cpu_calls, cpu_quant_calls, quant_reference
from sterna.kernels.cpu_backend import CpuBackend
from sterna.kernels.quant_weight import FlatWeight
from sterna.kernels.tape import RecordingSink
from sterna.kernels.tiles import TILE_ROWS, tile_grid
from sterna.quant.formats import parse_format
from stream_read import StreamReader

# SmolLM2-135M, then shapes of a 1.1 B and a 3.8 B model: (in, out)
SHAPES = {"qkv": (576, 960), "out": (576, 576), "gate_up": (576, 3072), "down": (1536, 576),
          "head": (576, 49152), "1b up": (2048, 5632), "4b up": (3072, 8192)}  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
REPEATS, COLD_BYTES, MAX_SECONDS = 21, 140e6, 3.0
Record = Callable[[RecordingSink, Tensor], Tensor]


@dataclass(frozen=True)
class Limits:
    """GFLOP/s of the dots and GB/s that plain reads get from memory."""

    gflops: float
    gbs: float


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call; instructions a cycle of this thread, where they are counted."""

    seconds: float
    ipc: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, num_usable_cpus()])
    parser.add_argument("--formats", nargs="+", default=["fp6", "fp6-g128"])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--int8", action="store_true", help="int8 activations")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(fingerprint().line())
    rows = [row for threads in args.threads for row in bench(args, threads)]
    if args.json:
        result = {"machine": fingerprint().as_dict(), "rows": rows}
        args.json.write_text(json.dumps(result, indent=1))


def bench(args: argparse.Namespace, threads: int) -> list[dict[str, object]]:
    backend = CpuBackend(threads)
    reader = StreamReader(threads)
    bandwidth = statistics.median(reader.gbs() for _ in range(3))
    limits = Limits(arithmetic_limit(backend, torch.bfloat16), bandwidth)
    isa, counters = backend.kernels.isa, open_counters()
    if isinstance(counters, str):
        print(counters)
    print(f"isa {isa}, {threads} threads, {limits.gbs:.1f} GB/s, bf16 {limits.gflops:.0f} GFLOP/s")
    found = []
    peak = Limits(limits.gflops * (2 if args.int8 else 1), limits.gbs)
    for name in args.shapes:
        k, n = SHAPES[name]
        plain = bf16_calls(backend, k, n)
        packed = {fmt: quant_calls(backend, fmt, k, n, args.int8) for fmt in args.formats}
        for rows in args.rows:
            if name == "head" and rows > 32:
                continue
            base = clock(backend, plain, rows, k, counters)
            shape, flops = f"{name} {k}x{n}", 2.0 * rows * k * n
            found.append(line(shape, "bf16", rows, threads, base, base.seconds, 2.0 * k * n,
                              flops, limits))  # fmt: skip
            for fmt, (calls, size) in packed.items():
                timing = clock(backend, calls, rows, k, counters)
                label = fmt + (" int8" if args.int8 else "")
                found.append(line(shape, label, rows, threads, timing, base.seconds, size,
                                  flops, peak))  # fmt: skip
    return found


def bf16_calls(backend: CpuBackend, k: int, n: int) -> list[Record]:
    packed = backend.pack_weight(torch.randn(n, k).bfloat16())
    copies = [packed.clone() for _ in range(num_copies(2.0 * k * n))]
    return [lambda sink, x, w=w: cpu_calls.linear(sink, x, w, None, None, n) for w in copies]


def quant_calls(
    backend: CpuBackend, fmt: str, k: int, n: int, is_int8: bool
) -> tuple[list[Record], float]:
    """One call a copy, and the bytes of a copy."""
    w = random_weight(fmt, k, n)
    check(backend, w, k, n, is_int8)
    size = float(w[0].nbytes + w[1].nbytes)
    copies = [(w[0].clone(), w[1].clone(), *w[2:]) for _ in range(num_copies(size))]
    calls = [
        lambda sink, x, c=c: cpu_quant_calls.quant_linear(sink, x, *c, None, None, n, is_int8)
        for c in copies
    ]
    return calls, size


def num_copies(size: float) -> int:
    return max(1, -(-int(COLD_BYTES) // int(size)))


def random_weight(name: str, k: int, n: int) -> FlatWeight:
    """Random codes; scales that keep outputs near one."""
    fmt, (blocks, tiles) = parse_format(name), tile_grid(n, k)
    codes = torch.randint(0, 256, (blocks, tiles, 128 * fmt.bits), dtype=torch.uint8)
    groups = -(-k // fmt.group_size) if fmt.group_size else 1
    scales = torch.rand(blocks, groups, TILE_ROWS) * 0.01
    kinds = {"float32": scales, "float16": scales.half(),
             "e8m0": torch.full(scales.shape, 120, dtype=torch.uint8)}  # fmt: skip
    formats = torch.randint(0, 2, (blocks, TILE_ROWS), dtype=torch.uint8)
    mixed = formats if fmt.is_mixed else None
    return codes, kinds[fmt.scale], fmt.table(), mixed, fmt.bits, fmt.group_size, k


def check(backend: CpuBackend, w: FlatWeight, k: int, n: int, is_int8: bool) -> None:
    """Validate, then time: one row and nine against the reference."""
    x = torch.randn(9, k).bfloat16()
    want = quant_reference.quant_linear(x.float(), *w, None, None, n, is_int8)
    for rows in (1, 9):
        got = cpu_quant_calls.quant_linear(backend.eager, x[:rows], *w, None, None, n, is_int8)
        error = (got.float() - want[:rows]).abs().max() / want.abs().max()
        assert error <= 2**-7, f"kernel differs from reference by {error:.1e}"


def clock(
    backend: CpuBackend, calls: list[Record], rows: int, k: int, counters: Counters | str
) -> Timing:
    """Replays of a tape that holds one call a copy of the weight."""
    x, tape = torch.randn(rows, k).bfloat16(), _cpu.Tape()
    sink = RecordingSink(backend.kernels, tape, {x.data_ptr(): 0})
    used = calls if rows < 64 else calls[: max(1, len(calls) // 8)]  # bound by arithmetic there
    for call in used:
        call(sink, x)
    counted = counters if isinstance(counters, Counters) and backend.kernels.threads == 1 else None
    before = counted.read() if counted else None
    seconds, end = [], time.perf_counter() + MAX_SECONDS
    while len(seconds) < REPEATS and (time.perf_counter() < end or len(seconds) < 3):
        started = time.perf_counter()
        backend.kernels.replay(tape, rows, rows, 1)
        seconds.append(time.perf_counter() - started)
    ipc = counted.read().since(before).ipc if counted and before else None
    return Timing(statistics.median(seconds) / len(used), ipc)


def line(
    shape: str,
    fmt: str,
    rows: int,
    threads: int,
    timing: Timing,
    base: float,
    size: float,
    flops: float,
    limits: Limits,
) -> dict[str, object]:
    seconds = timing.seconds
    gbs, gflops = size / seconds / 1e9, flops / seconds / 1e9
    share = max(gbs / limits.gbs, gflops / limits.gflops)
    print(f"{shape:18} {fmt:14} rows {rows:4} threads {threads} {seconds * 1e6:9.1f} us "
          f"{gbs:6.1f} GB/s {gflops:7.1f} GFLOP/s {share:6.1%} of the limit "
          f"{base / seconds:5.2f} x bf16"
          + (f" {timing.ipc:.2f} instructions a cycle" if timing.ipc else ""))  # fmt: skip
    return {"shape": shape, "format": fmt, "rows": rows, "threads": threads,
            "us": seconds * 1e6, "gbs": gbs, "gflops": gflops, "share": share,
            "speedup": base / seconds, "ipc": timing.ipc}  # fmt: skip


if __name__ == "__main__":
    main()
