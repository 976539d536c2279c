"""The whole correctness matrix of tests/parity/test_training.py, its errors stored as a table.

python bench/train/parity.py [--dtype float64]   writes bench/results/parity-DATE.{json,md}
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import platform
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from sterna.core.rundir import write_atomic
from sterna.parallel.launch import LocalRanks
from sterna.train.trial import Trial, compare, run_trial
from sterna.train.trialmodel import TrialModel

ROOT = Path(__file__).parents[2]


def load_matrix() -> Any:
    """The test module, which owns the axes."""
    path = ROOT / "tests" / "parity" / "test_training.py"
    spec = importlib.util.spec_from_file_location("matrix", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_matrix(matrix: Any, dtypes: list[str]) -> list[dict[str, Any]]:
    """One record a case, its reference computed once."""
    references: dict[str, Any] = {}
    records = []
    cases = list(itertools.product(dtypes, [False, True], matrix.ALL))
    with LocalRanks() as ranks:
        for dtype, tied, (mesh, rows, heads) in track(cases, "cases"):
            model = TrialModel(matrix.config(heads, tied))
            plain = Trial(matrix.ROWS[rows], model, dtype=dtype)
            if repr(plain) not in references:
                references[repr(plain)] = run_trial(plain)
            world, parallel = matrix.MESHES[mesh]
            result = ranks.run(world, matrix.RUN, replace(plain, parallel=parallel))[0]
            errors = compare(references[repr(plain)], result)
            key = {"mesh": mesh, "rows": rows, "heads": heads, "tied": tied, "dtype": dtype}
            records.append({**key, **asdict(errors), "limit": matrix.LIMITS[dtype]})
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Worst errors by mesh and dtype."""
    lines = [
        "| mesh | dtype | cases | loss | eval | gradients | weights | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((r["mesh"], r["dtype"]) for r in records)
    for mesh, dtype in keys:
        chosen = [r for r in records if (r["mesh"], r["dtype"]) == (mesh, dtype)]
        worst = [max(r[k] for r in chosen) for k in ("loss", "eval_loss", "grad", "weight")]
        values = " | ".join(f"{w:.1e}" for w in worst)
        lines.append(f"| {mesh} | {dtype} | {len(chosen)} | {values} | {chosen[0]['limit']:.0e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", action="append", choices=["float64", "float32"])
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    matrix, started = load_matrix(), time.time()
    records = run_matrix(matrix, options.dtype or ["float64", "float32"])
    name = f"parity-{datetime.now(UTC):%Y-%m-%dT%H%M%S}"
    meta = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    content = {**meta, "seconds": round(time.time() - started), "cases": records}
    write_atomic(options.output / f"{name}.json", json.dumps(content, indent=1) + "\n")
    write_atomic(options.output / f"{name}.md", table(records))
    failed = [r for r in records if max(r[k] for k in ("loss", "grad", "weight")) > r["limit"]]
    print(table(records), f"{len(records)} cases, {len(failed)} over their limit", sep="\n")


if __name__ == "__main__":
    main()
