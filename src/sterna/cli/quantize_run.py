"""A run of `sterna quantize`: progress while it works, the table of errors when it is done."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sterna.core.errors import QuantizeError
from sterna.kernels.load import load_kernels
from sterna.model.decoder import Decoder
from sterna.model.hub import resolve_model
from sterna.quant.awq import channel_scales
from sterna.quant.budget import choose_formats, price_formats
from sterna.quant.calibrate import input_mean_squares, random_mean_squares, random_tokens
from sterna.quant.convert import QuantizeOptions, quantize_folder
from sterna.quant.hessian import Hessians
from sterna.quant.load import load_quantized
from sterna.quant.report import ModelReport, WeightReport
from sterna.quant.sensitivity import row_sensitivities
from sterna.quant.sources import open_source
from sterna.quant.stream import OnLayer, StreamedDecoder
from sterna.text.tokenizer import load_tokenizer

_WORST = 12  # rows of the table; --json has them all
_MARGIN = 8  # characters a token, at most, that are read of a calibration text


class QuantizeRun:
    """One model, one output folder."""

    def __init__(
        self, model: str, output: Path, options: QuantizeOptions, *, is_quiet: bool
    ) -> None:
        load_kernels()
        self._source = resolve_model(model)
        self._output = output
        self._options = options
        self._seen: list[int] = []
        self._console = Console(stderr=True, quiet=is_quiet, highlight=False)

    def calibrate(self, text: Path, num_tokens: int) -> None:
        """Weigh inputs by their mean squares over a text. QuantizeError for an unusable one."""
        tokens = self._tokens(text, num_tokens)
        decoder = self._decoder()
        with self._progress("calibrate") as bar:
            squares = input_mean_squares(decoder, tokens, str(text), _advancer(bar))
        self._options = replace(self._options, importance=squares)
        self._seen = tokens

    def calibrate_at_random(self) -> None:
        """The same over random tokens."""
        decoder = self._decoder()
        with self._progress("calibrate") as bar:
            squares = random_mean_squares(decoder, _advancer(bar))
        self._options = replace(self._options, importance=squares)
        self._seen = random_tokens(decoder)

    def use_budget(self, bits: float) -> None:
        """Choose formats for `bits` a weight, after calibration. QuantizeError for too few."""
        self._require_plain("--bits")
        options = self._options
        if not options.importance:
            raise QuantizeError("--bits needs calibration; leave out --calibrate none")
        decoder = self._decoder()
        with self._progress("measure sensitivities") as bar:
            sensitivity = row_sensitivities(decoder, self._seen, _advancer(bar))
        with self._progress("price formats") as bar:
            prices = price_formats(
                decoder, options.importance, sensitivity, on_weight=_advancer(bar)
            )
        chosen = tuple(choose_formats(prices, decoder, bits).items())
        overrides = (*options.overrides, *chosen)
        self._options = replace(options, overrides=overrides, label=f"bits={bits:g}")

    def use_gptq(self, text: Path, num_tokens: int) -> None:
        """Round by Hessians over a text. QuantizeError for an unusable or too short one."""
        self._require_plain("--method gptq")
        tokens = self._tokens(text, num_tokens)
        hessians = Hessians(self._decoder(), tokens, str(text))
        self._options = replace(self._options, gptq=hessians)

    def use_awq(self) -> None:
        """Search channel scales. QuantizeError when nothing was calibrated or codes are kept."""
        self._require_plain("--method awq")
        options = self._options
        if options.format is None or not options.importance:
            raise QuantizeError(
                "--method awq needs a format and calibration; leave out --format keep and "
                "--calibrate none"
            )
        with self._console.status("scale channels"):
            scales = channel_scales(self._decoder(), options.importance, options.format)
        self._options = replace(options, awq=scales)

    def _require_plain(self, setting: str) -> None:
        """QuantizeError for a SwiftKV model: its later blocks are not walked one by one."""
        if open_source(self._source).config.swiftkv is not None:
            raise QuantizeError(
                f"{setting} does not work on SwiftKV models; leave it out (rounding to nearest, "
                "weighed by --calibrate), or use six bits, where the methods hardly differ"
            )

    def _tokens(self, text: Path, num_tokens: int) -> list[int]:
        try:
            with text.open(encoding="utf-8") as file:
                sample = file.read(num_tokens * _MARGIN)
        except (OSError, UnicodeDecodeError) as error:
            raise QuantizeError(f"calibration text {text}: {error}; give a UTF-8 file") from error
        return load_tokenizer(self._source).encode(sample)[:num_tokens]

    def _decoder(self) -> Decoder:
        """The source in bfloat16, not packed: a plain one block by block, at no time as a whole.

        A SwiftKV model is loaded whole.
        """
        checkpoint = open_source(self._source)  # refuses what is quantised already
        if checkpoint.packed is not None or checkpoint.config.swiftkv is not None:
            return load_quantized(checkpoint.path).decoder
        return StreamedDecoder(checkpoint, torch.bfloat16)

    def run(self) -> ModelReport | None:
        """Quantise; None when the folder is this command's result already."""
        with self._progress("quantise") as bar:
            task = bar.add_task("", total=None, name="")

            def on_weight(index: int, count: int, report: WeightReport) -> None:
                bar.update(task, completed=index + 1, total=count, name=report.name)

            return quantize_folder(self._source, self._output, self._options, on_weight)

    def as_json(self, report: ModelReport | None) -> dict[str, Any]:
        """All figures; `status` is "written" or "unchanged"."""
        facts: dict[str, Any] = {"output": str(self._output), "format": self._options.name}
        if report is None:
            return {**facts, "status": "unchanged"}
        weights = [
            {**asdict(w), "sqnr_db": _finite(w.sqnr_db), "bits_per_weight": w.bits_per_weight}
            for w in report.weights
        ]
        return {
            **facts,
            "status": "written",
            "bits_per_weight": report.bits_per_weight,
            "num_bytes": report.num_bytes,
            "num_parameters": report.num_parameters,
            "seconds": report.seconds,
            "weights": weights,
        }

    def show(self, report: ModelReport | None) -> None:
        """The worst weights and the totals, on stdout."""
        console = Console(highlight=False)
        if report is None:
            console.print(escape(f"{self._output} is the result of this command already"))
            return
        worst = sorted(report.weights, key=lambda w: -_badness(w))
        console.print(_table(worst[:_WORST]))
        if len(worst) > _WORST:
            console.print(f"[dim]the {_WORST} largest errors of {len(worst)} weights[/]")
        console.print(
            escape(
                f"{self._output}: {report.format}, {report.bits_per_weight:.3f} bits a weight all "
                f"included ({report.num_bytes / 1e6:,.1f} MB, {report.num_parameters / 1e6:,.1f} M "
                f"weights) in {report.seconds:.1f} s"
            )
        )

    def _progress(self, verb: str) -> Progress:
        columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        name = TextColumn("{task.fields[name]}")
        return Progress(*columns, name, console=self._console, transient=True)


def _advancer(bar: Progress) -> OnLayer:
    task = bar.add_task("", total=None, name="")
    return lambda done, count: bar.update(task, completed=done, total=count)


def _badness(report: WeightReport) -> float:
    """The predicted output error where calibrated, else the weight error."""
    return report.weight_error if report.output_error is None else report.output_error


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(reports: list[WeightReport]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("weight")
    table.add_column("format")
    for title in ("size", "bits", "weight error", "SQNR", "output error"):
        table.add_column(title, justify="right")
    for r in reports:
        output = "-" if r.output_error is None else f"{r.output_error:.4f}"
        table.add_row(
            r.name,
            r.format,
            f"{r.rows}x{r.in_features}",
            f"{r.bits_per_weight:.2f}",
            f"{r.weight_error:.4f}",
            f"{r.sqnr_db:.1f} dB",
            output,
        )
    return table
