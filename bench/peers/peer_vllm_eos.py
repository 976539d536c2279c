"""vLLM without speculation, answers to their end: for bench/speculate.py."""

from __future__ import annotations

from peer_vllm_lookup import ToTheEnd
from worker import serve

if __name__ == "__main__":
    serve(ToTheEnd)
