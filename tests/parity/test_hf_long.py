"""Models behind transformers on long rows: tiles, checkpoints and the chunked head against plain
forward and backward of the same code.

Every architecture of test_hf.py. float64 to 1e-10; float32 to 1e-5, since there the order of sums
shows. Tiles do not divide the row; the last segment of `every` = 2 is short with 3 layers.
"""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tests.parity.test_hf import CASES, batch_of, documents, grads, new_model, targets_of
from torch.nn import functional as F

from sterna.core.errors import UnsupportedModelError
from sterna.model.hf import HFDecoder
from sterna.train.longseq.apply import apply_longseq
from sterna.train.longseq.config import LongseqSection
from sterna.train.longseq.foreign import cut
from sterna.train.longseq.foreign_graph import graph_widths
from sterna.train.longseq.foreign_proof import experts_of
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


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_tile": 10},
        {"mlp_tile": 1},
        {"checkpoint": True},
        {"checkpoint": True, "every": 2, "mlp_tile": 100},
    ],
    ids=["attention alone", "tiles of one", "checkpoint alone", "tiles longer than the row"],
)
def test_each_feature_alone(settings, tmp_path):
    docs, model = documents(), new_model("phi3")
    expected = plain_step(model, docs)
    check(expected, long_step(model, docs, settings, tmp_path), 1e-10)


def test_a_checkpoint_keeps_one_row_a_layer_and_tiles_keep_less_than_the_layer():
    """What autograd keeps between forward and backward, in numbers a token."""

    def kept(settings):
        decoder = HFDecoder(new_model("llama"))
        apply_longseq(decoder, LongseqSection.model_validate(settings))
        sizes, weights = {}, {p.data_ptr() for p in decoder.parameters()}

        def note(x):
            sizes.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
            return x

        docs = documents() * 40
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            hidden = decoder.hidden(batch_of(docs))
        del hidden
        return sum(n for p, n in sizes.items() if p not in weights) / (8 * sum(map(len, docs)))

    plain, tiled, checkpoint = (
        kept(s) for s in ({}, {"mlp_tile": 64, "attention_tile": 64}, {"checkpoint": True})
    )
    # hidden_size is 32; tiles keep each half's inputs, checkpoints none of them for autograd
    assert checkpoint < 8 * 32 < tiled < plain / 2


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_tiles_of_experts_are_refused_with_the_reason(name):
    decoder = HFDecoder(new_model(name))
    assert experts_of(decoder)
    with pytest.raises(UnsupportedModelError, match=r"sends rows to experts.*mlp_tile = 0"):
        apply_longseq(decoder, LongseqSection(mlp_tile=8))


def test_a_layer_whose_rows_depend_on_each_other_is_refused():
    decoder = HFDecoder(new_model("llama"))
    mlp = decoder.layers[1].mlp
    own = type(mlp).forward
    mlp.forward = lambda x: own(mlp, x) + x.mean(dim=1, keepdim=True)
    with pytest.raises(UnsupportedModelError, match="does not work row by row"):
        apply_longseq(decoder, LongseqSection(mlp_tile=8))


def test_what_happens_between_layers_is_seen():
    """Scaled between the layers of a segment: the model has to be refused, not trained wrongly."""
    decoder = HFDecoder(new_model("llama"))
    scale = lambda layer, args: (args[0] * 2, *args[1:])  # noqa: E731
    decoder.layers[1].register_forward_pre_hook(scale)
    with pytest.raises(UnsupportedModelError, match="between its layers"):
        apply_longseq(decoder, LongseqSection(checkpoint=True, every=2))


def test_arguments_are_cut_by_rows_or_refused():
    rows = torch.arange(2, 5)
    values = {"a": (torch.arange(14).view(1, 7, 2), None), "b": torch.arange(7), "c": torch.ones(3)}
    found = cut(values, rows, 7)
    assert found["a"][0].tolist() == [[[4, 5], [6, 7], [8, 9]]] and found["a"][1] is None
    assert found["b"].tolist() == [2, 3, 4] and found["c"].shape == (3,)
    with pytest.raises(UnsupportedModelError, match="whose rows"):
        cut(torch.ones(2, 7), rows, 7)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox"])
def test_the_planner_counts_what_autograd_keeps(name):
    """On the meta device as on a real one, to the kernels' own small buffers (5 %)."""
    found = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = tf.AutoModelForCausalLM.from_config(CASES[name](), dtype=torch.bfloat16)
        found.append(graph_widths(HFDecoder(model)))
    for a, b in zip(*found, strict=True):
        assert abs(a - b) <= 0.05 * b
