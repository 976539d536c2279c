"""The chunked head against whole logits: values, gradients, masks, precision, and the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sterna.core.errors import KernelError
from sterna.data.pack import IGNORE
from sterna.engine.sampler import token_logprob
from sterna.kernels import ops
from sterna.kernels.load import load_kernels
from sterna.train.longseq import chunks, config, head

T, D, V = 13, 6, 11
F64 = 1e-12  # sums of a few hundred terms near 1


@pytest.fixture(autouse=True)
def kernels():
    load_kernels()


def rand(*shape, seed=0, dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(grad)


def some_targets(vocab=V, rows=T):
    targets = torch.arange(rows) * 7 % vocab
    targets[[0, 4, 5, rows - 1]] = IGNORE
    return targets


def whole_logits(hidden, weight, bias, softcap, scale):
    z = hidden @ weight.t() * scale
    z = z if bias is None else z + bias
    return softcap * torch.tanh(z / softcap) if softcap else z


# Chunk rows: one, not dividing the 9 valid rows, more than there are. Softcap, scale and bias each
# change the chain rule in another place.
GRID = [
    (1, 0.0, 1.0, False),
    (4, 0.0, 1.0, True),
    (4, 2.0, 0.7, True),
    (5, 3.0, 1.0, False),
    (99, 0.0, 1.3, False),
]


@pytest.mark.parametrize(("rows", "softcap", "scale", "has_bias"), GRID)
def test_cross_entropy_and_its_gradients_equal_whole_logits(rows, softcap, scale, has_bias):
    hidden, weight = rand(T, D), rand(V, D)
    bias = rand(V) if has_bias else None
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    targets = some_targets()
    options = {"softcap": softcap, "scale": scale, "bias": bias, "chunk_rows": rows}
    got = head.chunked_cross_entropy(hidden, weight, targets, **options)
    z = whole_logits(hidden, weight, bias, softcap, scale)
    expected = F.cross_entropy(z, targets, ignore_index=IGNORE, reduction="sum")
    assert abs(got - expected) < F64 * 100
    found = torch.autograd.grad(got * 0.37, leaves)
    wanted = torch.autograd.grad(expected * 0.37, leaves)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < F64 * 10


@pytest.mark.parametrize(("rows", "softcap", "scale", "has_bias"), GRID)
def test_every_head_op_passes_gradcheck(rows, softcap, scale, has_bias):
    """With an upstream gradient of its own for every output: gradcheck perturbs each alone."""
    hidden, weight = rand(T, D), rand(V, D)
    bias = rand(V) if has_bias else None
    teacher = (rand(T, 4, grad=False), rand(V, 4, grad=False))
    options = {"softcap": softcap, "scale": scale, "chunk_rows": rows}
    targets, mask = some_targets(), some_targets() != IGNORE
    starts = torch.tensor([0, 3, 3, T])
    inputs = (hidden, weight, *(() if bias is None else (bias,)))

    def ce(h, w, b=None):
        return head.chunked_cross_entropy(h, w, targets, bias=b, **options) * -1.7

    def logprobs(h, w, b=None):
        return head.chunked_logprobs(h, w, targets, bias=b, **options)

    def kl(h, w, b=None):
        return 2.5 * head.chunked_kl(h, w, *teacher, 2.0, mask, bias=b, **options)

    def dpo(h, w, b=None):
        return head.chunked_dpo_logps(h, w, targets, starts, bias=b, **options)

    for function in (ce, logprobs, kl, dpo):
        assert torch.autograd.gradcheck(function, inputs), function.__name__


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 0.01), (0.2, 0.03)])
@pytest.mark.parametrize(("rows", "softcap", "scale", "has_bias"), GRID)
def test_smoothing_and_z_loss_equal_whole_logits(rows, softcap, scale, has_bias, smoothing, z_loss):
    """Value by PyTorch's own smoothing, gradients by autograd and by finite differences."""
    hidden, weight = rand(T, D), rand(V, D)
    leaves = [hidden, weight, *([rand(V)] if has_bias else [])]
    targets = some_targets()

    def chunked(h, w, b=None):
        return -1.7 * head.chunked_cross_entropy(
            h, w, targets, bias=b, softcap=softcap, scale=scale, chunk_rows=rows,
            label_smoothing=smoothing, z_loss=z_loss,
        )  # fmt: skip

    def whole(h, w, b=None):
        z = whole_logits(h, w, b, softcap, scale)
        ce = F.cross_entropy(z, targets, ignore_index=IGNORE, reduction="sum",
                             label_smoothing=smoothing)  # fmt: skip
        return -1.7 * (ce + z_loss * z[targets != IGNORE].logsumexp(1).square().sum())

    got, expected = chunked(*leaves), whole(*leaves)
    assert abs(got - expected) < F64 * 100
    pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves),
                strict=True)  # fmt: skip
    assert all((a - b).abs().max() < F64 * 100 for a, b in pairs)
    assert torch.autograd.gradcheck(chunked, leaves)
    with torch.no_grad():
        assert abs(chunked(*leaves) - expected) < F64 * 100


