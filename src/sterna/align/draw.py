"""Who draws a step's completions: the hybrid engine, alone or with tools between the turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sterna.align.config import RlRecipe
from sterna.align.engines import RolloutEngine
from sterna.align.hybrid import Sampling
from sterna.align.prompts import Prompt, renders_chat
from sterna.align.rollout import Rollout
from sterna.align.tools.protocol import ChatProtocol, PlainProtocol
from sterna.align.tools.toolbox import Toolbox
from sterna.align.tools.turns import ToolTurns
from sterna.text.tokenizer import Tokenizer


class Draw(Protocol):
    """Completions of prompts."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> list[Rollout]:
        """Errors and order as HybridEngine.generate."""
        ...

    def close(self) -> None:
        """Free what it holds beside the engine."""
        ...


class EngineDraw:
    """The engine's completions, through the tools where there are any."""

    def __init__(
        self, hybrid: RolloutEngine, toolbox: Toolbox | None, turns: ToolTurns | None
    ) -> None:
        self._hybrid = hybrid
        self._toolbox = toolbox
        self._turns = turns

    def __call__(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> list[Rollout]:
        """See Draw."""
        tokens = [prompt.tokens.tolist() for prompt in prompts]
        source = self._turns or self._hybrid
        return source.generate(tokens, group_size, sampling, seeds)

    def close(self) -> None:
        """End the tools' processes."""
        if self._toolbox is not None:
            self._toolbox.close()


def make_toolbox(recipe: RlRecipe) -> Toolbox | None:
    """The recipe's tools, loaded; None without any. ConfigError as Toolbox."""
    rollout = recipe.rollout
    return Toolbox(rollout.tools, rollout.tool_timeout_s) if rollout.tools else None


def speaks_chat(recipe: RlRecipe, tokenizer: Tokenizer) -> bool:
    """Whether calls are those of the chat template."""
    asked = recipe.rollout.tool_protocol
    return asked == "chat" or (asked == "auto" and renders_chat(recipe.prompts, tokenizer))


def make_draw(
    recipe: RlRecipe, hybrid: RolloutEngine, tokenizer: Tokenizer, toolbox: Toolbox | None
) -> Draw:
    """ConfigError for a chat template without a place for tools' answers."""
    if toolbox is None:
        return EngineDraw(hybrid, None, None)
    rollout = recipe.rollout
    if speaks_chat(recipe, tokenizer):
        protocol: ChatProtocol | PlainProtocol = ChatProtocol(
            tokenizer, toolbox.names, rollout.tool_tokens
        )
    else:
        protocol = PlainProtocol(tokenizer, rollout.tool_tokens)
    return EngineDraw(
        hybrid, toolbox, ToolTurns(hybrid, tokenizer, toolbox, protocol, rollout.max_turns)
    )
