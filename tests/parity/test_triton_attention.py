"""Triton's packed attention and its gradient against the float64 formula, by Triton's interpreter.

float32: sums of up to 150 products in another order. bfloat16: the rounding of probabilities (as
every flash kernel has it) and of the result, each up to 2^-8 of the largest; a gradient rounds its
own probabilities, dS and the result.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sterna.kernels import attention_backward, reference

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed"),
    # Triton decides when it is imported, and any test before may have imported it.
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="run by test_triton_interpreted.py in a process of its own (TRITON_INTERPRET=1)",
    ),
]

FORWARD = {torch.float32: 1e-5, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}
BACKWARD = {torch.float32: 2e-5, torch.bfloat16: 3 * 2**-8, torch.float16: 3 * 2**-11}
# (heads, key heads, head_dim): plain, grouped, one key head with an odd width, beyond a tile's.
SHAPES = [(2, 2, 32), (4, 2, 16), (3, 1, 24), (2, 1, 160)]
# Documents of no and of one token, of part of a tile, of several with a rest.
STARTS = torch.tensor([0, 1, 1, 21, 171], dtype=torch.int32)
CASES = [(0, 0.0), (1, 0.0), (40, 0.0), (0, 2.0), (70, 30.0)]  # window, softcap


@pytest.fixture(scope="module")
def kernels():
    """The module, while Triton is an interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from sterna.kernels.triton import attention

        yield attention


def inputs(shape, dtype):
    heads, kv_heads, dim = shape
    draw = torch.Generator().manual_seed(3)
    tokens = int(STARTS[-1])
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=draw, dtype=torch.float64)
    grad = torch.randn(tokens, heads * dim, generator=draw, dtype=torch.float64)
    return qkv.to(dtype), grad.to(dtype)


def check(kernels, shape, dtype, window, softcap):
    qkv, grad = inputs(shape, dtype)
    rest = (shape[2] ** -0.5, window, softcap)
    out = kernels.forward(qkv, STARTS, shape, *rest)
    exact = reference.attention(qkv.double(), STARTS, *shape, *rest)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= FORWARD[dtype] * exact.abs().max()
    d_qkv = kernels.backward(grad, qkv, STARTS, shape, *rest)
    exact = attention_backward.reference(grad.double(), qkv.double(), STARTS, shape, *rest)
    assert d_qkv.dtype == dtype
    assert (d_qkv.double() - exact).abs().max() <= BACKWARD[dtype] * exact.abs().max()


def test_shared_prefixes_are_read_through_it(kernels):
    """A prefix of 20 rows, continued by 1 and by 30 others."""
    from sterna.kernels.triton import backend

    shape, draw = (4, 2, 16), torch.Generator().manual_seed(4)
    qkv = torch.randn(51, 128, generator=draw)
    starts = torch.tensor([0, 20, 21, 51], dtype=torch.int32)
    rows = torch.tensor([*range(20), *range(21), *range(20), *range(21, 51)], dtype=torch.int32)
    keys = (rows, torch.tensor([0, 20, 41, 91], dtype=torch.int32))
    out = backend._shared_attention(qkv, starts, *keys, *shape, 0.25, 7, 0.0)
    exact = reference.shared_attention(qkv.double(), starts, *keys, *shape, 0.25, 7, 0.0)
    assert (out.double() - exact).abs().max() <= FORWARD[torch.float32] * exact.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), CASES)
def test_float32_equals_the_formula(kernels, shape, window, softcap):
    check(kernels, shape, torch.float32, window, softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (70, 30.0)])
def test_half_precision_equals_the_formula(kernels, dtype, window, softcap):
    check(kernels, (4, 2, 16), dtype, window, softcap)


def test_a_document_does_not_depend_on_its_neighbours(kernels):
    shape = (4, 2, 16)
    qkv, grad = inputs(shape, torch.float32)
    whole = kernels.forward(qkv, STARTS, shape, 0.25, 30, 0.0)
    d_whole = kernels.backward(grad, qkv, STARTS, shape, 0.25, 30, 0.0)
    alone = torch.tensor([0, 150], dtype=torch.int32)
    assert torch.equal(whole[21:], kernels.forward(qkv[21:], alone, shape, 0.25, 30, 0.0))
    own = kernels.backward(grad[21:], qkv[21:], alone, shape, 0.25, 30, 0.0)
    assert torch.equal(d_whole[21:], own)


