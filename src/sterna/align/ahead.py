"""Rollouts one step off: those of step k + 1 are drawn by the weights that step k starts from.

    rollout.staleness = 0    draw 0, train 0, draw 1, train 1, ...
    rollout.staleness = 1    draw 0, [draw 1 | train 0], [draw 2 | train 1], ...

Drawn beside training by other processes (`rollout.workers`), or just before it in this one: the
same tokens either way, since a rollout's tokens follow from weights, prompt and seed. Each is
stamped with the version that drew it, one step old when it is trained on; the loop asks the
trainer for its log-probs and corrects by importance (`algorithm.correction`). A checkpoint holds
the queue itself, as the weights that drew it are gone: a run resumes to the bit.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from sterna.align.prompts import Prompt
from sterna.align.rollout import Rollout

# (prompts, the step they are for) -> their completions
DrawStep = Callable[[Sequence[Prompt], int], list[Rollout]]
_ARRAYS = ("prompt", "completion", "mask", "logprobs")
_NUMBERS = {f.name: f.type for f in fields(Rollout) if f.name not in _ARRAYS}


@dataclass(frozen=True, slots=True)
class _Queued:
    """The next step's rollouts, under way or done."""

    prompts: list[Prompt]
    position: int  # of the prompt stream before them
    rollouts: Future[list[Rollout]]


class Ahead:
    """A queue of one step. `is_beside`: draw in a thread, while this one trains."""

    def __init__(self, draw: DrawStep, is_beside: bool) -> None:
        self._draw = draw
        self._pool = ThreadPoolExecutor(1, "rollouts") if is_beside else None
        self._queued: _Queued | None = None

    @property
    def prompts(self) -> list[Prompt] | None:
        """Of the step that is queued; None when nothing is."""
        return None if self._queued is None else self._queued.prompts

    @property
    def position(self) -> int | None:
        """Of the prompt stream before those prompts; None when nothing is queued."""
        return None if self._queued is None else self._queued.position

    def drop(self) -> None:
        """Empty the queue; what is being drawn is not waited for."""
        self._queued = None

    def begin(self, prompts: list[Prompt], position: int, step: int) -> None:
        """Draw for `step`, whose prompts began at `position` of the stream."""
        assert self._queued is None, "a queue of one step"
        if self._pool is not None:
            future = self._pool.submit(self._draw, prompts, step)
        else:
            future = Future()
            future.set_result(self._draw(prompts, step))
        self._queued = _Queued(prompts, position, future)

    def take(self) -> list[Rollout]:
        """The queued rollouts, waited for; the queue is then empty. Errors as the drawing's."""
        assert self._queued is not None, "nothing is queued"
        queued, self._queued = self._queued, None
        return queued.rollouts.result()

    def wait(self) -> None:
        """Until nothing is being drawn. Errors as `take`."""
        if self._queued is not None:
            self._queued.rollouts.result()

    def state(self) -> dict[str, Any] | None:
        """The queue as JSON, waited for."""
        if self._queued is None:
            return None
        queued = self._queued
        return {"position": queued.position, "rollouts": pack(queued.rollouts.result())}

    def restore(self, state: dict[str, Any], prompts: list[Prompt]) -> None:
        """Take over a queue; `prompts` are those of its position."""
        future: Future[list[Rollout]] = Future()
        future.set_result(unpack(state["rollouts"]))
        self._queued = _Queued(prompts, state["position"], future)

    def close(self) -> None:
        """Let the drawing under way end."""
        if self._pool is not None:
            self._pool.shutdown()


def pack(rollouts: Sequence[Rollout]) -> str:
    """Rollouts as text: safetensors in base64."""
    columns = {name: np.array([getattr(r, name) for r in rollouts], np.int64) for name in _NUMBERS}
    for name in _ARRAYS:
        parts = [getattr(rollout, name) for rollout in rollouts]
        columns[f"{name}/sizes"] = np.array([len(part) for part in parts], np.int64)
        columns[name] = np.concatenate(parts)
    return base64.b64encode(save(columns)).decode()


def unpack(text: str) -> list[Rollout]:
    """What was packed, to the bit."""
    columns = load(base64.b64decode(text))
    found: list[dict[str, Any]] = [{} for _ in columns["prompt/sizes"]]
    for name in _ARRAYS:
        ends = list(accumulate(columns[f"{name}/sizes"].tolist()))
        for each, part in zip(found, np.split(columns[name], ends[:-1]), strict=True):
            each[name] = part
    for name, kind in _NUMBERS.items():
        for each, value in zip(found, columns[name].tolist(), strict=True):
            each[name] = bool(value) if kind == "bool" else value
    return [Rollout(**each) for each in found]
