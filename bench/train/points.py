"""Runs memory_point.py: one step of a model in a process of its own, capped or measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE.parents[1] / ".peers"
OOM = 3
# Freed tensors go back to the system at once, on all sides alike: else the peak is malloc's.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}


def llama(
    hidden: int, layers: int, vocab: int, inner: int = 0, kv_heads: int = 0
) -> dict[str, Any]:
    """A Llama-shaped config: heads of 32, a quarter of them for keys."""
    heads = hidden // 32
    return {
        "hidden_size": hidden, "intermediate_size": inner or 4 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4), "vocab_size": vocab,
        "max_position_embeddings": 262_144, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "hidden_act": "silu",
    }  # fmt: skip


def measure(threads: int = 1, timeout: float = 600, **job: Any) -> dict[str, Any] | None:
    """The point's figures; None when its memory did not suffice. SystemExit when it failed."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"threads": threads, "system": "sterna", "folder": folder, "longseq": {}, **job}
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(values))
        is_own = values["system"] == "sterna"
        python = sys.executable if is_own else str(PEERS / "trl" / "bin" / "python")
        command = [python, str(HERE / "memory_point.py"), str(file)]
        env = {**os.environ, **MALLOC, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout,
                              check=False)  # fmt: skip
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    if done.returncode == OOM or "bad_alloc" in done.stderr or "MemoryError" in done.stderr:
        return None
    raise SystemExit(f"{job}: exit code {done.returncode}\n{done.stderr[-1500:]}")