def test_logprobs_entropy_and_sums_equal_whole_logits():
    hidden, weight, targets = rand(T, D), rand(V, D), some_targets()
    logprobs, entropy = head.chunked_logprobs(hidden, weight, targets, chunk_rows=4)
    log_p = (hidden @ weight.t()).log_softmax(1)
    valid = targets != IGNORE
    expected = torch.where(valid, log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0], 0.0)
    assert (logprobs - expected).abs().max() < F64
    plain = torch.where(valid, -(log_p.exp() * log_p).sum(1), 0.0)
    assert (entropy - plain).abs().max() < F64
    sums = head.chunked_dpo_logps(hidden, weight, targets, torch.tensor([0, 2, 2, T]))
    by_hand = torch.stack([expected[:2].sum(), expected[:0].sum(), expected[2:].sum()])
    assert (sums - by_hand).abs().max() < F64 * 10


def test_kl_equals_whole_logits():
    hidden, weight, teacher = rand(T, D), rand(V, D), (rand(T, 4), rand(V, 4))
    mask = torch.arange(T) % 3 > 0
    got = head.chunked_kl(hidden, weight, *teacher, 2.0, mask, chunk_rows=4)
    log_q = (hidden @ weight.t() / 2).log_softmax(1)[mask]
    log_p = (teacher[0] @ teacher[1].t() / 2).log_softmax(1)[mask]
    assert abs(got - F.kl_div(log_q, log_p, reduction="sum", log_target=True)) < F64 * 10
    got.backward()
    assert teacher[0].grad is None
    assert hidden.grad[~mask].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_logprobs_are_the_engines_to_the_bit(dtype):
    hidden, weight = rand(70, 64, dtype=dtype, grad=False), rand(999, 64, dtype=dtype)
    targets = torch.arange(70) * 13 % 999
    got, entropy = head.chunked_logprobs(hidden, weight, targets, chunk_rows=32)
    rows = ops.logits(hidden, ops.pack_weight(weight.detach()), 999).numpy()
    for t in range(70):
        assert got[t].item() == np.float32(token_logprob(rows[t], int(targets[t]), 0).logprob)
    log_p = torch.from_numpy(rows).double().log_softmax(1)
    assert (entropy + (log_p.exp() * log_p).sum(1)).abs().max() < 1e-4


