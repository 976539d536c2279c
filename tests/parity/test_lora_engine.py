"""Several adapters and the base in one flat batch: each request has the bits it has alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.drafts import FreeRows, Scripted

from sterna.align.rollout import Rollout
from sterna.align.score import completion_logprobs
from sterna.core.errors import AdapterError, RequestError, UnknownModelError, UnsupportedModelError
from sterna.engine import draft_rows
from sterna.engine.adapters import add_slots
from sterna.kernels.load import load_kernels
from sterna.model.load import load_model
from sterna.model.peft import read_peft
from sterna.train.adapter import add_adapter, merge_adapter
from sterna.train.adapter_config import AdapterConfig
from sterna.train.adapter_file import load_adapter, save_adapter

from .lora_tiny import ADAPTERS, finish, make, request, stir, table_of, write_all

# A short prompt, one longer than a KV block and a step, one that shares a block with it.
PROMPTS = [[10, 11, 12], list(range(30, 85)), [*range(30, 50), 7, 8]]
SETTINGS = {
    "plain": {},
    "bfloat16": {"dtype": "bfloat16"},
    "interpreted": {"capture": False},
    "chunks of 5": {"token_budget": 5},
    "preempted": {"num_kv_blocks": 12},
    "no prefix cache": {"enable_prefix_cache": False},
    "fp6": {"weights": "fp6", "dtype": "bfloat16"},
    "int4": {"weights": "int4-g32"},
    "int8 activations": {"weights": "fp6", "dtype": "bfloat16", "activations": "int8"},
    "int8 cache": {"kv_cache_dtype": "int8"},
    "right drafts": {"drafts": "right"},
    "mixed drafts": {"drafts": "mixed"},
}


@pytest.fixture(autouse=True)
def _native(monkeypatch):
    monkeypatch.setattr(draft_rows, "MIN_GAIN", 0.0)  # verify whatever is proposed
    if load_kernels().level != "cpu":
        pytest.skip("equal bits are promised by the C++ kernels only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("lora"))


def jobs():
    """Every prompt on every adapter and the base, some sampled, one with two samples."""
    found = []
    for i, prompt in enumerate(PROMPTS):
        for adapter in ("", *ADAPTERS):
            more = {"temperature": 1.0, "seed": 5, "n": 2} if i == 0 else {}
            found.append(request(f"{adapter or 'base'}-{i}", prompt, adapter, **more))
    return found


def engine_of(folder, names=tuple(ADAPTERS), drafts="", **settings):
    if not drafts:
        return make(folder, names, **settings)
    known = {}
    for job in jobs():
        pairs = finish(make(folder), [job])[job.request_id]
        size = len(pairs) // job.params.n
        for index in range(job.params.n):
            tokens = [token for token, _ in pairs[index * size : (index + 1) * size]]
            known[job.request_id, index] = tokens
    engine = make(folder, names, drafters=[Scripted(known, drafts, 272)], **settings)
    engine.speculator.cost = FreeRows()
    return engine


@pytest.mark.parametrize("name", SETTINGS)
def test_a_request_has_the_bits_it_has_alone(folder, name):
    together = finish(engine_of(folder, **SETTINGS[name]), jobs())
    engine = engine_of(folder, **SETTINGS[name])
    plain = engine_of(folder, names=(), **SETTINGS[name])
    for job in jobs():
        assert finish(engine, [job])[job.request_id] == together[job.request_id]
        if not job.adapter:
            assert finish(plain, [job])[job.request_id] == together[job.request_id]
    texts = {tuple(t for t, _ in together[f"{a or 'base'}-1"]) for a in ("", *ADAPTERS)}
    assert len(texts) == 1 + len(ADAPTERS)
    is_recorded = SETTINGS[name].get("capture", True)
    assert (engine.runner._adapted is not None) == is_recorded


def test_settings_do_not_change_an_output(folder):
    """Recorded or not, cut or whole, found in the cache or computed: the same bits."""
    alike = ("plain", "interpreted", "chunks of 5", "preempted", "no prefix cache", "right drafts")
    results = [finish(engine_of(folder, **SETTINGS[name]), jobs()) for name in alike]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_logprobs_are_those_of_the_training_forward(folder, name, dtype):
    engine = engine_of(folder, dtype=dtype)
    found = finish(engine, [request("a", PROMPTS[1], name), request("b", PROMPTS[2])])["a"]
    decoder = load_model(folder / "model", dtype).decoder
    load_adapter(decoder, folder / name)
    rollout = Rollout(
        prompt_idx=0,
        sample_idx=0,
        prompt=np.array(PROMPTS[1], np.int32),
        completion=np.array([token for token, _ in found], np.int32),
        mask=np.ones(len(found), np.bool_),
        logprobs=np.array([logprob for _, logprob in found], np.float32),
        policy_version=0,
        is_truncated=True,
    )
    with torch.no_grad():
        wanted, _ = completion_logprobs(decoder, [rollout])
    assert torch.equal(torch.from_numpy(rollout.logprobs), wanted)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2**-17), ("bfloat16", 2**-4)])
def test_merged_weights_say_the_same(folder, tmp_path, dtype, bound):
    """float32: 2^-23 times the steps of a sum; bfloat16: the merged weight is rounded, 2^-9 each,
    through a dozen of them."""
    from sterna.model.save import save_model

    (tmp_path / "model").mkdir()
    decoder = load_model(folder / "model", "float32").decoder
    load_adapter(decoder, folder / "all")
    merge_adapter(decoder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((folder / "model" / name).read_bytes())
    save_model(decoder, tmp_path / "model")
    prompt = PROMPTS[1]
    asked = {"max_tokens": 1, "prompt_logprobs": 0}
    merged = scores(make(tmp_path, (), dtype=dtype), request("m", prompt, **asked))
    engine = make(folder, dtype=dtype)
    served = scores(engine, request("s", prompt, "all", **asked))
    base = scores(engine, request("b", prompt, **asked))
    assert np.abs(served - merged).max() <= bound * np.abs(merged).max()
    assert np.abs(served - base).max() > 0.1


def scores(engine, job):
    """Logprobs of the prompt's tokens but the first."""
    engine.add(job)
    found = []
    while engine.has_work:
        for output in engine.step():
            found += [e.logprob for e in (output.prompt_logprobs or ())[1:]]
    return np.array(found)


