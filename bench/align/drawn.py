"""What the default model writes by itself: the material of pairs and of counted sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sterna.align.hybrid import HybridEngine, Sampling
from sterna.engine.config import EngineConfig
from sterna.model.hub import resolve_model
from sterna.model.load import load_model
from sterna.text.chat import ChatRenderer
from sterna.text.tokenizer import load_tokenizer

Chat = list[dict[str, Any]]


def ended(chats: Sequence[Chat], count: int, sampling: Sampling) -> list[tuple[int, str]]:
    """(index of the chat, answer) of `count` answers to each chat, of those that ended."""
    path = resolve_model("default")
    tokenizer = load_tokenizer(path)
    renderer = ChatRenderer(tokenizer)
    config = EngineConfig(threads=1, num_kv_blocks=800, max_num_seqs=64, token_budget=256)
    engine = HybridEngine(load_model(path).decoder, tokenizer, config)
    prompts = [tokenizer.encode(renderer.render(chat, None), False) for chat in chats]
    found = engine.generate(prompts, count, sampling, range(len(chats)))
    engine.close()
    return [
        (rollout.prompt_idx, tokenizer.decode(rollout.completion.tolist()))
        for rollout in found
        if not rollout.is_truncated
    ]
