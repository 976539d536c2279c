"""Hugging Face transformers, eager, bfloat16; left out of no case, but slow at all of them."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM
from worker import Peer, serve


class TransformersPeer(Peer):
    """`model.generate` on one padded batch (all prompts of a case have one length)."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """See Peer."""
        ids = torch.tensor(prompts)
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return out[:, ids.shape[1] :].tolist()


if __name__ == "__main__":
    serve(TransformersPeer)
