"""From a model's name to a running engine: load, pack, size the cache, measure the budget."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sterna.core.errors import ConfigError, TaskError
from sterna.core.log import get_logger
from sterna.core.machine import fingerprint
from sterna.engine.adapters import AdapterTable, add_slots, parse_pairs
from sterna.engine.budget import StepCurve, choose_budget, load_curve, measure_curve, save_curve
from sterna.engine.config import EngineConfig
from sterna.engine.costfile import review, tuned
from sterna.engine.drafters.base import Drafter
from sterna.engine.drafters.choose import build_drafters
from sterna.engine.drafters.identity import model_identity
from sterna.engine.drafters.learned import LearnedDrafter
from sterna.engine.drafters.suffix import SuffixDrafter
from sterna.engine.engine import Engine, buffer_tokens
from sterna.engine.memory import EngineShape, engine_shape
from sterna.engine.speculate import Speculator
from sterna.engine.structured import GrammarCompiler
from sterna.engine.task import resolve_task
from sterna.kernels.device import check_device, set_threads
from sterna.kernels.load import load_kernels
from sterna.model.decoder import Decoder
from sterna.model.encoder import Encoder
from sterna.model.hub import DEFAULT_NAMES, resolve_model
from sterna.model.load import DTypeName
from sterna.model.peft import PeftFile, read_peft
from sterna.quant.cache import DEFAULT_MODEL_WEIGHTS, cached_folder
from sterna.quant.linear import describe_weights, use_int8_activations
from sterna.quant.load import AUTO, PLAIN, load_quantized
from sterna.text.tokenizer import load_tokenizer
from sterna.version import __version__

log = get_logger(__name__)


def build_engine(model: str, config: EngineConfig) -> Engine:
    """An engine for a folder, GGUF file, hub name, or "" for the default model.

    Raises ModelError (not found, damaged, unsupported), ConfigError (settings that do not fit the
    model or the memory), KernelError (a forced kernel level is not available), TaskError for a
    model that embeds.
    """
    path = resolve_model(model)
    if resolve_task(path, config.task) == "embed":
        raise TaskError(
            f"{path} is a model that embeds and writes no text; use `sterna serve`, `sterna embed` "
            "or LLM.embed, or set task to generate where it is a decoder"
        )
    check_device(config.device)
    set_threads(1)  # idle kernel threads would spin on the core that the imports need
    with ThreadPoolExecutor(1) as beside:  # loading weights leaves a core to the tokenizer
        tokenizer_loading = beside.submit(load_tokenizer, path)
        decoder = load_weights(model, path, config)
        tokenizer = tokenizer_loading.result()
    set_threads(config.threads)
    decoder.prepare_inference()
    shape = engine_shape(decoder, config)
    grammars = GrammarCompiler(tokenizer, shape.vocab_size)
    key = _curve_key(decoder, config)
    identity = model_identity(path, tokenizer) if config.draft_cache else ""
    drafters = build_drafters(config, tokenizer, decoder, identity)
    adapters = load_adapters(decoder, config, shape)
    engine = Engine(decoder, tokenizer, config, shape, grammars, drafters, adapters)
    engine.on_close.extend(d.save for d in drafters if isinstance(d, SuffixDrafter))
    start_learning(engine, drafters)
    if config.token_budget is None:
        tune_budget(engine, key)
    if engine.speculator is not None:
        tune_cost(engine, engine.speculator, key)
    return engine


def load_adapters(
    decoder: Decoder, config: EngineConfig, shape: EngineShape
) -> AdapterTable | None:
    """Places for adapters, with those of `config.lora`; None where there are to be none.

    ConfigError for a setting that does not hold them, AdapterError or ModelError for an adapter.
    """
    found = {name: read_peft(path) for name, path in parse_pairs(config.lora).items()}
    count = len(found) if config.max_loras is None else config.max_loras
    if count < len(found):
        raise ConfigError(
            f"max_loras is {count}, lora names {len(found)} adapters; raise max_loras, or name "
            "fewer",
            param="engine.max_loras",
        )
    if not count:
        return None
    table = add_slots(
        decoder, count, _max_rank(config, found), buffer_tokens(config, shape), config.device
    )
    for name, adapter in found.items():
        entry = table.load(name, adapter)
        log.info("adapter %s: rank %d, from %s", name, entry.rank, entry.path)
    return table


def _max_rank(config: EngineConfig, found: Mapping[str, PeftFile]) -> int:
    given = (adapter.max_rank for adapter in found.values())
    return config.max_lora_rank or max((16, *given))


def start_learning(engine: Engine, drafters: Sequence[Drafter]) -> None:
    """Let the learned drafter's head learn from what the engine serves, where that is asked for."""
    learner = next((d.learner for d in drafters if isinstance(d, LearnedDrafter)), None)
    if learner is not None:
        engine.learner = learner
        engine.on_step.append(learner.note_step)
        engine.on_close.append(learner.close)
        learner.start()


