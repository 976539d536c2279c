"""Answers for a training report: the engine on the model that was just trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def generate(model: Path, prompts: Sequence[str], max_tokens: int) -> list[str]:
    """Greedy answers; through the chat template where the model has one, else continued."""
    from sterna.engine.llm import LLM
    from sterna.engine.request import SamplingParams
    from sterna.text.tokenizer import load_tokenizer

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    with LLM(str(model), token_budget=256) as llm:
        if load_tokenizer(model).chat_template is None:
            done = llm.generate(list(prompts), params)
        else:
            done = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], params)
        return [completion.samples[0].text for completion in done]
