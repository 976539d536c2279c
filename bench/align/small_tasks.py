"""Tasks of small models made here: shortest walks in a graph, and sums of two-digit numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from charmodel import pretrain
from experiment import Experiment, Target, Values
from probe import Probe

from sterna.align.hybrid import HybridEngine, Sampling
from sterna.align.tasks.arithmetic import Arithmetic
from sterna.align.tasks.walks import NAMES, Walks
from sterna.engine.config import EngineConfig
from sterna.model.load import load_model
from sterna.text.tokenizer import load_tokenizer

DIGITS = "0123456789+-="
_HALF = 0.45
# Highest digit first, a model of this size solves 7 % of these after 900 steps, and of numbers
# below 20 it learns the 720 trained problems by heart (held out: 0.57 -> 0.76 by 400 steps).
_OPTIONS: Mapping[str, int] = {"most": 99, "ones_first": 1}
_FIRST, _LAST, _CHUNK = 400, 1600, 50
_LINES = 20_000


def _prepare_walks(folder: Path, seed: int) -> Values:
    """A model of random walks in graph `seed`."""
    walks = Walks(graph=seed)
    lines = (("", walks.walk(i, seed)) for i in range(_LINES))
    model = pretrain(folder, NAMES[: walks.nodes], lines, hidden=64, layers=2, steps=200, seed=seed)
    return {"model": str(model), "pretraining_steps": 200}


def _walks_recipe(facts: Values, seed: int, variant: str) -> Values:
    algorithm: Values = {
        "ppo": {"kind": "ppo", "epochs": 4, "minibatches": 1, "lam": 0.95},
        "grpo": {"kind": "grpo", "epochs": 4},
        "rloo": {"kind": "rloo", "epochs": 4},
        "hacking": {"kind": "grpo", "epochs": 4},
    }[variant]
    prompts, group = (128, 1) if variant == "ppo" else (16, 8)
    options = {"graph": seed, "pays_steps": int(variant == "hacking")}
    return {
        "prompts": {"task": "walks", "options": options, "max_tokens": 4, "seed": seed},
        "rollout": {"prompts_per_step": prompts, "group_size": group, "max_tokens": 10},
        "algorithm": algorithm,
        "optim": {"lr": 3e-4},
        "critic": {"optim": {"lr": 1e-3}},
    }


def _prepare_arithmetic(folder: Path, seed: int) -> Values:
    """A model that solves about half of the held-out problems when it samples."""
    task = Arithmetic(**_OPTIONS)
    kept = [task.problem(i, seed, "train") for i in range(_LINES)]
    for steps in range(_FIRST, _LAST, _CHUNK):
        model = pretrain(folder, DIGITS, kept, hidden=64, layers=3, steps=steps, seed=seed)
        share = _solved(model, seed)
        print(f"arithmetic, seed {seed}: {steps} steps of text, {share:.3f} solved", flush=True)
        if share >= _HALF:
            break
    return {"model": str(model), "pretraining_steps": steps, "solved": share}


def _solved(model: Path, seed: int) -> float:
    """Share of 256 held-out problems of another seed that a sample solves."""
    task, tokenizer = Arithmetic(**_OPTIONS), load_tokenizer(model)
    config = EngineConfig(
        dtype="float32", threads=1, num_kv_blocks=300, max_num_seqs=256, token_budget=512
    )
    engine = HybridEngine(load_model(model, "float32").decoder, tokenizer, config)
    problems = [task.problem(i, seed + 1000, "eval") for i in range(256)]
    prompts = [tokenizer.encode(question, False) for question, _ in problems]
    found = engine.generate(prompts, 1, Sampling(max_tokens=5), range(256))
    engine.close()
    texts = [tokenizer.decode(rollout.completion.tolist()) for rollout in found]
    return sum(t == answer for t, (_, answer) in zip(texts, problems, strict=True)) / 256


def _arithmetic_recipe(facts: Values, seed: int, variant: str) -> Values:
    return {
        "prompts": {
            "task": "arithmetic",
            "options": dict(_OPTIONS),
            "max_tokens": 8,
            "seed": seed,
        },
        "rollout": {"prompts_per_step": 128, "group_size": 8, "max_tokens": 5},
        "algorithm": {"kind": variant, "epochs": 2, "minibatches": 2, "eps_high": 0.28},
        "optim": {"lr": 5e-4},
        # At 1e-3, or without the first steps, the policy is gone after two updates.
        "schedule": {"kind": "linear", "warmup_steps": 10},
    }


WALKS = Experiment(
    name="walks",
    about="shortest walks in a random graph of 21 nodes; 1 = every walk is a shortest one",
    steps=40,
    variants=("ppo", "grpo", "rloo", "hacking"),
    prepare=_prepare_walks,
    recipe=_walks_recipe,
    probe=lambda: Probe(every=4, prompts=64, samples=8),
    targets=(Target("sampled/reward", 0.85),),
    shown=("sampled/reward", "sampled/gold", "entropy"),
)
ARITHMETIC = Experiment(
    name="arithmetic",
    about="sums and differences of two numbers below 100, exact answers, problems never trained",
    steps=200,
    variants=("grpo", "rloo"),
    prepare=_prepare_arithmetic,
    recipe=_arithmetic_recipe,
    probe=lambda: Probe(every=10, prompts=64, samples=8, has_trained=True),
    targets=(Target("greedy/solved", 0.95), Target("pass@1", 0.95)),
    shown=("pass@1", "pass@8", "entropy"),
)
