"""Small runs: a tiny Llama with a byte tokenizer, and a reward that it can learn."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sterna.align.config import RlRecipe
from sterna.align.reward import Sample

_SPEC = importlib.util.spec_from_file_location(
    "align_tiny_model", Path(__file__).parents[1] / "train" / "tiny.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)


def recipe(folder: Path, **sections: Any) -> RlRecipe:
    """Three steps of 4 x 4 completions of up to 6 tokens in `folder`/run."""
    if not (folder / "model").exists():
        tiny.write_model(folder / "model")
    values: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "prompts": {"task": "arithmetic", "render": "plain"},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_tokens": 6},
        "algorithm": {"kind": "grpo"},
        "optim": {"lr": 1e-3},
        "run": {"output": str(folder / "run"), "steps": 3, "threads": 1, "report": False},
        "checkpoint": {"every": 1, "keep_last": 9, "is_async": False},
    }
    for name, section in sections.items():
        values[name] = section if isinstance(section, list) else {**values.get(name, {}), **section}
    return RlRecipe.model_validate(values)


class Low:
    """Rewards bytes below 100: what the tiny model can learn in a few steps."""

    name = "low"

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """The share of such tokens."""
        return [float((s.rollout.completion < 100).mean()) for s in samples]
