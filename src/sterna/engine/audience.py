"""Who watches an engine's steps: the metrics page and whoever else subscribes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from sterna.engine.request import StepStats

# Steps a subscriber may lag behind before the oldest are dropped.
MAX_PENDING_STATS = 1024


class Audience:
    """Subscribers of one engine; event-loop thread only."""

    def __init__(self) -> None:
        self._queues: list[asyncio.Queue[StepStats]] = []

    async def subscribe(self) -> AsyncIterator[StepStats]:
        """Every step from now on. A subscriber that lags loses the oldest."""
        queue: asyncio.Queue[StepStats] = asyncio.Queue(MAX_PENDING_STATS)
        self._queues.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._queues.remove(queue)

    def show(self, step: StepStats) -> None:
        """A finished step, to all."""
        for queue in self._queues:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(step)
