"""Signal to quantisation noise of a checkpoint's matrices, by format: no model code needed.

    python bench/quality/sqnr.py FILE.safetensors [--formats fp6,int6-g128] [--out bench/results]

For encoders that Sterna has no forward for yet: weights only, rounded to nearest with searched
scales. Per tensor and over all (noise and signal summed), in decibels; bits with padding.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from sterna.core.rundir import write_atomic
from sterna.quant.formats import WeightFormat, parse_format
from sterna.quant.rtn import quantize_weight

FORMATS = ("fp6", "fp6-e3m2", "fp6-mixed", "fp6-g128", "fp5", "int4", "int4-g32", "int5-g32",
           "int6-g128", "int8", "mxfp6")  # fmt: skip


def measure(tensors: dict[str, Tensor], fmt: WeightFormat) -> dict[str, Any]:
    """Decibels of every matrix and of all together, and bits a weight."""
    by_tensor, noise, signal, num_bytes = {}, 0.0, 0.0, 0
    for name, value in tensors.items():
        weight = quantize_weight(value, fmt, name=name)
        miss = float((weight.dequantize() - value).double().square().sum())
        power = float(value.double().square().sum())
        by_tensor[name] = 10 * math.log10(power / miss)
        noise, signal, num_bytes = noise + miss, signal + power, num_bytes + weight.nbytes
    count = sum(value.numel() for value in tensors.values())
    return {
        "bits_per_weight": 8 * num_bytes / count,
        "sqnr_db": 10 * math.log10(signal / noise),
        "worst": min(by_tensor.items(), key=lambda item: item[1]),
        "tensors": by_tensor,
    }


def main() -> int:
    """Measure one file and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    tensors = {name: value.float() for name, value in load_file(args.file).items()
               if value.dim() == 2 and min(value.shape) > 2}  # fmt: skip
    found = {}
    for name in track(args.formats.split(","), description="formats", transient=True):
        found[name] = measure(tensors, parse_format(name))
        row = found[name]
        print(f"{name:12s} {row['bits_per_weight']:.3f} bits  {row['sqnr_db']:.2f} dB  "
              f"worst {row['worst'][1]:.2f} dB {row['worst'][0]}")  # fmt: skip
    path = args.out / f"sqnr-{datetime.now(UTC):%Y-%m-%d}.json"
    write_atomic(path, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
