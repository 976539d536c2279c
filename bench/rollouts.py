"""Rollouts of a hybrid engine: on the trainer's weights, on packed ones, with guesses.

    python bench/rollouts.py [--model default] [--groups 4,1x4] [--size 8] [--tokens 64]
        [--rounds 3] [--what plain,packed,speculation]

`plain` is `rollout.weights = "policy"`, no second copy of the weights; `packed` the copy of the
same bits, `speculation` plain with sibling drafts, after an epoch over the same prompts. Rounds are
interleaved, medians printed; equal tokens are asserted. `--groups 4,1x4` with `--size 8`: 4 groups
of 8 are 32 sequences, one of 4 are 4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sterna.align.hybrid import HybridEngine, Sampling
from sterna.align.rollout import Rollout
from sterna.core.machine import fingerprint
from sterna.engine.config import EngineConfig
from sterna.kernels.device import set_threads
from sterna.model.hub import resolve_model
from sterna.model.load import load_model
from sterna.text.chat import ChatRenderer
from sterna.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
ASKED = (
    "Write one sentence about the sea.",
    "List the numbers from one to twenty in words.",
    "Explain in a few words what a tern is.",
    "Give a short recipe for tea.",
)
console = Console()
# (groups, size, seed) -> rollouts, seconds, drafted and accepted tokens
Run = Callable[[int, int, int], tuple[list[Rollout], float, int, int]]


def main() -> None:
    """Run and print."""
    args = _arguments()
    set_threads(args.threads)
    kinds = args.what.split(",")
    runs = {kind: _contestant(kind, args) for kind in kinds}
    rows = []
    for setting in args.groups.split(","):
        groups, _, size = setting.partition("x")
        rows += _measure(runs, int(groups), int(size or args.size), args.rounds)
    table = Table("sequences", "what", "tokens/s", "against the first", "drafted", "accepted")
    for row in rows:
        table.add_row(*(str(row[key]) for key in row))
    console.print(fingerprint().line())
    console.print(table)
    name = f"rollouts-{datetime.now():%Y-%m-%dT%H%M%S}.json"
    data = {"machine": fingerprint().line(), "settings": vars(args), "rows": rows}
    (ROOT / "bench" / "results" / name).write_text(json.dumps(data, indent=1) + "\n")


def _contestant(kind: str, args: argparse.Namespace) -> Run:
    folder = resolve_model(args.model)
    tokenizer = load_tokenizer(folder)
    renderer = ChatRenderer(tokenizer)
    model = load_model(folder, args.dtype).decoder
    config = EngineConfig(
        token_budget=256, num_kv_blocks=512, dtype=args.dtype, threads=args.threads
    )
    weights = "packed" if kind == "packed" else "policy"
    hybrid = HybridEngine(model, tokenizer, config, weights, kind == "speculation")
    sampling = Sampling(max_tokens=args.tokens, temperature=args.temperature)

    def run(groups: int, size: int, seed: int) -> tuple[list[Rollout], float, int, int]:
        asked = [ASKED[i % len(ASKED)] for i in range(groups)]
        texts = [renderer.render([{"role": "user", "content": each}], None) for each in asked]
        prompts = [tokenizer.encode(text, False) for text in texts]
        hybrid.engine.pool.clear_cache()
        publishing = time.perf_counter()
        hybrid.publish()
        console.print(f"{kind}: published in {1e3 * (time.perf_counter() - publishing):.0f} ms")
        started = time.perf_counter()
        found = hybrid.generate(prompts, size, sampling, [seed + i for i in range(groups)])
        seconds = time.perf_counter() - started
        count = hybrid.drafts.take()
        return found, seconds, count.num_drafted, count.num_accepted

    return run


def _measure(runs: dict[str, Run], groups: int, size: int, rounds: int) -> list[dict[str, object]]:
    speeds: dict[str, list[float]] = {kind: [] for kind in runs}
    drafts = {kind: [0, 0] for kind in runs}
    for round_idx in range(-1, rounds):  # the first warms up: recorded steps, an earlier epoch
        texts = {}
        for kind, run in runs.items():
            found, seconds, drafted, accepted = run(groups, size, 100 * (round_idx + 1))
            texts[kind] = [rollout.completion.tolist() for rollout in found]
            console.print(f"{groups * size} sequences, {kind}: {seconds:.1f} s")
            if round_idx >= 0:
                speeds[kind].append(sum(map(len, texts[kind])) / seconds)
                drafts[kind][0] += drafted
                drafts[kind][1] += accepted
        assert all(text == texts[next(iter(runs))] for text in texts.values()), "other tokens"
    first = statistics.median(speeds[next(iter(runs))])
    return [
        {
            "sequences": groups * size,
            "what": kind,
            "speed": round(statistics.median(speeds[kind]), 1),
            "ratio": round(statistics.median(speeds[kind]) / first, 3),
            "drafted": drafts[kind][0],
            "accepted": drafts[kind][1],
        }
        for kind in runs
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--groups", default="4,1x4", help="groups, or groups x size")
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--what", default="plain,packed,speculation")
    return parser.parse_args()


if __name__ == "__main__":
    main()
