"""Whether asking a drafter is worth its time: what its drafts saved against what asking took.

A head on the model's states takes a tenth of a decode step, asked in vain as well. Its gain is the
plain seconds of the tokens that came true, less the seconds of the rows that it took to verify
them. A drafter that gained less than it took over FIRST_ASKS proposals (ASKS where it paid before),
or by the time that asking took MAX_SPENT plain steps, pauses, each time for twice as many steps;
one that pays is asked at every step again. Drafters whose time is nothing beside a step (suffix:
microseconds) are always asked.
"""

from __future__ import annotations

from typing import Final

FIRST_ASKS, ASKS = 16, 64
PAUSE, MAX_PAUSE = 64, 4096
# In a batch of 32 a head takes a quarter of a step: known to be too much after six proposals.
MAX_SPENT: Final = 1.5
# Of a step's seconds: less is not counted.
NOTHING: Final = 0.01


class Asking:
    """The account of one drafter."""

    def __init__(self) -> None:
        self._spent = self._gained = self._steps_s = 0.0
        self._num_asks = 0
        self._asks = FIRST_ASKS
        self._pause = PAUSE
        self._left = 0

    def is_due(self) -> bool:
        """Ask it in this step; counts a pause down."""
        self._left = max(0, self._left - 1)
        return self._left == 0

    def note_ask(self, seconds: float, step_s: float) -> None:
        """A proposal took `seconds`, where a step without drafts takes `step_s`."""
        is_dear = self._spent > MAX_SPENT * step_s and self._asks == FIRST_ASKS
        if self._num_asks == self._asks or is_dear:
            self._judge()
        self._num_asks += 1
        self._spent += min(seconds, step_s)  # a pause of the machine is not the drafter's
        self._steps_s += step_s

    def note_gain(self, seconds: float) -> None:
        """Its draft saved `seconds` of plain decoding; negative where it cost more than it gave."""
        self._gained += seconds

    def _judge(self) -> None:
        is_cheap = self._spent < NOTHING * self._steps_s
        if is_cheap or self._gained >= self._spent:
            self._pause, self._asks = PAUSE, ASKS
        else:
            self._asks = FIRST_ASKS
            self._left, self._pause = self._pause, min(2 * self._pause, MAX_PAUSE)
        self._spent = self._gained = self._steps_s = 0.0
        self._num_asks = 0
