"""`sterna merge`: an adapter folded into its model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from sterna.core.log import setup_logging
from sterna.core.rundir import refuse_existing

if TYPE_CHECKING:
    from sterna.model.load import DTypeName
    from sterna.train.adapter import AnyDecoder


def merge(
    model: str,
    adapter: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
) -> int:
    """Write a model with an adapter (Sterna's or PEFT's) merged in, as a Hugging Face folder.

    A quantised model is written with plain weights: merged ones have other codes.

    Parameters
    ----------
    model
        The adapter's base: a folder, a GGUF file or a name; "" is the default model. Families that
        are not native are read by transformers.
    adapter
        Folder with adapter_config.json and adapter_model.safetensors.
    output
        The folder to write.
    dtype
        Of the written weights; the sum is formed in float32 and rounded once.
    """
    from rich.console import Console

    from sterna.core.rundir import write_atomic
    from sterna.model.hub import resolve_model
    from sterna.quant.sources import small_files
    from sterna.train.adapter import merge_adapter
    from sterna.train.adapter_file import load_adapter

    setup_logging("WARNING")
    refuse_existing(output)
    path = resolve_model(model)
    with Console(stderr=True).status("merge"):
        decoder = _plain_model(path, dtype)
        load_adapter(decoder, adapter)
        merge_adapter(decoder)
        _save(decoder, output)
        for name, content in small_files(path).items():
            write_atomic(output / name, content)
    print(f"{output}: {model or 'the default model'} with {adapter} merged, in {dtype}")
    return 0


def _plain_model(path: Path, dtype: DTypeName) -> AnyDecoder:
    """The model with plain weights: native, else behind transformers."""
    from sterna.core.errors import UnsupportedModelError
    from sterna.model.hf import load_hf
    from sterna.model.load import load_config
    from sterna.quant.load import PLAIN, load_quantized

    try:
        load_config(path)
    except UnsupportedModelError:
        if not path.is_dir():
            raise
        return load_hf(path, dtype)
    return load_quantized(path, dtype, weights=PLAIN).decoder


def _save(decoder: AnyDecoder, folder: Path) -> None:
    from sterna.model.hf import HFDecoder
    from sterna.model.save import save_model

    if isinstance(decoder, HFDecoder):
        decoder.save(folder)
    else:
        save_model(decoder, folder)
