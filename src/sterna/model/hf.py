"""Any transformers causal language model behind `hidden(batch)`.

The model's code runs as it is; only its attention is replaced, through transformers' registry of
attention functions: `_attend` sees the rotated queries, keys and values of the flat row and gives
them to `ops.attention` with the batch's document borders, spread over sp ranks when a plan is set.
No mask is ever built. One registry key serves all models; what differs (borders, plan) hangs on the
modules of each instance, so that two models live in one process.

What is accepted is proven: `hf_checks.py` runs the packed model against transformers' own eager
attention, document by document, before the first batch, and refuses what differs. Dropout and other
training-only noise are off: the model stays in eval mode. Auxiliary losses (router balance) are not
added.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sterna.core.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from sterna.kernels import ops
from sterna.model.batch import Batch
from sterna.model.hf_falcon import falcon_forward
from sterna.parallel.fsdp import full
from sterna.parallel.ulysses import ParallelPlan

KEY = "sterna"  # of transformers' attention registry
# What models pass to attention functions besides; none of these changes a causal result.
_HARMLESS = {"position_ids", "output_attentions", "output_router_logits", "use_cache"}
_HARMLESS |= {"return_dict", "cache_position", "layer_idx", "logits_to_keep"}
# H, G, C, scale, window (0 = none), softcap (0 = none)
AttentionOptions = tuple[int, int, int, float, int, float]


@dataclass(frozen=True, slots=True)
class HFConfig:
    """What the trainer asks of a config, under the native names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    logits_softcap: float
    hf: Any  # transformers' own config


class Captured(Exception):
    """What attention was given, while `AttentionContext.captures`."""

    def __init__(self, qkv: Tensor, options: AttentionOptions) -> None:
        super().__init__()
        self.qkv = qkv
        self.options = options


@dataclass(slots=True)
class AttentionContext:
    """What attention needs beyond its arguments; one per model instance.

    `captures` and `given` cut a layer in two (train/longseq/foreign.py): attention raises what it
    was given, or returns `given` [t, H * C] whatever it was given.
    """

    starts: Tensor | None = None
    plan: ParallelPlan | None = None
    num_calls: int = 0
    num_windowed: int = 0
    captures: bool = False
    given: Tensor | None = None

    def attend(self, qkv: Tensor, starts: Tensor, options: AttentionOptions) -> Tensor:
        """qkv [t, (H + 2G) * C] of this rank's tokens -> [t, H * C]."""
        self.num_calls += 1
        self.num_windowed += bool(options[4])
        if self.plan is None:
            return ops.attention(qkv, starts, *options)
        return self.plan.attend(qkv, starts, *options, ops.attention)


