"""`sterna data inspect` and `sterna data pack`: training data seen and prepared without a run."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from sterna.cli.failures import describe_validation
from sterna.cli.flags import AsJson
from sterna.core.errors import ConfigError
from sterna.core.log import setup_logging

if TYPE_CHECKING:
    from sterna.data.config import DataConfig
    from sterna.data.counts import Counts
    from sterna.data.pack import PackedRow
    from sterna.text.tokenizer import Tokenizer

Fields = Annotated[dict[str, str] | None, Parameter(negative=())]
TrainOn = Literal["completions", "all", "last"]


def inspect(
    *paths: str,
    model: str,
    recipe: Path | None = None,
    format: str = "auto",
    fields: Fields = None,
    documents: str = "file",
    split: str = "train",
    train_on: TrainOn = "completions",
    on_bad_row: Literal["fail", "skip"] = "skip",
    seq_len: int = 2048,
    show: int = 1,
    as_json: AsJson = False,
) -> int:
    """Read all rows once: what is malformed or too long, how well rows fill, what is trained.

    Parameters
    ----------
    paths
        Files, folders or patterns; or give --recipe.
    model
        The model whose tokenizer and chat template are used.
    recipe
        A TOML file with a [data] section, instead of paths.
    format
        Of the rows: chat, prompt_completion, alpaca, sharegpt, text, or auto.
    fields
        --fields.prompt question: our field and its name (or dotted path) in the rows.
    documents
        What is one document of a text file: file, line or blank_line.
    split
        Of a dataset folder that has several.
    train_on
        Completions, all, or the last turn only.
    on_bad_row
        Skip malformed rows and name them, or fail at the first.
    seq_len
        Tokens of a packed row.
    show
        Documents to print, trained tokens marked.
    as_json
        Print one JSON object.
    """
    from sterna.data.loader import Loader

    setup_logging("WARNING")
    source = {"format": format, "fields": fields or {}, "documents": documents, "split": split}
    settings = {"train_on": train_on, "on_bad_row": on_bad_row, "seq_len": seq_len}
    data, tokenizer = _settings(paths, recipe, source, settings), _tokenizer(model)
    once = [source.model_copy(update={"epochs": 1}) for source in data.sources]
    shown: list[PackedRow] = []
    with Loader(data.model_copy(update={"sources": tuple(once)}), tokenizer) as loader:
        for row in loader:
            shown.extend([row] if len(shown) < show else [])
        counts = loader.counts
    if as_json:
        print(json.dumps({**counts.of, "fill": counts.fill, "bad_rows": counts.bad_rows}))
        return 0
    for row in shown:
        _show(row, tokenizer)
    _print_counts(counts)
    return 0


def pack(
    *paths: str,
    model: str,
    out: Path,
    recipe: Path | None = None,
    format: str = "auto",
    fields: Fields = None,
    documents: str = "file",
    split: str = "train",
    train_on: TrainOn = "completions",
    on_bad_row: Literal["fail", "skip"] = "fail",
    shard_tokens: int = 1 << 27,
) -> int:
    """Tokenise sources once and write them as token shards, to be read as `path = "FOLDER"`.

    Parameters
    ----------
    paths
        Files, folders or patterns; or give --recipe.
    model
        The model whose tokenizer and chat template are used.
    out
        The folder to write.
    recipe
        A TOML file with a [data] section, instead of paths.
    format
        Of the rows: chat, prompt_completion, alpaca, sharegpt, text, or auto.
    fields
        --fields.prompt question: our field and its name (or dotted path) in the rows.
    documents
        What is one document of a text file: file, line or blank_line.
    split
        Of a dataset folder that has several.
    train_on
        Completions, all, or the last turn only.
    on_bad_row
        Fail at the first malformed row, or skip and name them.
    shard_tokens
        About so many tokens a file.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from sterna.data.prepare import pack_shards

    setup_logging("WARNING")
    source = {"format": format, "fields": fields or {}, "documents": documents, "split": split}
    settings = {"train_on": train_on, "on_bad_row": on_bad_row}
    data, tokenizer = _settings(paths, recipe, source, settings), _tokenizer(model)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading")

        def tick(counts: Counts) -> None:
            of = counts.of
            text = f"{of['documents']:,} documents, {of['tokens']:,} tokens"
            progress.update(task, description=text)

        counts = pack_shards(data, tokenizer, out, shard_tokens=shard_tokens, tick=tick)
    _print_counts(counts)
    return 0


def _tokenizer(model: str) -> Tokenizer:
    from sterna.model.hub import resolve_model
    from sterna.text.tokenizer import load_tokenizer

    return load_tokenizer(resolve_model(model))


def _settings(
    paths: tuple[str, ...],
    recipe: Path | None,
    source: dict[str, Any],
    settings: dict[str, Any],
) -> DataConfig:
    """The settings of the paths and options, or of the recipe's [data] section."""
    from pydantic import ValidationError

    from sterna.data.config import DataConfig

    if bool(paths) == (recipe is not None):
        raise ConfigError("give either paths or --recipe FILE with a [data] section")
    try:
        if recipe is not None:
            return DataConfig.model_validate(tomllib.loads(recipe.read_text())["data"])
        return DataConfig.model_validate(
            {"sources": [{"path": path, **source} for path in paths], **settings}
        )
    except ValidationError as error:
        raise ConfigError(describe_validation(error)) from error
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise ConfigError(f"{recipe}: no recipe with a [data] section ({error})") from error


def _show(row: PackedRow, tokenizer: Tokenizer) -> None:
    """The first document of a row; the trained text in green, or between « » in a pipe."""
    from rich.console import Console
    from rich.text import Text

    end = int(row.starts[1])
    console, text = Console(), Text()
    is_trained = [False, *(int(t) >= 0 for t in row.targets[: end - 1])]
    at = 0
    for i in range(1, end + 1):
        if i == end or is_trained[i] != is_trained[at]:
            piece = tokenizer.decode([int(t) for t in row.tokens[at:i]], skip_special_tokens=False)
            marked = piece if console.is_terminal or not is_trained[at] else f"«{piece}»"
            text.append(marked, "green" if is_trained[at] else "dim")
            at = i
    console.print(text, soft_wrap=True)


def _print_counts(counts: Counts) -> None:
    of = counts.of
    print(
        f"{of['rows']:,} rows: {of['documents']:,} documents, {of['tokens']:,} tokens, "
        f"{of['targets']:,} of them trained; {of['bad_rows']:,} rows malformed, "
        f"{of['too_long']:,} documents too long, {of['untrained']:,} without a target"
    )
    if of["packed_rows"]:
        print(f"{of['packed_rows']:,} packed rows, {counts.fill:.1%} full")
    for line in counts.bad_rows:
        print(line, file=sys.stderr)
