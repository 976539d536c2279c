"""A minimal runner over the paged cache, and tiny random Hugging Face models, for parity tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sterna.model.batch import Batch, KVView
from sterna.model.decoder import Decoder

BLOCK_SIZE = 16


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed_batch(sequences: list[list[int]], offset: int = 0) -> Batch:
    """A training batch (kv=None) of whole sequences."""
    lengths = [len(s) for s in sequences]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = [p + offset for n in lengths for p in range(n)]
    tokens = [t for s in sequences for t in s]
    return Batch(int32(tokens), int32(positions), starts, int32(lengths))


@dataclass
class PagedRunner:
    """Keeps sequences in a paged cache with scattered blocks; one `step` is one mixed batch."""

    decoder: Decoder
    num_blocks: int = 64
    layers: tuple[Tensor, ...] = ()
    tables: dict[str, list[int]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = self.decoder.new_kv_layers(self.num_blocks, BLOCK_SIZE)
        # Blocks 1.. in an order with gaps, so that contiguity is never relied on.
        self._free = [b for b in range(1, self.num_blocks) if b % 2] + [
            b for b in range(1, self.num_blocks) if not b % 2
        ]

    def add(self, name: str, offset: int = 0) -> None:
        self.tables[name], self.lengths[name], self.offsets[name] = [], 0, offset

    @torch.inference_mode()
    def step(self, new: dict[str, list[int]], rows: Tensor | None = None) -> Tensor:
        """Run new tokens of each named sequence; float32 logits of `rows` (None = all)."""
        positions, slots, starts = [], [], [0]
        for name, tokens in new.items():
            begin, end = self.lengths[name], self.lengths[name] + len(tokens)
            table = self.tables[name]
            while len(table) * BLOCK_SIZE < end:
                table.append(self._free.pop(0))
            at = range(begin, end)
            positions += [p + self.offsets[name] for p in at]
            slots += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in at]
            starts.append(starts[-1] + len(tokens))
            self.lengths[name] = end
        width = max(len(self.tables[name]) for name in new)
        tables = [self.tables[name] + [0] * (width - len(self.tables[name])) for name in new]
        kv = KVView(self.layers, torch.tensor(tables, dtype=torch.int32), torch.tensor(slots), 16)
        batch = Batch(
            int32([t for tokens in new.values() for t in tokens]),
            int32(positions),
            int32(starts),
            int32([self.lengths[name] for name in new]),
            rows,
            kv,
            None if rows is None else torch.searchsorted(rows, int32(starts)).int(),
        )
        return self.decoder.logits(self.decoder.hidden(batch))

    def greedy(self, prompt: list[int], num_tokens: int) -> tuple[list[int], Tensor]:
        """Greedy tokens, and the logits that chose each [num_tokens, V]."""
        tokens, logits = self.greedy_together([prompt], num_tokens)
        return tokens[0], logits[0]

    def greedy_together(
        self, prompts: list[list[int]], num_tokens: int
    ) -> tuple[list[list[int]], list[Tensor]]:
        """`greedy` of several prompts in one batch a step."""
        names = [f"s{i}" for i in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            self.add(name, self.decoder.rope_row_offset(len(prompt) + num_tokens))
        feed = dict(zip(names, prompts, strict=True))
        tokens: list[list[int]] = [[] for _ in names]
        chosen: list[Tensor] = []
        for _ in range(num_tokens):
            ends = torch.tensor([len(new) for new in feed.values()]).cumsum(0) - 1
            chosen.append(self.step(feed, ends.int()))
            best = chosen[-1].argmax(dim=-1).tolist()
            feed = {name: [token] for name, token in zip(names, best, strict=True)}
            for sequence, token in zip(tokens, best, strict=True):
                sequence.append(token)
        return tokens, list(torch.stack(chosen, dim=1))


@pytest.fixture
def paged() -> Callable[..., PagedRunner]:
    return PagedRunner


@pytest.fixture
def packed() -> Callable[..., Batch]:
    return packed_batch


@pytest.fixture
def save_hf(tmp_path: Path) -> Callable[[Any], Path]:
    """Saves a transformers model to a folder and returns the folder."""

    def save(model: Any) -> Path:
        folder = tmp_path / "hf"
        model.save_pretrained(folder)
        return folder

    return save
