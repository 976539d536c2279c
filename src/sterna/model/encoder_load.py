"""load_encoder: a Hugging Face folder becomes an encoder, with its head when it has one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sterna.core.errors import ConfigError, ModelFileError, UnsupportedModelError
from sterna.core.lookup import unknown
from sterna.kernels.load import load_kernels
from sterna.model.encoder import Encoder
from sterna.model.encoder_config import EncoderConfig, is_encoder, parse_encoder_config
from sterna.model.encoder_heads import SequenceHead, head_names
from sterna.model.families import Names
from sterna.model.hf_weights import SafetensorsSource
from sterna.model.load import DTYPES, DTypeName, read_config_json
from sterna.model.weights import read_parameter


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    """An encoder with its weights; `head` is None for a model that only embeds."""

    encoder: Encoder
    head: SequenceHead | None
    config: EncoderConfig
    source: Path


def is_encoder_folder(path: Path) -> bool:
    """Whether `path` is a folder whose config.json names an encoder."""
    return (path / "config.json").is_file() and is_encoder(read_config_json(path / "config.json"))


def load_encoder(
    path: str | Path, dtype: DTypeName = "bfloat16", device: str | torch.device = "cpu"
) -> LoadedEncoder:
    """Load a Hugging Face folder; also chooses the kernels of this process.

    Raises ModelFileError or UnsupportedModelError, naming the file, what was found and what is
    supported; ConfigError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(unknown("dtype", dtype, DTYPES), param="dtype")
    load_kernels()
    path, device = Path(path), torch.device(device)
    hf = read_config_json(path / "config.json")
    if hf.get("quantization_config"):
        raise UnsupportedModelError(
            f"{path}: its weights are quantised; encoders are loaded plain and rounded at load "
            "(weights=int8, fp6, ...)"
        )
    config = parse_encoder_config(hf, str(path / "config.json"))
    source = SafetensorsSource(path)
    prefix, names = _naming(source, config)
    encoder = Encoder(config, DTYPES[dtype], "meta", rope_device=device)
    _fill(encoder, source, names, device)
    encoder.embed.places = _places(config, source, names, device)
    head = _load_head(config, source, prefix, device) if config.num_labels else None
    return LoadedEncoder(encoder, head, config, path)


def _naming(source: SafetensorsSource, config: EncoderConfig) -> tuple[str, Names]:
    """The prefix and the name table of this checkpoint: those whose first tensors are there."""
    tried = []
    for prefix in config.family.prefixes:
        for names in config.family.names:
            wanted = [names["embed.word"][0], names["layers.{i}.qkv"][0].replace("{i}", "0")]
            found = [source.has(f"{prefix}{name}.weight") for name in wanted]
            if all(found):
                return prefix, {own: tuple(prefix + n for n in ns) for own, ns in names.items()}
            tried.append(prefix + wanted[1])
    raise ModelFileError(
        f"{source.label}: no weights of family {config.family.name} under any known name; looked "
        f"for {', '.join(tried)}"
    )


def _fill(module: nn.Module, source: SafetensorsSource, names: Names, device: torch.device) -> None:
    for own, parameter in list(module.named_parameters()):
        value = _read(source, own, names, parameter)
        owner, _, leaf = own.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value.to(device)))


def _read(source: SafetensorsSource, own: str, names: Names, like: Tensor) -> Tensor:
    """One parameter; where a checkpoint stacks up before gate, the halves change places."""
    if ".gate_up." in own and "layers.{i}.gate_up" not in names:
        other = own.replace(".gate_up.", ".up_gate.")
        value = read_parameter(source, other, names, like.shape, like.dtype)
        return torch.cat(value.chunk(2)[::-1])
    return read_parameter(source, own, names, like.shape, like.dtype)


def _places(
    config: EncoderConfig, source: SafetensorsSource, names: Names, device: torch.device
) -> Tensor | None:
    """The float32 table of position and type; see encoder.py."""
    types = None
    if config.type_vocab_size and "types" in names:
        types = source.read(names["types"][0] + ".weight", torch.float32)
    if not config.family.has_learned_positions:
        return None if types is None else types[:1].contiguous().to(device)
    table = source.read(names["positions"][0] + ".weight", torch.float32)
    rows = table[config.position_offset :]
    if len(rows) != config.num_positions:
        raise ModelFileError(
            f"{source.label}: {len(table)} position rows, the config asks for "
            f"{config.num_positions + config.position_offset}"
        )
    if types is not None:
        rows = torch.cat([rows + kind for kind in types])
    return rows.contiguous().to(device)


def _load_head(
    config: EncoderConfig, source: SafetensorsSource, prefix: str, device: torch.device
) -> SequenceHead:
    head = SequenceHead(config, torch.device("meta"))
    _fill(head, source, head_names(config, prefix), device)
    return head
