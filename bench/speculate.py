"""Speculation against plain decoding: five kinds of work, batch 1 and 8, one engine, in turn.

    python bench/speculate.py [--model M] [--weights bf16] [--batches 1,8] [--rounds 3]
        [--drafters suffix] [--questions mt_bench.jsonl] [--tokens 160] [--temperature 0]

Each round runs every task plain and speculating, right after one another, with empty prefix cache
and drafters that remember nothing from before. Outputs must be equal. Figures: tokens/s of
all the time, and of the steps without prompt tokens ("decode"); medians over rounds. With two
rounds or more it writes bench/results/speculate-DATE.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from speculate_prompts import all_tasks
from sterna.core.machine import fingerprint
from sterna.engine.build import build_engine
from sterna.engine.config import EngineConfig
from sterna.engine.drafters.choose import build_drafters
from sterna.engine.engine import Engine
from sterna.engine.request import DraftResult, EngineRequest, SamplingParams, StepStats
from sterna.engine.speculate import Speculator
from sterna.model.decoder import Decoder
from sterna.model.speculator_file import read_speculator_config
from sterna.text.chat import ChatRenderer

ROOT = Path(__file__).resolve().parents[1]
console = Console()
Outputs = dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over a task."""

    num_tokens: int
    seconds: float
    decode_tokens: int
    decode_s: float
    num_drafted: int
    num_accepted: int
    num_drafts: int
    num_steps: int
    by_source: dict[str, tuple[int, int, int]]  # drafts, their tokens, those accepted

    @property
    def speed(self) -> float:
        """Tokens a second, prompts' time included."""
        return self.num_tokens / self.seconds

    @property
    def decode_speed(self) -> float:
        """Tokens a second of steps without prompt tokens."""
        return self.decode_tokens / self.decode_s


def main() -> None:
    """Run and print."""
    args = _arguments()
    config = EngineConfig(
        weights=args.weights,
        speculation=args.drafters,
        draft_model=args.draft_model,
        speculator=args.speculator,
        num_draft_tokens=args.draft_tokens,
    )
    engine = build_engine(args.model, config)
    renderer = ChatRenderer(engine.tokenizer)
    tasks = {
        name: [engine.tokenizer.encode(renderer.render(c), False) for c in chats]
        for name, chats in all_tasks(args.questions).items()
        if name in args.tasks.split(",")
    }
    found: dict[tuple[str, int, bool], list[Run]] = {}
    for _ in range(args.rounds):
        for batch in map(int, args.batches.split(",")):
            for name, prompts in tasks.items():
                _compare(engine, args, prompts, batch, lambda on, run, n=name, b=batch: (
                    found.setdefault((n, b, on), []).append(run)
                ))  # fmt: skip
    rows = _rows(found)
    _show(rows)
    if args.rounds > 1:
        _write(rows, args)


def _compare(
    engine: Engine,
    args: argparse.Namespace,
    prompts: list[list[int]],
    batch: int,
    keep: Callable[[bool, Run], None],
) -> None:
    outputs = []
    for is_on in (False, True):
        speculator = engine.speculator
        assert speculator is not None, "built with drafters"
        decoder = engine.runner.decoder
        assert isinstance(decoder, Decoder), "loaded by build_engine"
        drafters = build_drafters(engine.config, engine.tokenizer, decoder, "bench")
        fresh = Speculator(drafters, engine.config, speculator.cost)
        speculator.drafters, speculator.trust = fresh.drafters, fresh.trust
        speculator.guard = fresh.guard
        engine.pool.clear_cache()
        run, texts = _run(engine, prompts, batch, args, is_on)
        outputs.append(texts)
        keep(is_on, run)
        console.print(
            f"{batch} at once, {'speculating' if is_on else 'plain'}: {run.speed:.0f} tok/s"
        )
    assert outputs[0] == outputs[1], "speculation changed the output"


