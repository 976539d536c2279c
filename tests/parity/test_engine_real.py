"""The metamorphic suite on the real default model: bits do not depend on the surroundings."""

from __future__ import annotations

import pytest

from sterna.engine.llm import LLM
from sterna.engine.request import SamplingParams
from sterna.kernels.load import load_kernels

pytestmark = pytest.mark.real

TEXT = "The tern flies from the Arctic to the Antarctic and back, so it sees two summers a year. "
PROMPTS = [
    "Write one sentence about the sea.",
    TEXT * 3 + "In short:",
    TEXT * 2 + "Question: why does it fly so far? Answer:",
    "def fibonacci(n):",
]
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=1)
SEEDED = SamplingParams(
    temperature=0.9, top_p=0.9, seed=5, max_tokens=30, ignore_eos=True, logprobs=0, n=2
)


def answers(llm, prompts, params):
    """Tokens and logprobs of all samples."""
    done = llm.generate(prompts, params, progress=False)
    return [[(s.token_ids, s.logprobs) for s in completion.samples] for completion in done]


@pytest.fixture(scope="module")
def alone():
    """Each prompt by itself, uncut, without prefix cache."""
    if load_kernels().level != "cpu":
        pytest.skip("equal bits are promised by the C++ kernels only")
    with LLM(token_budget=1024, enable_prefix_cache=False, num_kv_blocks=200, threads=1) as llm:
        return [
            [answers(llm, [prompt], params)[0] for prompt in PROMPTS] for params in (GREEDY, SEEDED)
        ]


SURROUNDINGS = {
    "together": {"token_budget": 1024},
    "two threads": {"token_budget": 1024, "threads": 2},
    "chunks of 9": {"token_budget": 9},
    "whole prompts": {"policy": "whole-prompt", "token_budget": 64},
    "preempted": {"num_kv_blocks": 12, "token_budget": 64, "max_model_len": 176},
}


@pytest.mark.parametrize("settings", SURROUNDINGS.values(), ids=SURROUNDINGS.keys())
def test_bits_do_not_depend_on_the_surroundings(alone, settings):
    with LLM(**{"num_kv_blocks": 200, "threads": 1, **settings}) as llm:
        stats = []
        llm.engine.on_step.append(stats.append)
        for params, want in zip((GREEDY, SEEDED), alone, strict=True):
            assert answers(llm, PROMPTS, params) == want
            # again, with every full block in the prefix cache
            assert answers(llm, PROMPTS, params) == want
        preempted = sum(step.num_preempted for step in stats)
        assert (preempted > 0) == ("max_model_len" in settings)


def test_offline_api():
    with LLM(num_kv_blocks=100, token_budget=128, threads=1) as llm:
        question = [{"role": "user", "content": "What is the capital of Japan?"}]
        (chat,) = llm.chat(question, GREEDY)
        assert "Tokyo" in chat.text
        streamed = list(llm.stream(PROMPTS[0], GREEDY))
        (whole,) = llm.generate(PROMPTS[0], GREEDY)
        assert "".join(delta.text for delta in streamed) == whole.text
        likely = sum(entry.logprob for entry in llm.score("The capital of France is", " Paris"))
        unlikely = sum(entry.logprob for entry in llm.score("The capital of France is", " Quito"))
        assert likely > unlikely + 2
        stream = llm.stream(PROMPTS[0], GREEDY)
        next(stream)
        stream.close()
        assert llm.engine.num_free_blocks == llm.engine.pool.num_usable