def weights_of(model: str, config: EngineConfig) -> str:
    """The weights setting that applies: the default model's own when none is asked for."""
    if model in DEFAULT_NAMES and config.weights == AUTO and config.device == "cpu":
        return DEFAULT_MODEL_WEIGHTS
    return config.weights


def load_weights(model: str, path: Path, config: EngineConfig) -> Decoder:
    """The decoder as `config.weights` asks; the default model's quantised copy is kept."""
    dtype: DTypeName = "bfloat16" if config.dtype == "auto" else config.dtype
    weights = weights_of(model, config)
    kept = None
    if model in DEFAULT_NAMES and weights not in (AUTO, PLAIN):
        kept = cached_folder(path, weights)
    if kept is not None:
        decoder = load_quantized(kept, dtype, config.device, verify=False).decoder
    else:
        decoder = load_quantized(path, dtype, config.device, weights).decoder
    set_activations(decoder, config)
    if line := describe_weights(decoder):
        log.info("%s", line)
    if decoder.config.swiftkv is not None:
        log.info("layers that a prompt runs: %s", decoder.prompt_layers)
    return decoder


def set_activations(decoder: Decoder | Encoder, config: EngineConfig) -> None:
    """Switch the decoder to int8 activations if asked for.

    ConfigError when the weights do not allow it, and for bf16 in a model that computes otherwise.
    """
    if config.activations == "int8":
        use_int8_activations(decoder)
    elif config.activations == "bf16" and decoder.dtype != torch.bfloat16:
        computes = str(decoder.dtype).removeprefix("torch.")
        raise ConfigError(
            f"activations is bf16, the model computes in {computes}; set dtype to bfloat16, or "
            "leave activations at auto",
            param="activations",
        )


def tune_budget(engine: Engine, key: str) -> StepCurve:
    """Set the engine's budget from measured step times, kept ones if there are any."""
    kept = curve = load_curve(key)
    origin = "measured earlier"
    run = engine.runner.run_probe
    if curve is None or curve.is_contradicted(run):
        origin = "measured now"
        longest = min(engine.limits.max_model_len, engine.limits.max_pool_tokens)
        curve = measure_curve(run, longest)
        curve = curve.merged(kept) if kept else curve
        save_curve(key, curve)
    budget = choose_budget(curve, engine.config.max_num_seqs)
    engine.set_token_budget(budget, curve.widest())
    engine.speed.prompt_speed = curve.best_speed
    idle = engine.scheduler.idle_budget
    log.info("token budget %d, %d without decodes (%s: %s)", budget, idle, origin, curve.line())
    return curve


def tune_cost(engine: Engine, speculator: Speculator, key: str) -> None:
    """What a step costs by its rows, for speculation; kept ones if real steps do not contradict."""
    longest = min(engine.limits.max_model_len, engine.limits.max_pool_tokens)
    max_rows = min(engine.config.max_draft_rows, engine.limits.max_pool_tokens)
    speculator.cost = tuned(key, engine.runner.run_verify_probe, max_rows, longest)
    engine.on_close.append(lambda: review(key, speculator.cost))


def _curve_key(decoder: Decoder, config: EngineConfig) -> str:
    """What step times depend on. Not the folder: a model that is trained on costs the same."""
    facts = (
        __version__,
        fingerprint().line(),
        hashlib.blake2b(repr(decoder.config).encode(), digest_size=8).hexdigest(),
        str(decoder.dtype),
        describe_weights(decoder),
        f"activations={config.activations}",
        config.device,
        f"{torch.get_num_threads()} threads",
        load_kernels().level,
        f"capture={config.capture}",
        f"kv={config.kv_cache_dtype}",
    )
    return " | ".join(facts)
