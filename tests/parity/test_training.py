"""Training spread over ranks against one process: loss, every gradient, weights after 3 steps.

The axes are those of the issue: head ratios (with more ranks than kv heads, and heads that the
ranks do not divide), one document or packed, lengths no rank count divides, a shard without a
target, accumulation with unequal targets, tied embeddings, dp x sp, cut and replicated weights,
frozen weights, windows. 1e-10 in float64 proves the algebra, 1e-5 in float32 the order of sums.
`pytest -m slow tests/parity/test_training.py` runs all; a chosen few run always.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from sterna.parallel.launch import LocalRanks
from sterna.train.trial import Row, Trial, compare, run_trial
from sterna.train.trialmodel import TrialModel

RUN = "sterna.train.trial:run_trial"
LIMITS = {"float64": 1e-10, "float32": 1e-5}
ROWS = {
    "one": (Row((37,)),),  # 37: no rank count divides it
    "packed": (Row((5, 18, 1, 13)),),
    "empty-shard": (Row((7, 30), trained=(0, 9)),),  # from 9 on there is no target
    "accumulate": (Row((5, 18, 14)), Row((40,), trained=(30, 33)), Row((21, 9), drop=0.0)),
    "dp": (Row((5, 18)), Row((33,), trained=(2, 5)), Row((9, 9, 9)), Row((26,), drop=0.0)),
}
MESHES = {
    "alone": (1, {}),
    "sp2": (2, {"sp": 2}),
    "sp2-replicated": (2, {"sp": 2, "shard": "none"}),
    "dp2": (2, {"dp": 2}),
    "sp2-gathered": (2, {"sp": 2, "ulysses": 1}),
    "sp4": (4, {"sp": 4}),
    "sp4-gathered": (4, {"sp": 4, "ulysses": 1}),
    "sp4-mixed": (4, {"sp": 4, "ulysses": 2}),
    "dp2-sp2": (4, {"dp": 2, "sp": 2}),
    "dp2-sp2-replicated": (4, {"dp": 2, "sp": 2, "shard": "none"}),
    "dp4": (4, {"dp": 4}),
}
HEADS = {"8/8": (8, 8), "8/2": (8, 2), "8/1": (8, 1), "6/2": (6, 2)}


def config(heads="8/2", tied=False, **values):
    num_heads, num_kv_heads = HEADS[heads]
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 83,
        "hidden_size": 8 * num_heads,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        **values,
    }


GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "sliding_window": 6,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 8,
    "final_logit_softcapping": 20.0,
    "attn_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
}


HF_SIZES = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HF = {
    "qwen3": {"model_type": "qwen3", **HF_SIZES, "head_dim": 8},
    "gpt_neox": {"model_type": "gpt_neox", **HF_SIZES},
    "mistral": {"model_type": "mistral", **HF_SIZES, "sliding_window": 7},
}


@pytest.fixture(scope="module")
def ranks():
    with LocalRanks() as pool:
        yield pool


REFERENCES = {}
OPTIONS = ("longseq", "chunked", "adapter", "frozen")


def check(ranks, mesh, rows, dtype="float64", backend="native", **options):
    """Beside OPTIONS, the options are values of the model's config."""
    longseq, chunked, adapter, frozen = (options.pop(key, None) for key in OPTIONS)
    model = options
    world, parallel = MESHES[mesh]
    kind = "native" if backend == "native" else "hf"
    shape = TrialModel(config(**model) if backend == "native" else HF[backend], backend=kind)
    plain = Trial(ROWS[rows], shape, dtype=dtype, frozen=frozen or (), adapter=adapter)
    if repr(plain) not in REFERENCES:
        REFERENCES[repr(plain)] = run_trial(plain)
    longseq = longseq or {}
    spread = replace(plain, parallel=parallel, chunked_head=chunked, longseq=longseq)
    found = compare(REFERENCES[repr(plain)], ranks.run(world, RUN, spread)[0])
    assert found.worst <= LIMITS[dtype], found
    return found


