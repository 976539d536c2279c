"""A run of `sterna quality`: two models, their shared tokens, a progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sterna.core.errors import ConfigError, ModelError
from sterna.eval.quality import Quality, compare, cut_windows, summarise, together
from sterna.eval.scorer import load_scorer
from sterna.model.hub import resolve_model
from sterna.model.load import DTypeName
from sterna.text.tokenizer import load_tokenizer


def measure(
    models: tuple[str, str],
    files: Mapping[str, Path],
    window: int,
    max_windows: int,
    dtype: DTypeName,
    *,
    int8_activations: bool = False,
    is_quiet: bool,
) -> dict[str, Quality]:
    """One row a text, and "all" when there are several. int8_activations: of the second model.

    Raises ConfigError for an unreadable or too short text, ModelError for models of different
    vocabularies.
    """
    paths = [resolve_model(model) for model in models]
    domains = {
        name: cut_windows(_tokens(paths, file), window, max_windows, str(file))
        for name, file in files.items()
    }
    first, second = load_scorer(paths[0], dtype), load_scorer(paths[1], dtype, int8_activations)
    if first.vocab_size != second.vocab_size:
        raise ModelError(
            f"{models[0]} has {first.vocab_size} tokens, {models[1]} {second.vocab_size}; "
            "distributions over different vocabularies cannot be compared"
        )
    columns = (TextColumn("compare"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True, quiet=is_quiet)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        found = compare(first, second, domains, lambda i, n: bar.update(task, completed=i, total=n))
    rows = {name: summarise(positions) for name, positions in found.items()}
    return rows if len(rows) == 1 else {**rows, "all": summarise(together(list(found.values())))}


def _tokens(paths: list[Path], file: Path) -> list[int]:
    """The text's tokens, which both models must agree on."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text {file}: {error}; give a UTF-8 file") from error
    first, second = (load_tokenizer(path).encode(text) for path in paths)
    if first != second:
        raise ModelError(
            f"{paths[0]} and {paths[1]} cut {file} into different tokens; compare models of one "
            "tokenizer"
        )
    return first
