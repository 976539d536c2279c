"""The loss of a step is the mean over its valid targets, however it is cut up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sterna.core.errors import TrainError
from sterna.data.pack import PackedRow
from sterna.model.config import parse_config
from sterna.model.decoder import Decoder
from sterna.parallel.mesh import Mesh
from sterna.train.flops import FlopCounter
from sterna.train.init_weights import init_weights
from sterna.train.neftune import Neftune, embedding_of
from sterna.train.step import TrainStep, as_batch


def row(lengths, trained, seed=0):
    """Documents of these lengths; the last `trained[i]` tokens of document i are targets."""
    chance = np.random.default_rng(seed)
    total = sum(lengths)
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    tokens = chance.integers(0, 256, total).astype(np.int32)
    targets = np.full(total, -100, np.int32)
    for begin, end, count in zip(starts, starts[1:], trained, strict=False):
        where = range(max(begin, end - 1 - count), end - 1)
        targets[list(where)] = tokens[[i + 1 for i in where]]
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    return PackedRow(tokens, targets, positions, starts, (0,) * len(lengths))


ROWS = [row((9, 20), (3, 11), 1), row((31,), (30,), 2), row((12,), (0,), 3), row((5, 5), (1, 4), 4)]


def model(tiny, **changed):
    decoder = Decoder(parse_config({**tiny.CONFIG, **changed}, "tiny"), torch.float32)
    init_weights(decoder, 3)
    return decoder


def gradients(decoder, micro_rows):
    step = TrainStep(decoder, Mesh.single(), micro_rows)
    loss = step.run(ROWS)
    grads = {n: step.gradients.of(p).clone() for n, p in decoder.named_parameters()}
    step.gradients.clear()
    return loss, grads


def test_the_loss_is_the_mean_over_all_valid_targets(tiny):
    decoder = model(tiny)
    losses = []
    for r in ROWS:
        for begin, end in zip(r.starts, r.starts[1:], strict=False):  # each document on its own
            single = PackedRow(*(a[begin:end] for a in (r.tokens, r.targets, r.positions)),
                               np.array([0, end - begin], np.int32), (0,))  # fmt: skip
            batch, targets = as_batch([single], torch.device("cpu"))
            logits = decoder(batch).detach()
            each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            losses += each[targets != -100].tolist()
    found, _ = gradients(decoder, 1)
    assert found.num_targets == len(losses) == 49
    assert found.num_tokens == sum(len(r.tokens) for r in ROWS)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_micro_batches_change_neither_loss_nor_gradients(tiny, tied):
    decoder = model(tiny, tie_word_embeddings=tied)
    whole_loss, whole = gradients(decoder, 4)
    for micro_rows in (1, 2, 3):
        loss, grads = gradients(decoder, micro_rows)
        assert loss.loss == pytest.approx(whole_loss.loss, rel=1e-6)
        for name, grad in grads.items():
            scale = whole[name].abs().max()
            assert (grad - whole[name]).abs().max() < 1e-5 * scale, name


def test_a_step_without_targets_is_refused(tiny):
    step = TrainStep(model(tiny), Mesh.single())
    with pytest.raises(TrainError, match="none of the step's 12 tokens is trained"):
        step.run([row((12,), (0,))])


def test_the_first_bad_micro_batch_is_named(tiny):
    decoder = model(tiny)
    with torch.no_grad():
        decoder.embed_tokens.weight[ROWS[1].tokens[3]] = float("nan")
    for r in (0, 2, 3):
        ROWS[r].tokens[ROWS[r].tokens == ROWS[1].tokens[3]] = 0
    step = TrainStep(decoder, Mesh.single(), 1)
    # tied: the head reads the NaN row for every token, so all are bad
    assert step.run(ROWS).bad_micro == 0
    untied = model(tiny, tie_word_embeddings=False)
    with torch.no_grad():
        untied.embed_tokens.weight[ROWS[1].tokens[3]] = float("nan")
    assert TrainStep(untied, Mesh.single(), 1).run(ROWS).bad_micro == 1


def test_flops_are_those_of_the_formula(tiny):
    decoder = model(tiny, tie_word_embeddings=False)
    table = decoder.embed_tokens.weight.numel()
    norms = sum(p.numel() for p in decoder.parameters() if p.dim() == 1)
    dense = sum(p.numel() for p in decoder.parameters()) - table - norms
    pairs = 2 * sum(n * (n + 1) / 2 for n in (9, 20))
    assert FlopCounter(decoder).of(ROWS[:1]) == 6 * dense * 29 + 12 * 4 * 16 * pairs
    for p in decoder.layers.parameters():
        p.requires_grad_(False)
    head = decoder.lm_head.weight.numel()
    assert FlopCounter(decoder).of(ROWS[:1]) == (4 * dense + 2 * head) * 29 + 12 * 64 * pairs


def test_neftune_noise_has_its_width_and_repeats(tiny):
    decoder = model(tiny)
    noise = Neftune(embedding_of(decoder), 5.0, seed=1)
    batch, _ = as_batch([row((9, 400), (1, 1))], torch.device("cpu"))
    clean = decoder.embed_tokens(batch.tokens).detach()
    found = []
    for step in (0, 0, 1):
        noise.arm(batch, step, 0)
        found.append(decoder.embed_tokens(batch.tokens).detach() - clean)
        assert torch.equal(decoder.embed_tokens(batch.tokens), clean)  # armed for one forward
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    for part, length in ((found[0][:9], 9), (found[0][9:], 400)):
        width = 5 / (length * 64) ** 0.5
        assert part.abs().max() <= width + 1e-6
        assert part.std() == pytest.approx(width / 3**0.5, rel=0.1)


def test_first_weights_have_the_configs_spread_and_repeat(tiny):
    first, second = model(tiny), model(tiny)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b)
        if a.dim() == 1:
            assert (a == 1).all()
        elif name.endswith(("down.weight", "out.weight")):
            assert a.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.05)
        else:
            assert a.std().item() == pytest.approx(0.02, rel=0.05)


def test_bfloat16_gradients_are_summed_in_float32(tiny):
    """64 equal micro-batches: a bfloat16 sum stalls at about 2^8 of its least addend."""
    decoder = model(tiny).bfloat16()
    one = TrainStep(decoder, Mesh.single(), 1)
    one.run(ROWS[:1])
    single = {n: one.gradients.of(p).float() for n, p in decoder.named_parameters()}
    many = TrainStep(decoder, Mesh.single(), 1)
    many.run(ROWS[:1] * 64)
    for name, p in decoder.named_parameters():
        found = many.gradients.of(p)
        assert found.dtype == torch.float32 and p.grad is None
        # each addend is single / 64 rounded to bfloat16: equal but for where scaling is inexact
        error = (found - single[name]).abs().max() / single[name].abs().max()
        assert error < 2**-7, name