def _run(
    engine: Engine, prompts: list[list[int]], batch: int, args: argparse.Namespace, is_on: bool
) -> tuple[Run, Outputs]:
    """`batch` requests at a time."""
    steps: list[StepStats] = []
    engine.on_step.append(steps.append)
    found: Outputs = {}
    gained: list[int] = []
    started = time.perf_counter()
    for first in range(0, len(prompts), batch):
        for i, prompt in enumerate(prompts[first : first + batch]):
            params = SamplingParams(
                temperature=args.temperature, max_tokens=args.tokens, speculation=is_on, seed=1
            )
            engine.add(
                EngineRequest(
                    request_id=str(first + i), prompt_token_ids=tuple(prompt), params=params
                )
            )
        while engine.has_work:
            outputs = engine.step()
            new = [(o.request_id, t) for o in outputs for d in o.deltas for t in d.token_ids]
            gained.append(len(new))
            for name, token in new:
                found.setdefault(name, []).append(token)
    seconds = time.perf_counter() - started
    engine.on_step.pop()
    decoding = [(s, n) for s, n in zip(steps, gained, strict=True) if not s.num_prompt_tokens]
    drafts = [draft for step in steps for draft in step.drafts]
    run = Run(
        num_tokens=sum(gained),
        seconds=seconds,
        decode_tokens=sum(n for _, n in decoding),
        decode_s=sum(s.duration for s, _ in decoding),
        num_drafted=sum(d.num_tokens for d in drafts),
        num_accepted=sum(d.num_accepted for d in drafts),
        num_drafts=len(drafts),
        num_steps=len(steps),
        by_source=_by_source(drafts),
    )
    return run, found


def _by_source(drafts: list[DraftResult]) -> dict[str, tuple[int, int, int]]:
    found: dict[str, tuple[int, int, int]] = {}
    for draft in drafts:
        num, tokens, accepted = found.get(draft.source, (0, 0, 0))
        counts = (num + 1, tokens + draft.num_tokens, accepted + draft.num_accepted)
        found[draft.source] = counts
    return found


def _rows(found: dict[tuple[str, int, bool], list[Run]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, batch, is_on in found:
        if not is_on:
            continue
        plain, spec = found[name, batch, False], found[name, batch, True]
        pairs = list(zip(plain, spec, strict=True))
        one = spec[0]
        rows.append({
            "task": name,
            "batch": batch,
            "plain": statistics.median(r.speed for r in plain),
            "speculating": statistics.median(r.speed for r in spec),
            "ratio": statistics.median(b.speed / a.speed for a, b in pairs),
            "decode_plain": statistics.median(r.decode_speed for r in plain),
            "decode_speculating": statistics.median(r.decode_speed for r in spec),
            "decode_ratio": statistics.median(b.decode_speed / a.decode_speed for a, b in pairs),
            "accepted_a_draft": one.num_accepted / max(one.num_drafts, 1),
            "accepted_share": one.num_accepted / max(one.num_drafted, 1),
            "accepted_of_output": one.num_accepted / one.num_tokens,
            "tokens_a_decode_step": one.num_tokens / one.num_steps,
            "by_source": one.by_source,
            "runs": [asdict(run) for run in (*plain, *spec)],
        })  # fmt: skip
    return rows


def _show(rows: list[dict[str, object]]) -> None:
    table = Table(title="tokens/s, plain against speculating")
    names = [name for name in rows[0] if name not in ("runs", "by_source")]
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_text(row[name]) for name in names))
    Console(width=180).print(table)


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _write(rows: list[dict[str, object]], args: argparse.Namespace) -> None:
    stamp = datetime.now().strftime("%Y-%m-%dT%H%M%S")
    path = ROOT / "bench" / "results" / f"speculate-{stamp}.json"
    settings = {k: str(v) for k, v in vars(args).items() if k != "questions"}
    settings["speculator"] = _kind_of(args.speculator)
    data = {"machine": fingerprint().line(), "settings": settings, "rows": rows}
    path.write_text(json.dumps(data, indent=1) + "\n")
    console.print(f"written: {path.relative_to(ROOT)}")


def _kind_of(folder: str | None) -> str:
    """What a speculator is, without where it lies."""
    if folder is None:
        return "none"
    config = read_speculator_config(Path(folder) / "config.json")
    return f"{config.cell}, {config.num_drafts} drafts, {config.num_outputs} draft tokens"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", default="edit,agent,rag,json,chat")
    parser.add_argument("--drafters", default="suffix")
    parser.add_argument("--draft-model", default=None)
    parser.add_argument("--speculator", default=None)
    parser.add_argument("--draft-tokens", type=int, default=32)
    parser.add_argument("--questions", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
