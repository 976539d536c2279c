"""What a SwiftKV student can still do: three tasks that a 135M model does, student against teacher.

    python bench/swiftkv_tasks.py plain=MODEL student=FOLDER [...] --questions gsm8k_test.jsonl

- copy: eight random words, said once and begun again; greedy tokens that repeat them.
- recall: four lines "NAME keeps the WORD." and one of them begun again; the word, exactly.
- choice: a GSM8K question with its own answer and three others' answers; the one that the model
  finds likeliest (mean log-prob a token). Chance is 25 %. Reasoning is not asked for: at this size
  exact answers are about none.

The first model is the one to compare with. A difference has its standard error over paired items.
`copy` and `recall` run on the engine that serves; `choice` on the training form, since a SwiftKV
model has no log-probs of prompt tokens. Writes bench/results/swiftkv-tasks-DATE.json.
"""

from __future__ import annotations

import argparse
import json
import random
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sterna.core.machine import fingerprint
from sterna.core.rundir import write_atomic
from sterna.engine.llm import LLM
from sterna.engine.request import SamplingParams
from sterna.model.batch import Batch
from sterna.model.hub import resolve_model
from sterna.quant.load import load_quantized
from sterna.text.tokenizer import Tokenizer, load_tokenizer

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = ("Ada", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate",
         "Leo", "Mary", "Nora", "Oscar", "Paul")  # fmt: skip
WORDS = ("book", "key", "hat", "lamp", "boat", "ring", "clock", "apple", "bread", "chair", "drum",
         "flag", "glass", "horse", "knife", "letter", "map", "needle", "orange", "piano", "rope",
         "sword", "table", "violin", "window", "yarn", "basket", "candle", "dollar",
         "engine")  # fmt: skip
NUM_CHOICES = 4


def copies(count: int) -> list[tuple[str, str]]:
    """(prompt, what follows)."""
    draw = random.Random(1)
    found = []
    for _ in range(count):
        words = draw.sample(WORDS, 8)
        line = " ".join(words)
        found.append((f"{line}\n{line}\n{' '.join(words[:2])}", " " + " ".join(words[2:])))
    return found


def recalls(count: int) -> list[tuple[str, str]]:
    """(prompt, what follows)."""
    draw = random.Random(2)
    found = []
    for _ in range(count):
        pairs = list(zip(draw.sample(NAMES, 4), draw.sample(WORDS, 4), strict=True))
        lines = "\n".join(f"{name} keeps the {word}." for name, word in pairs)
        name, word = draw.choice(pairs)
        found.append((f"{lines}\n\n{name} keeps the", f" {word}"))
    return found


def generated(model: str, items: list[tuple[str, str]], threads: int) -> list[float]:
    """Share of each answer's tokens that greedy decoding gives, up to the first wrong one."""
    tokenizer = load_tokenizer(resolve_model(model))
    answers = [tokenizer.encode(answer, False) for _, answer in items]
    with LLM(model, weights="bf16", threads=threads, max_model_len=1024) as llm:
        params = [SamplingParams(temperature=0, max_tokens=len(answer)) for answer in answers]
        outputs = llm.generate([prompt for prompt, _ in items], params, progress=False)
    found = []
    for output, answer in zip(outputs, answers, strict=True):
        ids = output.samples[0].token_ids
        right = next((i for i, pair in enumerate(zip(ids, answer, strict=False))
                      if pair[0] != pair[1]), min(len(ids), len(answer)))  # fmt: skip
        found.append(right / len(answer))
    return found


def choices(path: Path, count: int) -> list[tuple[str, list[str]]]:
    """(question, answers of which the first is its own)."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    draw = random.Random(3)
    draw.shuffle(rows)
    return [
        (row["question"] + "\n", [row["answer"]]
         + [other["answer"] for other in draw.sample(rows[count:], NUM_CHOICES - 1)])
        for row in rows[:count]
    ]  # fmt: skip


def chosen(model: str, items: list[tuple[str, list[str]]]) -> list[float]:
    """1.0 where the question's own answer has the largest mean log-prob."""
    decoder = load_quantized(resolve_model(model), "bfloat16", weights="bf16").decoder
    tokenizer = load_tokenizer(resolve_model(model))
    with torch.inference_mode():
        return [
            float(np.argmax([_score(decoder, tokenizer, question, text) for text in answers]) == 0)
            for question, answers in items
        ]


def _score(decoder: Any, tokenizer: Tokenizer, question: str, answer: str) -> float:
    prompt, rest = tokenizer.encode(question), tokenizer.encode(answer, False)
    tokens = torch.tensor([*prompt, *rest]).int()
    ends = torch.tensor([0, len(tokens)]).int()
    rows = torch.arange(len(prompt) - 1, len(tokens) - 1).int()
    batch = Batch(tokens, torch.arange(len(tokens)).int(), ends, ends[1:], rows)
    logs = decoder(batch).float().log_softmax(-1)
    return float(logs.gather(1, torch.tensor(rest)[:, None]).mean())


def compare(found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Score of each model and its distance to the first one, in points, with standard error."""
    base = np.array(next(iter(found.values())))
    rows = {}
    for name, values in found.items():
        lost = 100 * (base - np.array(values))
        rows[name] = {
            "score": 100 * float(np.mean(values)),
            "lost": float(lost.mean()),
            "error": float(lost.std(ddof=1) / len(lost) ** 0.5),
        }
    return rows


def main() -> None:
    """All tasks on all models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="NAME=MODEL, the teacher first")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--choices", type=int, default=80)
    parser.add_argument("--threads", type=int, default=0)
    stamp = datetime.now().strftime("%Y-%m-%d")
    parser.add_argument("--out", type=Path, default=RESULTS / f"swiftkv-tasks-{stamp}.json")
    args = parser.parse_args()
    models = dict(model.split("=", 1) for model in args.models)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: dict[str, Any] = {}
    asked = choices(args.questions, args.choices)
    for task, items in (("copy", copies(args.count)), ("recall", recalls(args.count))):
        found = {name: generated(model, items, args.threads) for name, model in models.items()}
        rows[task] = compare(found)
        print(task, json.dumps(rows[task]), flush=True)
    rows["choice"] = compare({name: chosen(model, asked) for name, model in models.items()})
    print("choice", json.dumps(rows["choice"]))
    counts = {"items": args.count, "choices": args.choices}
    report = {"machine": fingerprint().as_dict(), **counts, "tasks": rows}
    write_atomic(args.out, json.dumps(report, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
