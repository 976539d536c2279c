"""A forward consists of sterna ops alone: what a tape records is all that runs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sterna.kernels.load import load_kernels
from sterna.model.batch import Batch, KVView
from sterna.model.config import parse_config
from sterna.model.swiftkv import new_decoder
from sterna.model.swiftkv_config import SwiftKVConfig, with_swiftkv

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


class Ops(TorchDispatchMode):
    """Collects the names of the ops that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def tiny(dtype=torch.float32, swiftkv=False):
    torch.manual_seed(0)
    config = parse_config(TINY, "tiny")
    decoder = new_decoder(with_swiftkv(config, SwiftKVConfig(1)) if swiftkv else config, dtype)
    for p in decoder.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return decoder


def paged_batch(layers, tokens, starts, lens, rows, tables, slots):
    ints = (torch.tensor(x, dtype=torch.int32) for x in (tokens, starts, lens, rows))
    token_ids, query_starts, context_lens, output_rows = ints
    positions = torch.arange(len(tokens), dtype=torch.int32)
    view = KVView(layers, torch.tensor(tables, dtype=torch.int32), torch.tensor(slots), 16)
    output_starts = torch.arange(len(starts), dtype=torch.int32)
    return Batch(token_ids, positions, query_starts, context_lens, output_rows, view, output_starts)


@pytest.mark.parametrize("swiftkv", [False, True])
def test_only_sterna_ops_reach_the_dispatcher(swiftkv):
    load_kernels()
    decoder = tiny(swiftkv=swiftkv)
    batch = paged_batch(
        decoder.new_kv_layers(4, 16), [1, 2, 3], [0, 3], [3], [2], [[1]], [16, 17, 18]
    )
    with torch.inference_mode(), Ops() as seen:
        decoder.logits(decoder.hidden(batch))
    foreign = {name for name in seen.names if not name.startswith("sterna::")}
    assert foreign == set()


@pytest.mark.parametrize("swiftkv", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_equals_the_interpreted_forward_to_the_bit(dtype, swiftkv):
    if load_kernels().level != "cpu":
        pytest.skip("only the C++ kernels replay")
    from sterna.engine.capture import capture

    decoder = tiny(dtype, swiftkv)
    decoder.prepare_inference()
    layers = decoder.new_kv_layers(8, 16)
    wide = paged_batch(
        layers, [0] * 32, [0] * 5, [0] * 4, [0] * 4, [[0] * 3 for _ in range(4)], [0] * 32
    )
    forward = capture(decoder, wide)
    assert forward is not None
    # two sequences: a prompt chunk of 5 and one of 3; then one decode each
    steps = [([5, 6, 7, 8, 9, 1, 2, 3], [0, 5, 8], [5, 3]), ([11, 12], [0, 1, 2], [6, 4])]
    for tokens, starts, lens in steps:
        news = [b - a for a, b in itertools.pairwise(starts)]
        slots = [16 * (s + 1) + lens[s] - news[s] + i for s in range(2) for i in range(news[s])]
        rows = [stop - 1 for stop in starts[1:]]
        tables = [[1, 0, 0], [2, 0, 0]]
        batch = paged_batch(layers, tokens, starts, lens, rows, tables, slots)
        positions = torch.tensor([slot % 16 for slot in slots], dtype=torch.int32)
        wide.tokens[: len(tokens)] = batch.tokens
        wide.positions[: len(tokens)] = positions
        wide.query_starts[:3] = batch.query_starts
        wide.context_lens[:2] = batch.context_lens
        wide.output_rows[:2] = batch.output_rows
        wide.output_starts[:3] = batch.output_starts
        wide.kv.block_tables[:2] = batch.kv.block_tables
        wide.kv.slots[: len(slots)] = batch.kv.slots
        replayed = forward(len(tokens), 2, 2).clone()
        same = Batch(
            batch.tokens, positions, batch.query_starts, batch.context_lens, batch.output_rows,
            batch.kv, batch.output_starts,
        )  # fmt: skip
        with torch.inference_mode():
            assert torch.equal(decoder.logits(decoder.hidden(same)), replayed)


def test_training_logprobs_equal_serving_logprobs_to_the_bit():
    """One forward: the kv=None path and the paged path give the same bits on the CPU."""
    if load_kernels().level != "cpu":
        pytest.skip("the reference attention is equal to rounding only")
    for dtype in (torch.float32, torch.bfloat16):
        decoder = tiny(dtype)
        tokens = torch.randint(0, 64, (40,), dtype=torch.int32)
        positions = torch.arange(40, dtype=torch.int32)
        starts = torch.tensor([0, 40], dtype=torch.int32)
        lens = torch.tensor([40], dtype=torch.int32)
        trained = decoder(Batch(tokens, positions, starts, lens)).detach()
        view = KVView(
            decoder.new_kv_layers(5, 16), torch.tensor([[1, 2, 3]], dtype=torch.int32),
            torch.arange(16, 56), 16,
        )  # fmt: skip
        decoder.prepare_inference()
        with torch.inference_mode():
            served = decoder(Batch(tokens, positions, starts, lens, kv=view))
        assert torch.equal(trained, served)
