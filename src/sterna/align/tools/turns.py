"""Completions of several turns: the policy writes, a tool answers, the policy goes on.

A turn's prompt is the tokens of all earlier ones and the answer's, so the engine finds them in its
prefix cache. An answer's tokens are part of the completion with mask False and log-prob 0: no loss
reads them. A completion ends as truncated when a turn ran into the length limit, when an answer
and one more token would not fit, or when its last allowed turn calls a tool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sterna.align.engines import RolloutEngine
from sterna.align.hybrid import Sampling
from sterna.align.rollout import Rollout
from sterna.align.tools.protocol import ToolProtocol
from sterna.align.tools.toolbox import Toolbox, ToolRequest, ToolResult
from sterna.data.order import mix
from sterna.text.tokenizer import Tokenizer


@dataclass(slots=True)
class _Dialogue:
    """A completion while it grows."""

    rollout: Rollout
    seed: int
    turn_start: int = 0  # in the completion, of the latest turn


class ToolTurns:
    """`generate` of a HybridEngine with tools in it."""

    def __init__(
        self,
        hybrid: RolloutEngine,
        tokenizer: Tokenizer,
        toolbox: Toolbox,
        protocol: ToolProtocol,
        max_turns: int,
    ) -> None:
        self._hybrid = hybrid
        self._tokenizer = tokenizer
        self._toolbox = toolbox
        self._protocol = protocol
        self._max_turns = max_turns

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> list[Rollout]:
        """As HybridEngine.generate; `sampling.max_tokens` counts all turns and answers."""
        sampling = replace(sampling, stop=(*sampling.stop, *self._protocol.stop))
        first = self._hybrid.generate(prompts, group_size, sampling, seeds)
        dialogues = [
            _Dialogue(r, mix(seeds[r.prompt_idx], r.sample_idx, len(r.prompt))) for r in first
        ]
        going = dialogues
        for turn in range(1, self._max_turns + 1):
            is_last = turn == self._max_turns
            going = self._answered(going, sampling.max_tokens, is_last)
            if not going:
                break
            self._next_turn(going, sampling, turn)
        return [dialogue.rollout for dialogue in dialogues]

    def _answered(
        self, dialogues: Sequence[_Dialogue], max_tokens: int, is_last: bool
    ) -> list[_Dialogue]:
        """Run the tools that the latest turns call; returns the dialogues that go on."""
        asked = [(d, self._calls(d)) for d in dialogues]
        asked = [(d, calls) for d, calls in asked if calls]
        if is_last:
            for dialogue, _ in asked:
                dialogue.rollout = replace(dialogue.rollout, is_truncated=True)
            return []
        results = iter(self._toolbox.run([call for _, calls in asked for call in calls]))
        return [
            dialogue
            for dialogue, calls in asked
            if self._append(dialogue, calls, [next(results) for _ in calls], max_tokens)
        ]

    def _calls(self, dialogue: _Dialogue) -> list[ToolRequest]:
        rollout = dialogue.rollout
        if rollout.is_truncated:
            return []
        written = rollout.completion[dialogue.turn_start :].tolist()
        return self._protocol.calls(self._tokenizer.decode(written))

    def _append(
        self,
        dialogue: _Dialogue,
        calls: Sequence[ToolRequest],
        results: Sequence[ToolResult],
        max_tokens: int,
    ) -> bool:
        """Put the answer behind the turn; False when no token would fit behind it."""
        rollout = dialogue.rollout
        rollout = replace(
            rollout,
            tool_calls=rollout.tool_calls + len(calls),
            tool_errors=rollout.tool_errors + sum(result.is_error for result in results),
        )
        last = int(rollout.completion[-1])
        answer = np.array(self._protocol.reply(calls, results, last), np.int32)
        size = len(rollout.completion) + len(answer)
        limit = min(max_tokens, self._hybrid.max_model_len - len(rollout.prompt))
        if size >= limit:
            dialogue.rollout = replace(rollout, is_truncated=True)
            return False
        dialogue.rollout = _longer(
            rollout, answer, np.zeros(len(answer), np.bool_), np.zeros(len(answer), np.float32)
        )
        dialogue.turn_start = size
        return True

    def _next_turn(self, going: Sequence[_Dialogue], sampling: Sampling, turn: int) -> None:
        prompts = [[*d.rollout.prompt.tolist(), *d.rollout.completion.tolist()] for d in going]
        seeds = [mix(d.seed, turn) for d in going]
        room = [
            min(
                sampling.max_tokens - len(d.rollout.completion),
                self._hybrid.max_model_len - d.rollout.num_tokens,
            )
            for d in going
        ]
        written = self._hybrid.generate(prompts, 1, sampling, seeds, room)
        for dialogue, more in zip(going, written, strict=True):
            longer = _longer(dialogue.rollout, more.completion, more.mask, more.logprobs)
            dialogue.rollout = replace(longer, is_truncated=more.is_truncated)


def _longer(
    rollout: Rollout, completion: np.ndarray, mask: np.ndarray, logprobs: np.ndarray
) -> Rollout:
    return replace(
        rollout,
        completion=np.concatenate([rollout.completion, completion]),
        mask=np.concatenate([rollout.mask, mask]),
        logprobs=np.concatenate([rollout.logprobs, logprobs]),
    )
