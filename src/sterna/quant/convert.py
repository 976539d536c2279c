"""A checkpoint becomes a folder of quantised weights, one weight at a time.

At no time is more than one weight in memory as float32 (2 GB for the embedding of an 8B model);
the source is mapped and the output written in place, so an 8B model needs about 5 GB.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sterna.core.errors import ConfigError, QuantizeError
from sterna.kernels.quant_weight import QuantWeight
from sterna.model.swiftkv import new_decoder
from sterna.model.weights import read_parameter, split_parts
from sterna.quant.awq import ChannelScales
from sterna.quant.file import FILE_NAME, VERSION, TensorSpec, WeightSpec, weight_spec
from sterna.quant.formats import SCALE_DTYPES, WeightFormat
from sterna.quant.gptq import gptq_weight
from sterna.quant.hessian import Hessians
from sterna.quant.linear import weight_shapes
from sterna.quant.report import ModelReport, WeightReport, weight_report
from sterna.quant.rtn import ScaleSearch, quantize_weight
from sterna.quant.sources import STERNA, Checkpoint, open_source, small_files
from sterna.quant.writer import ContainerWriter

Targets = Literal["blocks", "all"]
_REST_DTYPE = torch.bfloat16
_HEADS = ("embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What becomes of each weight.

    format: None keeps the codes of a GPTQ or AWQ checkpoint. targets: "blocks" leaves embedding
    and head in bfloat16. overrides: (glob of module names, format or None = bfloat16), the first
    match wins. importance: mean square of each weight's inputs, by module name. gptq: the Hessians
    to round by, instead of to nearest. awq: scales to multiply input channels by before. label:
    what the file says of its format when overrides make it several.
    """

    format: WeightFormat | None
    targets: Targets = "all"
    search: ScaleSearch = "mse"
    overrides: tuple[tuple[str, WeightFormat | None], ...] = ()
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    gptq: Hessians | None = None
    awq: ChannelScales | None = None
    label: str = ""
    is_measured: bool = True

    @property
    def name(self) -> str:
        """The label if there is one, the format's name, "keep" for the checkpoint's own."""
        return self.label or (self.format.name if self.format else "keep")


OnWeight = Callable[[int, int, WeightReport], None]  # index, count, what was done


def quantize_folder(
    source: Path, out: Path, options: QuantizeOptions, on_weight: OnWeight | None = None
) -> ModelReport | None:
    """Write the quantised `source` to the folder `out`; None when that was done before.

    Weights that an interrupted run has written are kept (they are in no report). Raises
    QuantizeError for a source that is quantised already, weights that are not finite, a folder in
    the way or a full disk; ModelError as loading would.
    """
    started = time.perf_counter()
    checkpoint = open_source(source)
    job = _job(checkpoint, options)
    if _is_done(out, job):
        return None
    plan = _Plan(checkpoint, options)
    with ContainerWriter(out, job, options.name, plan.tensors, plan.specs) as writer:
        if _is_done(out, job):  # by the process this one has waited for
            return None
        reports = _write_weights(plan, writer, options, on_weight)
        _write_rest(plan, writer)
        writer.finish(_texts(checkpoint, options, job))
    size = (out / FILE_NAME).stat().st_size
    seconds = time.perf_counter() - started
    return ModelReport(options.name, tuple(reports), size, plan.num_parameters, seconds)


class _Plan:
    """Which weight gets which format, and every tensor of the output."""

    def __init__(self, checkpoint: Checkpoint, options: QuantizeOptions) -> None:
        self.checkpoint = checkpoint
        self.awq = options.awq or ChannelScales({}, {})
        self.decoder = new_decoder(checkpoint.config, _REST_DTYPE, "meta")
        self.formats: dict[str, WeightFormat] = {}
        self.specs: dict[str, WeightSpec] = {}
        self.tensors: list[TensorSpec] = []
        for name, rows, in_features, is_gated in weight_shapes(self.decoder):
            fmt = self._format(name, options)
            if fmt is not None:
                self.formats[name] = fmt
                self.specs[name] = weight_spec(fmt, rows, in_features, is_gated)
                self.tensors += self.specs[name].tensors(name, SCALE_DTYPES[fmt.scale])
        parameters = dict(self.decoder.named_parameters())
        self.num_parameters = sum(p.numel() for p in parameters.values())
        quantised = {f"{name}.weight" for name in self.formats}
        self.rest = {name: p for name, p in parameters.items() if name not in quantised}
        self.tensors += [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in self.rest_parts()]

    def rest_parts(self) -> list[tuple[str, Tensor]]:
        """Output name and (meta) tensor of everything that is not quantised."""
        config = self.checkpoint.config
        parts = (split_parts(n, p, config.hf_names, config) for n, p in self.rest.items())
        return [pair for pairs in parts for pair in pairs]

    def _format(self, name: str, options: QuantizeOptions) -> WeightFormat | None:
        for pattern, fmt in options.overrides:
            if fnmatch.fnmatchcase(name, pattern):
                return fmt
        if options.format is None:
            packed, bases = self.checkpoint.packed, self.checkpoint.packed_names(name)
            return packed.form(bases).format if packed and bases else None
        return None if options.targets == "blocks" and name in _HEADS else options.format

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter's value, channels scaled."""
        if name in self.awq.norms:
            return self.awq.norms[name].to(dtype)
        c, shape = self.checkpoint, self.decoder.get_parameter(name).shape
        value = read_parameter(c.source, name, c.names, shape, dtype)
        factors = self.awq.columns.get(name.removesuffix(".weight"))
        return value if factors is None else value * factors


