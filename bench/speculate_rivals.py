"""llama.cpp's and vLLM's own n-gram lookup on the prompts of bench/speculate.py.

Both run on all cores, greedy, to the end of the answer, without prefix cache, plain and with
lookup.
llama.cpp: its server on Q6_K (Sterna's default is FP6), `ngram-cache` (its lookup decoding, drafts
of 8) and `ngram-simple` (matches of 3 and drafts of 16 instead of its 12 and 48, for short texts).
vLLM: bfloat16, `ngram` (matches of 1 to 4, drafts of 8), its engine in a process of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from peers.children import PeerError, PeerSpec, RunningPeer, start, stop
from peers.served import free_port, wait_ready
from peers.weights import LLAMA_BIN, gguf_file

Prompts = list[list[int]]
LLAMA_MODES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "ngram-cache": ("--spec-type", "ngram-cache", "--spec-draft-n-max", "8"),
    "ngram-simple": ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "3",
                     "--spec-ngram-simple-size-m", "16"),
}  # fmt: skip
VLLM_MODES = ("plain", "ngram")


def rival_rows(
    rival: str, task: str, prompts: Prompts, batch: int, num_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """One row a mode: tokens/s of all the time, and of decoding where the rival tells."""
    modes = LLAMA_MODES if rival == "llamacpp" else VLLM_MODES
    run = _llama if rival == "llamacpp" else _vllm
    found = {mode: run(mode, prompts, batch, num_tokens, rounds) for mode in modes}
    return [
        {
            "task": task,
            "batch": batch,
            "variant": f"{rival} {mode}",
            "speed": statistics.median(r["speed"] for r in runs),
            "ratio": statistics.median(r["speed"] for r in runs)
            / statistics.median(r["speed"] for r in found["plain"]),
            **_decode(runs, found["plain"]),
            "runs": runs,
        }
        for mode, runs in found.items()
    ]


def _decode(runs: list[dict[str, float]], plain: list[dict[str, float]]) -> dict[str, float]:
    if "decode_speed" not in runs[0]:
        return {}
    speed, base = (statistics.median(r["decode_speed"] for r in x) for x in (runs, plain))
    return {"decode_speed": speed, "decode_ratio": speed / base}


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def _llama(
    mode: str, prompts: Prompts, batch: int, num_tokens: int, rounds: int
) -> list[dict[str, float]]:
    port, cores = free_port(), _cores()
    command = [str(LLAMA_BIN / "llama-server"), "-m", str(gguf_file("q6_k")), "--host", "127.0.0.1",
               "--port", str(port), "-t", str(len(cores)), "-np", str(batch), "-c",
               str(2048 * batch), "--cache-ram", "0", *LLAMA_MODES[mode]]  # fmt: skip
    process = start(command, cores, f"llamacpp-{mode}.log", stdout=subprocess.DEVNULL)
    try:
        wait_ready(process, port, f"llamacpp {mode}")
        _pass(lambda ids: _complete(port, ids, 8), prompts[:1], batch)
        return [
            _pass(lambda ids: _complete(port, ids, num_tokens), prompts, batch)
            for _ in range(rounds)
        ]
    finally:
        stop(process)


def _complete(port: int, ids: list[int], num_tokens: int) -> tuple[int, float]:
    """Tokens, and milliseconds that the server says it decoded."""
    body = {"prompt": ids, "n_predict": num_tokens, "temperature": 0, "cache_prompt": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        timings = json.load(reply)["timings"]
    return int(timings["predicted_n"]), float(timings["predicted_ms"])


def _pass(
    complete: Callable[[list[int]], tuple[int, float]], prompts: Prompts, batch: int
) -> dict[str, float]:
    begun = time.perf_counter()
    with ThreadPoolExecutor(batch) as pool:
        done = [
            result
            for first in range(0, len(prompts), batch)
            for result in pool.map(complete, prompts[first : first + batch])
        ]
    seconds = time.perf_counter() - begun
    count = sum(tokens for tokens, _ in done)
    found = {"num_tokens": float(count), "speed": count / seconds}
    if batch == 1:
        found["decode_speed"] = 1e3 * (count - len(done)) / sum(ms for _, ms in done)
    return found


def _vllm(
    mode: str, prompts: Prompts, batch: int, num_tokens: int, rounds: int
) -> list[dict[str, float]]:
    name = "vllm-lookup" if mode == "ngram" else "vllm-eos"
    peer = RunningPeer(PeerSpec(name, "vllm"), _cores())
    try:
        found = []
        for i in range(rounds + 1):
            begun, count = time.perf_counter(), 0
            for first in range(0, len(prompts), batch):
                part = prompts[first : first + batch]
                answer = peer.ask({"do": "generate", "prompts": part, "tokens": num_tokens})
                count += sum(map(len, answer))
            if i:  # the first pass compiles
                seconds = time.perf_counter() - begun
                found.append({"num_tokens": float(count), "speed": count / seconds})
        return found
    except PeerError as error:
        raise PeerError(f"vLLM, {mode}: {error}") from error
    finally:
        peer.close()
