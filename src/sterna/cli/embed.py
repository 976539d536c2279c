"""`sterna embed`: a file of texts to vectors."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from cyclopts.validators import Number
from numpy.typing import NDArray

from sterna.cli.embed_files import check_files
from sterna.cli.embed_run import EmbedSummary, Parts, embed_file, manifest_of
from sterna.cli.flags import DEFAULT_ENGINE, AsJson, ConfigFiles, EngineOptions
from sterna.core.errors import ConfigError
from sterna.core.log import setup_logging


def embed(
    file: Path,
    /,
    *,
    model: str,
    output: Annotated[Path, Parameter(name=("--output", "-o"))],
    field: str = "text",
    dimensions: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    prompt_name: str = "",
    truncate: bool = False,
    as_json: AsJson = False,
    config: ConfigFiles = (),
    engine: EngineOptions = DEFAULT_ENGINE,
) -> int:
    """Embed a file of texts: .txt (one a line), .jsonl or .parquet.

    Parameters
    ----------
    file
        The texts. A run that was cut off goes on where it stopped.
    model
        Folder, GGUF file or name of an embedding model.
    output
        .npy (float32, one row a text) or .parquet (index, embedding).
    field
        Key of the text in JSONL, column in Parquet.
    dimensions
        Only the first so many numbers of a vector.
    prompt_name
        One of the model's own prompts, put before each text.
    truncate
        Cut texts longer than the model takes, instead of refusing them.
    as_json
        Print the summary as JSON.
    """
    setup_logging("WARNING")
    check_files(file, output)
    if engine.task == "generate":
        raise ConfigError("task is generate; sterna embed embeds, leave it out", param="task")
    settings = {
        "model": model, "field": field, "dimensions": dimensions, "prompt_name": prompt_name,
        "truncate": truncate, **engine.model_dump(mode="json"), "task": "embed",
    }  # fmt: skip
    started = time.monotonic()
    parts = Parts(output, manifest_of(file, settings))

    from sterna.engine.llm import LLM
    from sterna.engine.progress import counting

    options = engine.model_dump() | {"task": "embed"}
    with LLM(model, **options) as llm, counting(None, file.name, _is_shown(as_json)) as note:

        def run(texts: Sequence[str]) -> NDArray[np.float32]:
            found = llm.embed(
                texts,
                dimensions=dimensions,
                prompt_name=prompt_name or None,
                truncate=-1 if truncate else None,
                progress=False,
            )
            note(len(texts))
            return found

        rows, resumed = embed_file(file, field, parts, run, note)
    summary = EmbedSummary(rows, resumed, round(time.monotonic() - started, 3), str(output))
    _print(summary, as_json)
    return 0


def _is_shown(as_json: bool) -> bool:
    return not as_json and sys.stderr.isatty()


def _print(summary: EmbedSummary, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary.as_dict()))
        return
    speed = (summary.texts - summary.resumed) / max(summary.seconds, 1e-3)
    print(
        f"{summary.texts:,} texts in {summary.output} ({summary.resumed:,} were done before), "
        f"{speed:,.0f} a second"
    )
