"""Writes distill.json: TRL's generalised Jensen-Shannon divergence of fixed logits.

Run once with a Python that has TRL (1.16.0 wrote the stored file); the tests need only the file:

    PYTHON_WITH_TRL tests/golden/make_distill_golden.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from trl.experimental.gkd.gkd_trainer import GKDTrainer

FILE = Path(__file__).with_name("distill.json")
ROWS, VOCAB = 5, 7
CASES = [(0.0, 1.0), (0.1, 1.0), (0.5, 1.0), (0.5, 2.0), (0.9, 0.7), (1.0, 1.0), (1.0, 1.5)]


def wave(turn: float) -> torch.Tensor:
    """The same float64 logits wherever they are made."""
    number = torch.arange(ROWS * VOCAB, dtype=torch.float64)
    return (torch.sin(number * 12.9898 + turn) * 3).reshape(1, ROWS, VOCAB)


def case(beta: float, temperature: float) -> dict[str, object]:
    student = wave(0.0).requires_grad_(True)
    labels = torch.tensor([[1, 1, -100, 1, 1]])
    loss = GKDTrainer.generalized_jsd_loss(
        student, wave(1.0), labels, beta, temperature, num_items_in_batch=4
    )
    loss.backward()
    assert student.grad is not None
    return {
        "beta": beta,
        "temperature": temperature,
        "loss": float(loss),
        "grad": student.grad[0].tolist(),
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps([case(*each) for each in CASES], indent=1) + "\n")