def test_rows_are_found_in_64_bits(kernels):
    """The last document of a row of more than 2^31 numbers; its other pages are never touched."""
    heads, tokens, own = (2, 1, 128), (1 << 22) + 4096, 70
    draw = torch.Generator().manual_seed(5)
    qkv = torch.empty(tokens, 512, dtype=torch.float16)
    grad = torch.empty(tokens, 256, dtype=torch.float16)
    assert qkv.numel() > 1 << 31
    qkv[-own:] = torch.randn(own, 512, generator=draw).half()
    grad[-own:] = torch.randn(own, 256, generator=draw).half()
    far = torch.tensor([tokens - own, tokens], dtype=torch.int32)
    near = torch.tensor([0, own], dtype=torch.int32)
    rest = (heads, 0.1, 0, 0.0)
    out = kernels.forward(qkv, far, *rest)[-own:]
    assert torch.equal(out, kernels.forward(qkv[-own:], near, *rest))
    d_qkv = kernels.backward(grad, qkv, far, *rest)[-own:]
    assert torch.equal(d_qkv, kernels.backward(grad[-own:], qkv[-own:], near, *rest))


_COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sterna.kernels.triton import attention, attention_kernels
name, dtype, dim, has_more = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
kernel = getattr(attention_kernels, name)
flags = {
    "H": 8, "G": 2, "C": dim, "BLOCK_C": triton.next_power_of_2(dim), "HAS_WINDOW": has_more,
    "BLOCK": attention.block_rows(dim, 4 if dtype == "fp32" else 2), "HAS_CAP": has_more,
    "IS_CPU": False, "IS_STATE": has_more,
}
flags = {key: value for key, value in flags.items() if key in kernel.arg_names}
kinds = {"log_sums": "*fp32", "deltas": "*fp32", "tiles": "*i32", "total": "i32",
         "window": "i32", "scale": "fp32", "softcap": "fp32"}
kinds = {n: "constexpr" if n in flags else kinds.get(n, "*" + dtype) for n in kernel.arg_names}
source = ASTSource(kernel, kinds, flags)
options = {"num_warps": 4 if dim <= 128 else 8}
print(triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).metadata.shared)
"""


@pytest.mark.parametrize("name", ["forward", "queries", "keys"])
@pytest.mark.parametrize(
    ("dtype", "dim", "has_more"), [("bf16", 128, True), ("bf16", 256, False), ("fp32", 64, False)]
)
def test_kernels_compile_for_a_gpu(name, dtype, dim, has_more, tmp_path):
    """The interpreter accepts more than the compiler does; no GPU is needed to compile."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _COMPILE, name, dtype, str(dim), str(has_more)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 99 << 10


_STEP = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny, torch
from sterna.train.build import build
folder = Path(sys.argv[2])
recipe = tiny.recipe(folder, run={"output": str(folder / sys.argv[3])})
with build(recipe) as trainer:
    rows = next(iter(trainer.steps()))
    loss = trainer.compute_gradients(rows)
    grads = [p.grad.clone() for p in trainer.parts.model.parameters()]
torch.save((loss.loss, grads), folder / (sys.argv[3] + ".pt"))
"""


def test_a_training_step_through_the_dispatcher(tmp_path):
    """Loss and every gradient of a tiny model, Triton's attention against the reference."""
    unit = Path(__file__).parents[1] / "unit" / "train"
    found = []
    for level in ("reference", "triton"):
        env = {**os.environ, "STERNA_KERNELS": level, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-c", _STEP, str(unit), str(tmp_path), level]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / f"{level}.pt"))
    (loss, grads), (triton_loss, triton_grads) = found
    assert abs(loss - triton_loss) <= 1e-6 * loss
    for one, other in zip(grads, triton_grads, strict=True):
        assert (one - other).abs().max() <= 2e-5 * one.abs().max()
