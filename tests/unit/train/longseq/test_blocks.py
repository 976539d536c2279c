"""Checkpoints, tiles and tiers against the plain step: loss, every gradient, three clipped steps.

float64 holds the formulas to 1e-10 of the largest gradient; tiles change nothing but the order of
sums. Rows of 23 tokens in three documents, so that no tile divides them and one is a single token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sterna.core.errors import ConfigError, TrainError
from sterna.kernels.optable import define
from sterna.model.batch import Batch
from sterna.model.config import parse_config
from sterna.model.decoder import Decoder
from sterna.train.init_weights import init_weights
from sterna.train.longseq.apply import apply_longseq
from sterna.train.longseq.config import LongseqSection
from sterna.train.longseq.head import chunked_cross_entropy

define()
SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8},
    "mistral": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": None,
        "pad_token_id": 0,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8, "sliding_window": 5,
    },
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"},
    "opt": {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "ffn_dim": 48,
        "word_embed_proj_dim": 32, "activation_function": "relu",
    },
}  # fmt: skip
SETTINGS = {
    "checkpoint": {"checkpoint": True},
    "every 2": {"checkpoint": True, "every": 2},
    "tiles": {"mlp_tile": 6, "attention_tile": 4},
    "tiled mlp": {"mlp_tile": 23},
    "more tiles than tokens": {"mlp_tile": 1, "attention_tile": 100},
    "all": {"checkpoint": True, "mlp_tile": 6, "attention_tile": 4},
    "all every 3": {"checkpoint": True, "every": 3, "mlp_tile": 5, "attention_tile": 7},
    "disk": {"checkpoint": True, "tier": "disk", "mlp_tile": 6},
    "disk every 2": {"checkpoint": True, "tier": "disk", "every": 2, "attention_tile": 4},
}
STARTS = [0, 9, 10, 23]


def decoder(family: str = "llama", dtype: torch.dtype = torch.float64) -> Decoder:
    config = parse_config({**SIZES, **FAMILIES[family]}, family)
    made = Decoder(config, torch.float32)
    init_weights(made, seed=1)
    made.to(dtype)
    made.dtype = dtype
    for p in made.parameters():
        p.data.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    return made.train()


def row() -> tuple[Batch, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 90, (STARTS[-1],), generator=draw, dtype=torch.int32)
    starts = torch.tensor(STARTS, dtype=torch.int32)
    lens = starts[1:] - starts[:-1]
    positions = torch.cat([torch.arange(int(n), dtype=torch.int32) for n in lens])
    targets = torch.roll(tokens, -1).long()
    targets[starts[1:].long() - 1] = -100
    return Batch(tokens, positions, starts, lens), targets


def loss_of(model: Decoder, num_targets: int = 20) -> torch.Tensor:
    batch, targets = row()
    return chunked_cross_entropy(model.hidden(batch), model.head_weight(), targets) / num_targets


def step(model: Decoder) -> tuple[float, dict[str, torch.Tensor]]:
    loss = loss_of(model)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), grads


def long_decoder(tmp_path, changed: dict, family: str = "llama", dtype=torch.float64) -> Decoder:
    model = decoder(family, dtype)
    apply_longseq(model, LongseqSection(**changed), tmp_path)
    return model


def assert_same(got, want, bound: float) -> None:
    assert abs(got[0] - want[0]) <= bound * abs(want[0])
    assert got[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        scale = grad.abs().max().clamp(min=1e-12)
        assert (got[1][name] - grad).abs().max() <= bound * scale, name


@pytest.mark.parametrize("changed", SETTINGS.values(), ids=SETTINGS.keys())
def test_loss_and_gradients_are_the_plain_ones(tmp_path, changed):
    assert_same(step(long_decoder(tmp_path, changed)), step(decoder()), 1e-10)


@pytest.mark.parametrize("changed", [SETTINGS["all"], SETTINGS["tiles"]], ids=["all", "tiles"])
def test_in_float32(tmp_path, changed):
    got = step(long_decoder(tmp_path, changed, dtype=torch.float32))
    assert_same(got, step(decoder(dtype=torch.float32)), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family):
    got = step(long_decoder(tmp_path, SETTINGS["all every 3"], family))
    assert_same(got, step(decoder(family)), 1e-10)


def test_three_clipped_steps(tmp_path):
    models = decoder(), long_decoder(tmp_path, SETTINGS["all"])
    for model in models:
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            loss_of(model).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimiser.step()
            optimiser.zero_grad()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-8, name  # Adam divides tiny gradients by their own size


def test_frozen_weights_get_no_gradient(tmp_path):
    models = decoder(), long_decoder(tmp_path, SETTINGS["all every 3"])
    for model in models:
        model.requires_grad_(False)
        model.layers[2].attn.out.weight.requires_grad_(True)
    want, got = step(models[0]), step(models[1])
    assert set(got[1]) == {"layers.2.attn.out.weight"}
    assert_same(got, want, 1e-10)


@pytest.mark.parametrize("name", ["all every 3", "checkpoint", "tiles", "tiled mlp"])
def test_dropout_is_drawn_again_for_the_backward(tmp_path, name):
    """The gradient of a fixed draw by finite differences, along one direction.

    The module that drops says nothing of it by its type or attributes.
    """
    model = long_decoder(tmp_path, SETTINGS[name])
    block = model.layers[1]
    plain = block.mlp_norm.forward
    block.mlp_norm.forward = lambda x: torch.nn.functional.dropout(plain(x), 0.5)
    weight = block.mlp.down.weight
    direction = torch.randn(weight.shape, dtype=weight.dtype)

    def loss() -> torch.Tensor:
        torch.manual_seed(11)
        return loss_of(model)

    value = loss()
    after = torch.get_rng_state()
    value.backward()
    assert torch.equal(torch.get_rng_state(), after)  # the backward leaves no trace in it
    slope = float((weight.grad * direction).sum())
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(direction, alpha=sign * 1e-6)
            sides.append(float(loss()))
            weight.add_(direction, alpha=-sign * 1e-6)
    assert abs((sides[0] - sides[1]) / 2e-6 - slope) <= 1e-5 * abs(slope) + 1e-7


def test_generation_takes_the_plain_way(tmp_path):
    """A batch whose output rows are named is not a training row."""
    batch, _ = row()
    named = replace(batch, output_rows=torch.tensor([3, 22], dtype=torch.int32))
    for changed in (SETTINGS["all"], SETTINGS["every 2"]):
        model = long_decoder(tmp_path, changed)
        assert torch.allclose(model.hidden(named), decoder().hidden(named), atol=1e-12)


def test_refusals(tmp_path):
    model = decoder()
    with pytest.raises(ConfigError, match="FSDP2 gathers one at a time"):
        apply_longseq(model, LongseqSection(checkpoint=True, every=2), is_sharded=True)
    with pytest.raises(ConfigError, match=r"longseq\.folder"):
        apply_longseq(model, LongseqSection(checkpoint=True, tier="disk"))
    with pytest.raises(TrainError, match="off a GPU"):
        apply_longseq(model, LongseqSection(checkpoint=True, tier="host"))
    with pytest.raises(ValueError, match=r"longseq\.checkpoint is false"):
        LongseqSection(every=2)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    model = long_decoder(tmp_path, SETTINGS["disk"])

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(TrainError, match="No space left"):
        loss_of(model)


def test_the_file_of_checkpoints_is_reused(tmp_path):
    model = long_decoder(tmp_path, SETTINGS["disk"])
    step(model)
    store = model.layers[0].forward.__closure__
    sizes = [c.cell_contents.store._ends for c in store if hasattr(c.cell_contents, "store")]
    assert sizes == [[0]]
    assert list(tmp_path.iterdir()) == []  # it has no name on disk
