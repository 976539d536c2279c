"""Sterna's training step, timed: run by speed.py in this environment.

    python step_sterna.py JOB.json -> one JSON line

The chats of the whole job are packed without padding into rows of up to `seq_len` tokens; every
row is one optimizer step. The same pieces `sterna train` is made of, without its logging.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from sterna.data.pack import Document, PackedRow, pack
from sterna.kernels.load import load_kernels
from sterna.model.load import load_model
from sterna.parallel.mesh import Mesh
from sterna.train.config import OptimSection
from sterna.train.optim import AdamW
from sterna.train.step import TrainStep


def main() -> int:
    """Train the job's rows and print seconds, losses and tokens, step by step."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    load_kernels()
    decoder = load_model(job["model"], "bfloat16").decoder
    decoder.requires_grad_(True).train()
    settings = OptimSection(lr=job["lr"], beta2=0.999, master=not job["pure"],
                            states="bfloat16" if job["pure"] else "float32")  # fmt: skip
    optimiser = AdamW(decoder.named_parameters(), settings)
    step = TrainStep(decoder, Mesh.single())
    seconds, losses, tokens = [], [], []
    for i, row in enumerate(packed(job)):
        started = time.perf_counter()
        loss = step.run([row], i)
        norm = float(step.gradients.square_sum() ** 0.5)
        optimiser.step(step.gradients, i, job["lr"], min(1.0, 1.0 / max(norm, 1e-6)))
        seconds.append(time.perf_counter() - started)
        losses.append(loss.loss)
        tokens.append(loss.num_tokens)
    print(json.dumps({"seconds": seconds, "losses": losses, "tokens": tokens}))
    return 0


def packed(job: dict) -> list[PackedRow]:
    """The job's rows, packed as the data layer packs them."""
    rows = [row for batch in job["batches"] for row in batch]
    return pack([document(row) for row in rows], job["seq_len"], "best_fit")[: job["steps"]]


def document(row: dict[str, list[int]]) -> Document:
    """Labels shifted to targets."""
    targets = np.array([*row["labels"][1:], -100], np.int32)
    return Document(np.array(row["input_ids"], np.int32), targets, 0)


if __name__ == "__main__":
    sys.exit(main())
