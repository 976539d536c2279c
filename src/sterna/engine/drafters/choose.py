"""From the setting `speculation` to drafters."""

from __future__ import annotations

from pathlib import Path

from sterna.core.errors import ConfigError
from sterna.core.log import get_logger
from sterna.core.lookup import unknown
from sterna.engine.config import EngineConfig
from sterna.engine.drafters.base import Drafter
from sterna.engine.drafters.learned import build_learned_drafter
from sterna.engine.drafters.model import build_model_drafter
from sterna.engine.drafters.ngram import NgramDrafter
from sterna.engine.drafters.suffix import SuffixDrafter
from sterna.model.decoder import Decoder
from sterna.text.tokenizer import Tokenizer

log = get_logger(__name__)

OFF, AUTO = "off", "auto"
NAMES = ("suffix", "ngram", "model", "learned")


def drafter_names(config: EngineConfig) -> list[str]:
    """The drafters that `speculation` asks for. ConfigError for an unknown or repeated one."""
    if config.speculation == OFF:
        return []
    if config.speculation == AUTO:
        more = {"model": config.draft_model, "learned": config.speculator}
        return ["suffix", *(name for name, given in more.items() if given)]
    names = [name.strip() for name in config.speculation.split(",")]
    for name in names:
        if name not in NAMES:
            raise ConfigError(unknown("drafter", name, (OFF, AUTO, *NAMES)), param="speculation")
    if len(set(names)) < len(names):
        raise ConfigError(f"speculation is {config.speculation}; name each drafter once")
    if ("model" in names) != bool(config.draft_model):
        raise ConfigError(
            "the drafter `model` and the setting draft_model go together; give both or none",
            param="draft_model",
        )
    if ("learned" in names) != bool(config.speculator):
        raise ConfigError(
            "the drafter `learned` and the setting speculator go together; give both or none",
            param="speculator",
        )
    return names


def build_drafters(
    config: EngineConfig, tokenizer: Tokenizer, decoder: Decoder, identity: str
) -> list[Drafter]:
    """The drafters of an engine; none when speculation is off.

    `decoder` is the engine's, prepared for inference. `identity` names model and tokenizer for
    outputs that are kept over restarts. Raises ConfigError, and ModelError for a draft model or a
    speculator that cannot be loaded.
    """
    built: list[Drafter] = []
    if config.speculator and config.speculation == OFF:
        log.warning("speculator has no effect while speculation is off; add speculation=auto")
    if config.speculator_learns and not config.speculator:
        log.warning("speculator_learns has no effect without a speculator")
    for name in drafter_names(config):
        if name == "suffix":
            path = Path(config.draft_cache) if config.draft_cache else None
            built.append(
                SuffixDrafter(max_bytes=config.draft_cache_bytes, path=path, identity=identity)
            )
        elif name == "ngram":
            built.append(NgramDrafter())
        elif name == "learned":
            built.append(build_learned_drafter(decoder, config))
        else:
            built.append(build_model_drafter(config.draft_model or "", tokenizer, config))
    return built
