"""`sterna quality A B`: how far model B's predictions are from model A's, by text."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from sterna.cli.flags import AsJson
from sterna.core.errors import ConfigError
from sterna.core.log import setup_logging

if TYPE_CHECKING:
    from rich.table import Table

    from sterna.eval.quality import Quality

Domains = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)]
ALL = "all"


def quality(
    first: str,
    second: str,
    /,
    *,
    text: Path | None = None,
    domain: Domains = (),
    window: int = 512,
    max_windows: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    activations: Literal["auto", "int8"] = "auto",
    plot: Path | None = None,
    as_json: AsJson = False,
) -> int:
    """Compare two models' next-token distributions on texts: KL, top-1 agreement, perplexity.

    Each runs on the kernels it is served with. The second half of every window is scored.

    Parameters
    ----------
    first
        The model to compare with: a folder, a GGUF file or a name.
    second
        Its quantised or changed form, of the same vocabulary.
    text
        A UTF-8 text file.
    domain
        NAME=FILE, one more text with its own row; may be repeated.
    window
        Tokens of a window.
    max_windows
        Windows of each text to read; 0 reads all.
    dtype
        Of the activations (and of plain weights).
    activations
        int8 runs the second model, a quantised one, as `serve --activations int8` does.
    plot
        Save KL and top-1 agreement by text as a picture.
    as_json
        Print one JSON object.
    """
    from sterna.cli.quality_run import measure

    setup_logging("WARNING")
    if window < 4 or max_windows < 0:
        raise ConfigError(
            f"--window {window} (at least 4), --max-windows {max_windows} (0 or more)"
        )
    found = measure(
        (first, second),
        _files(text, domain),
        window,
        max_windows,
        dtype,
        int8_activations=activations == "int8",
        is_quiet=as_json,
    )
    if as_json:
        rows = {name: asdict(row) for name, row in found.items()}
        print(json.dumps({"first": first, "second": second, "window": window, "domains": rows}))
    else:
        from rich.console import Console

        Console(highlight=False).print(_table(found))
    if plot is not None:
        from sterna.cli.quality_plot import draw_quality

        draw_quality(found, f"{second} against {first}", plot)
    return 0


def _files(text: Path | None, domains: tuple[str, ...]) -> dict[str, Path]:
    files = {} if text is None else {text.stem: text}
    for entry in domains:
        name, equals, path = entry.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--domain {entry!r}; write NAME=FILE, such as code=main.py")
        if name in files or name == ALL:
            raise ConfigError(f"--domain {entry!r}: the name {name!r} is taken; choose another")
        files[name] = Path(path)
    if not files:
        raise ConfigError("no text to compare on; give --text FILE or --domain NAME=FILE")
    return files


def _table(found: dict[str, Quality]) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("text")
    for title in ("positions", "PPL first", "PPL second", "ln ratio", "mean KL", "median", "p99",
                  "top-1"):  # fmt: skip
        table.add_column(title, justify="right")
    for name, q in found.items():
        table.add_row(
            name,
            f"{q.positions:,}",
            f"{q.ppl_first:.3f}",
            f"{q.ppl_second:.3f}",
            f"{q.ln_ratio:+.4f} ± {q.ln_ratio_se:.4f}",
            f"{q.kl:.4f} ± {q.kl_se:.4f}",
            f"{q.kl_median:.4f}",
            f"{q.kl_p99:.4f}",
            f"{q.top1:.1%} ± {q.top1_se:.1%}",
        )
    return table
