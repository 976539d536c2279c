"""Log-probs under a sampling distribution: gradients against autograd through the formula."""

from __future__ import annotations

import pytest
import torch

from sterna.kernels.scores import PLAIN, Distribution
from sterna.train.longseq.head import chunked_logprobs

T, D, V = 7, 5, 23
# A temperature alone and with each kind of filter; what is left out depends on the row.
DISTRIBUTIONS = [PLAIN, Distribution(0.6), Distribution(1.5, top_k=6), Distribution(0.9, 0, 0.7)]


def formula(z: torch.Tensor, y: torch.Tensor, d: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
    z = z / d.temperature
    if d.top_k:
        z = z.masked_fill(z < z.topk(d.top_k, 1).values[:, -1:], -torch.inf)
    if d.top_p < 1:
        p, order = z.softmax(1).sort(1, descending=True)
        dropped = (p.cumsum(1) - p >= d.top_p).scatter(1, order, p.cumsum(1) - p >= d.top_p)
        z = z.masked_fill(dropped, -torch.inf)
    log_p = z.log_softmax(1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(1)
    return log_p.gather(1, y[:, None])[:, 0], entropy


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_values_and_gradients(distribution, softcap):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(V, D, dtype=torch.float64, generator=generator).requires_grad_()
    g, k = torch.randn(2, T, dtype=torch.float64, generator=generator)
    z = hidden @ weight.t()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    y = z.argmax(1).detach()  # never left out
    wanted = formula(z, y, distribution)
    found = chunked_logprobs(
        hidden, weight, y, softcap=softcap, distribution=distribution, chunk_rows=3
    )
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    inputs = (hidden, weight)
    grads = torch.autograd.grad((found[0] * g + found[1] * k).sum(), inputs)
    for a, b in zip(
        grads, torch.autograd.grad((wanted[0] * g + wanted[1] * k).sum(), inputs), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_a_target_that_is_left_out_has_no_chance():
    hidden, weight = torch.ones(1, 1), torch.tensor([[3.0], [2.0], [1.0]])
    found, _ = chunked_logprobs(
        hidden, weight, torch.tensor([2]), distribution=Distribution(top_k=2)
    )
    assert found.tolist() == [-torch.inf]