def _write_weights(
    plan: _Plan, writer: ContainerWriter, options: QuantizeOptions, on_weight: OnWeight | None
) -> list[WeightReport]:
    reports = []
    # The head last: Hessians come in the order of the forward, also that of a tied table.
    order = sorted(plan.formats.items(), key=lambda item: item[0] in _HEADS)
    for i, (name, fmt) in enumerate(order):
        names = [spec.name for spec in plan.specs[name].tensors(name, SCALE_DTYPES[fmt.scale])]
        if all(map(writer.has, names)):
            continue
        weight, report = _quantised(plan, name, fmt, options)
        for tensor_name in names:
            writer.write(tensor_name, getattr(weight, tensor_name.rpartition(".")[2]))
        reports.append(report)
        if on_weight is not None:
            on_weight(i, len(plan.formats), report)
    return reports


def _quantised(
    plan: _Plan, name: str, fmt: WeightFormat, options: QuantizeOptions
) -> tuple[QuantWeight, WeightReport]:
    spec, importance = plan.specs[name], _importance(plan, name, options)
    plain = plan.read(f"{name}.weight", torch.float32)
    checkpoint = plan.checkpoint
    bases = checkpoint.packed_names(name) if options.format is None else ()
    if checkpoint.packed is not None and bases:
        weight = checkpoint.packed.weight(bases, spec.is_gated)
    elif importance is not None and importance.dim() == 2:
        weight = gptq_weight(plain, importance, fmt, is_gated=spec.is_gated, name=name)
    else:
        weight = quantize_weight(
            plain, fmt, search=options.search, importance=importance, is_gated=spec.is_gated,
            name=name,
        )  # fmt: skip
    if not options.is_measured:
        nan = float("nan")
        shape = (plain.shape[0], plain.shape[1], weight.nbytes)
        return weight, WeightReport(name, fmt.name, *shape, nan, None)
    halves = plain.chunk(1 + spec.is_gated)
    return weight, weight_report(name, fmt.name, halves, weight, importance)


def _importance(plan: _Plan, name: str, options: QuantizeOptions) -> Tensor | None:
    """A weight's Hessian [K, K] when GPTQ rounds it, else its inputs' mean squares [K]."""
    hessian = None if options.gptq is None else options.gptq.get(name)
    if hessian is not None:
        return hessian
    squares = options.importance.get(name)
    factors = plan.awq.columns.get(name)
    return squares if squares is None or factors is None else squares / factors.square()


def _write_rest(plan: _Plan, writer: ContainerWriter) -> None:
    config = plan.checkpoint.config
    for own_name in plan.rest:
        value = plan.read(own_name, _REST_DTYPE)
        if not bool(torch.isfinite(value).all()):
            raise QuantizeError(
                f"{own_name}: holds NaN or infinite values; repair the checkpoint first"
            )
        for name, part in split_parts(own_name, value, config.hf_names, config):
            if not writer.has(name):
                writer.write(name, part)


def _job(checkpoint: Checkpoint, options: QuantizeOptions) -> str:
    """A digest of what is made from what; equal jobs give equal files."""
    files = [checkpoint.path] if checkpoint.path.is_file() else sorted(checkpoint.path.iterdir())
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    sums = sorted((name, hashlib.sha256(h.numpy().tobytes()).hexdigest())
                  for name, h in options.importance.items())  # fmt: skip
    facts = (VERSION, stats, options.format, options.targets, options.search, options.overrides)
    methods = [made.digest for made in (options.gptq, options.awq) if made is not None]
    return hashlib.sha256(repr((facts, sums, *methods)).encode()).hexdigest()


def _is_done(out: Path, job: str) -> bool:
    """Whether `out` is the result of this job. QuantizeError when something else is there."""
    if not out.exists():
        return False
    try:
        section = json.loads((out / "config.json").read_text())["quantization_config"]
        if section["job"] == job and (out / FILE_NAME).is_file():
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if out.is_dir() and not any(out.iterdir()):
        return False
    raise QuantizeError(
        f"{out}: exists and is not the result of this command; remove it or choose another --output"
    )


def _texts(checkpoint: Checkpoint, options: QuantizeOptions, job: str) -> dict[str, str | bytes]:
    """The small files of the folder."""
    section = {"quant_method": STERNA, "format": options.name, "version": VERSION, "job": job}
    files = small_files(checkpoint.path)
    return {**files, "config.json": _config_text(checkpoint, section)}


def _config_text(checkpoint: Checkpoint, section: dict[str, Any]) -> str:
    config = checkpoint.config
    dropped = ("torch_dtype", "dtype", "quantization_config")
    kept = {key: value for key, value in config.hf.items() if key not in dropped}
    text = {
        **kept,
        "dtype": str(_REST_DTYPE).removeprefix("torch."),
        "tie_word_embeddings": config.tie_word_embeddings,
        "quantization_config": section,
    }
    return json.dumps(text, indent=2, sort_keys=True) + "\n"


def parse_overrides(
    texts: tuple[str, ...], parse: Callable[[str], WeightFormat]
) -> tuple[tuple[str, WeightFormat | None], ...]:
    """`GLOB=FORMAT` (or `GLOB=bf16`) to pairs. ConfigError for a text without "="."""
    pairs: list[tuple[str, WeightFormat | None]] = []
    for text in texts:
        pattern, equals, name = text.partition("=")
        if not equals or not pattern:
            raise ConfigError(
                f"override {text!r}; write GLOB=FORMAT, such as 'layers.*.mlp.down=int8'"
            )
        pairs.append((pattern, None if name == "bf16" else parse(name)))
    return tuple(pairs)
