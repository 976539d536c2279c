"""From a model's name to a running embedder: load, round, pack, record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sterna.core.errors import ConfigError, UnsupportedModelError
from sterna.core.log import get_logger
from sterna.engine.build import load_weights, set_activations
from sterna.engine.config import EngineConfig
from sterna.engine.embed import Embedder, EmbedModel
from sterna.kernels.device import check_device, set_threads
from sterna.model.encoder_load import LoadedEncoder, is_encoder_folder, load_encoder
from sterna.model.hub import resolve_model
from sterna.model.load import DTypeName
from sterna.model.pooling import PoolingConfig, read_pooling
from sterna.quant.encoder import quantize_encoder
from sterna.quant.formats import parse_format
from sterna.quant.linear import describe_weights
from sterna.quant.load import AUTO, PLAIN
from sterna.text.inputs import InputEncoder
from sterna.text.tokenizer import load_tokenizer

log = get_logger(__name__)


def build_embedder(model: str, config: EngineConfig) -> Embedder:
    """An embedder for a folder, GGUF file or hub name.

    Raises ModelError (not found, damaged, unsupported), ConfigError (settings that do not fit the
    model), KernelError (a forced kernel level is not available).
    """
    path = resolve_model(model)
    check_device(config.device)
    set_threads(config.threads)
    is_encoder = is_encoder_folder(path)
    found = _encoder_model(path, config) if is_encoder else _decoder_model(model, path, config)
    limit = _max_tokens(found, config)
    encoder = InputEncoder(load_tokenizer(path), limit, found.pooling.is_lowercased)
    embedder = Embedder(found, encoder, config.capture, config.token_budget or 0)
    log.info(
        "embeds texts of up to %d tokens, %d in a step (%s pooling%s, %s)",
        limit, embedder.token_budget, found.pooling.kind,
        ", normalised" if found.pooling.is_normalized else "",
        "replayed" if embedder.is_captured else "interpreted",
    )  # fmt: skip
    return embedder


def _dtype(config: EngineConfig) -> DTypeName:
    return "bfloat16" if config.dtype == "auto" else config.dtype


def _encoder_model(path: Path, config: EngineConfig) -> EmbedModel:
    loaded = load_encoder(path, _dtype(config), config.device)
    if config.weights not in (AUTO, PLAIN):
        quantize_encoder(loaded.encoder, parse_format(config.weights))
    set_activations(loaded.encoder, config)
    loaded.encoder.prepare_inference()
    if line := describe_weights(loaded.encoder):
        log.info("%s", line)
    if loaded.head is None:
        return EmbedModel(loaded.encoder, _pooling(read_pooling(path, "mean"), config))
    return _scorer(loaded, path, config)


def _scorer(loaded: LoadedEncoder, path: Path, config: EngineConfig) -> EmbedModel:
    if config.pooling != "auto":
        raise ConfigError(
            f"pooling is {config.pooling}, but {path} has a classification head, which says itself "
            "what it reads; leave pooling at auto",
            param="pooling",
        )
    settings = loaded.config
    if settings.num_labels != 1:
        raise UnsupportedModelError(
            f"{path}: a classifier of {settings.num_labels} labels; one that scores pairs (1 "
            "label), or a model without a head, can be served"
        )
    pooling = PoolingConfig(settings.classifier_pooling, is_normalized=False)
    return EmbedModel(loaded.encoder, pooling, loaded.head, settings.has_sigmoid)


def _decoder_model(model: str, path: Path, config: EngineConfig) -> EmbedModel:
    decoder = load_weights(model, path, config)
    decoder.prepare_inference()
    return EmbedModel(decoder, _pooling(read_pooling(path, "last"), config))


def _pooling(found: PoolingConfig, config: EngineConfig) -> PoolingConfig:
    return found if config.pooling == "auto" else replace(found, kind=config.pooling)


def _max_tokens(model: EmbedModel, config: EngineConfig) -> int:
    """The longest text: as asked, else as the model's files say, within its positions."""
    limit = model.body.config.num_positions
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len is {config.max_model_len:,}, the model has {limit:,} positions; "
            "ask for less",
            param="max_model_len",
        )
    return config.max_model_len or min(model.pooling.max_tokens or limit, limit)
