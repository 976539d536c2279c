"""Any model, quantised or not, becomes a decoder: what the engine loads with.

Folders written by Sterna run from their mapped file; GPTQ and AWQ folders on native tiles made in
memory; plain checkpoints as they are, or rounded at load when a format is asked for.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sterna.core.errors import ConfigError, ModelFileError
from sterna.core.log import get_logger
from sterna.core.lookup import unknown
from sterna.kernels.load import load_kernels
from sterna.model.decoder import Decoder
from sterna.model.load import DTYPES, DTypeName, LoadedModel, load_config, load_model
from sterna.model.swiftkv import new_decoder
from sterna.model.weights import assign
from sterna.quant.calibrate import random_mean_squares
from sterna.quant.file import FILE_NAME, Container, open_container
from sterna.quant.formats import WeightFormat, parse_format
from sterna.quant.linear import dequantize_decoder, replace_weight, weight_shapes
from sterna.quant.rtn import quantize_weight
from sterna.quant.sources import STERNA, Checkpoint, open_source, stored_method

AUTO, PLAIN = "auto", "bf16"
log = get_logger(__name__)


def load_quantized(
    path: str | Path,
    dtype: DTypeName = "bfloat16",
    device: str | torch.device = "cpu",
    weights: str = AUTO,
    verify: bool = True,
) -> LoadedModel:
    """Load a model as its weights are stored ("auto"), plain ("bf16"), or in a format.

    "bf16" dequantises what is quantised to `dtype`; a format rounds plain weights to nearest at
    load, in seconds and in memory (`sterna quantize` does it once and better). verify: compare
    the checksums of a container. Raises the errors of `load_model`, and ConfigError for an unknown
    format or a second quantisation.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise ConfigError(unknown("dtype", dtype, DTYPES), param="dtype")
    fmt = None if weights in (AUTO, PLAIN) else parse_format(weights)
    method = stored_method(path)
    loaded = _load_stored(path, method, DTYPES[dtype], torch.device(device), verify)
    if loaded is None:
        loaded = load_model(path, dtype, device)
        if fmt is not None:
            quantize_decoder(loaded.decoder, fmt)
    elif weights == PLAIN:
        dequantize_decoder(loaded.decoder)
    elif fmt is not None:
        raise ConfigError(
            f"{path}: its weights are quantised already ({method}); {weights!r} would round them "
            "twice. Use 'auto', or 'bf16' to dequantise them",
            param="weights",
        )
    return loaded


def _load_stored(
    path: Path, method: str | None, dtype: torch.dtype, device: torch.device, verify: bool
) -> LoadedModel | None:
    """A model whose weights are quantised in its files; None for a plain one."""
    if method is None:
        return None
    load_kernels()
    if method == STERNA:
        return _from_container(path, dtype, device, verify)
    return _from_packed(open_source(path), dtype, device)


def _from_container(
    path: Path, dtype: torch.dtype, device: torch.device, verify: bool
) -> LoadedModel:
    container = open_container(path / FILE_NAME, verify)
    config = load_config(path)
    decoder = new_decoder(config, dtype, "meta", rope_device=device)
    _check_weights(container, decoder)
    for name, weight in container.weights.items():
        replace_weight(decoder, name, weight)
    assign(decoder, _Rest(container), config.hf_names, device)
    return LoadedModel(decoder.to(device), config, path)


def _from_packed(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    decoder = Decoder(checkpoint.config, dtype, "meta", rope_device=device)
    forms: set[str] = set()
    for name, *_, is_gated in list(weight_shapes(decoder)):
        bases = checkpoint.packed_names(name)
        if checkpoint.packed is not None and bases:
            form = checkpoint.packed.form(bases)
            forms.add(form.format.name + ("" if form.is_native else " (rounded anew)"))
            replace_weight(decoder, name, checkpoint.packed.weight(bases, is_gated))
    log.info("%s: its packed weights run as %s", checkpoint.path, ", ".join(sorted(forms)))
    assign(decoder, checkpoint.source, checkpoint.names, device)
    return LoadedModel(decoder.to(device), checkpoint.config, checkpoint.path)


class _Rest:
    """The unquantised tensors of a container as a TensorSource."""

    def __init__(self, container: Container) -> None:
        self.label = str(container.path)
        self._tensors = container.rest

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See TensorSource."""
        if name not in self._tensors:
            raise ModelFileError(f"{self.label}: tensor {name!r} is missing; quantise again")
        return self._tensors[name].to(dtype)


def _check_weights(container: Container, decoder: Decoder) -> None:
    """ModelFileError when the container is of another model than its config.json."""
    shapes = {name: sizes for name, *sizes in weight_shapes(decoder)}
    for name, w in container.weights.items():
        found = [w.out_features * (1 + w.is_gated), w.in_features, w.is_gated]
        if shapes.get(name) != found:
            raise ModelFileError(
                f"{container.path}: weight {name!r} has (rows, inputs, gated) {found}, config.json "
                f"asks for {shapes.get(name)}; the two are of different models"
            )


def quantize_decoder(decoder: Decoder, fmt: WeightFormat) -> None:
    """Round every weight of a decoder to `fmt`, in place; the plain ones are freed one by one.

    Scales weigh inputs by what random tokens show of them (see calibrate.py).
    """
    importance = random_mean_squares(decoder)
    for name, *_, is_gated in list(weight_shapes(decoder)):
        plain = decoder.get_parameter(f"{name}.weight").detach()
        weight = quantize_weight(
            plain, fmt, search="fast", importance=importance.get(name), is_gated=is_gated, name=name
        )
        replace_weight(decoder, name, weight)
