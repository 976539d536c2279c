"""A tiny model, pairs of a rule, and recipes on them."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

from sterna.align.offline.config import OfflineRecipe
from sterna.align.offline.task import choose_task
from sterna.core.errors import SternaError
from sterna.train.loop import train
from sterna.train.metrics import read_metrics
from sterna.train.recipe import make_recipe, merge_into


def _tiny():
    path = Path(__file__).parents[1] / "train" / "tiny.py"
    spec = importlib.util.spec_from_file_location("train_tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _tiny()


def word(chance, letters="abcdef"):
    return "".join(chance.choice(letters) for _ in range(chance.randint(3, 10)))


def write_pairs(path, count=300, seed=0, letters="abcdef"):
    """The chosen answer is lower-case, the rejected one is another word in upper case."""
    chance = random.Random(seed)
    rows = (
        {"prompt": word(chance, letters), "chosen": word(chance, letters),
         "rejected": word(chance, letters).upper()}
        for _ in range(count)
    )  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_labels(path, count=300, seed=0):
    chance = random.Random(seed)
    with path.open("w") as file:
        for i in range(count):
            said = word(chance)
            row = {"prompt": word(chance), "completion": said.upper() if i % 2 else said}
            file.write(json.dumps({**row, "label": i % 2 == 0}) + "\n")
    return path


def recipe(folder, kind="dpo", **sections):
    if not (folder / "model").exists():
        tiny.write_model(folder / "model")
        write_pairs(folder / "pairs.jsonl")
        write_labels(folder / "labels.jsonl")
    name = "labels.jsonl" if kind == "kto" else "pairs.jsonl"
    values = {
        "kind": kind,
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "sources": [{"path": str(folder / name), "epochs": 0}],
            "seq_len": 128,
            "window_tokens": 2048,
            "prefetch": 0,
            "held_out": 0.2,
        },
        "optim": {"lr": 3e-3},
        "run": {"output": str(folder / "run"), "steps": 4, "rows_per_step": 4, "threads": 1},
        "checkpoint": {"every": 0},
        "log": {"tensorboard": False, "report": False, "peak_tflops": 0.1},
    }
    merge_into(values, sections)
    return make_recipe(values, OfflineRecipe)


def run(made, **options):
    return train(made, task=choose_task(made), **options)


def lines(made, kind="step"):
    return [
        line for line in read_metrics(made.run.output / "metrics.jsonl") if line["kind"] == kind
    ]


def run_rank(folder, kind, sections):
    """A run on this rank: its loss, eval loss and last figures, or the refusal."""
    try:
        result = run(recipe(Path(folder), kind, **sections))
    except SternaError as error:
        return type(error).__name__, error.message
    return result.loss, result.eval_loss
