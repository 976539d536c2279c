"""A tiny model with adapters in folders, and an engine that serves them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sterna.engine.adapters import AdapterTable, add_slots
from sterna.engine.build import set_activations
from sterna.engine.config import EngineConfig
from sterna.engine.engine import Engine, buffer_tokens
from sterna.engine.memory import engine_shape
from sterna.engine.request import EngineRequest, SamplingParams
from sterna.model.decoder import Decoder
from sterna.model.load import load_model
from sterna.model.peft import read_peft
from sterna.quant.load import load_quantized
from sterna.text.tokenizer import load_tokenizer
from sterna.train.adapter import adapted_modules, add_adapter
from sterna.train.adapter_config import AdapterConfig
from sterna.train.adapter_file import save_adapter

_TINY = Path(__file__).parents[1] / "unit" / "train" / "tiny.py"
# Ranks beside whole vectors; one adapts two parts of three of qkv, one the MLP of a layer only.
ADAPTERS = {
    "all": AdapterConfig(rank=5, alpha=10),
    "attention": AdapterConfig(rank=16, alpha=16, targets=("q_proj", "v_proj"), is_rslora=True),
    "one-layer": AdapterConfig(rank=8, alpha=24, targets=("up_proj", "down_proj"), layers=(1,)),
}


def tiny() -> Any:
    spec = importlib.util.spec_from_file_location("lora_tiny_model", _TINY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stir(decoder: Decoder, seed: int, size: float = 0.3) -> None:
    """B as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in adapted_modules(decoder):
            for part in module.adapters():
                part.B.copy_(size * torch.randn(part.B.shape, generator=generator))


def write_all(folder: Path, **changed: object) -> Path:
    """`folder`/model and one folder for each of ADAPTERS."""
    (folder / "model").mkdir()
    tiny().write_model(folder / "model", **changed)
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        decoder = load_model(folder / "model", "float32").decoder
        add_adapter(decoder, config, seed)
        stir(decoder, seed)
        save_adapter(decoder, folder / name)
    return folder


def make(
    folder: Path,
    names: Sequence[str] = tuple(ADAPTERS),
    weights: str = "auto",
    drafters: Sequence[Any] = (),
    **settings: Any,
) -> Engine:
    """An engine with the named adapters, as build_engine makes it; none: without slots."""
    given = {"token_budget": 32, "num_kv_blocks": 64, "dtype": "float32", "threads": 1, **settings}
    config = EngineConfig.model_validate(given)
    decoder = load_quantized(folder / "model", config.dtype, "cpu", weights).decoder
    set_activations(decoder, config)
    decoder.prepare_inference()
    shape = engine_shape(decoder, config)
    table = None
    if names:
        table = add_slots(decoder, len(names) + 1, 16, buffer_tokens(config, shape), "cpu")
        for name in names:
            table.load(name, read_peft(folder / name))
    tokenizer = load_tokenizer(folder / "model")
    return Engine(decoder, tokenizer, config, shape, None, drafters, table)


def table_of(engine: Engine) -> AdapterTable:
    assert engine.adapters is not None
    return engine.adapters


def request(name: str, prompt: Sequence[int], adapter: str = "", **params: Any) -> EngineRequest:
    sampling = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 0, **params}
    return EngineRequest(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**sampling),
        adapter=adapter,
    )


def finish(engine: Engine, requests: Sequence[EngineRequest]) -> dict[str, list[tuple[int, float]]]:
    """Request id -> (token, logprob) of its samples, one after the other."""
    found: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for each in requests:
        engine.add(each)
    while engine.has_work:
        for output in engine.step():
            for delta in output.deltas:
                assert delta.error is None, delta.error
                pairs = [(e.token_id, e.logprob) for e in delta.logprobs or ()]
                found.setdefault((output.request_id, delta.index), []).extend(pairs)
        engine.check_integrity()
    flat: dict[str, list[tuple[int, float]]] = {}
    for (name, _), pairs in sorted(found.items()):
        flat.setdefault(name, []).extend(pairs)
    return flat
