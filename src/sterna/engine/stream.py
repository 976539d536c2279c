"""One request's outputs on their way from the engine's thread to a coroutine.

The engine never waits for a reader. What a slow reader has not taken yet is merged into one
output, so a stream holds at most one request's tokens, however slow its reader is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from sterna.core.errors import SternaError
from sterna.engine.request import Delta, RequestOutput, TokenLogprob


class Stream:
    """Filled and read on the event loop's thread."""

    def __init__(self) -> None:
        self.is_finished = False
        self._pending: list[RequestOutput] = []
        self._error: SternaError | None = None
        self._ready = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        """Add what a step did."""
        self._pending.append(output)
        self.is_finished = output.is_finished
        self._ready.set()

    def fail(self, error: SternaError) -> None:
        """Make `get` raise once what is pending was taken."""
        self._error = error
        self.is_finished = True
        self._ready.set()

    async def get(self) -> RequestOutput:
        """Everything since the last call, as one output; waits for at least one."""
        await self._ready.wait()
        pending, self._pending = self._pending, []
        if self._error is None:
            self._ready.clear()
        if pending:
            return merge_outputs(pending)
        assert self._error is not None, "ready without output or error"
        raise self._error


def merge_outputs(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Consecutive outputs of one request as one: samples' deltas joined, the last one's state."""
    if len(outputs) == 1:
        return outputs[0]
    by_sample: dict[int, list[Delta]] = {}
    for output in outputs:
        for delta in output.deltas:
            by_sample.setdefault(delta.index, []).append(delta)
    found = [o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None]
    return replace(
        outputs[-1],
        deltas=tuple(map(merge_deltas, by_sample.values())),
        prompt_logprobs=found[0] if found else None,
    )


def merge_deltas(deltas: Sequence[Delta]) -> Delta:
    """Consecutive deltas of one sample as one."""
    if len(deltas) == 1:
        return deltas[0]
    logprobs: list[TokenLogprob] = [entry for d in deltas for entry in d.logprobs or ()]
    return replace(
        deltas[-1],
        token_ids=tuple(token for d in deltas for token in d.token_ids),
        text="".join(d.text for d in deltas),
        logprobs=tuple(logprobs) if any(d.logprobs is not None for d in deltas) else None,
    )
