"""`sterna quantize` and `sterna dequantize`: smaller weights, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from sterna.cli.flags import AsJson
from sterna.core.errors import ConfigError
from sterna.core.log import setup_logging

Output = Annotated[Path, Parameter(name=["--output", "-o"])]
Texts = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)]
KEEP = "keep"
DEFAULT_FORMAT = "fp6"
RANDOM, NONE = "random", "none"


def quantize(
    model: str = "",
    /,
    *,
    output: Output,
    format: str = DEFAULT_FORMAT,
    method: Literal["rtn", "gptq", "awq"] = "rtn",
    bits: float = 0,
    targets: Literal["blocks", "all"] = "all",
    scales: Literal["absmax", "fast", "mse"] = "mse",
    scale_type: Literal["auto", "float32", "float16", "e8m0"] = "auto",
    override: Texts = (),
    calibrate: str = "random",
    calibrate_tokens: int = 16_384,
    plot: Path | None = None,
    as_json: AsJson = False,
) -> int:
    """Write a model's weights in six bits (or another width) to a folder that `serve` reads.

    A stopped run goes on where it was when the same command is given again.

    Parameters
    ----------
    model
        Folder, GGUF file or name; empty is the default model.
    output
        The folder to write; it appears when it is complete.
    format
        fp6, fp6-e3m2, fp6-mixed, fp5, fp4, fp8, int4, int5, int6, int8, each also with -g32, -g64
        or -g128; mxfp4, mxfp6, mxfp6-e3m2; keep (the codes of a GPTQ or AWQ checkpoint).
    method
        rtn rounds to nearest; gptq lets other weights make up for each error (needs --calibrate
        FILE; minutes); awq scales input channels into the norms first.
    bits
        Choose a format for every weight, for the least predicted KL at this many bits a weight
        all included; in the place of --format. 0 is off.
    targets
        all, or blocks: leave the embedding and the head in bfloat16.
    scales
        absmax, or searched for the smallest error on 12 (fast) or 45 (mse) points.
    scale_type
        auto is float32 for one scale a row, float16 for groups.
    override
        GLOB=FORMAT for weights by name, such as layers.*.mlp.down=int8 or lm_head=bf16.
    calibrate
        What shows which inputs matter: a text file, random (512 random tokens) or none.
    calibrate_tokens
        Tokens of the file to read.
    plot
        Save the error of every weight as a picture.
    as_json
        Print one JSON object.
    """
    from sterna.cli.quantize_run import QuantizeRun

    setup_logging("WARNING")
    if bits:
        _check_budget(bits, format, targets)
    if method == "gptq":
        _check_gptq(format, calibrate)
    options = _options(format, targets, scales, scale_type, override)
    run = QuantizeRun(model, output, options, is_quiet=as_json)
    _prepare(run, method, bits, calibrate, calibrate_tokens)
    report = run.run()
    if as_json:
        print(json.dumps(run.as_json(report), indent=2))
    else:
        run.show(report)
    if plot is not None and report is not None:
        from sterna.cli.quantize_plot import draw_errors

        draw_errors(report, plot)
    return 0


def _prepare(run: Any, method: str, bits: float, calibrate: str, num_tokens: int) -> None:
    """Calibrate, choose formats, scale channels: what comes before the first weight."""
    if method == "gptq":
        run.use_gptq(Path(calibrate), num_tokens)
    if calibrate == RANDOM:
        run.calibrate_at_random()
    elif calibrate != NONE and (bits or method != "gptq"):
        run.calibrate(Path(calibrate), num_tokens)
    if bits:
        run.use_budget(bits)
    if method == "awq":
        run.use_awq()


def _check_gptq(format_name: str, calibrate: str) -> None:
    if format_name == KEEP:
        raise ConfigError("--method gptq rounds anew, --format keep keeps codes; choose one")
    if calibrate in (RANDOM, NONE):
        raise ConfigError(
            f"--method gptq with --calibrate {calibrate}; it needs a text: --calibrate FILE"
        )


def _check_budget(bits: float, format_name: str, targets: str) -> None:
    if bits < 0:
        raise ConfigError(f"--bits {bits:g}; give a positive number such as 5.5")
    if format_name != DEFAULT_FORMAT or targets != "all":
        raise ConfigError(
            "--bits chooses the format of every weight; leave out --format and --targets "
            "(--override still fixes weights by name)"
        )


def dequantize(
    model: str,
    /,
    *,
    output: Output,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> int:
    """Write the plain weights of a quantised model (or GGUF file) as a Hugging Face folder.

    Parameters
    ----------
    model
        Folder of a quantised model, or a GGUF file.
    output
        The folder to write.
    dtype
        float32 holds the quantised values exactly; the others round once.
    """
    from sterna.model.hub import resolve_model
    from sterna.quant.export import dequantize_folder

    setup_logging("WARNING")
    dequantize_folder(resolve_model(model), output, dtype)
    print(f"{output}: plain weights in {dtype}")
    return 0


def _options(
    format_name: str, targets: Any, search: Any, scale_type: Any, overrides: tuple[str, ...]
) -> Any:
    """QuantizeOptions of the flags. ConfigError for an unknown format or a scale that is fixed."""
    from sterna.quant.convert import QuantizeOptions, parse_overrides
    from sterna.quant.formats import parse_format

    kind = None if scale_type == "auto" else scale_type
    if format_name == KEEP and kind is not None:
        raise ConfigError("--scale-type has no effect with --format keep; leave it out")
    fmt = None if format_name == KEEP else parse_format(format_name, kind)
    return QuantizeOptions(fmt, targets, search, parse_overrides(overrides, parse_format))
