"""What a transformers model must be for packed training, and the proof that it is.

Known kinds are refused by their config with the reason. Everything else is run: two short
documents side by side through the packed path, and each alone through transformers' own eager
attention. Hidden states, then logits, have to agree to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sterna.core.errors import UnsupportedModelError
from sterna.model.batch import Batch

# Relative to the largest hidden state: a few hundred roundings through the layers. transformers'
# eager attention takes its softmax in float32 even of a float64 model.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
_PROBE = (11, 6)  # tokens of the two documents, when no window has to end inside one
_LONGEST_PROBE = 600
_STATEFUL = ("linear", "mamba", "recurrent", "conv", "chunked", "ssm")


def refuse_known(model: Any) -> None:
    """UnsupportedModelError naming the reason, for kinds that cannot be packed."""
    config = model.config.get_text_config()
    reason = _reason(model, config)
    if reason:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported behind transformers: {reason}"
        )


def _reason(model: Any, config: Any) -> str:
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    stateful = sorted(k for k in kinds if any(word in k for word in _STATEFUL))
    rope = _rope_values(config)
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if stateful:
        return (
            f"its layers of type {', '.join(stateful)} carry a state from token to token, which "
            "would run on across documents and ranks"
        )
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "ALiBi adds a bias to the scores that packed attention does not have"
    if any("mrope_section" in values for values in rope):
        return "multi-dimensional rotary positions (mRoPE) do not fit flat positions"
    if any(values.get("rope_type", values.get("type")) == "dynamic" for values in rope):
        return "dynamic rotary scaling depends on the longest row, so packing would change it"
    if not (model._supports_attention_backend or config.model_type == "falcon"):
        return "its attention does not go through transformers' attention registry"
    return ""


def _rope_values(config: Any) -> list[dict[str, Any]]:
    """The rope settings: one dictionary, or one a layer type."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return [found, *nested]


def refuse_mixed_longrope(config: Any, lengths: Tensor) -> None:
    """transformers picks one LongRope table for the longest document: all must be on its side."""
    for values in _rope_values(config):
        if values.get("rope_type") != "longrope":
            continue
        border = values.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", config.max_position_embeddings
        )
        is_long = lengths > border
        if bool(is_long.any()) and not bool(is_long.all()):
            raise UnsupportedModelError(
                f"a row holds documents shorter and longer than {border} tokens, for which "
                "LongRope has two tables; pack them apart, or use the native family phi3"
            )


@torch.no_grad()
def prove(decoder: Any) -> None:
    """UnsupportedModelError when packed hidden states or logits are not transformers' own."""
    window = getattr(decoder.config.hf, "sliding_window", None) or 0
    lengths = (window + 5, 6) if 0 < window < _LONGEST_PROBE else _PROBE
    lengths = tuple(min(n, decoder.config.hf.max_position_embeddings) for n in lengths)
    batch = probe(lengths, decoder.config.vocab_size, decoder.device)
    hidden = decoder.hidden(batch)
    _check_windows(decoder)
    logits = decoder.logits(hidden)
    expected = [
        _eager(decoder.model, tokens) for tokens in torch.split(batch.tokens, list(lengths))
    ]
    for what, mine, theirs in (
        ("hidden states", hidden, torch.cat([h for h, _ in expected])),
        ("logits", logits, torch.cat([z for _, z in expected])),
    ):
        error = float((mine - theirs).abs().max() / theirs.abs().max())
        if not error <= TOLERANCE[decoder.dtype]:
            raise UnsupportedModelError(
                f"{type(decoder.model).__name__}: {what} of packed documents differ from "
                f"transformers' own by {error:.1e} (allowed {TOLERANCE[decoder.dtype]:.0e}); the "
                "model is refused, since it would be trained wrongly"
            )


def probe(lengths: tuple[int, ...], vocab_size: int, device: torch.device) -> Batch:
    """Random tokens of documents of these lengths, side by side."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    starts = torch.tensor([0, *lengths]).cumsum(0)
    lens = torch.tensor(lengths).int().to(device)
    return Batch(tokens.int().to(device), positions.int().to(device), starts.int().to(device), lens)


def _check_windows(decoder: Any) -> None:
    """Sliding layers have to pass their window: a window only in a mask would be lost."""
    config = decoder.config.hf
    kinds = list(getattr(config, "layer_types", None) or ())
    sliding = sum(kind == "sliding_attention" for kind in kinds)
    if sliding > decoder.context.num_windowed:
        raise UnsupportedModelError(
            f"{type(decoder.model).__name__} has {sliding} sliding-window layers, but only "
            f"{decoder.context.num_windowed} name their window; the others would see too far"
        )


def _eager(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One document through transformers alone: hidden states [t, D] and logits [t, V]."""
    key, replaced = model.config._attn_implementation, _own_forwards(model)
    model.config._attn_implementation = "eager"
    try:
        ids = tokens[None].long()
        output = model.base_model(input_ids=ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state[0]
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        model.config._attn_implementation = key
        for module, forward in replaced:
            module.forward = forward
    return hidden, logits.to(hidden.dtype)


def _own_forwards(model: Any) -> list[tuple[Any, Any]]:
    """Take replaced forwards off for a moment; (module, its replacement) to put them back."""
    found = [(m, vars(m)["forward"]) for m in model.modules() if "forward" in vars(m)]
    for module, _ in found:
        del module.forward
    return found