@pytest.mark.parametrize("op", ["ce", "logprobs"])
def test_bfloat16_gradients_are_within_a_few_roundings(op):
    """bf16 rounds d logits, the products' outputs and the result: 3 roundings of 2^-9, doubled."""
    hidden, weight = rand(70, 64, dtype=torch.bfloat16), rand(999, 64, dtype=torch.bfloat16)
    targets = torch.arange(70) * 13 % 999
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    for h, w in ((hidden, weight), wide):
        if op == "ce":
            loss = head.chunked_cross_entropy(h, w, targets, chunk_rows=16)
        else:
            loss = -head.chunked_logprobs(h, w, targets, chunk_rows=16)[0].sum()
        (loss / 70).backward()
    for narrow, exact in zip((hidden, weight), wide, strict=True):
        error = (narrow.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < 6 * 2**-9


@pytest.mark.parametrize("has_loss", [True, False])
def test_masked_rows_are_never_computed(monkeypatch, has_loss):
    seen = []
    real = ops.logits
    monkeypatch.setattr(
        chunks.ops, "logits", lambda x, *rest: (seen.append(len(x)), real(x, *rest))[1]
    )
    targets = torch.full((T,), IGNORE)
    if has_loss:
        targets[5:8] = 1
    hidden, weight = rand(T, D), rand(V, D)
    loss = head.chunked_cross_entropy(hidden, weight, targets, chunk_rows=2)
    assert seen == ([2, 1] if has_loss else [])
    loss.backward()  # also of a batch without a single valid token
    assert hidden.grad.shape == hidden.shape
    assert (float(weight.grad.abs().sum()) > 0) is has_loss


def test_nothing_but_the_value_is_computed_without_a_graph(monkeypatch):
    added = []
    monkeypatch.setattr(chunks.Gradients, "add", lambda *a: added.append(1))
    hidden, weight, targets = rand(T, D), rand(V, D), some_targets()
    with torch.no_grad():
        quiet = head.chunked_cross_entropy(hidden, weight, targets)
    frozen = head.chunked_cross_entropy(hidden.detach(), weight.detach(), targets)
    assert added == [] and not quiet.requires_grad and not frozen.requires_grad
    assert quiet == frozen == head.chunked_cross_entropy(hidden, weight, targets).detach()
    assert added


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_a_checkpoint_the_gradients_are_those_without(use_reentrant):
    hidden, weight, targets = rand(T, D), rand(V, D), some_targets()

    def loss(h, w):
        return head.chunked_cross_entropy(h * 2, w, targets, chunk_rows=4)

    plain = torch.autograd.grad(loss(hidden, weight) * 3, (hidden, weight))
    checkpoint(loss, hidden, weight, use_reentrant=use_reentrant).mul(3).backward()
    for x, expected in zip((hidden, weight), plain, strict=True):
        assert torch.equal(x.grad, expected)


def test_a_tied_weight_collects_both_gradients():
    """The embedding's rows and the head: one leaf, two uses."""
    weight, targets = rand(V, D), some_targets()
    rows = torch.arange(T) % V
    ours = head.chunked_cross_entropy(weight[rows] * 1.5, weight, targets)
    grad = torch.autograd.grad(ours, weight)[0]
    z = (weight[rows] * 1.5) @ weight.t()
    loss = F.cross_entropy(z, targets, ignore_index=IGNORE, reduction="sum")
    assert (grad - torch.autograd.grad(loss, weight)[0]).abs().max() < F64 * 10


def test_a_composed_weight_passes_its_gradient_on():
    """LoRA on the head: base + B A is an ordinary tensor with a graph behind it."""
    base, a, b = rand(V, D, grad=False), rand(2, D), rand(V, 2)
    loss = head.chunked_cross_entropy(rand(T, D, grad=False), base + b @ a, some_targets())
    loss.backward()
    assert a.grad.abs().sum() > 0 and b.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(1, 3, 32, 2)}, "plain"),
        ({"weight": torch.zeros(V, D, dtype=torch.float32)}, "one dtype"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, "targets or marks"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, "vocabulary"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"hidden": rand(T, D), "weight": rand(V, D), "targets": some_targets(), **change}
    with pytest.raises(KernelError, match=message):
        head.chunked_cross_entropy(**given)


def test_a_target_beyond_the_vocabulary_is_refused():
    targets = some_targets()
    targets[2] = V
    with pytest.raises(KernelError, match=r"target .*11"):
        head.chunked_cross_entropy(rand(T, D), rand(V, D), targets)


def test_a_chunk_never_exceeds_its_bytes():
    for vocab in (1_000, 49_152, 128_256, 10**9):
        rows = config.chunk_rows_of(vocab)
        assert 1 <= rows <= config.CHUNK_ROWS
        assert rows == 1 or rows * vocab * 4 <= config.CHUNK_BYTES
    assert config.chunk_rows_of(128_256, 7) == 7
