"""Sterna: one language-model stack. `LLM` and `SamplingParams` are loaded when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sterna.version import __version__

if TYPE_CHECKING:
    from sterna.engine.llm import LLM
    from sterna.engine.request import SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Import on first use: `import sterna` must load no torch."""
    if name == "LLM":
        from sterna.engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from sterna.engine.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'sterna' has no attribute {name!r}")
