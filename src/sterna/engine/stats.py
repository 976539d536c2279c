"""What the engine's recent past says about its near future: the wait behind Retry-After."""

from __future__ import annotations

from dataclasses import dataclass

from sterna.engine.request import StepStats

# A sum loses half its weight in this many seconds of computing: long enough to average over
# requests, short enough to follow a change of load.
HALF_LIFE_S = 20.0
MIN_WAIT_S, MAX_WAIT_S = 0.1, 600.0


@dataclass(slots=True)
class SpeedMeter:
    """Decayed sums of steps and finished requests. Written by the engine's thread only.

    `prompt_speed` is the start value in tokens/s, from the measured step times.
    """

    prompt_speed: float
    _prompt_tokens: float = 0.0
    _prompt_s: float = 0.0
    _finished: float = 0.0
    _busy_s: float = 0.0

    def note_step(self, stats: StepStats) -> None:
        """Take a finished step. Its decode work counts against its prompt tokens."""
        keep = 0.5 ** (stats.duration / HALF_LIFE_S)
        self._busy_s = self._busy_s * keep + stats.duration
        self._finished *= keep
        if stats.num_prompt_tokens:
            self._prompt_s = self._prompt_s * keep + stats.duration
            self._prompt_tokens = self._prompt_tokens * keep + stats.num_prompt_tokens
            # Below a second of evidence the start value stands.
            if self._prompt_s > 1:
                self.prompt_speed = self._prompt_tokens / self._prompt_s

    def note_finished(self, count: int) -> None:
        """Take the number of requests that ended in a step."""
        self._finished += count

    def predict_wait_s(self, num_queued: int, queued_tokens: int, has_free_place: bool) -> float:
        """Seconds until a request behind this queue gets its first chunk.

        The queue drains no faster than prompts are computed and, when all places are taken, no
        faster than requests finish.
        """
        wait = queued_tokens / self.prompt_speed
        if not has_free_place and self._finished > 0:
            wait = max(wait, num_queued * self._busy_s / self._finished)
        return min(max(wait, MIN_WAIT_S), MAX_WAIT_S)


@dataclass(slots=True)
class RetrySlots:
    """Spreads the clients that were refused over the time in which places become free.

    Told all the same moment, they would return together and be refused again but for one: with
    64 clients outside a full house, four in five of all answers were refusals, and refusing them
    took a third of the goodput. So each gets the slot behind the last one given. A slot whose
    client stays away costs nobody anything: who comes while there is room is taken.
    """

    _last: float = 0.0

    def take(self, now: float, wait_s: float, interval_s: float) -> float:
        """Seconds until the next free slot: at least `wait_s`, `interval_s` behind the last."""
        self._last = min(max(now + wait_s, self._last + interval_s), now + MAX_WAIT_S)
        return self._last - now
