"""A streamed decoder gives what a loaded one does, and holds one block at a time."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sterna.model.load import load_model
from sterna.quant.awq import channel_scales
from sterna.quant.budget import price_formats
from sterna.quant.calibrate import input_mean_squares
from sterna.quant.formats import parse_format
from sterna.quant.hessian import MIN_TOKENS, Hessians
from sterna.quant.sensitivity import row_sensitivities
from sterna.quant.sources import open_source
from sterna.quant.stream import StreamedDecoder, block_of, weight_of

TOKENS = torch.randint(0, 70, (MIN_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture
def both(plain_folder):
    """(loaded, streamed)."""
    streamed = StreamedDecoder(open_source(plain_folder), torch.bfloat16)
    return load_model(plain_folder).decoder, streamed


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def is_empty(decoder):
    return all(p.is_meta for p in decoder.layers.parameters())


def test_statistics_are_those_of_the_loaded_decoder(both):
    loaded, streamed = both
    squares = input_mean_squares(loaded, TOKENS, "text")
    assert equal(squares, input_mean_squares(streamed, TOKENS, "text"))
    assert is_empty(streamed)
    sensitivity = row_sensitivities(loaded, TOKENS)
    assert equal(sensitivity, row_sensitivities(streamed, TOKENS))
    formats = ("fp6", "int4-g32")
    prices = [price_formats(d, squares, sensitivity, formats) for d in both]
    assert prices[0] == prices[1]
    scales = [channel_scales(d, squares, parse_format("int4")) for d in both]
    assert equal(scales[0].columns, scales[1].columns)
    assert equal(scales[0].norms, scales[1].norms)
    names = ("layers.0.attn.qkv", "layers.1.mlp.down", "lm_head")
    hessians = [Hessians(d, TOKENS, "text") for d in both]
    assert all(torch.equal(hessians[0].get(n), hessians[1].get(n)) for n in names)
    assert is_empty(streamed)


def test_a_block_is_dropped_also_when_its_user_fails(both):
    loaded, streamed = both
    with pytest.raises(ZeroDivisionError), block_of(streamed, 1) as block:
        weight = block.get_parameter("attn.qkv.weight")
        assert torch.equal(weight, loaded.get_parameter("layers.1.attn.qkv.weight"))
        raise ZeroDivisionError
    assert is_empty(streamed)
    assert torch.equal(weight_of(streamed, "layers.1.attn.qkv.weight"), weight)


def test_sensitivities_by_blocks_are_those_of_one_backward(both):
    """The whole graph at once, with weights that take gradients, on one window."""
    decoder = both[0].float()
    tokens = TOKENS[:64]
    found = row_sensitivities(decoder, tokens)
    squares = input_mean_squares(decoder, (tokens * 8)[:512], "text")
    decoder.requires_grad_(True)
    n = len(tokens)
    batch = one_sequence(tokens)
    log_probs = decoder(batch).log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
    log_probs.gather(1, drawn).sum().backward()
    for name in ("layers.0.attn.qkv", "layers.1.mlp.down", "lm_head"):
        gradient = decoder.get_parameter(f"{name}.weight").grad
        by_hand = gradient.square().sum(dim=1) / (squares[name].sum() * n)
        assert torch.allclose(found[name], by_hand, rtol=1e-3), name


def one_sequence(tokens):
    from sterna.quant.calibrate import windows

    (batch,) = windows(tokens, len(tokens))
    return batch


SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 70, "num_hidden_layers": 12,
         "max_position_embeddings": 64}  # fmt: skip
LAYER_BYTES = 2 * (1024 * 1024 * 3 + 3 * 1024 * 4096)  # bfloat16: 31 MB, 378 in all

SCRIPT = """
import re, sys, threading, time
peak = [0]
def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.01)
from sterna.cli.main import run
import sterna.cli.quantize_run, torch
before = resident()
threading.Thread(target=watch, daemon=True).start()
code = run(sys.argv[1:])
print(code, peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [["--bits", "6.13"], ["--method", "gptq"], ["--method", "awq", "--format", "int4"]]
)
def test_memory_is_that_of_some_blocks(make_folder, tmp_path, method):
    """Anonymous memory, the mapped file not counted: below half of the model, which is 12 blocks.

    A budget's float32 block and its gradients are 5 blocks in bfloat16, GPTQ's float64 factors
    of 4,096 inputs 9; a model that is loaded fused holds 12 and these.
    """
    model = make_folder(tmp_path / "plain", big_tensors(), **SHAPE)
    text = tmp_path / "text.txt"
    text.write_text("#%&'(*+,-.3579;=?ACEGI" * 200)
    arguments = ["quantize", str(model), "-o", str(tmp_path / "out"), "--json",
                 "--calibrate", str(text), "--calibrate-tokens", "2048", *method]  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, peak = map(int, done.stdout.splitlines()[-1].split())
    assert code == 0
    assert peak < MOST_BLOCKS * LAYER_BYTES, f"{peak / LAYER_BYTES:.1f} blocks"


MOST_BLOCKS = 11


def big_tensors():
    g = torch.Generator().manual_seed(0)
    d, inner, kv = 1024, 4096, 512
    shapes = {"model.embed_tokens.weight": (70, d), "lm_head.weight": (70, d),
              "model.norm.weight": (d,)}  # fmt: skip
    for i in range(12):
        p = f"model.layers.{i}."
        shapes |= {
            p + "self_attn.q_proj.weight": (d, d), p + "self_attn.k_proj.weight": (kv, d),
            p + "self_attn.v_proj.weight": (kv, d), p + "self_attn.o_proj.weight": (d, d),
            p + "mlp.gate_proj.weight": (inner, d), p + "mlp.up_proj.weight": (inner, d),
            p + "mlp.down_proj.weight": (d, inner), p + "input_layernorm.weight": (d,),
            p + "post_attention_layernorm.weight": (d,),
        }  # fmt: skip
    return {n: (torch.randn(*s, generator=g) * 0.02).bfloat16() for n, s in shapes.items()}