CHOSEN = [
    ("sp2", "packed", "8/2"),
    ("sp2", "empty-shard", "8/1"),
    ("sp4", "packed", "8/1"),
    ("sp4", "accumulate", "6/2"),
    ("sp4-gathered", "packed", "8/2"),
    ("sp2-gathered", "one", "6/2"),
    ("sp2-gathered", "empty-shard", "8/1"),
    ("dp2-sp2", "dp", "8/2"),
    ("dp2-sp2-replicated", "dp", "8/8"),
]
ALL = [
    (mesh, rows, heads)
    for mesh, rows, heads in itertools.product(MESHES, ROWS, HEADS)
    if mesh != "alone" and (rows == "dp" or "dp" not in mesh)
]


@pytest.mark.parametrize(("mesh", "rows", "heads"), CHOSEN)
def test_spread_training_is_one_process_training(ranks, mesh, rows, heads):
    check(ranks, mesh, rows, heads=heads)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("mesh", "rows", "heads"), ALL)
def test_all_of_the_matrix(ranks, mesh, rows, heads, tied, dtype):
    check(ranks, mesh, rows, dtype, heads=heads, tied=tied)


@pytest.mark.parametrize("mesh", ["sp2", "sp4-mixed", "dp2-sp2"])
def test_float32_is_held_too(ranks, mesh):
    check(ranks, mesh, "dp", "float32")


@pytest.mark.parametrize("mesh", ["sp4", "dp2-sp2"])
def test_tied_embeddings(ranks, mesh):
    check(ranks, mesh, "dp", tied=True)


@pytest.mark.parametrize("mesh", ["sp2-gathered", "sp4-mixed", "dp2-sp2"])
def test_windows_softcaps_and_two_ropes(ranks, mesh):
    check(ranks, mesh, "dp", tied=True, num_hidden_layers=4, **GEMMA)


@pytest.mark.parametrize(
    "frozen", [("embed_tokens",), ("mlp", "norm", "lm_head"), ("qkv", "embed")]
)
def test_frozen_weights(ranks, frozen):
    check(ranks, "dp2-sp2", "dp", frozen=frozen)


@pytest.mark.parametrize("chunked", [3, 64])
def test_the_chunked_head(ranks, chunked):
    check(ranks, "dp2-sp2", "dp", chunked=chunked, tied=True)
    check(ranks, "sp2", "empty-shard", chunked=chunked)


@pytest.mark.parametrize("backend", HF)
def test_models_behind_transformers(ranks, backend):
    check(ranks, "dp2-sp2", "dp", "float32", backend)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("backend", HF)
def test_models_behind_transformers_on_every_mesh(ranks, backend, mesh):
    check(ranks, mesh, "dp", "float32", backend)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters(ranks, kind):
    adapter = {"kind": kind, "rank": 4}
    check(ranks, "dp2-sp2", "dp", adapter=adapter)
    check(ranks, "sp2-replicated", "empty-shard", adapter=adapter, tied=True)


# Tiles that do not divide the row, are longer than it, or hold one token.
LONGSEQ = {
    "checkpoint": {"checkpoint": True},
    "tiles": {"mlp_tile": 5, "attention_tile": 7},
    "one-token-tiles": {"checkpoint": True, "mlp_tile": 1, "attention_tile": 1},
    "tiles-beyond-the-row": {"checkpoint": True, "mlp_tile": 99, "attention_tile": 50},
}


@pytest.mark.parametrize("mesh", ["alone", "sp2-replicated", "dp2-sp2"])
@pytest.mark.parametrize("name", LONGSEQ)
def test_long_rows(ranks, mesh, name):
    check(ranks, mesh, "dp", longseq=LONGSEQ[name], chunked=11)


def test_checkpoints_of_several_blocks(ranks):
    longseq = {"checkpoint": True, "every": 2, "mlp_tile": 6}
    check(ranks, "sp2-replicated", "accumulate", longseq=longseq, num_hidden_layers=3)
