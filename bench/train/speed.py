"""Training speed: Sterna against a plain transformers loop and TRL's SFTTrainer, on one CPU.

    python bench/train/speed.py --chats CHATS.jsonl --text FILE [--model FOLDER] [--steps 8]
        [--rounds 2] [--peers trl,transformers] [--out bench/results]

Two cases, SmolLM2-135M, rows of up to 1,024 tokens, one row (or its tokens in chats) a step:

full    text cut into rows of exactly 1,024 tokens, one row a step: nothing to gain by packing.
mixed   chats of mixed lengths. Sterna packs them without padding; transformers and TRL pad each
        batch of --batch chats to its longest, which is their default; `trl-packed` is TRL's own
        packing, which on this attention lets documents see each other (it warns).

Every contestant is a process of its own, run in turn (`--rounds` times), and trains on the same
tokenized rows with AdamW at one learning rate. `amp` is float32 weights under bfloat16 autocast,
`pure` is bfloat16 weights and states; Sterna's counterparts are bfloat16 weights with float32
masters and states, and bfloat16 states without masters. Tokens a second count real tokens only, the
first step (warm-up) left out. Losses of equal data and `amp` must agree, or the run fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from sterna.core.machine import fingerprint
from sterna.core.rundir import write_atomic
from sterna.data.config import DataConfig
from sterna.data.loader import Loader
from sterna.data.pack import IGNORE, PackedRow
from sterna.text.tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parent
PEERS = HERE.parents[1] / ".peers"
SEQ_LEN = 1024
LOSS_BOUND = 0.02  # relative, of the mean loss: rounding of bfloat16 and of masters
Row = dict[str, list[int]]


def main() -> int:
    """Prepare, run in turn, print and store."""
    args = arguments()
    jobs = {name: job for name, job in all_jobs(args).items() if name.split("/")[1] in args.peers}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, job in jobs.items():
            runs[name].append(run(name, job))
            print(name, speed(job, runs[name][-1]), flush=True)
    table = {name: summary(jobs[name], results) for name, results in runs.items()}
    check_losses(table)
    print(markdown(table))
    store(table, args)
    return 0


def all_jobs(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """CASE/CONTESTANT/PRECISION -> what its process is told."""
    full = [[row] for row in text_rows(args)][: args.steps]
    chats = chat_rows(args)
    mixed = [chats[i : i + args.batch] for i in range(0, len(chats), args.batch)]
    jobs: dict[str, dict[str, Any]] = {}
    for case, batches in (("full", full), ("mixed", mixed)):
        for peer in ("sterna", "transformers", "trl", "trl-packed"):
            if case == "full" and peer == "trl-packed":
                continue
            for precision in ("amp", "pure"):
                jobs[f"{case}/{peer}/{precision}"] = {
                    "model": args.model, "threads": args.threads, "lr": 2e-5, "steps": args.steps,
                    "seq_len": SEQ_LEN, "batches": batches, "pure": precision == "pure",
                    "packing": peer == "trl-packed",
                }  # fmt: skip
    return jobs


def text_rows(args: argparse.Namespace) -> list[Row]:
    """The text as rows of SEQ_LEN tokens, all of them trained."""
    tokens = load_tokenizer(args.model).encode(args.text.read_text()[: 8 * SEQ_LEN * args.steps])
    rows = [tokens[i : i + SEQ_LEN] for i in range(0, len(tokens) - SEQ_LEN, SEQ_LEN)]
    return [{"input_ids": row, "labels": list(row)} for row in rows]


def chat_rows(args: argparse.Namespace) -> list[Row]:
    """Chats as tokens and labels, in the file's order; their lengths are what they are."""
    source = {"path": str(args.chats), "epochs": 1}
    data = DataConfig(sources=(source,), seq_len=SEQ_LEN, packing="none", shuffle="none",
                      too_long="drop")  # type: ignore[arg-type]  # fmt: skip
    loader = Loader(data, load_tokenizer(args.model))
    return [as_row(row) for row in islice(loader, args.steps * args.batch)]


def as_row(row: PackedRow) -> Row:
    """Targets back to labels, which every peer shifts itself."""
    return {"input_ids": row.tokens.tolist(), "labels": [IGNORE, *row.targets.tolist()[:-1]]}


def run(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """One contestant's process: seconds, losses and tokens of each step."""
    peer = name.split("/")[1].removesuffix("-packed")
    python = sys.executable if peer == "sterna" else str(PEERS / "trl" / "bin" / "python")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job))
        command = [python, str(HERE / f"step_{peer}.py"), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def step_tokens(job: dict[str, Any], result: dict[str, Any]) -> list[int]:
    """Real tokens of each step."""
    if "tokens" in result:
        return list(result["tokens"])
    if job["packing"]:
        return list(result["row_tokens"])
    return [sum(len(row["input_ids"]) for row in batch) for batch in job["batches"]]


def speed(job: dict[str, Any], result: dict[str, Any]) -> float:
    """Real tokens a second without the first step."""
    tokens = step_tokens(job, result)[: len(result["seconds"])]
    return round(sum(tokens[1:]) / sum(result["seconds"][1:]), 1)


def summary(job: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """Median speed of the rounds and the losses of the last."""
    return {"tokens_per_s": statistics.median(speed(job, r) for r in results),
            "losses": results[-1]["losses"], "runs": [speed(job, r) for r in results]}  # fmt: skip


def check_losses(table: dict[str, dict[str, Any]]) -> None:
    """Full rows are the same data everywhere: so must be the losses."""
    curves = {name: row["losses"] for name, row in table.items() if name.startswith("full/")}
    means = {name: statistics.mean(curve) for name, curve in curves.items() if "/amp" in name}
    if means and max(means.values()) > (1 + LOSS_BOUND) * min(means.values()):
        raise SystemExit(f"the losses differ: {means}")


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """One line a contestant, with Sterna's ratio to it."""
    lines = ["| case | contestant | tokens/s | Sterna against it | first and last loss |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, row in table.items():
        case, peer, precision = name.split("/")
        own = table.get(f"{case}/sterna/{precision}", row)["tokens_per_s"]
        lines.append(f"| {case} | {peer}, {precision} | {row['tokens_per_s']:,.0f} | "
                     f"{own / row['tokens_per_s']:.2f}x | {row['losses'][0]:.3f} "
                     f"{row['losses'][-1]:.3f} |")  # fmt: skip
    return "\n".join(lines)


def store(table: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """JSON and markdown of the day."""
    name = f"train-speed-{datetime.now(UTC):%Y-%m-%d}"
    facts = {
        "machine": fingerprint().as_dict(),
        "steps": args.steps,
        "batch": args.batch,
        "table": table,
    }
    write_atomic(args.out / f"{name}.json", json.dumps(facts, indent=1) + "\n")
    write_atomic(args.out / f"{name}.md", markdown(table) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chats", type=Path, required=True, help="JSONL of messages")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default=str(PEERS / "model" / "hf-bf16"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="chats of a padded batch")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=lambda s: s.split(","),
                        default=["sterna", "transformers", "trl", "trl-packed"])  # fmt: skip
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
