"""Positivity with a reward model trained here, on pairs of SmolLM2's own sentences.

Pairs: SmolLM2 writes about the topics that are trained on, VADER says which of two sentences about
a topic is the more positive one. The reward model is SmolLM2's first layers with a score
(`sterna train`, kind reward); TextBlob, the gold metric, has no part in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from drawn import Chat, ended
from experiment import Experiment, Target, Values, gap
from probe import Probe
from smollm_tasks import SYSTEM, TEMPERATURE

from sterna.align.hybrid import Sampling
from sterna.align.offline.config import OfflineRecipe
from sterna.align.offline.task import choose_task
from sterna.align.reward import Sample
from sterna.align.tasks.positive import Positive, novelty
from sterna.core.rundir import write_atomic
from sterna.data.order import mix
from sterna.model.config import parse_config
from sterna.model.decoder import Decoder
from sterna.model.hub import resolve_model
from sterna.model.load import load_model
from sterna.model.save import hf_config, save_model
from sterna.text.save import tokenizer_files
from sterna.text.tokenizer import load_tokenizer
from sterna.train.loop import train
from sterna.train.metrics import read_metrics

LAYERS = 10
PROMPTS, SAMPLES = 32, 10
_LONGEST = 40
_SEED = 7
# VADER's compound has to differ by this much for two sentences to be a pair.
_MARGIN = 0.2
_STEPS = 80


def prepare(folder: Path, seed: int) -> Values:
    """Sentences, pairs, trunk, reward model; what is there already stays."""
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        rows = list(_pairs(_sentences()))
        write_atomic(pairs, "".join(json.dumps(row) + "\n" for row in rows))
    trunk = folder / "trunk"
    if not (trunk / "tokenizer.json").exists():
        _write_trunk(trunk)
    recipe = _reward_recipe(folder, trunk, pairs)
    resume = (recipe.run.output / "checkpoints").exists()
    result = train(recipe, task=choose_task(recipe), resume=resume)
    if result.outcome != "done":
        raise SystemExit(f"{result.outcome} after {result.steps} steps; the same call goes on")
    last = [x for x in read_metrics(recipe.run.output / "metrics.jsonl") if x["kind"] == "eval"][-1]
    return {
        "model": "default",
        "settings": {"dtype": "bfloat16"},
        "reward_model": str(result.model),
        "pairs": sum(1 for _ in pairs.open()),
        "held_out": {k: v for k, v in last.items() if isinstance(v, float)},
    }


def _sentences() -> list[tuple[str, str]]:
    """(prompt, sentence) of the topics that are trained on; those that did not end are left out."""
    task = Positive()
    rows = [task.prompt(i, _SEED, "train") for i in range(PROMPTS)]
    system = {"role": "system", "content": SYSTEM}
    chats = [[system, *cast("Chat", row.prompt)] for row in rows]
    found = ended(chats, SAMPLES, Sampling(max_tokens=_LONGEST, temperature=TEMPERATURE))
    return [(chats[i][-1]["content"], text) for i, text in found]


def _pairs(sentences: Sequence[tuple[str, str]]) -> Iterator[Values]:
    """Each sentence against two others of its prompt, where VADER tells them apart."""
    told = Positive()
    scored: dict[str, list[tuple[float, str]]] = {}
    for prompt, text in dict.fromkeys(sentences):
        scored.setdefault(prompt, []).append((told.score(text), text))
    for prompt, answers in scored.items():
        for i, (value, text) in enumerate(answers):
            for turn in range(2):
                other_value, other = answers[mix(_SEED, i, turn) % len(answers)]
                if value - other_value >= _MARGIN:
                    yield {"prompt": prompt, "chosen": text, "rejected": other, "system": SYSTEM}


def _write_trunk(folder: Path) -> None:
    """SmolLM2's first layers as a model of its own."""
    path = resolve_model("default")
    whole = load_model(path).decoder
    config = parse_config({**hf_config(whole), "num_hidden_layers": LAYERS}, "trunk")
    trunk = Decoder(config, whole.dtype)
    known = dict(whole.named_parameters())
    for name, parameter in trunk.named_parameters():
        parameter.data.copy_(known[name].data)
    save_model(trunk, folder)
    for name, text in tokenizer_files(load_tokenizer(path)).items():
        write_atomic(folder / name, text)


def _reward_recipe(folder: Path, trunk: Path, pairs: Path) -> OfflineRecipe:
    return OfflineRecipe.model_validate(
        {
            "kind": "reward",
            "model": {"path": str(trunk)},
            "data": {
                "sources": [{"path": str(pairs), "epochs": 0}],
                "seq_len": 512,
                "held_out": 0.15,
                "prefetch": 0,
            },
            "optim": {"lr": 2e-4},
            "schedule": {"warmup_steps": 5},
            "run": {
                "output": folder / "reward",
                "steps": _STEPS,
                "rows_per_step": 2,
                "seed": _SEED,
                "threads": 1,
            },
            "checkpoint": {"every": 20, "keep_last": 1},
            "eval": {"every": 40},
            "log": {"report": False, "tensorboard": False, "peak_tflops": 0.1},
        }
    )


def _recipe(facts: Values, seed: int, variant: str) -> Values:
    """Against the reward model; `hacking` goes without the KL term."""
    is_hacking = variant == "hacking"
    return {
        "prompts": {"task": "positive", "max_tokens": 96, "system": SYSTEM, "seed": seed},
        "rollout": {
            "prompts_per_step": 3,
            "group_size": 8,
            "max_tokens": _LONGEST,
            "temperature": TEMPERATURE,
        },
        "algorithm": {
            "kind": "grpo",
            "micro_tokens": 1024,
            "kl_coef": 0.0 if is_hacking else 0.05,
            "missing_eos_penalty": 1.0,
        },
        "rewards": [
            {"kind": "model", "path": facts["reward_model"]},
            {"kind": "task", "weight": 0.0},
        ],
        "optim": {"lr": 5e-5 if is_hacking else 4e-5},
        "schedule": {"kind": "constant", "warmup_steps": 3},
    }


def _figures(samples: Sequence[Sample]) -> Values:
    task = Positive()
    return {
        "vader": gap(samples, lambda s: task.score(s.completion)),
        "textblob": gap(samples, lambda s: task.polarity(s.completion)),
        "distinct_2": novelty([s.completion for s in samples]),
    }


POSITIVE = Experiment(
    name="positive",
    about="SmolLM2-135M-Instruct against a reward model of VADER's pairs; TextBlob is gold",
    steps=28,
    variants=("grpo", "hacking"),
    prepare=prepare,
    recipe=_recipe,
    probe=lambda: Probe(every=7, prompts=24, samples=2, extra=_figures, has_greedy=False),
    targets=(
        Target("vader", 0.6),
        Target("sampled/gold", 0.05, is_rise=True),
        Target("distinct_2", 0.5),
    ),
    shown=("sampled/model", "vader", "textblob", "distinct_2"),
    has_own_base=False,
)
