"""From the setting `speculation` to drafters."""

from __future__ import annotations

from pathlib import Path

from sterna.core.errors import ConfigError
from sterna.core.lookup import unknown
from sterna.engine.config import EngineConfig
from sterna.engine.drafters.base import Drafter
from sterna.engine.drafters.model import build_model_drafter
from sterna.engine.drafters.ngram import NgramDrafter
from sterna.engine.drafters.suffix import SuffixDrafter
from sterna.text.tokenizer import Tokenizer

OFF, AUTO = "off", "auto"
NAMES = ("suffix", "ngram", "model")


def drafter_names(config: EngineConfig) -> list[str]:
    """The drafters that `speculation` asks for. ConfigError for an unknown or repeated one."""
    if config.speculation == OFF:
        return []
    if config.speculation == AUTO:
        return ["suffix", "model"] if config.draft_model else ["suffix"]
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
    return names


def build_drafters(config: EngineConfig, tokenizer: Tokenizer, identity: str) -> list[Drafter]:
    """The drafters of an engine; none when speculation is off.

    `identity` names model and tokenizer for outputs that are kept over restarts. Raises
    ConfigError, and ModelError for a draft model that cannot be loaded.
    """
    built: list[Drafter] = []
    for name in drafter_names(config):
        if name == "suffix":
            path = Path(config.draft_cache) if config.draft_cache else None
            built.append(
                SuffixDrafter(max_bytes=config.draft_cache_bytes, path=path, identity=identity)
            )
        elif name == "ngram":
            built.append(NgramDrafter())
        else:
            built.append(build_model_drafter(config.draft_model or "", tokenizer, config))
    return built
