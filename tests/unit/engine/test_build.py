"""What is settled before an engine runs: device, threads, lengths, buffers."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from sterna.core.errors import ConfigError
from sterna.core.machine import num_usable_cpus
from sterna.engine.budget import StepCurve, StepTime, choose_budget
from sterna.engine.build import set_activations
from sterna.engine.config import EngineConfig
from sterna.engine.memory import engine_shape, kv_dtype
from sterna.kernels.device import check_device, set_threads
from sterna.model.config import parse_config
from sterna.model.decoder import Decoder


def test_devices_that_are_not_here_are_a_config_error(monkeypatch):
    check_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds 0 CUDA devices"):
        check_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda")
    check_device("cuda:1")
    with pytest.raises(ConfigError, match=r"'cuda:2'.*finds 2 CUDA devices"):
        check_device("cuda:2")


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "CPU", "cpu:0", ""])
def test_devices_that_are_none_are_refused_by_the_settings(name):
    with pytest.raises(ValidationError, match="device"):
        EngineConfig(device=name)


def test_more_threads_than_cpus_are_not_started(caplog):
    before = torch.get_num_threads()
    try:
        set_threads(1)
        assert torch.get_num_threads() == 1 and not caplog.records
        set_threads(num_usable_cpus() + 997)
        assert torch.get_num_threads() == num_usable_cpus()
        assert f"may use {num_usable_cpus()} CPUs" in caplog.text
    finally:
        set_threads(before)


def test_a_context_beyond_the_models_positions_is_refused(fake_decoder):
    decoder = fake_decoder()
    longest = decoder.config.num_positions
    assert engine_shape(decoder, EngineConfig(max_model_len=longest)).max_model_len == longest
    with pytest.raises(ConfigError, match=f"positions end at {longest}"):
        engine_shape(decoder, EngineConfig(max_model_len=longest + 1))


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}


@pytest.mark.parametrize(("kind", "row"), [("auto", 128), ("fp8", 68), ("int8", 68)])
def test_a_quantised_cache_holds_more_blocks(kind, row):
    """Bytes a head and token: 64 of 2, or 64 of 1 and a scale."""
    decoder = Decoder(parse_config(LLAMA, "llama"), torch.bfloat16)
    size = 100 * 2 * 2 * 16 * 128  # 100 plain blocks of 16 tokens: 2 layers, keys and values
    shape = engine_shape(decoder, EngineConfig(kv_cache_bytes=size, kv_cache_dtype=kind))
    assert shape.num_kv_blocks == 100 * 128 // row


def test_a_plain_cache_of_another_dtype_is_refused():
    decoder = Decoder(parse_config(LLAMA, "llama"), torch.bfloat16)
    assert kv_dtype(decoder, EngineConfig(kv_cache_dtype="bfloat16")) == torch.bfloat16
    with pytest.raises(ConfigError, match="computes in bfloat16; use auto, fp8 or int8"):
        engine_shape(decoder, EngineConfig(kv_cache_dtype="float32"))


def test_the_buffers_hold_any_budget_that_can_be_chosen(harness):
    engine = harness(max_num_seqs=5000, num_blocks=5).engine
    curve = StepCurve((StepTime(64, 0.01),))
    engine.set_token_budget(choose_budget(curve, 5000))
    assert engine.scheduler.max_running == 5000


def test_bf16_activations_of_a_float32_model_are_refused(fake_decoder):
    decoder = fake_decoder()
    with pytest.raises(ConfigError, match=r"computes in float32; set dtype"):
        set_activations(decoder, EngineConfig(activations="bf16", dtype="float32"))
    set_activations(decoder, EngineConfig())