def test_prompt_logprobs_of_several_adapters_in_one_step(folder):
    asked = {"max_tokens": 1, "prompt_logprobs": 0}
    engine = make(folder, token_budget=256)
    found = {}
    for name in ("", "all", "attention"):
        engine.add(request(name or "base", PROMPTS[2], name, **asked))
    while engine.has_work:
        for output in engine.step():
            if output.prompt_logprobs:
                found[output.request_id] = [e.logprob for e in output.prompt_logprobs[1:]]
    for name in ("", "all", "attention"):
        alone = scores(make(folder), request("x", PROMPTS[2], name, **asked))
        assert found[name or "base"] == alone.tolist()


def test_cached_keys_and_values_are_never_those_of_another_adapter(folder):
    engine = make(folder)
    job = request("a", PROMPTS[1], "all")
    first = finish(engine, [job])["a"]
    num_cached = []
    for name in ("all", "attention", ""):
        engine.add(replace(job, request_id=name or "base", adapter=name))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        num_cached.append(outputs[-1].num_cached_tokens)
    assert num_cached[0] > 0
    assert num_cached[1:] == [0, 0]
    table_of(engine).unload("all")
    table_of(engine).load("all", read_peft(folder / "attention"))  # the same name, other weights
    again = finish(engine, [job])["a"]
    assert again != first
    assert again == finish(make(folder), [replace(job, adapter="attention")])["a"]


def test_an_unloaded_adapter_finishes_what_it_began(folder):
    engine = make(folder)
    table = table_of(engine)
    wanted = finish(engine, [request("a", PROMPTS[0], "all")])["a"]
    engine.add(request("b", PROMPTS[0], "all"))
    engine.step()
    table.unload("all")
    with pytest.raises(UnknownModelError, match="all"):
        engine.add(request("c", PROMPTS[0], "all"))
    table.load("new", read_peft(folder / "one-layer"))  # the last place; b still holds its own
    with pytest.raises(AdapterError, match="places for adapters are taken"):
        table.load("more", read_peft(folder / "one-layer"))
    found = []
    while engine.has_work:
        for output in engine.step():
            found += [(e.token_id, e.logprob) for d in output.deltas for e in d.logprobs or ()]
    assert found == wanted[1:]
    assert not table.leaving
    table.load("more", read_peft(folder / "one-layer"))


def test_refusals(folder, tmp_path):
    engine = make(folder)
    table = table_of(engine)
    with pytest.raises(RequestError, match="serves no adapters"):
        make(folder, ()).add(request("a", [1], "all"))
    with pytest.raises(AdapterError, match="loaded already"):
        table.load("all", read_peft(folder / "all"))
    with pytest.raises(AdapterError, match="nothing"):
        table.unload("nothing")
    cases = [
        ("rank", {}, AdapterConfig(rank=17), "max_lora_rank=17"),
        ("dora", {}, AdapterConfig(rank=4, kind="dora"), "DoRA"),
        ("shape", {"hidden_size": 128}, AdapterConfig(rank=4), "shape"),
        ("layers", {"num_hidden_layers": 3}, AdapterConfig(rank=4), "layers.2"),
    ]
    for name, changed, config, message in cases:
        (tmp_path / name).mkdir()
        path = write_all(tmp_path / name, **changed) / "model"
        decoder = load_model(path, "float32").decoder
        add_adapter(decoder, config)
        stir(decoder, 0)
        save_adapter(decoder, tmp_path / name / "it")
        with pytest.raises(AdapterError, match=message):
            table.load(name, read_peft(tmp_path / name / "it"))
    assert set(table.loaded) == set(ADAPTERS)


def test_swiftkv_models_are_refused():
    from types import SimpleNamespace

    decoder = SimpleNamespace(config=SimpleNamespace(swiftkv=object()))
    with pytest.raises(UnsupportedModelError, match="SwiftKV"):
        add_slots(decoder, 1, 8, 64, "cpu")
