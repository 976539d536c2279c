"""Models behind transformers on long rows: tiles, checkpoints and the chunked head against plain
forward and backward of the same code.

Every architecture of test_hf.py. float64 to 1e-10; float32 to 1e-5, since there the order of sums
shows. Tiles do not divide the row; the last segment of `every` = 2 is short with 3 layers.
"""

from __future__ import annotations

import pytest
import torch
from tests.parity.test_hf import CASES, batch_of, documents, grads, new_model, targets_of
from torch.nn import functional as F

from sterna.model.hf import HFDecoder
from sterna.train.longseq.apply import apply_longseq
from sterna.train.longseq.config import LongseqSection
from sterna.train.longseq.head import chunked_cross_entropy

EXPERTS = {"mixtral", "qwen2-moe", "qwen3-moe"}
TIERS = [{"tier": "memory"}, {"tier": "disk", "every": 2}]
# Gemma's norm is float32 whatever the model is, so the sums of its gradients are too.
ROUNDS = {"gemma3"}
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}


def plain_step(model, docs):
    decoder = HFDecoder(model)
    logits = decoder.hidden(batch_of(docs)) @ decoder.head_weight().t()
    cap = decoder.config.logits_softcap
    logits = cap * torch.tanh(logits / cap) if cap else logits
    loss = F.cross_entropy(logits, targets_of(docs), reduction="sum")
    loss.backward()
    return loss.detach(), grads(model)


def long_step(model, docs, settings, folder):
    decoder = HFDecoder(model)
    apply_longseq(decoder, LongseqSection.model_validate(settings), folder)
    loss = chunked_cross_entropy(
        decoder.hidden(batch_of(docs)), decoder.head_weight(), targets_of(docs),
        softcap=decoder.config.logits_softcap, chunk_rows=5,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), grads(model)


def check(expected, found, limit):
    (loss, theirs), (other, mine) = expected, found
    assert abs(other - loss) <= limit * abs(loss)
    assert mine.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    for name, grad in theirs.items():
        error = float((mine[name] - grad).abs().max())
        assert error <= limit * max(float(grad.abs().max()), 1e-3 * scale), (name, error)


@pytest.mark.parametrize("tier", TIERS, ids=["every layer", "every 2, on disk"])
@pytest.mark.parametrize("dtype", LIMITS, ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_are_those_of_the_plain_step(name, dtype, tier, tmp_path):
    docs, model = documents(), new_model(name, dtype)
    tiles = {"attention_tile": 10, "mlp_tile": 0 if name in EXPERTS else 7}
    settings = {"checkpoint": True, **tiles, **tier}
    expected = plain_step(model, docs)
    limit = max(LIMITS[dtype], 1e-6 if name in ROUNDS else 0.0)
    check(expected, long_step(model, docs, settings, tmp_path), limit)
