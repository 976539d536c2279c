"""Text the target wrote: prompts, what is trained, one generation a run."""

from __future__ import annotations

import numpy as np
import pytest

from sterna.core.errors import DataError
from sterna.data.loader import Loader
from sterna.data.pack import IGNORE, Document, join
from sterna.text.tokenizer import load_tokenizer
from sterna.train.distill.generated import document, row_prompts, with_generated

from .tiny import recipe


def row(*trained_from):
    documents = []
    for first in trained_from:
        tokens = np.arange(10, dtype=np.int32)
        targets = np.append(tokens[1:], IGNORE).astype(np.int32)
        targets[:first] = IGNORE
        documents.append(Document(tokens, targets, 0))
    return join(documents)


def test_a_prompt_ends_where_training_begins():
    """A chat up to its answer, the first tokens of a text, nothing of what trains nothing."""
    prompts = list(row_prompts(row(4, 0, 10), prompt_tokens=3))
    assert prompts == [[0, 1, 2, 3, 4], [0, 1, 2]]


def test_only_the_text_is_trained():
    made = document([5, 6, 7], [8, 9])
    assert made.tokens.tolist() == [5, 6, 7, 8, 9]
    assert made.targets.tolist() == [IGNORE, IGNORE, 8, 9, IGNORE]


def test_a_run_generates_once_and_trains_on_it(tmp_path):
    calls = []

    def generate(model, prompts, max_tokens, temperature, seed):
        calls.append((len(prompts), max_tokens, temperature))
        return [[7, 8, 9][: 1 + i % 3] for i in range(len(prompts))]

    asked = recipe(
        tmp_path,
        kind="distill",
        distill={"kind": "mlp_speculator", "generate": 20, "new_tokens": 3},
    )
    changed = with_generated(asked, generate)
    assert calls == [(8, 3, 0.0), (20, 3, 1.0)]  # held out greedily
    assert with_generated(asked, generate) == changed
    assert len(calls) == 2
    tokenizer = load_tokenizer(tmp_path / "model")
    with Loader(changed.eval.data, tokenizer) as rows:
        made = list(rows)
    assert sum(len(r.starts) - 1 for r in made) == 8
    wanted = {t for r in made for t in r.targets.tolist()}
    assert wanted == {IGNORE, 7, 8, 9}


def test_too_little_data_is_said(tmp_path):
    asked = recipe(
        tmp_path,
        kind="distill",
        distill={"kind": "mlp_speculator", "generate": 9_999},
        data={"sources": [{"path": str(tmp_path / "chats.jsonl")}]},
    )
    with pytest.raises(DataError, match="the data have 200 documents"):
        with_generated(asked, lambda *_: [])
    assert not (asked.run.output / "generated").exists()
