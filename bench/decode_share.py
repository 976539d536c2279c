"""Python's share of a decode step: the whole step against the one native call inside it.

    python bench/decode_share.py [--batches 1,2,4,8,32] [--weights fp6] [--rounds 3] [--json FILE]

A decode step is schedule, fill the input buffers, replay the recorded forward (one native call),
sample, commit. All but the replay counts as Python here, also numpy's work on the logits. The goal
is at most 5 % at one stream, where the native call is shortest.

Batch sizes take turns in rounds. The speed of a step against one of the first size is taken within
a round: the bandwidth of a shared machine drifts between rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sterna.core.machine import fingerprint, num_usable_cpus
from sterna.engine.build import build_engine
from sterna.engine.config import EngineConfig
from sterna.engine.engine import Engine
from sterna.engine.request import EngineRequest, SamplingParams

PROMPT_TOKENS = 64
NUM_STEPS = 128
PLAIN_IDS = range(1000, 16_000)
GOAL = 0.05


@dataclass(frozen=True, slots=True)
class Share:
    """Medians over the decode steps of one batch size, microseconds."""

    batch: int
    step_us: float
    native_us: float

    @property
    def python_share(self) -> float:
        """0..1."""
        return 1 - self.native_us / self.step_us


class ClockedForward:
    """The engine's recorded forward with a clock around each call."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward
        self.seconds = 0.0

    def __call__(self, *counts: int) -> Any:
        started = time.perf_counter()
        logits = self._forward(*counts)
        self.seconds = time.perf_counter() - started
        return logits


def measure(engine: Engine, batch: int) -> Share:
    """Decode `batch` streams for NUM_STEPS steps; prefill steps are left out."""
    forward = engine.runner.captured
    assert forward is not None, "the forward is not recorded here: no C++ kernels"
    clock = ClockedForward(forward)
    engine.runner.captured = clock
    try:
        pairs = _decode_steps(engine, batch, clock)
    finally:
        engine.runner.captured = forward
    # The ratio of medians would mix steps; each step is split first.
    step_s = median(step for step, _ in pairs)
    rest_s = median(step - native for step, native in pairs)
    return Share(batch, step_s * 1e6, (step_s - rest_s) * 1e6)


def _decode_steps(engine: Engine, batch: int, clock: ClockedForward) -> list[tuple[float, float]]:
    draw = random.Random(batch)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_STEPS, ignore_eos=True)
    for index in range(batch):
        ids = tuple(draw.choices(PLAIN_IDS, k=PROMPT_TOKENS))
        request = EngineRequest(
            request_id=f"share-{batch}-{index}", prompt_token_ids=ids, params=params
        )
        engine.add(request)
    pairs = []
    while engine.has_work:
        started = time.perf_counter()
        outputs = engine.step()
        taken = time.perf_counter() - started
        # A pure decode step gives every stream one token and computes nothing else.
        if len(outputs) == batch and not any(output.is_finished for output in outputs):
            pairs.append((taken, clock.seconds))
    return pairs[1:]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line a batch size; 1 when the goal is missed at the first one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--threads", type=int, default=num_usable_cpus())
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    config = EngineConfig(threads=args.threads, max_model_len=1024, weights=args.weights)
    engine = build_engine("", config)
    print(fingerprint().line())
    batches = [int(batch) for batch in args.batches.split(",")]
    rounds = [[measure(engine, batch) for batch in batches] for _ in range(args.rounds)]
    shares, rows = [], []
    for i, batch in enumerate(batches):
        steps, natives = [r[i].step_us for r in rounds], [r[i].native_us for r in rounds]
        share = Share(batch, median(steps), median(natives))
        speed = median(r[0].step_us / r[i].step_us for r in rounds)
        print(
            f"{share.batch:3d} streams: step {share.step_us:8.0f} us, native "
            f"{share.native_us:8.0f} us, Python {share.python_share:6.1%}, "
            f"{speed:.2f} of the step speed of {batches[0]}, "
            f"{1e6 * batch / share.step_us:,.0f} tok/s"
        )
        shares.append(share)
        rows.append({**asdict(share), "python_share": share.python_share, "step_speed": speed})
    if args.json:
        result = {"machine": fingerprint().as_dict(), "threads": args.threads, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if shares[0].python_share <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
