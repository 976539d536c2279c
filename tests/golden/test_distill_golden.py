"""The divergence of distillation against TRL's (distill.json; make_distill_golden.py made it)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sterna.kernels.load import load_kernels
from sterna.train.longseq.divergence import Logits, chunked_jsd

GOLDEN = json.loads(Path(__file__).with_name("distill.json").read_text())
ROWS, VOCAB = 5, 7


def wave(turn):
    number = torch.arange(ROWS * VOCAB, dtype=torch.float64)
    return (torch.sin(number * 12.9898 + turn) * 3).reshape(ROWS, VOCAB)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['beta']}-{case['temperature']}")
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_the_divergence_is_trls(case, chunk_rows):
    load_kernels()
    # With the identity as head, hidden states are logits.
    student, head = wave(0.0).requires_grad_(True), torch.eye(VOCAB, dtype=torch.float64)
    weights = torch.tensor([0.25, 0.25, 0.0, 0.25, 0.25])
    found = chunked_jsd(
        Logits(student, head), Logits(wave(1.0), head), weights,
        case["beta"], case["temperature"], chunk_rows,
    )  # fmt: skip
    (found.loss * 3).backward()
    assert float(found.loss.detach()) == pytest.approx(case["loss"], rel=1e-12)
    wanted = 3 * torch.tensor(case["grad"], dtype=torch.float64)
    assert torch.allclose(student.grad, wanted, rtol=1e-10, atol=1e-14)
    q, p = (w.div(case["temperature"]).log_softmax(1) for w in (wave(0.0), wave(1.0)))
    reverse = (weights * (q.exp() * (q - p)).sum(1)).sum()
    assert found.reverse_kl == pytest.approx(float(reverse), rel=1e-12)
    assert found.entropy == pytest.approx(float(-(weights * (q.exp() * q).sum(1)).sum()), rel=1e-12)
