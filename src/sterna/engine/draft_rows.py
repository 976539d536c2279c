"""How many draft rows a step takes: those that raise the tokens a second of the whole batch."""

from __future__ import annotations

from typing import NamedTuple

from sterna.engine.sequence import Sequence as EngineSequence
from sterna.engine.stepcost import StepCost
from sterna.engine.worth import time_left, worths

# Rows are added only for this much more: estimates are no better.
MIN_GAIN = 1.02
# Sizes at which the price of a row is looked at.
ROWS = (1, 2, 3, 5, 7, 11, 15, 31)


class Offer(NamedTuple):
    """A draft: P(token i and all before it are accepted), for each i, and who made it."""

    reach: list[float]
    source: str


class Batch:
    """The next step without drafts, and how many rows to add."""

    def __init__(
        self,
        cost: StepCost,
        decodes: list[EngineSequence],
        num_others: int = 0,
        factor: float = 1.0,
        fixed_s: float = 0.0,
        is_queue: bool = True,
    ) -> None:
        """`num_others`: tokens of prompts in the step. `factor`, `fixed_s`: of account.Size.
        `is_queue`: somebody waits for the place of who ends (worth.py).
        """
        self._cost = cost
        self._factor, self._fixed_s = factor, fixed_s
        self._decodes = decodes
        self.num_decodes = len(decodes)
        self._rows = len(decodes) + num_others
        self._keys = sum(seq.num_computed for seq in decodes)
        self._mean_keys = self._keys // len(decodes)
        self.plain_s = self._seconds(self._rows, self._keys)
        self._plain_rate = self._rows / self.plain_s
        self._worth: dict[EngineSequence, float] | None = None
        self._is_mean = is_queue or num_others > 0 or len(decodes) == 1
        self.overhead_s = 0.0

    def rows_s(self, num_drafts: int) -> float:
        """Seconds that so many draft rows add."""
        keys = self._keys + num_drafts * self._mean_keys
        return self._seconds(self._rows + num_drafts, keys) - self.plain_s

    def least(self) -> float:
        """How likely a token must be to pay for the cheapest row, if all tokens had the mean worth.
        Above 1 nothing pays but what is worth more.
        """
        cheapest = min(self.rows_s(count) / count for count in ROWS)
        return MIN_GAIN * cheapest * self._plain_rate

    def worth(self, seq: EngineSequence) -> float:
        """Of its tokens, in units of the mean: all sequences' together are as many as they."""
        if self._is_mean:
            return 1.0
        if self._worth is None:
            lefts = [seq.num_left for seq in self._decodes]
            self._worth = dict(zip(self._decodes, worths(lefts, self.step_s), strict=True))
        return self._worth[seq]

    def choose(
        self, offers: dict[EngineSequence, Offer], max_rows: int, left_s: dict[str, float]
    ) -> dict[EngineSequence, int]:
        """Length of each sequence's draft. `left_s`: seconds that rows of a source may take."""
        order = [
            (-r * worth, seq.order, i)
            for i, (seq, offer) in enumerate(offers.items())
            for worth in (self.worth(seq),)
            for r in offer.reach
        ]
        order.sort()
        seqs = list(offers)
        # What asking took is spent either way (account.py decides whether to ask).
        plain_rate = self._rows / (self.plain_s + self.overhead_s)
        best_rate, best_count = MIN_GAIN * plain_rate, 0
        tokens, keys, before_s = float(self._rows), self._keys, self.plain_s
        left_s, taken = dict(left_s), list[EngineSequence]()
        for minus_gain, _, i in order:
            seq = seqs[i]
            seconds = self._seconds(self._rows + len(taken) + 1, keys + seq.num_computed)
            source = offers[seq].source
            left_s[source] -= seconds - before_s
            if left_s[source] < 0:
                continue
            taken.append(seq)
            tokens, keys, before_s = tokens - minus_gain, keys + seq.num_computed, seconds
            if tokens / (seconds + self.overhead_s) > best_rate:
                best_rate, best_count = tokens / (seconds + self.overhead_s), len(taken)
            if len(taken) == max_rows:
                break
        lengths: dict[EngineSequence, int] = {}
        for seq in taken[:best_count]:
            lengths[seq] = lengths.get(seq, 0) + 1
        return lengths

    def saved_s(self, lefts: list[tuple[int, int]]) -> float:
        """What gained tokens save: (tokens to go, tokens gained) of each sequence."""
        if self._is_mean:
            return sum(gained for _, gained in lefts) / self._plain_rate
        before = time_left([left + gained for left, gained in lefts], self.step_s)
        return before - time_left([left for left, _ in lefts], self.step_s)

    def step_s(self, num_decodes: int) -> float:
        """A plain step of so many decodes of this batch."""
        return self._seconds(num_decodes, num_decodes * self._mean_keys)

    def _seconds(self, num_rows: int, num_keys: int) -> float:
        return self._fixed_s + self._factor * self._cost.unlevelled(num_rows, num_keys)
