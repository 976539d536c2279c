"""Sterna in process: requests straight into the engine."""

from __future__ import annotations

import sys
from itertools import takewhile

from worker import MAX_CONTEXT, Peer, serve

from sterna.engine.build import build_engine
from sterna.engine.config import EngineConfig
from sterna.engine.request import EngineRequest, SamplingParams


class SternaPeer(Peer):
    """One engine with its defaults (budget measured at start)."""

    def __init__(self, model: str, threads: int) -> None:
        words = list(takewhile(lambda word: not word.startswith("--"), sys.argv[3:]))
        weights, activations = (*words, *("bf16", "auto")[len(words) :])
        config = EngineConfig(
            threads=threads, max_model_len=MAX_CONTEXT, weights=weights, activations=activations
        )
        # "" is the default model: its quantised copy is kept, as `sterna serve` keeps it.
        self._engine = build_engine(model if weights == "bf16" else "", config)
        self._count = 0

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """See Peer."""
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        answers: dict[str, list[int]] = {}
        for prompt in prompts:
            self._count += 1
            name = str(self._count)
            answers[name] = []
            self._engine.add(
                EngineRequest(request_id=name, prompt_token_ids=tuple(prompt), params=params)
            )
        while self._engine.has_work:
            for output in self._engine.step():
                for delta in output.deltas:
                    answers[output.request_id] += delta.token_ids
        return list(answers.values())


if __name__ == "__main__":
    serve(SternaPeer)
