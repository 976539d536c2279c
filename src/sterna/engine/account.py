"""What each drafter has earned and spent: why speculation cannot lose more than SHARE of the time.

A drafter has an account at every size of batch, in seconds:

    + a share of every step's time                  the allowance, SHARE for all drafters together,
                                                    and START plain steps to begin with
    - what asking it took                           measured
    - what its rows added to the step               measured: the step less asking less a plain step
    + plain_s / n for each token that came true     n decodes took plain_s without drafts

It is asked only while the account covers asking and one row, and rows are verified only as far as
the account covers all of them being wrong. So an account is never overdrawn by more than one step
was misjudged, and over any time T the losses at a size of batch are at most SHARE * T, START and
that step: a bound by construction, whatever drafts are worth. What was gained earlier may be lost
again only up to MAX_SAVED plain steps, so the bound holds from any moment on, with that constant.

`plain_s` comes from real steps without drafts of that size of batch: the first KNOWN ones, those
in which nobody had a draft, and one in PLAIN_EVERY while everything is drafted.

A drafter that loses gets half the allowance after each LOSS plain steps lost, down to LEAST of it;
one that gains as much gets all of it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

SHARE: Final = 0.015
MAX_SAVED: Final = 64.0  # plain steps
START: Final = 1.0  # plain steps, once
LOSS: Final = 0.5  # plain steps
LEAST: Final = 1 / 4
KNOWN: Final = 2
PLAIN_EVERY: Final = 64
# Weight of a step in the averages, and how far one may move them: a process that was paused shows
# a step of minutes.
WEIGHT: Final = 0.1
CLIP: Final = 1.5
# What asking takes before it was measured, in plain steps.
FIRST_ASK: Final = 0.02


class Account:
    """One drafter's at one size of batch. Seconds."""

    def __init__(self, share: float, first: float = 0.0) -> None:
        """`share`: of every step's time. `first`: plain steps that it begins with."""
        self.balance = 0.0
        self._first, self._is_open = first, False
        self.share = self._full = share
        self._ask_s = 0.0
        self._num_asks = 0
        self._net = 0.0  # since the last verdict

    def ask_s(self, plain_s: float) -> float:
        """What asking is expected to take."""
        return self._ask_s if self._num_asks else FIRST_ASK * plain_s

    def affords(self, row_s: float, plain_s: float) -> bool:
        """Asking, and a row that takes `row_s`."""
        return self.balance >= self.ask_s(plain_s) + row_s

    def allow(self, seconds: float, plain_s: float) -> None:
        """A step of `seconds` went by."""
        most = MAX_SAVED * plain_s
        if not self._is_open:
            self._is_open, self.balance = True, self._first * plain_s
        if self.balance < most:
            self.balance = min(self.balance + self.share * seconds, most)

    def note_ask(self, seconds: float, plain_s: float) -> None:
        """Asking took so long."""
        self._num_asks += 1
        seconds = min(seconds, plain_s)  # a pause of the machine is not the drafter's
        self._ask_s += max(WEIGHT, 1 / self._num_asks) * (seconds - self._ask_s)
        self.note_gain(-seconds, plain_s)

    def note_gain(self, seconds: float, plain_s: float) -> None:
        """Seconds of plain decoding that its tokens saved, less those of its rows."""
        self.balance = min(self.balance + seconds, MAX_SAVED * plain_s)
        self._net += seconds
        if self._net < -LOSS * plain_s:
            self.share = max(self.share / 2, LEAST * self._full)
            self._net = 0.0
        elif self._net > LOSS * plain_s:
            self.share = self._full
            self._net = 0.0


class Size:
    """The accounts at one size of batch, and what plain steps of it take."""

    def __init__(self, names: Sequence[str]) -> None:
        # Forwards of real plain steps by those of the cost model, and what a step takes beside.
        self.factor, self.overhead_s = 1.0, 0.0
        self.accounts = {name: Account(SHARE / len(names), START / len(names)) for name in names}
        self._num_plain = 0
        self._num_drafted = 0  # since a plain one

    def must_be_plain(self) -> bool:
        """The next step is to tell what drafts are compared with."""
        return self._num_plain < KNOWN or self._num_drafted >= PLAIN_EVERY

    def is_broke(self) -> bool:
        """Nobody can be asked, whatever a row costs."""
        return all(account.balance <= account.ask_s(0.0) for account in self.accounts.values())

    def note_plain(self, forward_s: float, overhead_s: float, model_s: float) -> None:
        """A step without drafts took so long, asking not counted."""
        self._num_plain += 1
        self._num_drafted = 0
        ratio = forward_s / model_s
        if self._num_plain > KNOWN:
            ratio = min(max(ratio, self.factor / CLIP), self.factor * CLIP)
            overhead_s = min(overhead_s, CLIP * self.overhead_s)
        weight = max(WEIGHT, 1 / self._num_plain)
        self.factor += weight * (ratio - self.factor)
        self.overhead_s += weight * (overhead_s - self.overhead_s)

    def note_drafted(self) -> None:
        """A step had drafts."""
        self._num_drafted += 1

    def allow(self, seconds: float, plain_s: float) -> None:
        """A step went by."""
        for account in self.accounts.values():
            account.allow(seconds, plain_s)


class Books:
    """All sizes of batch: 1, 2, 3 to 4, 5 to 8, ... decodes."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names`: of the drafters."""
        self._names = tuple(names)
        self._sizes: dict[int, Size] = {}

    def at(self, num_decodes: int) -> Size:
        """That of a batch."""
        bucket = max(num_decodes - 1, 0).bit_length()
        found = self._sizes.get(bucket)
        if found is None:
            found = self._sizes[bucket] = Size(self._names)
        return found
