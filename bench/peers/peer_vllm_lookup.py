"""vLLM with n-gram lookup, answers to their end: for bench/speculate.py."""

from __future__ import annotations

from typing import Any

from peer_vllm import VllmPeer
from worker import serve


class ToTheEnd(VllmPeer):
    """An answer ends where the model ends it."""

    ignores_end = False


class LookupPeer(ToTheEnd):
    """Drafts of 8 tokens after matches of 1 to 4."""

    def settings(self) -> dict[str, Any]:
        """See VllmPeer."""
        lookup = {
            "method": "ngram", "num_speculative_tokens": 8,
            "prompt_lookup_min": 1, "prompt_lookup_max": 4,
        }  # fmt: skip
        return {"speculative_config": lookup}


if __name__ == "__main__":
    serve(LookupPeer)
