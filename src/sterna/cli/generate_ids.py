"""Continuations as token ids: the engine in this process, for training on a model's own text."""

from __future__ import annotations

from collections.abc import Sequence


def generate_ids(
    model: str,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """The new tokens of each prompt, up to its end or `max_tokens`; the same for the same seed."""
    from sterna.engine.llm import LLM
    from sterna.engine.request import SamplingParams

    params = [
        SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed + i)
        for i in range(len(prompts))
    ]
    with LLM(model) as llm:
        done = llm.generate([list(prompt) for prompt in prompts], params)
        return [list(completion.token_ids) for completion in done]
