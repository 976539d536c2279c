"""AdamW against torch's own, and the storage formats against exact arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sterna.core.errors import ConfigError
from sterna.train import optim, rounding
from sterna.train.config import OptimSection
from sterna.train.gradients import Gradients
from sterna.train.optim import AdamW


def weights(dtype=torch.float32, seed=0, shapes=((40, 33), (33,), (7, 300))):
    torch.manual_seed(seed)
    return [
        (f"w{i}.{'bias' if len(s) == 1 else 'weight'}", nn.Parameter(torch.randn(s).to(dtype)))
        for i, s in enumerate(shapes)
    ]


def run(named, settings, steps=20, lr=1e-2, grad_of=lambda p, t: torch.sin(p * 3) + 0.1, seed=0):
    ours = AdamW(named, settings, seed)
    grads = Gradients(p for _, p in named)
    for t in range(steps):
        for _, p in named:
            p.grad = grad_of(p.detach().float(), t).to(p.dtype)
        ours.step(grads, t, lr)
    return ours


def test_float32_is_torchs_fused_adamw_to_the_bit(monkeypatch):
    monkeypatch.setattr(optim, "SLICE", 1 << 20)
    ours, theirs = weights(), weights()
    decayed = [p for name, p in theirs if optim.is_decayed(name, p)]
    plain = [p for name, p in theirs if not optim.is_decayed(name, p)]
    assert len(decayed) == 2 and len(plain) == 1
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True,
    )  # fmt: skip
    run(ours, OptimSection(weight_decay=0.1))
    for _ in range(20):
        for _, p in theirs:
            p.grad = torch.sin(p.detach() * 3) + 0.1
        reference.step()
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_slices_change_nothing(monkeypatch):
    found = []
    for size in (1 << 20, 512):
        monkeypatch.setattr(optim, "SLICE", size)
        named = weights()
        run(named, OptimSection(states="float32"))
        found.append([p.detach() for _, p in named])
    for a, b in zip(*found, strict=True):
        # the vector kernel and its scalar tail may differ in the last place
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_bfloat16_weight_is_its_master_rounded_and_the_master_is_float32_adamw():
    named, exact = weights(torch.bfloat16), weights(torch.bfloat16)
    exact = [(name, nn.Parameter(p.detach().float())) for name, p in exact]
    grad_of = lambda p, t: torch.full_like(p, 0.5 + t)  # noqa: E731  the same for both
    ours = run(named, OptimSection(), grad_of=grad_of)
    run(exact, OptimSection(), grad_of=lambda p, t: grad_of(p, t).bfloat16().float())
    for (name, p), (_, w) in zip(named, exact, strict=True):
        master = ours.state_dict()[name]["master"].view_as(w)
        assert torch.equal(master, w.detach())
        assert torch.equal(p.detach(), master.bfloat16())


@pytest.mark.parametrize("states", ["bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_states_stay_near_exact_ones(states, dtype):
    """20 steps of lr 0.01 move a weight by about 0.2; rounded moments may be off by a few percent
    of it (e4m3 steps are 12 %, averaged over steps)."""
    exact = weights()
    run(exact, OptimSection())
    named = weights(dtype)
    run(named, OptimSection(states=states))
    for (_, a), (_, b), (_, first) in zip(named, exact, weights(), strict=True):
        moved = (b - first).abs().mean()
        assert (a.float() - b).abs().mean() < 0.12 * moved


def test_updates_below_half_a_step_survive_without_a_master():
    """Round-to-nearest would lose every one: 1e-4 is 1/39 of bfloat16's step at 1."""
    named = [("w", nn.Parameter(torch.ones(64, 1024, dtype=torch.bfloat16)))]
    constant = lambda p, t: torch.ones_like(p)  # noqa: E731
    run(named, OptimSection(master=False), steps=10, lr=1e-4, grad_of=constant)
    mean = named[0][1].detach().float().mean().item()
    # each step subtracts lr * m / sqrt(v) = lr; the mean of 65,536 roundings is within 5 sigma
    sigma = 10**0.5 * (2**-8) * 0.16 / 65536**0.5
    assert abs(1 - mean - 1e-3) < 5 * sigma + 1e-5


