"""Nothing counts in 32 bits: tensors of more than 2^31 numbers, rows of more than 524,288 tokens.

Llama-8B's hidden states pass 2^31 numbers at 524,288 tokens, where others die. The large tensors
here are maps of nothing: pages that were never written are the system's one page of zeros.
"""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sterna.data.pack import Document, join
from sterna.kernels import ops
from sterna.kernels.load import load_kernels
from sterna.train.longseq.config import LongseqSection
from sterna.train.longseq.head import chunked_cross_entropy
from sterna.train.longseq.store import DiskStore
from sterna.train.longseq.tiles import forward_tiles, tile_slices
from sterna.train.memory import Job, Layout, Shape, estimate
from sterna.train.offload.slab import Slab
from sterna.train.step import as_batch

TOKENS = 524_288 + 1024


@pytest.fixture(scope="module", autouse=True)
def kernels():
    load_kernels()


def zeros(rows: int, width: int) -> torch.Tensor:
    """bfloat16 [rows, width] that takes no memory until it is written."""
    memory = mmap.mmap(-1, rows * width * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(rows, width)


def test_kernels_reach_beyond_2_to_the_31():
    x = zeros(TOKENS, 4096)
    assert x.numel() > 2**31
    x[-1] = torch.arange(4096)
    assert torch.equal(
        ops.select_rows(x, torch.tensor([TOKENS - 1, 0], dtype=torch.int32))[0], x[-1]
    )
    token = torch.tensor([TOKENS - 1], dtype=torch.int32)
    assert torch.equal(ops.embed(token, x, 4096)[0], x[-1])
    y = ops.linear(x, torch.ones(16, 4096, dtype=torch.bfloat16), None, None, 16)
    assert y[:-1].abs().max() == 0 and (y[-1] / x[-1].float().sum() - 1).abs().max() < 2**-8


def test_the_head_sums_half_a_million_tokens():
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, 8), torch.randn(32, 8)
    targets = torch.randint(0, 32, (TOKENS,))
    hidden.requires_grad_(), weight.requires_grad_()
    got = chunked_cross_entropy(hidden, weight, targets, chunk_rows=100_000)
    found = torch.autograd.grad(got, (hidden, weight))
    want = F.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="sum")
    for a, b in zip(found, torch.autograd.grad(want, (hidden, weight)), strict=True):
        # float32 sums of 525,312 terms: 1e-7 a term, by the root of their number
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-6)


def test_rows_and_tiles_of_more_tokens():
    tokens = np.arange(TOKENS, dtype=np.int32) % 100
    batch, targets = as_batch([join([Document(tokens, tokens, 0)])], torch.device("cpu"))
    assert int(batch.positions[-1]) == TOKENS - 1 == int(batch.query_starts[-1]) - 1
    assert len(targets) == TOKENS
    assert list(tile_slices(2**32 + 1, 2**31))[-1] == slice(2**32, 2**32 + 1)
    x = torch.arange(TOKENS, dtype=torch.float64)[:, None]
    assert torch.equal(forward_tiles(lambda y: y + 1, (x,), 4096), x + 1)


def test_files_are_addressed_beyond_4_gib(tmp_path):
    slab, value, far = Slab(tmp_path), torch.arange(7.0), 5 << 30
    slab.write(far, value)  # a hole before it: the disk has one page
    out = torch.empty(7)
    slab.read(far, out)
    assert torch.equal(out, value)
    assert torch.equal(slab.view(far, 28).view(torch.float32), value)
    store = DiskStore(tmp_path)
    store._ends.append(far)
    assert torch.equal(store.take(store.put(value)), value)


def test_the_planner_counts_a_billion_tokens():
    shape = Shape(32, 4096, 14_336, 32, 8, 128, 128_256, False)
    settings = LongseqSection(checkpoint=True, mlp_tile=4096, attention_tile=4096, tier="disk")
    found = estimate(shape, Job(2**30), settings, Layout())
    assert found.disk == 2**30 * 4096 * 2 * 32
    assert found.moments["block"] > 2**30 * 4096 * 2 * 5
