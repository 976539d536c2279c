"""Reinforcement learning's speed: Sterna against TRL with transformers' generation, on one CPU.

    python bench/align/speed.py [--cases grpo,ppo,generate] [--dtypes bfloat16,float32] [--steps 3]
        [--peers sterna,trl] [--json FILE] [--out bench/results]

grpo       steps of GRPO, SmolLM2-135M: 8 prompts x 4 completions, 24 + 64 tokens, one update a
           step, no reference. Experience is generation, rewards and advantages (and what scoring
           is needed); the step adds forward, backward and AdamW.
ppo        the same with critic, reference and reward model of that size, KL 0.05, against TRL
           0.11.4, the last with a whole PPO trainer (its own environment, .peers/trl011).
generate   the generation phase alone: 32 prompts, 128 + 128 tokens, against plain
           `transformers.generate` in one batch of 32.

Each contestant is a process of its own with the same prompts as token ids, temperature 1, forced
lengths, the same learning rate and threads. `bfloat16`: TRL's weights and AdamW states are bfloat16
(its fastest way on a CPU), Sterna keeps float32 masters and states beside bfloat16 weights. The
first step or call (warm-up) is left out. CPU seconds (of all threads) stand beside the wall clock:
on a shared machine they say more.
With --json results are added to FILE piece by piece, so that a long comparison can be measured in
several short runs; --table prints and stores what FILE has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sterna.core.machine import fingerprint
from sterna.core.rundir import write_atomic

HERE = Path(__file__).resolve().parent
PEERS = HERE.parents[1] / ".peers"
SHAPES = {  # prompts, completions of each, prompt tokens, new tokens
    "grpo": (8, 4, 24, 64),
    "ppo": (8, 4, 24, 64),
    "generate": (32, 1, 128, 128),
    "generate-groups": (8, 4, 128, 128),
}
_STEP = {"experience": 6.0, "step": 3.0}
TARGETS = {"grpo": _STEP, "ppo": _STEP, "generate": {"seconds": 9.0}}
RIVALS = {"ppo": ("trl011", "step_trl_ppo.py")}  # environment and script, else trl's
Results = dict[str, dict[str, Any]]


def main() -> int:
    """Measure in turn, print and store."""
    args = arguments()
    file: Path = args.json or Path(tempfile.mkdtemp()) / "speed.json"
    results: Results = json.loads(file.read_text()) if file.exists() else {}
    for name, job in all_jobs(args).items():
        peer = name.split("/")[1]
        found = run(name.split("/")[0], peer, job)
        told = {key: Path(job[key]).name for key in ("model", "reward")}
        told |= {"prompts": len(job["prompts"])}
        results.setdefault(name, {"job": {**job, **told}, "runs": []})
        results[name]["runs"].append(found)
        print(name, json.dumps(phases(found)), flush=True)
        write_atomic(file, json.dumps(results, indent=1) + "\n")
    if args.table or args.json is None:
        text = markdown(results)
        print(text)
        store(results, text, args.out)
    return 0


def all_jobs(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """CASE/PEER/DTYPE -> what its process is told."""
    jobs = {}
    for case in args.cases:
        count, group, size, new_tokens = SHAPES[case]
        for dtype in args.dtypes:
            for peer in args.peers:
                jobs[f"{case}/{peer}/{dtype}"] = {
                    "what": case.split("-")[0], "model": args.model, "dtype": dtype, "lr": 1e-6,
                    "threads": args.threads, "steps": args.steps, "repeats": args.repeats,
                    "prompts": prompts(count, size), "group": group, "new_tokens": new_tokens,
                    "algorithm": "ppo" if case == "ppo" else "grpo",
                    "kl": 0.05 if case == "ppo" else args.kl, "reward": args.reward,
                    "weights": peer.partition("-")[2] or "auto", "micro_rows": args.micro_rows,
                    "micro_tokens": args.micro_rows * (size + new_tokens), "bound": 500,
                }  # fmt: skip
    return jobs


def prompts(count: int, size: int) -> list[list[int]]:
    """Token ids that repeat nowhere."""
    return [[1000 + 7 * (i * size + j) % 40_000 for j in range(size)] for i in range(count)]


def run(case: str, peer: str, job: dict[str, Any]) -> dict[str, Any]:
    """One contestant's process."""
    folder, script = RIVALS.get(case, ("trl", "step_trl.py"))
    python = str(PEERS / folder / "bin" / "python")
    if peer.startswith("sterna"):
        python, script = sys.executable, "step_sterna.py"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job))
        command = [python, str(HERE / script), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{peer} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def phases(found: dict[str, Any]) -> dict[str, float]:
    """Median seconds of each phase, warm-up left out."""
    if "seconds" in found:
        return {n: statistics.median(found[n]) for n in ("seconds", "cpu_seconds")}
    names = [kind + n for n in ("generate", "experience", "train", "step") for kind in ("", "cpu_")]
    return {n: statistics.median(step[n] for step in found["steps"][1:]) for n in names}


def rival(name: str) -> str:
    """Whose figures those of Sterna stand beside: CASE/trl/DTYPE, whatever its weights."""
    case, _, dtype = name.split("/")
    return f"{case}/trl/{dtype}"


def medians(row: dict[str, Any]) -> dict[str, float]:
    """Of all runs of a case."""
    each = [phases(found) for found in row["runs"]]
    return {name: statistics.median(values[name] for values in each) for name in each[0]}


def markdown(results: Results) -> str:
    """One line a phase and case, with the ratio and what was aimed at."""
    lines = ["| case | phase | Sterna, s | TRL, s | ratio | target | CPU seconds | ratio |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, row in results.items():
        case, peer, dtype = name.split("/")
        other = results.get(rival(name))
        if not peer.startswith("sterna") or other is None:
            continue
        own, theirs = medians(row), medians(other)
        for phase, seconds in own.items():
            if phase.startswith("cpu_"):
                continue
            target = TARGETS.get(case, {}).get(phase)
            said = "" if target is None else f"{target:.0f}x"
            title = "generation" if phase in ("seconds", "generate") else phase
            cpu, cpu_other = own[f"cpu_{phase}"], theirs[f"cpu_{phase}"]
            kind = peer.removeprefix("sterna").replace("-", ", rollouts in ")
            lines.append(f"| {case}, {dtype}{kind} | {title} | {seconds:.2f} | "
                         f"{theirs[phase]:.2f} | {theirs[phase] / seconds:.2f}x | {said} | "
                         f"{cpu:.2f}, {cpu_other:.2f} | {cpu_other / cpu:.2f}x |")  # fmt: skip
    return "\n".join(lines)


def store(results: Results, text: str, folder: Path) -> None:
    """JSON and markdown of the day."""
    machine = fingerprint()
    stem = folder / f"align-speed-{datetime.now(UTC):%Y-%m-%d}"
    facts = {"machine": machine.as_dict(), "results": results}
    write_atomic(stem.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    write_atomic(stem.with_suffix(".md"), f"{machine.line()}\n\n{text}\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words = {"type": lambda s: [word for word in s.split(",") if word]}
    parser.add_argument("--cases", default=["grpo", "generate"], **words)
    parser.add_argument("--dtypes", default=["bfloat16", "float32"], **words)
    parser.add_argument(
        "--peers", default=["sterna", "trl"], help="sterna-fp6 = rollout.weights fp6", **words
    )
    parser.add_argument("--reward", default=str(PEERS / "model" / "reward-bf16"),
                        help="ppo: folder of a sequence classifier with one label")  # fmt: skip
    parser.add_argument("--model", default=str(PEERS / "model" / "hf-bf16"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro-rows", type=int, default=32, help="completions run at once")
    parser.add_argument("--kl", type=float, default=0.0, help="weight of the KL to a reference")
    parser.add_argument("--json", type=Path, help="file that results are added to")
    parser.add_argument("--table", action="store_true", help="print and store what --json has")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