def test_8bit_second_moments_decay_and_never_reach_zero():
    named = [("w", nn.Parameter(torch.zeros(4, 256)))]
    optimizer = AdamW(named, OptimSection(states="8bit"))
    p = named[0][1]
    grads = Gradients([p])
    for t in range(60):
        p.grad = torch.full_like(p, 1.0 if t == 0 else 1e-3)
        p.grad[:, 0] = 1e-6  # the least of its block by far
        optimizer.step(grads, t, 1e-4)
    _, v = optim._load(optimizer.state_dict()["w"])
    exact = 0.05 * 0.95**59 + 1e-6 * (1 - 0.95**59)
    assert (v.view(4, 256)[:, 1:].mean() / exact).item() == pytest.approx(1, abs=0.15)
    assert (v > 0).all()
    assert p.abs().max() < 60 * 1e-4 * 2


def test_bytes_a_weight_are_those_of_the_docstring():
    def size(dtype, **settings):
        named = [("w", nn.Parameter(torch.zeros(256, 256, dtype=dtype)))]
        states = AdamW(named, OptimSection(**settings)).state_dict()["w"]
        return (named[0][1].nbytes + sum(t.nbytes for t in states.values())) / 65536

    half = torch.bfloat16
    assert size(half) == 14
    assert size(half, states="8bit") == pytest.approx(8.03, abs=0.01)
    assert size(half, states="bfloat16", master=False) == 6
    assert size(half, states="8bit", master=False) == pytest.approx(4.03, abs=0.01)
    assert size(torch.float32) == 12


@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master", [True, False])
def test_steps_repeat_from_saved_states_to_the_bit(states, dtype, master):
    settings = OptimSection(states=states, master=master, weight_decay=0.1)
    whole = weights(dtype)
    run(whole, settings, steps=7, seed=5)
    halves = weights(dtype)
    first = run(halves, settings, steps=4, seed=5)
    second = AdamW(halves, settings, 5)
    for name, states_of in second.state_dict().items():
        for key, tensor in states_of.items():
            tensor.copy_(first.state_dict()[name][key])
    for t in range(4, 7):
        for _, p in halves:
            p.grad = (torch.sin(p.detach().float() * 3) + 0.1).to(p.dtype)
        second.step(Gradients(p for _, p in halves), t, 1e-2)
    for (_, a), (_, b) in zip(whole, halves, strict=True):
        assert torch.equal(a, b)


def test_frozen_weights_are_left_alone():
    named = weights()
    named[0][1].requires_grad_(False)
    optimizer = AdamW(named, OptimSection())
    assert "w0.weight" not in optimizer.state_dict()
    for _, p in named[1:]:
        p.grad = torch.ones_like(p)
    assert Gradients(p for _, p in named).square_sum().item() == pytest.approx(33 + 2100, rel=1e-6)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        AdamW(named[:1], OptimSection())


@pytest.mark.parametrize("value", [0.7, -0.3, 1 / 3, 448.0, 300.1, 2.0**-7 * 1.3, 3e-4, -1e-5, 0.0])
def test_rounding_to_e4m3_is_unbiased(value):
    x = torch.full((40_000,), value)
    bits = rounding.low(rounding.noise(x, rounding.generator(1)))
    y = rounding.to_e4m3(x, bits).float()
    codes = sorted(set(y.tolist()))
    assert len(codes) <= 2 and codes[0] <= value <= codes[-1]
    spread = codes[-1] - codes[0]
    assert abs(y.mean().item() - value) <= 5 * spread / 2 / 200 + abs(value) * 2e-5 + 1e-9


def test_rounding_to_bfloat16_is_unbiased_and_keeps_what_is_no_number():
    x = torch.full((40_000,), 1.0 + 2**-10)
    y = rounding.to_bfloat16(x, rounding.high(rounding.noise(x, rounding.generator(2)))).float()
    assert set(y.tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(y.mean().item() - x[0].item()) < 5 * 2**-8 / 200
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.3e38])
    back = rounding.to_bfloat16(odd, torch.zeros(4, dtype=torch.int32)).float()
    assert back[0] == float("inf") and back[1] == float("-inf") and back[2].isnan()
