"""Engine settings. Field descriptions are the help text and the docs table."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EngineConfig(BaseModel):
    """How the engine schedules and how much memory it takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["auto", "generate", "embed"] = Field(
        "auto",
        description="generate text, or embed: read texts into vectors or scores; auto = by the "
        "model's files",
    )
    pooling: Literal["auto", "mean", "cls", "last"] = Field(
        "auto", description="of an embedding model; auto = as its files say"
    )
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights and activations; auto = bfloat16"
    )
    weights: str = Field(
        "auto",
        description="auto = as they are stored; bf16 = not quantised; or a format to round them to "
        "at load: fp6, fp6-g128, int4-g32, ... (`sterna quantize` does it once and better)",
    )
    activations: Literal["auto", "bf16", "int8"] = Field(
        "auto",
        description="inputs of the quantised weights; auto = as the model computes; int8 rounds "
        "each row (W6A8 with fp6): faster prompts, measurably other outputs",
    )
    threads: int = Field(0, ge=0, description="kernel threads; 0 = all usable CPUs")
    max_model_len: int | None = Field(
        None, gt=0, description="longest prompt + completion; None = the model's own limit"
    )
    block_size: int = Field(
        16, ge=16, multiple_of=16, description="tokens in a KV block; a multiple of 16"
    )
    kv_cache_bytes: int | None = Field(
        None, gt=0, description="KV cache size; None = a share of the free memory"
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "float32", "fp8", "int8"] = Field(
        "auto",
        description="KV cache; auto = as the model computes; fp8 and int8 hold twice the tokens",
    )
    num_kv_blocks: int | None = Field(None, gt=1, description="KV blocks; overrides kv_cache_bytes")
    max_num_seqs: int = Field(64, gt=0, description="sequences in one step")
    token_budget: int | None = Field(
        None, gt=0, description="tokens in one step; None = measured at start"
    )
    policy: Literal["splitfuse", "whole-prompt"] = Field(
        "splitfuse", description="splitfuse cuts and fuses prompts; whole-prompt runs them whole"
    )
    enable_prefix_cache: bool = Field(True, description="share KV blocks of equal prefixes")
    max_queued_requests: int = Field(256, gt=0, description="waiting requests before 429")
    max_queued_tokens: int = Field(
        262_144, gt=0, description="prompt tokens of waiting requests before 429"
    )
    stall_timeout_s: float = Field(
        30.0, gt=0, description="seconds without a finished step before /health turns red"
    )
    capture: bool = Field(True, description="replay recorded steps instead of re-interpreting")
    speculation: str = Field(
        "off",
        description="guess tokens ahead and verify them, output unchanged: off, auto (suffix, "
        "model with a draft_model, learned with a speculator), or a list of suffix, ngram, model, "
        "learned",
    )
    speculation_opt_in: bool = Field(
        False, description="only requests that ask for it (`speculation: true`) are guessed ahead"
    )
    draft_model: str | None = Field(
        None, description="small model of the same vocabulary that guesses for this one"
    )
    speculator: str | None = Field(
        None, description="folder of a head trained to guess for this model (docs/distillation.md)"
    )
    speculator_learns: bool = Field(
        False,
        description="while idle, train a copy of the speculator on what was served; it is used "
        "once it is right more often on rows kept aside",
    )
    speculator_rows: int = Field(
        8192, ge=1024, description="rows of served text kept in memory to learn from"
    )
    draft_cache_bytes: int = Field(
        256 << 20, ge=0, description="memory for past outputs that guesses come from; 0 = none"
    )
    draft_cache: str | None = Field(
        None,
        description="file that keeps past outputs over restarts, written when the engine closes "
        "(they hold users' text); None = nothing is kept",
    )
    num_draft_tokens: int = Field(32, gt=0, le=256, description="longest draft of a sequence")
    max_draft_rows: int = Field(
        128, gt=0, description="draft tokens in one step; each costs a row of logits in memory"
    )
    lora: tuple[str, ...] = Field(
        (), description="adapters to serve, name=folder each (PEFT's files); clients ask by name"
    )
    max_loras: int | None = Field(
        None, ge=0, description="places for adapters; None = those of `lora`, 0 = no adapters"
    )
    max_lora_rank: int | None = Field(
        None, gt=0, description="largest rank of an adapter; None = that of `lora`, at least 16"
    )
    seed: int = Field(0, description="seeds requests that bring none")
