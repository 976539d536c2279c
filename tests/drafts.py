"""Drafters for tests: they know what will come, and spoil it on purpose."""

from __future__ import annotations

import random

from sterna.engine import account, draft_rows
from sterna.engine.account import Account, Size
from sterna.engine.drafters.base import Draft

KINDS = ("right", "wrong", "mixed", "short")


class Scripted:
    """Knows each sample's plain output, by (request id, sample); says it as `kind` demands.

    right: all of it; wrong: never the next token; mixed: each token spoilt with probability 1/4;
    short: right, of random lengths, sometimes none.
    """

    name = "scripted"

    def __init__(self, known, kind, vocab, seed=0):
        self.known, self.kind, self.vocab = known, kind, vocab
        self.rng = random.Random(f"{kind} {seed}")
        self.seen = {}  # by sequence, its output at the last proposal
        self.finished = []

    def propose(self, seqs, limits):
        return [self._draft(seq, limit) for seq, limit in zip(seqs, limits, strict=True)]

    def finish(self, seq):
        self.finished.append(seq)
        self.seen.pop(seq, None)

    def _draft(self, seq, limit):
        seen = self.seen.get(seq, [])
        assert seq.output[: len(seen)] == seen
        self.seen[seq] = list(seq.output)
        known = self.known.get((seq.state.request.request_id, seq.index), ())
        place, count = len(seq.output), min(limit, 12)
        if self.kind == "short":
            count = self.rng.randint(0, count)
        tokens = [*known[place : place + count], *[1] * count][:count]
        tokens = [self._spoilt(token, i) for i, token in enumerate(tokens)]
        return Draft(tokens, [0.9] * count, self.name) if count else None

    def _spoilt(self, token, i):
        is_wrong = self.kind == "wrong" or (self.kind == "mixed" and self.rng.random() < 0.25)
        return (token + 1 + i) % self.vocab if is_wrong else token


class FreeRows:
    """A cost model in which drafts cost nothing."""

    level = 1.0

    def unlevelled(self, num_rows, num_keys):
        return 1e3

    def note(self, num_rows, num_keys, seconds, *, has_drafts=False):
        pass


class Rich(Account):
    """An account that affords everything."""

    def __init__(self, share=0.0):
        super().__init__(share)
        self.balance = 1e9

    def affords(self, row_s, plain_s):
        return True

    def allow(self, seconds, plain_s):
        pass

    def note_gain(self, seconds, plain_s):
        pass


class RichSize(Size):
    """Asks always."""

    def __init__(self, names):
        super().__init__(names)
        self.accounts = {name: Rich() for name in names}

    def must_be_plain(self):
        return False

    def is_broke(self):
        return False


def always_draft(engine, monkeypatch):
    """Verify whatever is proposed, however unlikely."""
    monkeypatch.setattr(draft_rows, "MIN_GAIN", 0.0)
    monkeypatch.setattr(account, "Size", RichSize)
    engine.speculator.cost = FreeRows()
