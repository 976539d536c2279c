"""Any checkpoint that quantisation reads: plain folders, GGUF files, GPTQ and AWQ folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sterna.core.errors import QuantizeError, UnsupportedModelError
from sterna.core.lookup import unknown
from sterna.model.config import ModelConfig
from sterna.model.families import Names
from sterna.model.hf_weights import SafetensorsSource
from sterna.model.load import load_config, open_checkpoint, quant_method, untied_if_stored
from sterna.model.weights import TensorSource, checkpoint_names
from sterna.quant.imports import METHODS, PackedSource
from sterna.text.save import tokenizer_files
from sterna.text.tokenizer import load_tokenizer

STERNA = "sterna"
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint; `packed` is its source when that is a GPTQ or AWQ folder."""

    path: Path
    config: ModelConfig
    source: TensorSource
    names: Names
    packed: PackedSource | None = None

    def packed_names(self, own_name: str) -> tuple[str, ...]:
        """The names of a weight's parts without `.weight`, if they are packed; else ()."""
        parts = checkpoint_names(f"{own_name}.weight", self.names)
        bases = tuple(name.removesuffix(".weight") for name in parts)
        is_packed = self.packed is not None and all(map(self.packed.is_packed, bases))
        return bases if is_packed else ()


def stored_method(path: Path) -> str | None:
    """Who quantised the weights at `path`: "sterna", "gptq", "awq", another, None = nobody."""
    return quant_method(load_config(path)) if path.is_dir() else None


def open_source(path: Path) -> Checkpoint:
    """Open what can be quantised; errors as `load_model`.

    Raises QuantizeError for a folder that Sterna has quantised already, UnsupportedModelError for
    one that another tool has, other than GPTQ and AWQ.
    """
    method = stored_method(path)
    if method is None:
        return Checkpoint(path, *open_checkpoint(path))
    if method == STERNA:
        raise QuantizeError(
            f"{path}: quantised already; a second rounding adds error. Quantise the original, or "
            "write plain weights first with `sterna dequantize`"
        )
    if method not in METHODS:
        raise UnsupportedModelError(
            f"{path}: {unknown('quant_method', method, (*METHODS, STERNA))}"
        )
    config, inner, names = untied_if_stored(load_config(path), SafetensorsSource(path))
    packed = PackedSource(inner, config.hf["quantization_config"])
    return Checkpoint(path, config, packed, names, packed)


def small_files(path: Path) -> dict[str, str | bytes]:
    """The tokenizer and generation settings of a model, as files of a Hugging Face folder."""
    if not path.is_dir():
        return dict(tokenizer_files(load_tokenizer(path)))
    found = [path / name for name in _COPIED]
    return {file.name: file.read_bytes() for file in found if file.is_file()}
