"""The first 20 steps of a tiny model, as numbers that a change of the trainer must explain.

Regenerate: `python tests/golden/test_train_curve.py` (writes train_curve.json beside it).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import pytest

_FILE = Path(__file__).with_name("train_curve.json")
_TINY = Path(__file__).parents[1] / "unit" / "train" / "tiny.py"


def curve(folder: Path, dtype: str) -> list[dict[str, float]]:
    """Loss, gradient norm and trained tokens of each step."""
    from sterna.train.loop import train
    from sterna.train.metrics import read_metrics

    spec = importlib.util.spec_from_file_location("train_tiny", _TINY)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    recipe = tiny.recipe(
        folder, model={"dtype": dtype}, run={"steps": 20, "micro_rows": 2},
        optim={"weight_decay": 0.1}, schedule={"kind": "cosine", "warmup_steps": 3},
    )  # fmt: skip
    train(recipe)
    lines = [x for x in read_metrics(folder / "run/metrics.jsonl") if x["kind"] == "step"]
    return [{key: line[key] for key in ("loss", "grad_norm", "targets")} for line in lines]


# float32: sums in another order (instruction set, threads) give other last digits, which 20 steps
# grow to about 1e-4. bfloat16: a weight that rounds the other way moves the loss by about 1e-2.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_the_curve_is_the_golden_one(tmp_path, dtype, tolerance):
    golden = json.loads(_FILE.read_text())[dtype]
    found = curve(tmp_path, dtype)
    assert [line["targets"] for line in found] == [line["targets"] for line in golden]
    for now, then in zip(found, golden, strict=True):
        assert now["loss"] == pytest.approx(then["loss"], rel=tolerance)
        assert now["grad_norm"] == pytest.approx(then["grad_norm"], rel=20 * tolerance)


if __name__ == "__main__":
    curves = {}
    for name in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as work:
            curves[name] = [
                {key: round(value, 6) for key, value in line.items()}
                for line in curve(Path(work), name)
            ]
    text = json.dumps(curves).replace("}, ", "},\n  ").replace("], ", "],\n ")
    _FILE.write_text(text + "\n")
    sys.stdout.write(f"wrote {_FILE.name}\n")
