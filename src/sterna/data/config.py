"""Settings of training data. Field descriptions are the help text and the docs table."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["auto", "jsonl", "json", "text", "parquet", "arrow", "shards"]
Format = Literal[
    "auto",
    "chat",
    "prompt_completion",
    "alpaca",
    "sharegpt",
    "text",
    "preference",
    "kto",
    "prompts",
]
# What a row becomes: text to predict, two answers side by side, or one with its label.
Rows = Literal["text", "pairs", "labelled"]
# The canonical names that `fields` maps to, by format.
FIELDS: dict[str, tuple[str, ...]] = {
    "chat": ("messages", "tools", "chat_template_kwargs"),
    "prompt_completion": ("prompt", "completion", "system"),
    "alpaca": ("instruction", "input", "output", "system"),
    "sharegpt": ("conversations", "system", "tools"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected", "margin", "system", "tools"),
    "kto": ("prompt", "completion", "label", "system", "tools"),
    "prompts": ("prompt", "system", "tools"),
}


class SourceConfig(BaseModel):
    """One source of rows: files of one kind and format."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        min_length=1, description="a file, a glob pattern, or a folder (a saved HF dataset, "
        "Parquet files, token shards, text files)",
    )  # fmt: skip
    kind: Kind = Field("auto", description="of the files; auto = by name and first bytes")
    format: Format = Field("auto", description="of the rows; auto = by the first rows' keys")
    fields: dict[str, str] = Field(
        default_factory=dict,
        description='our field = path in the row, such as {prompt = "question"} or '
        '{output = "instances.0.output"}',
    )
    split: str = Field("train", description="of a dataset folder that has several")
    documents: Literal["file", "line", "blank_line"] = Field(
        "file", description="what is one document of a plain text file"
    )
    system: str = Field("", description="system prompt for conversations that bring none")
    render: Literal["auto", "chat", "plain"] = Field(
        "auto",
        description="prompts with completions: through the chat template, or as plain text; "
        "auto = chat where the model has a template",
    )
    weight: float | None = Field(
        None, gt=0, description="share of the documents drawn; unset = its number of rows"
    )
    epochs: int = Field(
        1, ge=0, description="passes over the source; 0 = as long as the other sources last"
    )

    @model_validator(mode="after")
    def _known_fields(self) -> SourceConfig:
        allowed = FIELDS.get(self.format) or tuple(n for names in FIELDS.values() for n in names)
        for name in self.fields:
            if name not in allowed:
                known = ", ".join(dict.fromkeys(allowed))
                raise ValueError(f"unknown field {name!r} of format {self.format} (known: {known})")
        return self


class DataConfig(BaseModel):
    """What is trained on, in which order, and how it becomes rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="see [[data.sources]]")
    seq_len: int = Field(2048, ge=2, description="most tokens of a packed row")
    packing: Literal["best_fit", "greedy", "none"] = Field(
        "best_fit", description="best_fit fills rows best; greedy keeps the order; none = a "
        "row a document",
    )  # fmt: skip
    window_tokens: int = Field(
        1 << 19, ge=1, description="tokens packed at a time (at least 16 rows are)"
    )
    too_long: Literal["truncate", "drop", "split", "fail"] = Field(
        "truncate", description="documents over seq_len tokens"
    )
    train_on: Literal["completions", "all", "last"] = Field(
        "completions", description="assistant turns and completions, everything, or the last turn"
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail", description="malformed rows: stop, or count, name and skip them"
    )
    shuffle: Literal["full", "buffer", "none"] = Field(
        "full", description="a permutation of all rows, or within a buffer (sequential reading)"
    )
    shuffle_buffer: int = Field(10_000, ge=1, description="rows of the shuffle buffer")
    temperature: float = Field(
        1.0, gt=0, description="of the weights: w^(1/t); 1 = as given, large = all sources alike"
    )
    seed: int = Field(0, ge=0, description="of the order and of the mix")
    held_out: float = Field(
        0.0, ge=0, lt=1, description="share of every source's rows kept out of training for eval"
    )
    document_end: str = Field(
        "auto", description="token after a plain text: auto = the tokenizer's EOS, '' = none"
    )
    template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="variables of the chat template"
    )
    rows: Rows = Field(
        "text", description="what a row becomes; set by the kind of training. text takes the "
        "chosen answer of a preference, and desirable ones of a label",
    )  # fmt: skip
    split: tuple[float, ...] = Field(
        (), description="shares of the parts that the examples are divided into, such as "
        "[2, 4, 4]; equal prompts stay in one part. Empty = no parts",
    )  # fmt: skip
    split_part: int = Field(0, ge=0, description="which part of the split is read, from 0")
    prefetch: int = Field(
        2, ge=0, description="threads that tokenise ahead; 0 = none. The data are the same"
    )

    @model_validator(mode="after")
    def _fits(self) -> DataConfig:
        if self.rows != "text" and self.train_on == "all":
            raise ValueError(
                'answers are compared without their prompts; leave out train_on = "all"'
            )
        if self.rows != "text" and self.too_long == "split":
            raise ValueError("an answer is not compared in pieces; use too_long = truncate or drop")
        if any(share <= 0 for share in self.split):
            raise ValueError(f"split = {list(self.split)}: every share has to be above 0")
        if self.split_part and self.split_part >= len(self.split):
            raise ValueError(
                f"split_part = {self.split_part}, but split has {len(self.split)} parts (from 0)"
            )
        return self