class HFDecoder(nn.Module):
    """A transformers model on flat batches. Made by `load_hf` or around a model in memory."""

    def __init__(self, model: Any) -> None:
        """UnsupportedModelError for a kind whose packed attention is known not to be causal."""
        super().__init__()
        from transformers import AttentionInterface

        from sterna.model.hf_checks import refuse_known

        refuse_known(model)
        self.model = model
        self.context = AttentionContext()
        AttentionInterface.register(KEY, _attend)
        model.config._attn_implementation = KEY
        redirect(model, self.context)
        self.config = _config(model)
        self.dtype = next(model.parameters()).dtype
        self.eval()

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks: what is sharded, checkpointed and tiled one at a time."""
        found = [
            module
            for module in self.model.base_model.modules()
            if isinstance(module, nn.ModuleList) and len(module) == self.config.num_hidden_layers
        ]
        return found[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def train(self, mode: bool = True) -> HFDecoder:
        """Stays in eval mode: dropout would make a row depend on how it is cut."""
        super().train(False)
        return self

    def set_parallel(self, plan: ParallelPlan | None) -> None:
        """Training batches are slices of rows from now on, spread as `plan` says."""
        self.context.plan = plan

    def hidden(self, batch: Batch) -> Tensor:
        """Final normed hidden states [R, D] of batch.output_rows, or [T, D] when that is None."""
        if batch.kv is not None:
            raise UnsupportedModelError(
                "a model behind transformers has no paged cache: it trains and scores, it is not "
                "served; convert to a native family, or give batches with kv=None"
            )
        from sterna.model.hf_checks import refuse_mixed_longrope

        refuse_mixed_longrope(self.config.hf, batch.context_lens)
        self.context.starts, self.context.num_calls = batch.query_starts, 0
        self.context.num_windowed = 0
        output = self.model.base_model(
            input_ids=batch.tokens[None].long(),
            position_ids=batch.positions[None].long(),
            use_cache=False,
        )
        self._check_calls()
        h: Tensor = output.last_hidden_state[0]
        return h if batch.output_rows is None else h.index_select(0, batch.output_rows)

    def head_weight(self) -> Tensor:
        """The weight of the logits [V, D]; whole once `hidden` has run when it is sharded."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def head_bias(self) -> Tensor | None:
        """The bias of the logits [V], or None."""
        bias: Tensor | None = getattr(self.model.get_output_embeddings(), "bias", None)
        return bias

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] -> float32 logits [R, V]."""
        weight, bias = self.head_weight(), self.head_bias()
        softcap = self.config.logits_softcap
        if bias is None:
            return ops.logits(hidden, weight, weight.shape[0], softcap)
        scores = ops.logits(hidden, weight, weight.shape[0]) + bias
        return softcap * torch.tanh(scores / softcap) if softcap > 0 else scores

    def forward(self, batch: Batch) -> Tensor:
        """float32 logits [R, V] of the batch."""
        return self.logits(self.hidden(batch))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names and whole tensors (collective when sharded); tied ones once."""
        for name, parameter in self.model.named_parameters():
            yield name, full(parameter.detach()).contiguous()

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder; of sharded models, call on every rank with one folder each.

        Raises OSError (disk full, no permission).
        """
        self.model.save_pretrained(folder, state_dict=dict(self.tensors()))

    def _check_calls(self) -> None:
        if self.context.num_calls != self.config.num_hidden_layers:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: {self.context.num_calls} of "
                f"{self.config.num_hidden_layers} layers attend through transformers' registry; "
                "the others would attend across documents, so the model is refused"
            )


def load_hf(
    path: str | Path, dtype: str = "float32", device: torch.device | str = "cpu"
) -> HFDecoder:
    """The model of a Hugging Face folder, proven against transformers' own attention.

    Code that comes with a checkpoint is never run. Raises ModelNotFoundError, ModelFileError, and
    UnsupportedModelError for a model that cannot be proven.
    """
    from sterna.model.hf_checks import prove

    if not Path(path).is_dir():
        raise ModelNotFoundError(f"{path}: no such folder; give one with config.json and weights")
    kind = getattr(torch, dtype)
    if importlib.util.find_spec("transformers") is None:
        raise UnsupportedModelError(
            f"{path}: running it behind transformers needs that package; pip install sterna[train]"
        )
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=kind, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"{path}: transformers cannot load it ({error})") from error
    decoder = HFDecoder(model.to(device))
    prove(decoder)
    return decoder


def redirect(module: Any, context: AttentionContext) -> None:
    """Send every attention inside `module` through `_attend`, with this context."""
    for inner in module.modules():
        inner.sterna_context = context
        if type(inner).__name__ == "FalconAttention":
            inner.forward = falcon_forward(inner, _attend)


def _config(model: Any) -> HFConfig:
    hf = model.config.get_text_config()
    return HFConfig(
        vocab_size=model.get_output_embeddings().weight.shape[0],
        hidden_size=hf.hidden_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        logits_softcap=float(getattr(hf, "final_logit_softcapping", None) or 0.0),
        hf=hf,
    )


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention: query [1, H, T, C], key, value [1, G, T, C] -> [1, T, H, C]."""
    context: AttentionContext = module.sterna_context
    _refuse_arguments(module, query, value, attention_mask, dropout, others)
    heads = (query.shape[1], key.shape[1], query.shape[3])
    if context.given is not None:
        return context.given.view(1, -1, heads[0], heads[2]), None
    assert context.starts is not None
    qkv = torch.cat([query[0], key[0], value[0]]).transpose(0, 1).flatten(1).contiguous()
    scale = heads[2] ** -0.5 if scaling is None else float(scaling)
    options = (*heads, scale, sliding_window or 0, float(softcap or 0.0))
    if context.captures:
        raise Captured(qkv, options)
    return context.attend(qkv, context.starts, options).view(1, -1, heads[0], heads[2]), None


def _refuse_arguments(
    module: Any,
    query: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    others: dict[str, Any],
) -> None:
    """UnsupportedModelError for anything asked of attention that is not plainly causal."""
    unknown = [k for k, v in others.items() if isinstance(v, Tensor) and k not in _HARMLESS]
    reasons = {
        "an attention mask of its own": mask is not None,
        "dropout in attention": dropout > 0,
        "attention that is not causal": others.get("is_causal", getattr(module, "is_causal", True))
        is False,
        "value heads of another size than its query heads": query.shape[-1] != value.shape[-1],
        f"the extra inputs {', '.join(unknown)}": bool(unknown),
    }
    asked = [reason for reason, is_so in reasons.items() if is_so]
    if asked:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks for {' and '.join(asked)}, which packed attention does "
            "not have; train this model with its own trainer"
        )
