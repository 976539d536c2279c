"""TRL's SFTTrainer, timed: run by speed.py in the peer's own environment.

    python step_trl.py JOB.json -> one JSON line

The job's rows are tokenized already, so that only training is timed. `packing` is TRL's own, one
row a step.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Seconds of every optimizer step and the losses logged."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock; waiting for the collator belongs to the step before."""
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._started)

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Keep the loss."""
        if "loss" in logs:
            self.losses.append(logs["loss"])


def main() -> int:
    """Train the job's rows and print seconds and losses, step by step."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    dtype = torch.bfloat16 if job["pure"] else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    rows = [row for batch in job["batches"] for row in batch]
    keys = {
        "input_ids": [row["input_ids"] for row in rows],
        "labels": [row["labels"] for row in rows],
    }
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=1 if job["packing"] else len(job["batches"][0]),
            max_length=job["seq_len"],
            packing=job["packing"],
            max_steps=job["steps"],
            learning_rate=job["lr"],
            weight_decay=0.0,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=not job["pure"],
            use_cpu=True,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_dict(keys), callbacks=[clock],
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
        )  # fmt: skip
        tokens = [len(row) for row in trainer.train_dataset["input_ids"]]
        trainer.train()
    print(json.dumps({"seconds": clock.seconds, "losses": clock.losses, "row_tokens": tokens}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
