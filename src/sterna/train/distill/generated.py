"""Text that the target wrote itself: what a speculator has to predict when it serves.

Every document of the data gives one prompt: what precedes its first trained token (a chat up to the
answer), or its first `prompt_tokens` tokens where all of it is trained. The target continues them
through a callable (an engine in this process), and only what it wrote is trained. Held-out prompts
are continued greedily, so that simulated acceptance is what greedy verification would accept.

Both parts are token shards in `generated/` of the run; a run that goes on reads them again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from sterna.core.errors import DataError
from sterna.data.config import DataConfig, SourceConfig
from sterna.data.loader import Loader
from sterna.data.pack import IGNORE, Document, PackedRow
from sterna.data.shards import write_shards
from sterna.model.hub import resolve_model
from sterna.text.tokenizer import load_tokenizer
from sterna.train.config import Recipe

# (model, prompts as token ids, most new tokens, temperature, seed) -> the new token ids of each
GenerateIds = Callable[[str, Sequence[Sequence[int]], int, float, int], Sequence[Sequence[int]]]
FOLDER = "generated"
_HELD_OUT = 0.05
_LEAST_HELD_OUT = 8


def with_generated(recipe: Recipe, generate: GenerateIds) -> Recipe:
    """`recipe` on text its model continued, which is generated unless the run has it already.

    DataError when the data hold fewer documents than are asked for.
    """
    folder = recipe.run.output / FOLDER
    if not folder.exists():
        work = folder.with_name(f".{FOLDER}.tmp")
        shutil.rmtree(work, ignore_errors=True)
        _write(recipe, generate, work)
        os.replace(work, folder)
    return _on_shards(recipe, folder)


def _on_shards(recipe: Recipe, folder: Path) -> Recipe:
    def data(part: str, epochs: int) -> DataConfig:
        values = {"path": str(folder / part), "kind": "shards", "epochs": epochs}
        source = SourceConfig.model_validate(values)
        changed = {"sources": (source,), "held_out": 0.0}
        return recipe.data.model_copy(update=changed)

    evals = recipe.eval.model_copy(update={"data": data("held_out", 1)})
    return recipe.model_copy(update={"data": data("train", 0), "eval": evals})


def _write(recipe: Recipe, generate: GenerateIds, folder: Path) -> None:
    settings, path = recipe.distill, resolve_model(recipe.model.path)
    tokenizer = load_tokenizer(path)
    held_out = max(_LEAST_HELD_OUT, round(settings.generate * _HELD_OUT))
    count = settings.generate + held_out
    with Loader(recipe.data, tokenizer) as loader:
        prompts = list(islice(_prompts(loader, settings.prompt_tokens), count))
    if len(prompts) < count:
        raise DataError(
            f"distill.generate asks for {settings.generate} texts and {held_out} held out, the "
            f"data have {len(prompts)} documents; lower it, or give more data"
        )
    parts = {
        "held_out": (prompts[:held_out], 0.0),
        "train": (prompts[held_out:], settings.generate_temperature),
    }
    for name, (begun, temperature) in parts.items():
        texts = generate(
            recipe.model.path, begun, settings.new_tokens, temperature, recipe.run.seed
        )
        documents = (document(p, t) for p, t in zip(begun, texts, strict=True) if len(t))
        write_shards(documents, folder / name, tokenizer.fingerprint, tokenizer.vocab_size)


def _prompts(rows: Loader, prompt_tokens: int) -> Iterator[list[int]]:
    for row in rows:
        yield from row_prompts(row, prompt_tokens)


def row_prompts(row: PackedRow, prompt_tokens: int) -> Iterator[list[int]]:
    """One prompt a document of the row; none for a document without a trained token."""
    for begin, end in zip(row.starts[:-1], row.starts[1:], strict=True):
        trained = np.flatnonzero(row.targets[begin:end] != IGNORE)
        if len(trained):
            size = int(trained[0]) + 1 if trained[0] else prompt_tokens
            yield row.tokens[begin : min(begin + size, end)].tolist()


def document(prompt: Sequence[int], text: Sequence[int]) -> Document:
    """Prompt and text as one document that trains the text."""
    tokens = np.asarray([*prompt, *text], np.int32)
    targets = np.append(tokens[1:], IGNORE).astype(np.int32)
    targets[: len(prompt) - 1] = IGNORE
    return Document(tokens, targets, 0)
