"""SwiftKV distillation: the student inside its teacher, nothing held or computed twice.

The student shares every module of the teacher but the new norm, queries, keys and values, which
alone are trained. They start as

    norm_swiftkv     layer k's input norm
    q_swiftkv_i      layer i's own query rows
    kv_swiftkv_j     the mean over its group of the layers' own key and value rows

so with k = L - 1 and no groups the student starts as the teacher; then keys and values are fitted
to the teacher's (fit.py). The first k layers are frozen and the same in both: they run once,
without a graph. With p the teacher, q the student and h the output of layer L - 2, the loss of a
step is a mean over trained tokens of

    T^2 KL(p^(1/T) || q^(1/T)) + w |h_student - h_teacher|^2 / |h_teacher|^2

The hidden states' term is relative, token by token. Roads not taken: the plain mean square, which
is of the residual stream's scale (on SmolLM2-135M 192 of a first loss of 200: a few huge channels
would be all that is learned), and the sum over all tokens, prompts too, which do not run the
later layers when served.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sterna.data.pack import IGNORE
from sterna.model.batch import Batch
from sterna.model.config import ModelConfig
from sterna.model.decoder import Decoder
from sterna.model.layers import Block, Linear
from sterna.model.swiftkv import SwiftKVDecoder
from sterna.model.swiftkv_config import SwiftKVConfig, with_swiftkv
from sterna.parallel.ulysses import ParallelPlan
from sterna.train.longseq.head import chunked_kl


class SwiftKVPair(nn.Module):
    """Teacher and student over shared modules; as a model to train it is the student."""

    config: ModelConfig

    def __init__(self, teacher: Decoder, swift: SwiftKVConfig) -> None:
        super().__init__()
        teacher.requires_grad_(False)
        self.config = teacher.config
        self.teacher = teacher
        self.student = _share(teacher, swift)
        start_values(teacher, self.student)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.teacher.device

    def hidden(self, batch: Batch) -> Tensor:
        """The student's final normed hidden states [T, D]."""
        return self.student.hidden(batch)

    def head_weight(self) -> Tensor:
        """[V, D], of both."""
        return self.teacher.head_weight()

    def head_bias(self) -> Tensor | None:
        """[V], or None."""
        return self.teacher.head_bias()

    def set_parallel(self, plan: ParallelPlan | None) -> None:
        """Spread both as `plan` says."""
        self.teacher.set_parallel(plan)
        self.student.set_parallel(plan)

    def both(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """((student's late, final), (teacher's late, final)) hidden states [T, D].

        Late is the output of layer L - 2, final is normed. The teacher's have no graph.
        """
        with torch.no_grad():
            x = self.student.first(batch)
            taught = self._teacher_later(x, batch)
        late, h = self.student.later(x, batch)
        return (late, self.student.norm(h)), taught

    def teacher_kv(self, x: Tensor, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        """(layer, the teacher's qkv [T, (H + 2G) * C] before head norms and rotation) from k on."""
        h = x
        for i in self.student.owners:
            block = _block(self.teacher, i)
            yield i, block.attn.qkv(block.attn_norm(h))
            h = block(h, batch, self.teacher.rope_of(i), None)

    def _teacher_later(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        h = late = x
        for i in self.student.owners:
            late = h
            h = self.teacher.layers[i](h, batch, self.teacher.rope_of(i), None)
        return late, self.teacher.norm(h)


def _share(teacher: Decoder, swift: SwiftKVConfig) -> SwiftKVDecoder:
    """A student of the teacher's own modules; its new ones have no values yet."""
    config = with_swiftkv(teacher.config, swift)
    student = SwiftKVDecoder(config, teacher.dtype, "meta", rope_device=teacher.device)
    new = {i: student.attention(i) for i in student.owners}
    for name in ("embed_tokens", "embed_positions", "norm", "lm_head", "ropes"):
        setattr(student, name, getattr(teacher, name))
    for i, attn in new.items():
        block, old = student.block(i), _block(teacher, i)
        for name, module in list(old.named_children()):
            setattr(block, name, module)
        attn.out, attn.q_norm = old.attn.out, old.attn.q_norm
        attn.k_norm = old.attn.k_norm if attn.is_owner else None
        block.attn = attn
        attn.q_swiftkv.to_empty(device=teacher.device)
    for i in range(swift.num_key_value_layers):
        student.layers[i] = teacher.layers[i]
    for module in (student.norm_swiftkv, student.kv_swiftkv):
        module.to_empty(device=teacher.device)
    return student


def _block(teacher: Decoder, layer_idx: int) -> Block:
    found = teacher.layers[layer_idx]
    assert isinstance(found, Block)
    return found


@torch.no_grad()
def start_values(teacher: Decoder, student: SwiftKVDecoder) -> None:
    """Fill the student's own parameters from the teacher's."""
    later = _block(teacher, student.swift.num_key_value_layers)
    student.norm_swiftkv.load_state_dict(later.attn_norm.state_dict())
    groups: dict[int, list[int]] = {}
    for i, owner in student.owners.items():
        groups.setdefault(owner, []).append(i)
        new, old = student.attention(i).q_swiftkv, _block(teacher, i).attn.qkv
        _copy_rows(new, 0, [old], 0, new.out_features)
    width = student.kv_swiftkv.out_features // len(groups)
    for group_idx, members in enumerate(groups.values()):
        olds = [_block(teacher, i).attn.qkv for i in members]
        first = olds[0].out_features - width  # keys and values come last
        _copy_rows(student.kv_swiftkv, group_idx * width, olds, first, width)


def _copy_rows(new: Linear, at: int, olds: list[Linear], start: int, count: int) -> None:
    """Rows [start, start + count) of the old weights, averaged in float32, to rows `at` and on."""
    for name in ("weight", "bias"):
        target = getattr(new, name)
        if target is not None:
            rows = [getattr(old, name)[start : start + count].float() for old in olds]
            target[at : at + count].copy_(torch.stack(rows).mean(0))


def own_parameters(student: SwiftKVDecoder) -> dict[str, nn.Parameter]:
    """What SwiftKV adds to the model, by name: what is trained."""
    return {name: p for name, p in student.named_parameters() if "swiftkv" in name}


def swiftkv_loss(
    model: SwiftKVPair,
    batch: Batch,
    targets: Tensor,
    *,
    temperature: float,
    hidden_weight: float,
    chunk_rows: int | None = None,
) -> Tensor:
    """The SUM over trained tokens of the loss above, float32 scalar."""
    (late, hidden), (taught_late, taught) = model.both(batch)
    mask, head = targets != IGNORE, model.head_weight()
    kl = chunked_kl(
        hidden, head, taught, head, temperature, mask,
        softcap=model.config.logits_softcap, chunk_rows=chunk_rows,
    )  # fmt: skip
    wanted = taught_late[mask].float()
    miss = (late[mask].float() - wanted).square().sum(1) / wanted.square().sum(1)
    return temperature**2 * kl + hidden_weight * miss.sum()
