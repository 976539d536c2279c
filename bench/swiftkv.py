"""A SwiftKV model against the plain one it was made of, step by step in turn in one process.

    python bench/swiftkv.py [MODEL] [--student FOLDER] [--layers K] [--group-size N] [--rounds 5]
        [--threads 1 --clock cpu] [--cases 512,2048 --folder MODELS --out FILE]

Without --student the weights are what distillation starts from: speed does not depend on them,
but the text is no good. Cases: prefill of 512 and of 2,048 tokens (the seconds to one token are the
time to first token), decoding of 1 and of 8 streams, and the throughput of requests of 2,000 prompt
and 250 new tokens, all there at once. Before any clock starts the engine's log-probs are compared
with those of the training form. Writes bench/results/swiftkv-DATE.json; a second call that names
the same --out adds its rounds, so that a long measurement can be taken in pieces.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sterna.core.machine import fingerprint
from sterna.core.rundir import write_atomic
from sterna.engine.build import build_engine
from sterna.engine.config import EngineConfig
from sterna.engine.engine import Engine
from sterna.engine.llm import LLM
from sterna.engine.request import EngineRequest, SamplingParams
from sterna.model.batch import Batch
from sterna.model.hub import resolve_model
from sterna.model.load import load_model
from sterna.model.save import save_model
from sterna.model.swiftkv_config import SwiftKVConfig
from sterna.quant.load import load_quantized
from sterna.quant.sources import small_files
from sterna.train.distill.swiftkv import SwiftKVPair

ROOT = Path(__file__).resolve().parents[1]


class Run:
    """Random prompts through one engine, greedy; `seconds` counts its own steps alone."""

    def __init__(
        self, engine: Engine, sizes: tuple[int, int, int], clock: Callable[[], float]
    ) -> None:
        self._engine, self._clock, self._sizes = engine, clock, sizes
        count, input_len, output_len = sizes
        self.seconds = self.first_token_s = 0.0
        self._decoded = 0  # tokens after every sequence had its first
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        self._waiting = {f"{id(self)}-{i}" for i in range(count)}
        for name in self._waiting:
            ids = tuple(random.choices(range(300, 16_000), k=input_len))
            engine.add(EngineRequest(request_id=name, prompt_token_ids=ids, params=params))

    def step(self) -> bool:
        """One step of the engine; False when there is nothing left to do."""
        if not self._engine.has_work:
            return False
        is_prefilling, started = bool(self._waiting), self._clock()
        outputs = self._engine.step()
        self.seconds += self._clock() - started
        for output in outputs:
            gained = sum(len(delta.token_ids) for delta in output.deltas)
            if gained:
                self._waiting.discard(output.request_id)
            self._decoded += 0 if is_prefilling else gained
        if is_prefilling:
            self.first_token_s = self.seconds
        return True

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens/s until the last first token."""
        count, input_len, _ = self._sizes
        return count * input_len / self.first_token_s

    @property
    def decode_rate(self) -> float:
        """New tokens/s after that."""
        return self._decoded / (self.seconds - self.first_token_s)

    @property
    def total_rate(self) -> float:
        """Prompt and new tokens/s from beginning to end."""
        count, input_len, output_len = self._sizes
        return count * (input_len + output_len) / self.seconds


LOAD = (0, 2000, 250)  # 0: --load sequences
# (sequences, prompt tokens, new tokens) -> what is read of the run
CASES: dict[tuple[int, int, int], dict[str, Callable[[Run], float]]] = {
    (1, 512, 1): {"prefill 512 tokens/s": lambda run: run.prefill_rate},
    (1, 2048, 1): {
        "prefill 2048 tokens/s": lambda run: run.prefill_rate,
        "TTFT at 2048 ms": lambda run: 1e3 * run.first_token_s,
    },
    (1, 128, 160): {"decode 1 stream tokens/s": lambda run: run.decode_rate},
    (8, 128, 64): {"decode 8 streams tokens/s": lambda run: run.decode_rate},
    LOAD: {"2000/250 tokens/s": lambda run: run.total_rate},
}
NAMES = {"512": (1, 512, 1), "2048": (1, 2048, 1), "decode": (1, 128, 160),
         "batch": (8, 128, 64), "load": LOAD}  # fmt: skip
