"""`sterna convert swiftkv`: distil a model into its SwiftKV form; measure, then write or refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from sterna.core.errors import TrainError
from sterna.core.log import setup_logging
from sterna.core.rundir import refuse_existing

if TYPE_CHECKING:
    from sterna.train.distill.measure import StudentQuality

Paths = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)]
REPORT, PLOT = "swiftkv.json", "swiftkv.png"


def swiftkv(
    model: str = "",
    /,
    *,
    data: Paths,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    max_drop: float = 0.5,
    layers: int = 0,
    group_size: int = 1,
    steps: int = 1000,
    rows_per_step: int = 8,
    seq_len: int = 1024,
    lr: float = 1e-3,
    train_on: Literal["completions", "all", "last"] = "completions",
    held_out: float = 0.02,
    eval_rows: int = 64,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    threads: int = 0,
    run: Path | None = None,
) -> int:
    """Make a model whose prompt tokens run only its first layers (SwiftKV, arXiv 2410.03960).

    A stopped conversion goes on where it was when the same command is given again. The folder is
    written only when the held-out accuracy fell by no more than --max-drop; swiftkv.json and
    swiftkv.png in it say what it cost. Quantised models are taught by their dequantised weights.

    Parameters
    ----------
    model
        Folder, GGUF file or name; empty is the default model.
    data
        Training files, as in [[data.sources]] of a recipe; may be repeated.
    output
        The folder to write; it appears when it is complete.
    max_drop
        Points of held-out next-token accuracy that may be lost.
    layers
        First layers that every token runs; 0 is half of them.
    group_size
        Later layers that share keys and values (AcrossKV).
    steps
        Optimizer steps.
    rows_per_step
        Packed rows of a step.
    seq_len
        Tokens of a row.
    lr
        Peak learning rate, with 5 % warm-up and a cosine.
    train_on
        Which tokens the losses are taken on.
    held_out
        Share of the data kept out of training, on which quality is measured.
    eval_rows
        Held-out rows to measure on, at most.
    dtype
        Of weights and activations.
    threads
        CPU threads; 0 is all.
    run
        Folder of the run with its checkpoints and report.html; OUTPUT.run when not given.
    """
    refuse_existing(output)
    folder = run or output.with_name(output.name + ".run")
    values: dict[str, Any] = {
        "model": {"path": model, "dtype": dtype},
        "distill": {"layers": layers, "group_size": group_size},
        "data": {"seq_len": seq_len, "train_on": train_on, "held_out": held_out},
        "optim": {"lr": lr},
        "run": {"steps": steps, "rows_per_step": rows_per_step, "threads": threads},
        "eval": {"max_rows": eval_rows},
    }
    return _convert(values, data, folder, output, max_drop)


def _convert(
    values: dict[str, Any], data: tuple[str, ...], folder: Path, output: Path, max_drop: float
) -> int:
    from sterna.train.distill.measure import last_quality
    from sterna.train.loop import train
    from sterna.train.recipe import make_recipe, merge_into

    setup_logging()
    steps = values["run"]["steps"]
    often = {"every": max(1, steps // 10)}
    rest: dict[str, Any] = {
        "kind": "distill",
        "distill": {"kind": "swiftkv"},
        "data": {"sources": [{"path": path, "epochs": 0} for path in data]},
        "schedule": {"warmup_steps": _warm_up(folder, steps)},
        "run": {"output": folder},
        "eval": often,
        "checkpoint": often,
    }
    merge_into(values, rest)
    train(make_recipe(values), resume=(folder / "checkpoints").exists())
    quality = last_quality(folder)
    _require(quality, max_drop, folder)
    assert quality is not None
    _publish(folder, output, quality, max_drop)
    print(f"{output}: {_describe(quality)}")
    return 0


def _warm_up(folder: Path, steps: int) -> int:
    """A twentieth of the steps; what it began with where a run goes on, perhaps with more steps."""
    from sterna.train.checkpoint import newest

    kept = newest(folder / "checkpoints") if (folder / "checkpoints").exists() else None
    if kept is None:
        return steps // 20
    recipe = json.loads((kept / "trainer.json").read_text())["recipe"]
    return int(recipe["schedule"]["warmup_steps"])


def _require(quality: StudentQuality | None, max_drop: float, folder: Path) -> None:
    """TrainError when the student was not measured or is worse than allowed."""
    if quality is None or not quality.num_tokens:
        raise TrainError("no held-out token to measure on; give more data or a larger --held-out")
    if quality.drop > max_drop:
        raise TrainError(
            f"{_describe(quality)}; --max-drop allows {max_drop:g} points. Train longer (--steps), "
            f"keep more layers (--layers), or allow more. The student is in {folder / 'model'}"
        )


def _describe(q: StudentQuality) -> str:
    return (
        f"held-out accuracy {100 * q.teacher_accuracy:.2f} -> {100 * q.student_accuracy:.2f} % "
        f"({q.drop:.2f} +- {100 * q.accuracy_error:.2f} points lost), loss {q.teacher_loss:.4f} -> "
        f"{q.student_loss:.4f}, KL {q.kl:.4f} over {q.num_tokens:,} tokens"
    )


def _publish(folder: Path, output: Path, quality: StudentQuality, max_drop: float) -> None:
    """The model folder with its report beside the weights."""
    from dataclasses import asdict

    from sterna.cli.convert_plot import draw_student
    from sterna.core.rundir import write_atomic
    from sterna.train.checkpoint import newest, publish
    from sterna.train.distill.measure import FILE
    from sterna.train.metrics import read_metrics

    found = {**asdict(quality), "drop": quality.drop, "loss_rise": quality.loss_rise}
    report = {"max_drop": max_drop, **found}
    latest = newest(folder / "checkpoints")
    assert latest is not None
    draw_student(list(read_metrics(folder / FILE)), max_drop, folder / PLOT)
    publish(latest, output)
    (output / PLOT).write_bytes((folder / PLOT).read_bytes())
    write_atomic(output / REPORT, json.dumps(report, indent=2) + "\n")
