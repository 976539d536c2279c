"""vLLM's CPU build, bfloat16, in this process (its worker process would spin beside the others)."""

from __future__ import annotations

import os
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from worker import MAX_CONTEXT, MAX_SEQUENCES, Peer, serve


class VllmPeer(Peer):
    """`LLM.generate` without prefix cache."""

    ignores_end = True

    def __init__(self, model: str, threads: int) -> None:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        from vllm import LLM

        self._llm = LLM(
            model=model,
            dtype="bfloat16",
            max_model_len=MAX_CONTEXT,
            max_num_seqs=MAX_SEQUENCES,
            enable_prefix_caching=False,
            **self.settings(),
        )

    def settings(self) -> dict[str, Any]:
        """More arguments of `LLM`."""
        return {}

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """See Peer."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=self.ignores_end)
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(VllmPeer)
