"""How many draft rows a step takes: those that raise the tokens a second of the whole batch."""

from __future__ import annotations

from sterna.engine.sequence import Sequence as EngineSequence
from sterna.engine.stepcost import StepCost

# Rows are added only for this much more: estimates are no better.
MIN_GAIN = 1.02


class Batch:
    """The next step without drafts, and how many rows to add."""

    def __init__(self, cost: StepCost, decodes: list[EngineSequence], num_others: int) -> None:
        self._cost = cost
        self._rows = len(decodes) + num_others
        self._keys = sum(seq.num_computed for seq in decodes)
        self.plain_s = cost.seconds(self._rows, self._keys)
        self._plain_rate = self._rows / self.plain_s
        self._mean_keys = self._keys // len(decodes)
        self.overhead_s = 0.0

    def gain_s(self, num_drafts: int, num_accepted: int) -> float:
        """Seconds of plain decoding that a draft saved, less those of its rows."""
        keys = self._keys + num_drafts * self._mean_keys
        rows_s = self._cost.seconds(self._rows + num_drafts, keys) - self.plain_s
        return num_accepted / self._plain_rate - rows_s

    def may_gain(self, num_seqs: int, max_length: int) -> bool:
        """Even a draft that is all right pays only where rows are cheap."""
        length = 1
        while length <= max_length:
            rows = num_seqs * length
            seconds = self._cost.seconds(self._rows + rows, self._keys + rows * self._mean_keys)
            if (self._rows + rows) / seconds > MIN_GAIN * self._plain_rate:
                return True
            length *= 2
        return False

    def choose(
        self, reach: dict[EngineSequence, list[float]], max_rows: int
    ) -> dict[EngineSequence, int]:
        """Length of each sequence's draft."""
        order = [(-r, seq.order, seq) for seq, found in reach.items() for r in found]
        order.sort(key=lambda item: item[:2])
        # What asking took is spent either way (asking.py decides whether to ask).
        plain_rate = self._rows / (self.plain_s + self.overhead_s)
        best_rate, best_count = MIN_GAIN * plain_rate, 0
        tokens, keys = float(self._rows), self._keys
        for i, (minus_r, _, seq) in enumerate(order[:max_rows]):
            tokens -= minus_r
            keys += seq.num_computed
            seconds = self._cost.seconds(self._rows + i + 1, keys) + self.overhead_s
            if tokens / seconds > best_rate:
                best_rate, best_count = tokens / seconds, i + 1
        lengths: dict[EngineSequence, int] = {}
        for _, _, seq in order[:best_count]:
            lengths[seq] = lengths.get(seq, 0) + 1
        return lengths