Values = dict[str, dict[str, list[float]]]  # {case: {model: value of every round}}
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
    folders = into / "plain", into / "swiftkv"
    if all(folder.exists() for folder in folders):
        return folders
    path = resolve_model(model)
    teacher = load_quantized(path, "bfloat16", weights="bf16").decoder
    swift = swift or SwiftKVConfig(teacher.config.num_hidden_layers // 2)
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
    engines: dict[str, Engine],
    cases: list[tuple[int, int, int]],
    args: argparse.Namespace,
    values: Values,
) -> None:
    """Adds the rounds' figures to `values`; first a round to warm up."""
    for round_idx in range(args.rounds + 1):
        for sizes in cases:
            if sizes == LOAD and not round_idx:
                continue
            whole = (sizes[0] or args.load, *sizes[1:])
            clock = CLOCKS[args.clock]
            runs = {name: Run(engine, whole, clock) for name, engine in engines.items()}
            while sum(run.step() for run in runs.values()):  # a sum: every engine takes its turn
                pass
            for case, read in CASES[sizes].items() if round_idx else ():
                found = {name: read(run) for name, run in runs.items()}
                print(case, {name: round(value, 1) for name, value in found.items()}, flush=True)
                for name, value in found.items():
                    values.setdefault(case, {}).setdefault(name, []).append(value)


def table(values: Values) -> list[dict[str, Any]]:
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


def earlier(out: Path, settings: dict[str, Any]) -> Values:
    """The rounds that `out` holds already. ValueError when they were taken with other settings."""
    if not out.exists():
        return {}
    report = json.loads(out.read_text())
    for name, value in settings.items():
        if report[name] != value:
            raise ValueError(f"{out} was measured with {name} {report[name]!r}, not {value!r}")
    return {row["case"]: row["rounds"] for row in report["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--student", type=Path)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--group-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load", type=int, default=16, help="requests of the 2000/250 case")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--kv-cache", default="auto", help="its dtype, both models'")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--token-budget", type=int, default=256, help="0: each measures its own")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--cases", default=",".join(NAMES))
    parser.add_argument("--folder", type=Path, help="where both models are made, and kept")
    parser.add_argument("--skip-check", action="store_true", help="of a piece after the first")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = {
        "student": "distilled" if args.student else "not distilled (speed only)",
        "layers": args.layers or "half",
        "group_size": args.group_size,
        "weights": args.weights,
        "kv_cache": args.kv_cache,
        "requests": args.load,
        "threads": args.threads,
        "clock": args.clock,
        "token_budget": args.token_budget or "measured",
    }
    stamp = datetime.now().strftime("%Y-%m-%d")
    out = args.out or ROOT / "bench" / "results" / f"swiftkv-{stamp}.json"
    values = earlier(out, settings)
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder), values)
    report = {"machine": fingerprint().as_dict(), **settings, "rows": table(values)}
    write_atomic(out, json.dumps(report, indent=1) + "\n")
    print(out)


def run(args: argparse.Namespace, folder: Path, values: Values) -> None:
    """Make both models, compare the student with its training form, measure."""
    config = EngineConfig(
        threads=args.threads,
        weights=args.weights,
        kv_cache_dtype=args.kv_cache,
        token_budget=args.token_budget or None,
    )
    swift = SwiftKVConfig(args.layers, args.group_size) if args.layers else None
    plain, student = make_folders(args.model, swift, args.folder or folder)
    student = args.student or student
    if args.weights == args.kv_cache == "auto" and not args.skip_check:
        check(student, config)
    paths = {"plain": plain, "swiftkv": student}
    engines = {name: build_engine(str(path), config) for name, path in paths.items()}
    measure(engines, [NAMES[name] for name in args.cases.split(",")], args, values)


if __name__ == "__main__":
    main()
