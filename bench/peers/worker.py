"""The loop inside each peer's process: one JSON request a line in, one JSON answer a line out.

Only the standard library, because it runs in every peer's own environment. A peer is an object
with `generate`; the cases are timed here, next to the engine, so no peer pays for the pipe:

    decode   T(prompt, n tokens) - T(prompt, 1 token): n - 1 tokens of pure decode
    prefill  T(prompt, 1 token)
    batch    the same two for B sequences; end to end is B * n tokens in T(n tokens)

A peer whose own benchmark programs are the fairest measure (llama.cpp) overrides `measure`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

PLAIN_IDS = range(1000, 16_000)  # no special tokens
MAX_CONTEXT = 4096
MAX_SEQUENCES = 32


class Peer:
    """What a peer's script provides."""

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Greedy, exactly `num_tokens` each, all prompts at once; returns the new ids."""
        raise NotImplementedError

    def measure(self, case: dict[str, int], draw: random.Random) -> dict[str, float]:
        """Tokens/s of one case: {"batch", "prompt", "tokens"}."""
        batch, length, count = case["batch"], case["prompt"], case["tokens"]
        first_s = self._time(batch, length, 1, draw)
        if count == 1:
            return {"prefill": batch * length / first_s}
        whole_s = self._time(batch, length, count, draw)
        return {
            "decode": batch * (count - 1) / max(whole_s - first_s, 1e-9),
            "end_to_end": batch * count / whole_s,
        }

    def _time(self, batch: int, length: int, count: int, draw: random.Random) -> float:
        # New random prompts each time, so that no prefix cache helps.
        prompts = [draw.choices(PLAIN_IDS, k=length) for _ in range(batch)]
        started = time.perf_counter()
        self.generate(prompts, count)
        return time.perf_counter() - started


def serve(load: Callable[[str, int], Peer]) -> None:
    """`SCRIPT MODEL THREADS [--first-token IDS]`: answer requests until the input ends."""
    model, threads = sys.argv[1], int(sys.argv[2])
    out = os.fdopen(os.dup(1), "w", buffering=1)  # libraries print to stdout; answers must not mix
    os.dup2(2, 1)
    started = time.perf_counter()
    peer = load(model, threads)
    if "--first-token" in sys.argv:
        ids = json.loads(sys.argv[sys.argv.index("--first-token") + 1])
        print(json.dumps(peer.generate([ids], 1)[0]), file=out)
        return
    print(json.dumps({"load_s": time.perf_counter() - started}), file=out)
    for line in sys.stdin:
        print(json.dumps(_answer(peer, json.loads(line))), file=out)


def _answer(peer: Peer, request: dict[str, Any]) -> Any:
    if request["do"] == "generate":
        return peer.generate(request["prompts"], request["tokens"])
    return peer.measure(request["case"], random.Random(request["seed"]))
