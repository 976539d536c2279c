"""Does it learn? One task and seed a call, on one CPU thread; results of all calls are gathered.

    python bench/align/learning.py walks --seed 0 [--variant ppo] [--steps 40]
    python bench/align/learning.py walks --gather          # only the table, JSON and picture

Tasks: walks (PPO, GRPO, RLOO), arithmetic, length, format, positive (with a reward model trained
here); the variant `hacking` of the last two is a reward to be fooled. A call that was interrupted
goes on where it was, a larger --steps goes further. The curves of all seeds are in
bench/results/learning-TASK.json and docs/img/learning-TASK.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from experiment import Experiment, Values
from gather import gather
from sentiment import POSITIVE
from small_tasks import ARITHMETIC, WALKS
from smollm_tasks import FORMAT, LENGTH

from sterna.align.config import RlRecipe
from sterna.align.rl import align_rl
from sterna.core.log import setup_logging
from sterna.core.rundir import write_atomic

EXPERIMENTS = {
    experiment.name: experiment for experiment in (WALKS, ARITHMETIC, LENGTH, FORMAT, POSITIVE)
}
FACTS = "facts.json"


def main() -> int:
    """Prepare, learn, gather."""
    args = _arguments()
    experiment = EXPERIMENTS[args.task]
    if not args.gather:
        setup_logging()
        learn(experiment, args.variant or experiment.variants[0], args.seed, args.steps, args.work)
    gather(experiment, args.work / experiment.name)
    return 0


def learn(experiment: Experiment, variant: str, seed: int, steps: int, work: Path) -> None:
    """One run, from where it is."""
    base = work / experiment.name / (f"base-seed{seed}" if experiment.has_own_base else "base")
    run = work / experiment.name / f"{variant}-seed{seed}"
    facts = _prepared(experiment, base, seed)
    sections = experiment.recipe(facts, seed, variant)
    recipe = RlRecipe.model_validate(
        {
            "model": {"path": facts["model"], "dtype": "float32", **facts.get("settings", {})},
            **sections,
            "run": {
                "output": run,
                "steps": steps or experiment.steps,
                "seed": seed,
                "threads": 1,
                "samples": 8,
            },
            "checkpoint": {"every": 10, "keep_last": 1, "is_async": False},
        }
    )
    result = align_rl(recipe, resume=(run / "checkpoints").exists(), hooks=[experiment.probe()])
    if result.outcome != "done":
        raise SystemExit(f"{result.outcome} after {result.steps} steps; the same call goes on")


def _prepared(experiment: Experiment, base: Path, seed: int) -> Values:
    """What the task's preparation said, made when it is not there."""
    path = base / FACTS
    if not path.exists():
        base.mkdir(parents=True, exist_ok=True)
        started = time.process_time()
        facts = experiment.prepare(base, seed)
        facts["cpu_minutes"] = round((time.process_time() - started) / 60, 2)
        write_atomic(path, json.dumps(facts) + "\n")
    found: Values = json.loads(path.read_text())
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=EXPERIMENTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", default="")
    parser.add_argument("--steps", type=int, default=0, help="0 = the task's own number")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"))
    parser.add_argument("--gather", action="store_true", help="learn nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
