"""llama.cpp, BF16 GGUF: timed by its own programs, checked through its Python bindings.

`llama-batched-bench` gives decode and batches (with its own split into prompt and decode time) and
`llama-bench` prefill. Both load the model anew, which their figures leave out.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

from worker import MAX_CONTEXT, Peer, serve

BIN = Path(__file__).resolve().parents[2] / ".peers" / "llamacpp" / "build" / "bin"
os.environ["LLAMA_CPP_LIB_PATH"] = str(BIN)


class LlamaCppPeer(Peer):
    """The bindings for text, the programs for time."""

    def __init__(self, model: str, threads: int) -> None:
        self._model = model
        self._threads = threads

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """See Peer; one prompt after the other, since this is not what is timed."""
        from itertools import islice

        from llama_cpp import Llama

        llama = Llama(
            self._model,
            n_ctx=MAX_CONTEXT,
            n_threads=self._threads,
            n_threads_batch=self._threads,
            verbose=False,
        )
        return [list(islice(llama.generate(ids, temp=0.0), num_tokens)) for ids in prompts]

    def measure(self, case: dict[str, int], draw: random.Random) -> dict[str, float]:
        """See Peer."""
        if case["tokens"] == 1:
            return {"prefill": self._prefill(case["prompt"])}
        batch, length, count = case["batch"], case["prompt"], case["tokens"]
        row = self._run(
            "llama-batched-bench", "-c", str(batch * (length + count)), "-npp", str(length),
            "-ntg", str(count), "-npl", str(batch), "--output-format", "jsonl",
        )  # fmt: skip
        return {"decode": row["speed_tg"], "end_to_end": batch * count / row["t"]}

    def _prefill(self, length: int) -> float:
        row = self._run("llama-bench", "-p", str(length), "-n", "0", "-r", "1", "-o", "jsonl")
        return float(row["avg_ts"])

    def _run(self, program: str, *options: str) -> dict[str, float]:
        command = [str(BIN / program), "-m", self._model, "-t", str(self._threads), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return json.loads(rows[-1])


if __name__ == "__main__":
    serve(LlamaCppPeer)
