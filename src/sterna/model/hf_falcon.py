"""Falcon's attention does not go through transformers' registry; this sends it there.

Only the rotary variant: with ALiBi a position bias is added to the scores, which packed attention
does not have (refused in hf_checks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def falcon_forward(module: Any, attend: Callable[..., Any]) -> Callable[..., Any]:
    """A forward for one FalconAttention instance that attends by `attend`."""

    def forward(
        hidden_states: Tensor,
        alibi: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **ignored: Any,
    ) -> tuple[Tensor, None]:
        from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

        assert alibi is None and position_embeddings is not None
        heads = module._split_heads(module.query_key_value(hidden_states))
        q, k, v = (x.transpose(1, 2) for x in heads)  # [1, heads, T, C]
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out, _ = attend(module, q, k, v, attention_mask, scaling=module.inv_norm_factor)
        return module.dense(out.flatten(2)), None

    return forward
