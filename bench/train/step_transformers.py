"""A plain transformers training loop, timed: run by speed.py in the peer's own environment.

    python step_transformers.py JOB.json -> one JSON line

Mixed precision as its users do it: float32 weights, bfloat16 autocast, fused AdamW; or, with
`pure`, everything in bfloat16. Chats are padded to the longest of their batch.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def main() -> int:
    """Train the job's batches and print seconds and losses, step by step."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    dtype = torch.bfloat16 if job["pure"] else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=job["lr"], fused=True, weight_decay=0.0)
    seconds, losses = [], []
    for batch in job["batches"]:
        started = time.perf_counter()
        losses.append(step(model, optimiser, collate(batch), job["pure"]))
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds, "losses": losses}))
    return 0


def step(model: Any, optimiser: torch.optim.Optimizer, batch: Any, is_pure: bool) -> float:
    """One optimizer step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=not is_pure):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return float(loss)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest row; a batch of equal rows gets no mask."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], labels[i, :n] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        mask[i, :n] = 1
    batch = {"input_ids": ids, "labels": labels}
    return batch if bool(mask.all()) else {**batch, "attention_mask": mask}


if __name__ == "__main__":
    sys.exit(main())
