"""OpenVINO GenAI's plain pipeline (SDPA back end): for one sequence sometimes its faster path."""

from __future__ import annotations

import numpy as np
import openvino
import openvino_genai
from worker import Peer, serve


class OpenVinoSdpaPeer(Peer):
    """`LLMPipeline`, one prompt at a time."""

    def __init__(self, model: str, threads: int) -> None:
        self._pipe = openvino_genai.LLMPipeline(
            model, "CPU", ATTENTION_BACKEND="SDPA", INFERENCE_NUM_THREADS=threads
        )

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """See Peer."""
        answers = []
        for ids in prompts:
            tensor = openvino.Tensor(np.array([ids], dtype=np.int64))
            mask = openvino.Tensor(np.ones((1, len(ids)), dtype=np.int64))
            inputs = openvino_genai.TokenizedInputs(tensor, mask)
            result = self._pipe.generate(
                inputs, max_new_tokens=num_tokens, ignore_eos=True, do_sample=False
            )
            answers.append(list(result.tokens[0]))
        return answers


if __name__ == "__main__":
    serve(OpenVinoSdpaPeer)
