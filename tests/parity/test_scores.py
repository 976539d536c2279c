"""Log-probs under the sampling distribution: native against the reference, and against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sterna.kernels.load import load_kernels
from sterna.kernels.score_gradient import can_differentiate, row_gradient
from sterna.kernels.scores import Distribution, reference_score, score, weights
from sterna.train.longseq import head

# Every filter alone and together; a temperature on each side of 1.
DISTRIBUTIONS = [
    Distribution(),
    Distribution(temperature=0.6),
    Distribution(temperature=1.7, top_k=5),
    Distribution(top_p=0.9),
    Distribution(min_p=0.02),
    Distribution(0.8, 50, 0.95, 0.001),
]


def rows(count: int, vocab: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (count, vocab)).astype(np.float32)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("vocab", [37, 1000, 49152])
def test_native_is_the_reference_within_rounding(distribution, vocab):
    load_kernels()
    logits = rows(6, vocab)
    chosen = logits.argmax(1).astype(np.int32)
    chosen[0] = int(logits[0].argmin())
    found = score(logits.copy(), chosen, [distribution], wants_probs=True)
    wanted = reference_score(logits.copy(), chosen, [distribution], wants_probs=True)
    # float32 exponentials (2e-7) summed over V
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.entropies, wanted.entropies, rtol=0, atol=1e-5)
    assert found.probs is not None
    assert wanted.probs is not None
    assert ((found.probs > 0) == (wanted.probs > 0)).all()
    np.testing.assert_allclose(found.probs, wanted.probs, rtol=1e-5, atol=1e-9)


def test_without_filters_it_is_the_log_softmax():
    logits = rows(4, 2000)
    chosen = np.array([3, 0, 1999, 77], np.int32)
    found = score(logits, chosen, [Distribution(temperature=0.7)])
    log_p = torch.from_numpy(logits).double().div(np.float32(0.7)).log_softmax(1)
    wanted = log_p[range(4), chosen.tolist()].numpy()
    np.testing.assert_allclose(found.logprobs, wanted, atol=2e-6)
    entropy = -(log_p.exp() * log_p).sum(1)
    np.testing.assert_allclose(found.entropies, entropy.numpy(), atol=1e-5)


def test_a_row_does_not_know_its_companions():
    logits = rows(9, 4096)
    chosen = np.arange(9, dtype=np.int32)
    together = score(logits, chosen, [Distribution(top_p=0.8)])
    for i in range(9):
        alone = score(logits[i : i + 1], chosen[i : i + 1], [Distribution(top_p=0.8)])
        assert alone.logprobs[0] == together.logprobs[i] or np.isneginf(together.logprobs[i])
        assert alone.entropies[0] == together.entropies[i]


def test_rows_may_have_distributions_of_their_own():
    logits = rows(3, 500)
    each = [Distribution(), Distribution(top_k=1), Distribution(temperature=2.0)]
    chosen = logits.argmax(1).astype(np.int32)
    found = score(logits, chosen, each)
    assert found.logprobs[1] == 0.0
    assert found.entropies[1] == pytest.approx(0.0, abs=1e-7)
    assert found.logprobs[0] > found.logprobs[2]


def test_a_broken_row_is_nan_and_a_banned_token_minus_infinity():
    logits = rows(3, 64)
    logits[0, 5] = np.nan
    logits[1, 7] = -np.inf
    found = score(logits, np.array([1, 7, 1], np.int32), [Distribution()])
    assert np.isnan(found.logprobs[0])
    assert np.isneginf(found.logprobs[1])
    assert np.isfinite(found.entropies[1:]).all()


def test_weights_keep_ties_by_the_smaller_id():
    p, _ = weights(np.array([1.0, 2.0, 2.0, 2.0], np.float32), Distribution(top_k=2))
    assert (p > 0).tolist() == [False, True, True, False]


def logprob_and_entropy(logits: torch.Tensor, chosen: torch.Tensor, of: Distribution):
    """In float64, what is left out of the distribution at -infinity."""
    scaled = logits / np.float32(of.temperature)
    kept = torch.from_numpy(score(logits.detach().float().numpy().copy(), chosen.int().numpy(),
                                  [of], wants_probs=True).probs) > 0  # fmt: skip
    log_p = scaled.masked_fill(~kept, -torch.inf).log_softmax(1)
    weighted = log_p.exp() * log_p.masked_fill(~kept, 0.0)
    return log_p.gather(1, chosen[:, None])[:, 0], -weighted.sum(1)


# float32: exponentials (2e-7) and sums over V. bfloat16: one rounding of each number.
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-5), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("vocab", [37, 1000, 49152])
def test_the_native_gradient_is_autograds(distribution, vocab, dtype, rtol):
    load_kernels()
    if not can_differentiate(torch.empty(0, dtype=dtype), vocab):
        pytest.skip("no native gradient on the reference kernels")
    logits, chosen = torch.from_numpy(rows(5, vocab)), torch.from_numpy(rows(5, vocab)).argmax(1)
    g, k = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]), torch.tensor([0.0, 0.0, 0.3, 1.0, -1.0])
    leaf = logits.double().requires_grad_()
    logprobs, entropies = logprob_and_entropy(leaf, chosen, distribution)
    (logprobs @ g.double() + entropies @ k.double()).backward()
    out = torch.full((5, vocab), torch.nan, dtype=dtype)
    row_gradient(logits, chosen, distribution, g, k, out)
    bound = rtol * leaf.grad.abs() + 1e-6 * leaf.grad.abs().amax(1, keepdim=True)
    assert ((out.double() - leaf.grad).abs() <= bound).all()


def test_a_row_that_is_not_finite_has_a_gradient_of_nan():
    load_kernels()
    if not can_differentiate(torch.empty(0), 64):
        pytest.skip("no native gradient on the reference kernels")
    logits, chosen = torch.from_numpy(rows(2, 64)), torch.tensor([3, 4])
    logits[0, 9] = torch.nan
    out = torch.zeros(2, 64)
    row_gradient(logits, chosen, Distribution(), torch.ones(2), torch.zeros(2), out)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS[:4])
def test_the_heads_gradient_by_the_kernel_is_that_of_pytorch(
    monkeypatch, softcap, scale, distribution
):
    """Rows in pieces of 4 against all at once through PyTorch; a softcap takes the latter."""
    draw = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(11, 16, generator=draw), torch.randn(50, 16, generator=draw)
    targets = torch.randint(0, 50, (11,), generator=draw)
    found = []
    for is_native in (True, False):
        monkeypatch.setattr(head, "FEW_ROWS", 4)
        if not is_native:
            monkeypatch.setattr(head, "can_differentiate", lambda *_: False)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logprobs, entropies = head.chunked_logprobs(
            *leaves, targets, softcap=softcap, scale=scale, distribution=distribution
        )
        finite = torch.where(logprobs.isfinite(), logprobs, 0.0)
        (finite.sum() + (entropies * torch.linspace(-1, 1, 11)).sum()).backward()
        found.append((logprobs, *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
