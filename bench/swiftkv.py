"""A SwiftKV model against the plain one it was made of, in turn in one process.

    python bench/swiftkv.py [MODEL] [--student FOLDER] [--layers K] [--group-size N] [--rounds 5]
        [--threads 1 --clock cpu]

Without --student the weights are what distillation starts from: speed does not depend on them,
but the text is no good. Cases: prefill of 512 and of 2,048 tokens (the seconds to one token are the
time to first token), decoding of 1 and of 8 streams, and the throughput of requests of 2,000 prompt
and 250 new tokens, all there at once. Before any clock starts the engine's log-probs are compared
with those of the training form. Writes bench/results/swiftkv-DATE.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sterna.cli.bench_offline import OfflineBench, OfflineRun
from sterna.core.machine import fingerprint
from sterna.core.rundir import write_atomic
from sterna.engine.config import EngineConfig
from sterna.engine.llm import LLM
from sterna.engine.request import SamplingParams
from sterna.model.batch import Batch
from sterna.model.hub import resolve_model
from sterna.model.load import load_model
from sterna.model.save import save_model
from sterna.model.swiftkv_config import SwiftKVConfig
from sterna.quant.load import load_quantized
from sterna.quant.sources import small_files
from sterna.train.distill.swiftkv import SwiftKVPair

ROOT = Path(__file__).resolve().parents[1]
LOAD = (0, 2000, 250)  # 0: --load sequences
Read = Callable[[OfflineRun], float]
# (sequences, prompt tokens, new tokens) -> what is read of the run
CASES: dict[tuple[int, int, int], dict[str, Read]] = {
    (1, 512, 1): {"prefill 512 tokens/s": lambda run: run.prefill_rate},
    (1, 2048, 1): {
        "prefill 2048 tokens/s": lambda run: run.prefill_rate,
        "TTFT at 2048 ms": lambda run: 1e3 * run.first_token_s,
    },
    (1, 128, 160): {"decode 1 stream tokens/s": lambda run: run.decode_rate},
    (8, 128, 64): {"decode 8 streams tokens/s": lambda run: run.decode_rate},
    LOAD: {"2000/250 tokens/s": lambda run: run.output_rate * 2250 / 250},
}
# cpu: processor seconds of this process, which a machine shared with others leaves alone; they
# are the wall's with --threads 1.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
TARGETS = {
    "prefill 512 tokens/s": 1.7,
    "prefill 2048 tokens/s": 1.7,
    "TTFT at 2048 ms": 0.6,
    "decode 1 stream tokens/s": 0.98,
    "decode 8 streams tokens/s": 0.98,
    "2000/250 tokens/s": 1.4,
}


def make_folders(model: str, swift: SwiftKVConfig | None, into: Path) -> tuple[Path, Path]:
    """The model in bfloat16 and its SwiftKV form with the weights that distillation starts from."""
    path = resolve_model(model)
    teacher = load_quantized(path, "bfloat16", weights="bf16").decoder
    swift = swift or SwiftKVConfig(teacher.config.num_hidden_layers // 2)
    folders = into / "plain", into / "swiftkv"
    save_model(teacher, folders[0])
    save_model(SwiftKVPair(teacher, swift).student, folders[1])
    for folder in folders:
        for name, text in small_files(path).items():
            write_atomic(folder / name, text)
    return folders


def check(folder: Path, config: EngineConfig) -> None:
    """The engine says what the training form says, to the bit, cut into chunks or not."""
    prompt = [(7919 * i) % 15_000 + 300 for i in range(700)]
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    with LLM(str(folder), **config.model_dump()) as llm:
        entries = llm.generate([prompt], params, progress=False)[0].samples[0].logprobs
    tokens = torch.tensor([*prompt, *(entry.token_id for entry in entries)]).int()
    ends = torch.tensor([0, len(tokens)]).int()
    decoder = load_model(folder).decoder
    with torch.inference_mode():
        rows = torch.arange(len(prompt) - 1, len(tokens) - 1).int()
        batch = Batch(tokens, torch.arange(len(tokens)).int(), ends, ends[1:], rows)
        wanted = (
            decoder(batch).double().log_softmax(-1).gather(1, tokens[len(prompt) :, None].long())
        )
    found = torch.tensor([entry.logprob for entry in entries], dtype=torch.float64)
    assert (found - wanted[:, 0]).abs().max() < 1e-6, "the engine and the training form differ"


def measure(
    benches: dict[str, OfflineBench], rounds: int, load: int
) -> dict[str, dict[str, list[float]]]:
    """{case: {model: value of every round}}, the models in turn; first a round to warm up."""
    values = {case: {name: [] for name in benches} for reads in CASES.values() for case in reads}
    for round_idx in range(rounds + 1):
        for run, reads in CASES.items():
            if run == LOAD and not round_idx:
                continue
            count, *lengths = run
            for name, bench in benches.items():
                done = bench.run(count or load, *lengths)
                for case, read in reads.items() if round_idx else ():
                    values[case][name].append(read(done))
                    print(f"{case} {name}: {read(done):.1f}", flush=True)
    return values


def table(values: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Medians, and the median of the rounds' ratios."""
    rows = []
    for case, by_model in values.items():
        plain, swift = by_model["plain"], by_model["swiftkv"]
        ratio = median(b / a for a, b in zip(plain, swift, strict=True))
        target = TARGETS[case]
        is_met = ratio <= target if "TTFT" in case else ratio >= target
        row = {"case": case, "plain": median(plain), "swiftkv": median(swift), "ratio": ratio}
        rows.append({**row, "target": target, "is_met": is_met, "rounds": by_model})
        print(f"{case:<28}{median(plain):>10.1f}{median(swift):>10.1f}{ratio:>8.2f}x  "
              f"({'met' if is_met else 'MISSED'}: {target})")  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--student", type=Path)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--group-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load", type=int, default=16, help="requests of the 2000/250 case")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = EngineConfig(threads=args.threads, weights=args.weights)
    with tempfile.TemporaryDirectory() as folder:
        swift = SwiftKVConfig(args.layers, args.group_size) if args.layers else None
        plain, student = make_folders(args.model, swift, Path(folder))
        student = args.student or student
        if args.weights == "auto":
            check(student, config)
        benches = {name: OfflineBench(str(path), config, CLOCKS[args.clock])
                   for name, path in (("plain", plain), ("swiftkv", student))}  # fmt: skip
        rows = table(measure(benches, args.rounds, args.load))
    report = {
        "machine": fingerprint().as_dict(),
        "student": "distilled" if args.student else "not distilled (speed only)",
        "layers": args.layers or "half",
        "group_size": args.group_size,
        "weights": args.weights,
        "requests": args.load,
        "threads": args.threads,
        "clock": args.clock,
        "rows": rows,
    }
    stamp = datetime.now().strftime("%Y-%m-%d")
    out = args.out or ROOT / "bench" / "results" / f"swiftkv-{stamp}.json"
    write_atomic(out, json.dumps(report, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
