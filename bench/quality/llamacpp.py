"""Scores GGUF files with llama.cpp's own kernels, for study.py; runs in that peer's environment.

    LLAMA_CPP_LIB_PATH=BIN python bench/quality/llamacpp.py BASE WINDOWS.npz OUT.npz NAME=FILE ...

WINDOWS.npz: a token array [n, window] a domain. OUT.npz: for every NAME and domain an array
[4, n, scored positions]: nll of the base, nll, KL, agreement, by the definitions of
sterna.eval.quality, which this file must not import (no torch here).
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

Array = Any


def log_probs(model: Any, window: Array) -> Array:
    """float32 [window // 2, V]."""
    model.reset()
    model.eval(window.tolist())
    logits = model.scores[len(window) - len(window) // 2 : len(window)].astype(np.float32)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def rows(base: Array, other: Array, window: Array) -> list[Array]:
    """nll of the base, nll, KL and agreement of one window."""
    base, other, targets = base[:-1], other[:-1], window[-len(base) + 1 :, None]
    nll = [-np.take_along_axis(p, targets, axis=1)[:, 0] for p in (base, other)]
    kl = (np.exp(base) * (base - other)).sum(axis=1)
    agrees = base.argmax(axis=1) == other.argmax(axis=1)
    return [*nll, kl, agrees.astype(np.float32)]


def main() -> int:
    """Score every file against the base."""
    from llama_cpp import Llama

    base_file, windows_file, out, *entries = sys.argv[1:]
    domains = dict(np.load(windows_file))
    size = max(windows.shape[1] for windows in domains.values())

    def load(path: str) -> Any:
        threads = len(os.sched_getaffinity(0))
        return Llama(path, n_ctx=size, n_batch=size, n_ubatch=size, logits_all=True,
                     n_threads=threads, n_threads_batch=threads, verbose=False)  # fmt: skip

    base = load(base_file)
    known = {name: [log_probs(base, w) for w in ws] for name, ws in domains.items()}
    del base
    found = {}
    for entry in entries:
        name, _, path = entry.partition("=")
        model = load(path)
        for domain, windows in domains.items():
            scored = [rows(p, log_probs(model, w), w) for p, w in zip(known[domain], windows)]  # noqa: B905
            found[f"{name}/{domain}"] = np.stack(scored, axis=1)
        print(name, flush=True)
    np.savez(out, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
