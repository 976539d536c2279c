"""The settings of distillation. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DistillSection(BaseModel):
    """What is made of the model: a SwiftKV student, or a speculator beside it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["swiftkv", "mlp_speculator", "lstm_speculator"] = Field(
        "swiftkv", description="swiftkv (arXiv 2410.03960), or heads that draft tokens"
    )
    layers: int = Field(
        0, ge=0, description="swiftkv: first layers that every token runs; 0 = half of them"
    )
    group_size: int = Field(
        1, ge=1, description="swiftkv: later layers that share keys and values (AcrossKV)"
    )
    fit_tokens: int = Field(
        16_384, ge=0, description="swiftkv: training tokens on which keys and values are fitted to "
        "the original's by least squares before the first step; 0 = start as its rows",
    )  # fmt: skip
    temperature: float = Field(2.0, gt=0, description="swiftkv: of the KL between the two")
    hidden_weight: float = Field(
        1.0,
        ge=0,
        description="swiftkv: weight of the late hidden states' relative difference",
    )
    drafts: int = Field(3, ge=1, le=16, description="speculator: tokens drafted at a time")
    inner_size: int = Field(
        0, ge=0, description="speculator: size of its state; 0 = the model's hidden size"
    )
    shares_base: bool = Field(
        True, description="speculator: use the model's embedding and head, not own ones"
    )
    draft_vocab: int = Field(
        0, ge=0, description="speculator: draft only the most frequent tokens of the training "
        "data, this many; 0 = all",
    )  # fmt: skip
    scales_input: bool = Field(
        True, description="speculator: bring the model's hidden states to one length"
    )
    generate: int = Field(
        0, ge=0, description="speculator: train on this many texts that the model itself "
        "continues first; 0 = on the data as they are",
    )  # fmt: skip
    prompt_tokens: int = Field(
        64, ge=1, description="speculator: tokens of the data that each of these texts begins with"
    )
    new_tokens: int = Field(192, ge=1, description="speculator: tokens generated for each")
    generate_temperature: float = Field(
        1.0, ge=0, description="speculator: of the generated training text; held-out text is greedy"
    )
