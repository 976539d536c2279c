"""Speculation against plain decoding: six kinds of work, batch 1 and 8, one engine, in turn.

    python bench/speculate.py [--variants suffix,suffix+mlp] [--speculator FOLDER ...]
        [--tasks edit,agent,loop,rag,json,chat] [--batches 1,8] [--rounds 3] [--weights bf16]
        [--questions mt_bench.jsonl] [--tokens 160] [--rivals llamacpp,vllm]
        [--into bench/results/FILE.json]

Each round runs a task plain and in every variant, right after one another, with empty prefix cache
and drafters that remember nothing from before. Outputs must be equal. Figures are medians over the
rounds; ratios are to the plain run of the same round. `--rivals` (speculate_rivals.py) answer the
same prompts; `--variants ""` runs them alone. `--into` adds each task as it is done to a stored
result of the same machine and settings.

`agent` is the last turn of a scripted loop and nothing cached; `loop` is the whole loop with the
model's own answers, each turn finding those before it in the prefix cache, plain and speculating.
"bound" is what the ratio would be if decoding took no time: the prompts' share is left.

Shares are of the time of decode steps: "drafting" is spent in drafters, "verifying" is what
steps took beyond as many plain steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from speculate_prompts import all_tasks
from speculate_rivals import rival_rows
from speculate_run import PLAIN, Chat, Run, Variants
from sterna.core.machine import fingerprint
from sterna.engine.build import build_engine
from sterna.engine.config import EngineConfig
from sterna.model.speculator_file import read_speculator_config
from sterna.text.chat import ChatRenderer

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("task", "batch", "variant", "speed", "ratio", "decode_speed", "decode_ratio", "worst",
           "bound",
           "tokens_a_step", "accepted_a_draft", "accepted_share", "drafting_share",
           "verifying_share")  # fmt: skip
console = Console(width=170)


def main() -> None:
    """Run, print, store."""
    args = _arguments()
    speculators = {_cell_of(folder): folder for folder in args.speculator}
    config = EngineConfig(
        weights=args.weights,
        speculation="suffix",
        num_draft_tokens=args.draft_tokens,
        threads=args.threads,
    )
    engine = build_engine(args.model, config)
    renderer = ChatRenderer(engine.tokenizer)
    variants = Variants(engine, speculators)
    rows: list[dict[str, Any]] = []
    for name in args.tasks.split(","):
        chats = all_tasks(args.questions)[name]
        prompts = [engine.tokenizer.encode(renderer.render(chat), False) for chat in chats]
        for batch in map(int, args.batches.split(",")):
            new = _compare(variants, args, name, chats, batch) if args.variants else []
            for rival in filter(None, args.rivals.split(",")):
                assert name != "loop", "rivals answer one turn"
                new += rival_rows(rival, name, prompts, batch, args.tokens, args.rounds)
            rows += new
            if args.into:
                _store(new, args, engine.speculator.cost.line() if engine.speculator else "")
    engine.close()
    _show(rows)


def _compare(
    variants: Variants, args: argparse.Namespace, task: str, chats: list[Chat], batch: int
) -> list[dict[str, Any]]:
    names = [PLAIN, *args.variants.split(",")]
    found: dict[str, list[Run]] = {name: [] for name in names}
    want = None
    for i in range(args.rounds):
        for name in [PLAIN, *(names[1:] if i % 2 else names[:0:-1])]:
            variants.use(name)
            run, outputs = variants.run(chats, batch, args.tokens, args.temperature)
            want = want or outputs
            assert outputs == want, f"{name} changed the output of {task}"
            found[name].append(run)
    return [_row(task, batch, name, found[PLAIN], runs) for name, runs in found.items()]


def _row(task: str, batch: int, name: str, plain: list[Run], runs: list[Run]) -> dict[str, Any]:
    pairs = list(zip(plain, runs, strict=True))
    one = runs[0]
    plain_step_s = statistics.median(r.decode_s / r.num_decode_steps for r in plain)
    decode_s = statistics.median(r.decode_s for r in runs)
    drafting_s = statistics.median(r.drafting_s for r in runs)
    ratios = [b.decode_speed / a.decode_speed for a, b in pairs]
    return {
        "task": task,
        "batch": batch,
        "variant": name,
        "speed": statistics.median(r.speed for r in runs),
        "ratio": statistics.median(b.speed / a.speed for a, b in pairs),
        "decode_speed": statistics.median(r.decode_speed for r in runs),
        "decode_ratio": statistics.median(ratios),
        "worst": min(ratios),
        "bound": statistics.median(r.seconds / max(r.seconds - r.decode_s, 1e-9) for r in plain),
        "tokens_a_step": one.decode_tokens / one.num_decode_steps / batch,
        "accepted_a_draft": one.num_accepted / max(one.num_drafts, 1),
        "accepted_share": one.num_accepted / max(one.num_drafted, 1),
        "drafting_share": drafting_s / decode_s,
        "verifying_share": 1 - (drafting_s + one.num_decode_steps * plain_step_s) / decode_s,
        "by_source": one.by_source,
        "runs": [asdict(run) for run in runs],
    }


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="tokens/s, plain and speculating")
    for name in COLUMNS:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_text(row.get(name, "")) for name in COLUMNS))
    console.print(table)


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _store(rows: list[dict[str, Any]], args: argparse.Namespace, cost: str) -> None:
    """Add to the file; rows of the same task, batch and variant are replaced."""
    settings = {
        key: str(getattr(args, key))
        for key in ("weights", "tokens", "temperature", "draft_tokens", "threads")
    }
    settings["chat"] = "MT-Bench" if args.questions else "own questions"
    head = {"machine": fingerprint().line(), "settings": settings}
    data = json.loads(args.into.read_text()) if args.into.exists() else {**head, "rows": []}
    assert {key: data[key] for key in head} == head, f"{args.into}: of another machine or settings"
    new = {_key(row) for row in rows}
    data["rows"] = [row for row in data["rows"] if _key(row) not in new] + rows
    data["step_costs"] = cost
    data.setdefault("speculators", {}).update({_cell_of(f): _kind_of(f) for f in args.speculator})
    args.into.write_text(json.dumps(data, indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["task"], row["batch"], row["variant"]


def _cell_of(folder: str) -> str:
    return str(read_speculator_config(Path(folder) / "config.json").cell)


def _kind_of(folder: str) -> str:
    """What a speculator is, without where it lies."""
    config = read_speculator_config(Path(folder) / "config.json")
    return f"{config.cell}, {config.num_drafts} drafts, {config.num_outputs} draft tokens"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", default="edit,agent,loop,rag,json,chat")
    parser.add_argument("--variants", default="suffix")
    parser.add_argument("--speculator", action="append", default=[])
    parser.add_argument("--draft-tokens", type=int, default=32)
    parser.add_argument("--questions", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rivals", default="")
    parser.add_argument("--into", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
