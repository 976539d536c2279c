"""Tasks of SmolLM2-135M-Instruct: as many words as asked for, and a form that answers must have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from counted import warm
from experiment import Experiment, Target, Values, gap
from probe import Probe

from sterna.align.reward import Sample
from sterna.align.tasks.length import relative_error

# Shorter than the template's own, which every completion would be trained behind.
SYSTEM = "Be brief."
# At 1 the entropy is 3 nats a token, and chance drowns what is rewarded.
TEMPERATURE = 0.7
_BFLOAT16 = {"dtype": "bfloat16"}


def _default_model(folder: Path, seed: int) -> Values:
    return {"model": "default", "settings": _BFLOAT16}


def _prepare_length(folder: Path, seed: int) -> Values:
    return {**warm(folder, SYSTEM), "settings": _BFLOAT16}


def _errors(samples: Sequence[Sample]) -> Values:
    return {"relative_error": gap(samples, relative_error)}


def _recipe(task: str, max_tokens: int, prompts: int, lr: float) -> Values:
    """Groups of 8, one update a step, no KL term."""
    return {
        "prompts": {"task": task, "max_tokens": 96, "system": SYSTEM},
        "rollout": {
            "prompts_per_step": prompts,
            "group_size": 8,
            "max_tokens": max_tokens,
            "temperature": TEMPERATURE,
        },
        "algorithm": {"kind": "grpo", "micro_tokens": 1024},
        "optim": {"lr": lr},
        "schedule": {"kind": "constant", "warmup_steps": 3},
    }


def _length_recipe(facts: Values, seed: int, variant: str) -> Values:
    return _seeded(_recipe("length", 36, 16, 4e-5), seed)


def _format_recipe(facts: Values, seed: int, variant: str) -> Values:
    values = _seeded(_recipe("format", 24, 4, 2e-5), seed)
    if variant == "hacking":
        values["prompts"]["options"] = {"copies_count": 1}
    return values


def _seeded(values: Values, seed: int) -> Values:
    return {**values, "prompts": {**values["prompts"], "seed": seed}}


LENGTH = Experiment(
    name="length",
    about="SmolLM2-135M-Instruct writes about topics it was not trained on in N words, N = 5 to 20",
    steps=40,
    variants=("grpo",),
    prepare=_prepare_length,
    recipe=_length_recipe,
    probe=lambda: Probe(
        every=10, prompts=24, samples=2, has_greedy=False, extra=_errors, has_trained=True
    ),
    targets=(Target("relative_error", 0.2, is_least=False), Target("eos_ratio", 0.95)),
    shown=("relative_error", "eos_ratio", "entropy"),
    has_own_base=False,
)
FORMAT = Experiment(
    name="format",
    about="SmolLM2-135M-Instruct answers in one lower-case line inside <answer></answer>",
    steps=30,
    variants=("grpo", "hacking"),
    prepare=_default_model,
    recipe=_format_recipe,
    probe=lambda: Probe(every=10, prompts=24, samples=2, has_greedy=False, has_trained=True),
    targets=(Target("pass@1", 0.85),),
    shown=("pass@1", "sampled/gold", "eos_ratio", "entropy"),
)
