"""OpenVINO GenAI, continuous batching (paged attention): fp16 weights, bf16 arithmetic."""

from __future__ import annotations

import numpy as np
import openvino
import openvino_genai
from worker import MAX_SEQUENCES, Peer, serve

CACHE_GIB = 2


class OpenVinoPeer(Peer):
    """The pipeline with its default token budget and no prefix cache."""

    def __init__(self, model: str, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.max_num_seqs = MAX_SEQUENCES
        scheduler.enable_prefix_caching = False
        # A whole 2,048-token prompt in one step: its fastest prefill.
        scheduler.max_num_batched_tokens = 2048
        self._pipe = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """See Peer."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = num_tokens
        config.ignore_eos = True
        config.do_sample = False
        inputs = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        results = self._pipe.generate(inputs, [config] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in results]


if __name__ == "__main__":
    serve(OpenVinoPeer)
