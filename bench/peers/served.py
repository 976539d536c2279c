"""The server case: long and short prompts, closed loop, `sterna bench serve` as the client."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from peers.children import PeerError, PeerSpec, start, stop
from sterna.cli.bench_serve.words import TextSource, one_token_words
from sterna.text.tokenizer import load_tokenizer

LONG, SHORT, NEW_TOKENS = 1500, 50, 64
CONCURRENCY = 8
_READY_S = 180.0
# What is kept of the client's result.
KEYS = ("request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms",
        "median_itl_ms", "p99_itl_ms", "completed", "failed", "total_output_tokens")  # fmt: skip


def write_prompts(path: Path, model: Path, count: int, seed: int) -> None:
    """A prompt file: long and short prompts in turn, of exact token counts, no shared prefix."""
    source = TextSource(one_token_words(load_tokenizer(model)), seed)
    lengths = [LONG if index % 2 else SHORT for index in range(count)]
    rows = [
        {"prompt": source.text(length, index), "output_tokens": NEW_TOKENS}
        for index, length in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure_server(
    spec: PeerSpec, cores: list[int], prompts: Path, tokenizer: Path, count: int, seed: int
) -> dict[str, Any]:
    """Start the peer's server, load it, stop it; the client's figures and `ready_s`."""
    port = free_port()
    command = spec.server_command(port, len(cores))
    assert command is not None
    started = time.perf_counter()
    process = start(command, cores, f"{spec.name}-server.log", stdout=subprocess.DEVNULL)
    try:
        wait_ready(process, port, spec.name)
        ready_s = time.perf_counter() - started
        warm_up = prompts.with_name("warm-up.jsonl")
        write_prompts(warm_up, tokenizer, 2, seed=-1)  # other texts: no cache may know the load's
        _load(port, cores, warm_up, tokenizer, 2, seed)
        figures = _load(port, cores, prompts, tokenizer, count, seed)
    finally:
        stop(process)
    return {**{key: figures[key] for key in KEYS}, "ready_s": ready_s}


def _load(
    port: int, cores: list[int], prompts: Path, tokenizer: Path, count: int, seed: int
) -> dict[str, Any]:
    options = ["--port", port, "--dataset-name", "custom", "--dataset-path", prompts,
               "--num-prompts", count, "--max-concurrency", CONCURRENCY, "--ignore-eos",
               "--num-warmups", 0, "--seed", seed, "--tokenizer", tokenizer, "--json"]  # fmt: skip
    command = [sys.executable, "-m", "sterna.cli", "bench", "serve", *map(str, options)]
    client = start(command, cores, "client.log", stdout=subprocess.PIPE)
    out, _ = client.communicate()
    if client.returncode:
        raise PeerError("the load generator failed; see .peers/logs/client.log")
    return json.loads(out)


def wait_ready(process: subprocess.Popen[str], port: int, name: str) -> None:
    """Until /health answers 200. PeerError when the server ends or takes too long."""
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PeerError(f"{name}'s server ended; see .peers/logs/{name}-server.log")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    raise PeerError(f"{name}'s server was not ready after {_READY_S:.0f} s")


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
