"""A start for length control: the model's own sentences, asked for with the words they have.

SmolLM2-135M hardly hears a number of words: over N = 5 to 20 the correlation of wanted and written
words is 0.0 to 0.3, however it is asked, and GRPO from there learns the one length that suits all
N best (relative error 0.37). Its sentences, each behind the prompt that it is a right answer to
(hindsight relabelling, arXiv 1707.01495 and 2302.05206), teach it what the number means; rewards
teach it to be exact. No topic of the evaluation is in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from drawn import Chat, ended
from experiment import Values

from sterna.align.hybrid import Sampling
from sterna.align.tasks.length import TOPICS, Length
from sterna.core.rundir import write_atomic
from sterna.train.config import Recipe
from sterna.train.loop import train

_COUNTS = range(5, 21)
_SAMPLES = 3
# Answers of one length: most sentences have 10 to 20 words.
_MOST = 36
_TEMPERATURE = 0.9


def warm(folder: Path, system: str) -> Values:
    """The model after two epochs of its own sentences."""
    path = folder / "sentences.jsonl"
    if not path.exists():
        rows = list(_rows(system))
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    recipe = _recipe(folder, path)
    result = train(recipe, resume=(recipe.run.output / "checkpoints").exists())
    if result.outcome != "done":
        raise SystemExit(f"{result.outcome} after {result.steps} steps; the same call goes on")
    return {"model": str(result.model), "sentences": sum(1 for _ in path.open())}


def _rows(system: str) -> Iterator[Values]:
    """Chats of which the answer has as many words as it was asked for."""
    task = Length()
    topics = [topic for i, topic in enumerate(TOPICS) if i % 4 != 3]
    asked = [(topic, count) for topic in topics for count in _COUNTS]
    chats: list[Chat] = [_chat(task, system, *each) for each in asked]
    sampling = Sampling(max_tokens=36, temperature=_TEMPERATURE)
    seen: dict[int, set[str]] = {count: set() for count in _COUNTS}
    for i, text in ended(chats, _SAMPLES, sampling):
        count = len(text.split())
        if count in seen and text not in seen[count] and len(seen[count]) < _MOST:
            seen[count].add(text)
            answer = {"role": "assistant", "content": text}
            yield {"messages": [*_chat(task, system, asked[i][0], count), answer]}


def _chat(task: Length, system: str, topic: str, count: int) -> Chat:
    return [{"role": "system", "content": system}, *task.question(topic, count)]


def _recipe(folder: Path, path: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "kind": "sft",
            "model": {"path": "default", "dtype": "bfloat16"},
            "data": {
                "sources": [{"path": str(path), "epochs": 0}],
                "seq_len": 512,
                "prefetch": 0,
            },
            "optim": {"lr": 5e-5},
            "schedule": {"kind": "constant", "warmup_steps": 3},
            "run": {
                "output": folder / "run",
                "steps": 60,
                "rows_per_step": 2,
                "seed": 7,
                "threads": 1,
            },
            "checkpoint": {"every": 10, "keep_last": 1},
            "log": {"report": False, "tensorboard": False, "peak_tflops": 0.1},
        }
    )
