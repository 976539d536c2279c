"""A decoder without weights that proves the engine's bookkeeping.

Its "keys and values" are the tokens and positions themselves. The logits of a row are a hash of
every (position, token) that the row can see through the block table, so a wrong slot, a stale
block, a missing copy-on-write or a foreign prefix changes the output.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sterna.engine.config import EngineConfig
from sterna.engine.engine import Engine
from sterna.engine.memory import EngineShape
from sterna.engine.request import EngineRequest, SamplingParams

VOCAB = 97
EOS = 96
RARE = 95


@dataclass(frozen=True)
class FakeConfig:
    vocab_size: int = VOCAB
    num_positions: int = 512
    eos_token_ids: tuple[int, ...] = (EOS,)


def context_hash(tokens) -> int:
    """The fake model's whole state after `tokens`."""
    state = 1
    for position, token in enumerate(tokens):
        state = (state * 1_000_003 + position * 7919 + int(token) * 104_729 + 1) % (2**31 - 1)
    return state


def hash_logits(state: int) -> np.ndarray:
    logits = np.random.default_rng(state).standard_normal(VOCAB).astype(np.float32) * 3
    logits[RARE] = -30  # practically never generated: prompts use it to mark a request
    return logits


def check_output_rows(batch):
    """The output rows of a sequence are the last of its chunk, counted by `output_starts`."""
    ends, starts = batch.query_starts[1:].tolist(), batch.output_starts.tolist()
    assert len(starts) == len(ends) + 1 and starts[0] == 0
    counts = [b - a for a, b in itertools.pairwise(starts)]
    rows = [row for end, n in zip(ends, counts, strict=True) for row in range(end - n, end)]
    assert batch.output_rows.tolist() == rows


class FakeDecoder:
    """See the module docstring. `poison` tokens make logits NaN, `explode` tokens raise."""

    dtype = torch.float32
    skips_prompt_rows = False
    prompt_layers = "all 1"

    def __init__(self, poison=(), explode=()):
        self.config = FakeConfig()
        self.poison, self.explode = set(poison), set(explode)
        self.steps = []

    def new_kv_layers(self, num_blocks, block_size, dtype=None):
        return (torch.full((num_blocks, 2, block_size), -1, dtype=torch.int64),)

    def rope_row_offset(self, total_len):
        return 0

    def hidden(self, batch):
        tokens = batch.tokens.tolist()
        self.steps.append((len(tokens), len(batch.context_lens)))
        if self.explode & set(tokens):
            raise RuntimeError("exploded")
        check_output_rows(batch)
        cache = batch.kv.layers[0]
        size = batch.kv.block_size
        for token, position, slot in zip(
            tokens, batch.positions.tolist(), batch.kv.slots.tolist(), strict=True
        ):
            assert slot >= size, "the null block is written"
            cache[slot // size, 0, slot % size] = token
            cache[slot // size, 1, slot % size] = position
        states = [self._state(batch, row) for row in batch.output_rows.tolist()]
        return torch.tensor(states, dtype=torch.int64)

    def logits(self, hidden):
        rows = [hash_logits(s) if s >= 0 else np.full(VOCAB, np.nan) for s in hidden.tolist()]
        stacked = np.stack(rows).astype(np.float32) if rows else np.empty((0, VOCAB), np.float32)
        return torch.from_numpy(stacked)

    def _state(self, batch, row):
        starts = batch.query_starts.tolist()
        seq = next(i for i in range(len(starts) - 1) if starts[i] <= row < starts[i + 1])
        length = int(batch.context_lens[seq]) - (starts[seq + 1] - 1 - row)
        size = batch.kv.block_size
        table = batch.kv.block_tables[seq].tolist()
        slots = [(table[p // size], p % size) for p in range(length)]
        cells = [
            (int(batch.kv.layers[0][b, 0, o]), int(batch.kv.layers[0][b, 1, o])) for b, o in slots
        ]
        assert [position for _, position in cells] == list(range(length)), "a position is missing"
        tokens = [token for token, _ in cells]
        return -1 if self.poison & set(tokens) else context_hash(tokens)


class FakeTokenizer:
    """Token i is the character chr(32 + i); encode is the inverse."""

    eos_token_ids = (EOS,)

    def encode(self, text, add_special_tokens=True):
        return [ord(char) - 32 for char in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(32 + i) for i in ids)

    def incremental(self, skip_special_tokens=True, *, keep_leading_space=False):
        return FakeText()


class FakeText:
    def push(self, ids):
        return "".join(chr(32 + i) for i in ids)

    def flush(self):
        return ""


def naive_greedy(prompt, count, stop_at_eos=True):
    """What the fake model says, without any engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(hash_logits(context_hash(tokens)).argmax()))
        if stop_at_eos and tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


class Harness:
    """An engine with shortcuts for tests; collects every delta."""

    def __init__(
        self,
        decoder=None,
        num_blocks=64,
        max_model_len=512,
        grammars=None,
        drafters=(),
        **settings,
    ):
        settings = {"block_size": 16, "token_budget": 64, "max_num_seqs": 16, **settings}
        self.decoder = decoder or FakeDecoder()
        self.engine = Engine(
            self.decoder,
            FakeTokenizer(),
            EngineConfig(**settings),
            EngineShape(VOCAB, max_model_len, num_blocks, frozenset({EOS})),
            grammars,
            drafters,
        )
        self.outputs = {}

    def add(self, name, prompt, priority=0, deadline_s=None, cache_salt="", **params):
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **params})
        request = EngineRequest(
            request_id=name,
            prompt_token_ids=tuple(int(token) for token in prompt),
            params=params,
            priority=priority,
            deadline_s=deadline_s,
            cache_salt=cache_salt,
        )
        self.engine.add(request)
        self.outputs[name] = []

    def step(self):
        outputs = self.engine.step()
        for output in outputs:
            self.outputs[output.request_id].append(output)
        self.engine.check_integrity()
        return outputs

    def run(self, max_steps=5000):
        for _ in range(max_steps):
            if not self.engine.has_work:
                return self
            self.step()
        raise AssertionError("requests did not finish")

    def deltas(self, name, index=0):
        return [d for o in self.outputs[name] for d in o.deltas if d.index == index]

    def tokens(self, name, index=0):
        return [token for d in self.deltas(name, index) for token in d.token_ids]

    def text(self, name, index=0):
        return "".join(d.text for d in self.deltas(name, index))

    def end(self, name, index=0):
        """The one delta with a finish reason."""
        (last,) = [d for d in self.deltas(name, index) if d.finish_reason is not None]
        return last


@pytest.fixture
def harness():
    return Harness


@pytest.fixture
def fake_decoder():
    return FakeDecoder


@pytest.fixture
def greedy():
    return naive_greedy
