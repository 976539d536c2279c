"""The planner of align against the measured peak of each phase, SmolLM2-135M on this CPU.

    python bench/align/memory.py [--threads 1] [--only NAME] [--out bench/results]

Every point is two steps with prompts and answers of exactly the lengths that the recipe allows, in
a process of its own (memory_step.py). `bound` is what a run is held to: prompts of any length, and
the margin. All but the last state a budget, so freed memory is given back between phases.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import track

from sterna.align.config import RlRecipe
from sterna.align.memory.fit import Budget, plan_rl
from sterna.align.memory.held import held_models
from sterna.align.memory.phases import needs_of
from sterna.core.machine import fingerprint
from sterna.core.rundir import write_atomic
from sterna.model.hub import resolve_model

HERE = Path(__file__).resolve().parent
PPO: dict[str, Any] = {"algorithm": {"kind": "ppo", "kl_coef": 0.1, "micro_tokens": 1024},
                       "rewards": [{"kind": "model"}]}  # fmt: skip
POINTS: dict[str, dict[str, Any]] = {
    "ppo, reference, reward model": PPO,
    "ppo, both on disk": {**PPO, "memory": {"reference": "disk", "rewards": "disk"}},
    "grpo": {},
    "ppo, lora, shared critic": {
        "algorithm": {"kind": "ppo", "kl_coef": 0.1, "micro_tokens": 1024},
        "adapter": {"rank": 16},
    },
    "grpo, small micro-batches": {"algorithm": {"micro_tokens": 512}},
    "grpo, long rollouts": {"algorithm": {"micro_tokens": 512},
                            "rollout": {"prompts_per_step": 8, "max_tokens": 384}},
    "grpo, 8-bit states": {"optim": {"states": "8bit"}},
    "grpo, fp6 copy": {"rollout": {"weights": "fp6"}},
    "grpo, no budget": {"memory": {"budget_gb": 0.0}},
}  # fmt: skip


def main() -> int:
    """Measure, compare, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    args = parser.parse_args()
    names = [name for name in POINTS if args.only in name]
    rows = [point(name, args.threads) for name in track(names, description="points")]
    if not args.only:
        facts = {"machine": fingerprint().as_dict(), "points": rows,
                 "worst": max(abs(row["error"]) for row in rows),
                 "under_bound": all(row["measured"] <= row["bound"] for row in rows)}  # fmt: skip
        name = f"align-memory-{datetime.now(UTC):%Y-%m-%d}.json"
        write_atomic(args.out / name, json.dumps(facts, indent=1) + "\n")
    for row in rows:
        print(f"{row['point']}: measured {row['measured'] / 2**20:,.0f} MiB in {row['in']}, "
              f"planned {row['planned'] / 2**20:,.0f} in {row['planned_in']} "
              f"({row['error']:+.1%}), bound {row['bound'] / 2**20:,.0f}")  # fmt: skip
    return 0


def point(name: str, threads: int) -> dict[str, Any]:
    """One recipe, both ways."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = as_recipe(POINTS[name], Path(folder), threads)
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({"recipe": recipe}))
        done = subprocess.run(
            [sys.executable, str(HERE / "memory_step.py"), str(job)], capture_output=True,
            text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr[-1500:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        whole = RlRecipe.model_validate(recipe)
        needs = needs_of(whole, held_models(whole), has_full_prompts=True)
        bound = plan_rl(whole, Budget(1e15)).peak
    phases: dict[str, int] = found["phases"]
    peak = max(phases, key=lambda phase: phases[phase])
    row = {
        "point": name, "measured": phases[peak], "in": peak, "planned": needs.peak,
        "planned_in": needs.peak_phase, "bound": bound, "error": needs.peak / phases[peak] - 1,
        "phases": {phase: [value, needs.of(phase) if phase in needs.phases else None]
                   for phase, value in phases.items()},
        "parts": {**needs.held, **needs.phases[needs.peak_phase]},
    }  # fmt: skip
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def as_recipe(sections: dict[str, Any], folder: Path, threads: int) -> dict[str, Any]:
    """The point's recipe; prompts have 128 tokens each."""
    prompts = folder / "prompts.jsonl"
    lines = ({"prompt": [1000 + (i * 37 + j) % 3000 for j in range(128)]} for i in range(16))
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values: dict[str, Any] = {
        "model": {"path": "default"},
        "prompts": {"path": str(prompts), "max_tokens": 128},
        "rollout": {"prompts_per_step": 4, "group_size": 2, "max_tokens": 128, "ignore_eos": True},
        "rewards": [{"kind": "function", "path": "given.py:small"}],
        "run": {"output": str(folder / "run"), "steps": 2, "threads": threads, "samples": 0,
                "report": False},
        "checkpoint": {"every": 0, "is_async": False},
        "algorithm": {"micro_tokens": 1024}, "memory": {"budget_gb": 1000.0},
    }  # fmt: skip
    for name, section in sections.items():
        own = isinstance(section, list)
        values[name] = section if own else {**values.get(name, {}), **section}
    values["rewards"] = [
        {**reward, "path": str(resolve_model("default"))} if reward["kind"] == "model" else reward
        for reward in values["rewards"]
    ]
    return values


if __name__ == "__main__":
    sys.exit(main())
