"""Settings of `sterna bench serve`: the option names of `vllm bench serve`, and a few of our own.

Field descriptions are the help text. Ours: trace replay, sweeps, FastGen's effective throughput.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, model_validator

Dataset = Literal[
    "random", "prefix_repetition", "custom", "sharegpt", "sonnet", "mt_bench", "trace",
    "timed_trace",
]  # fmt: skip
# Read from dataset_path; the last two are names of one thing, the second is vLLM's.
FILE_DATASETS = ("custom", "sharegpt", "sonnet", "mt_bench", "timed_trace")
# `--goodput ttft:100 tpot:50`, as in `vllm bench serve`; repeating the option works too.
Several = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]
METRICS = ("ttft", "tpot", "itl", "e2el")


class TargetOptions(BaseModel):
    """Which endpoint is asked, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["openai", "openai-chat", "vllm", "sterna"] = Field(
        default="openai", description="openai-chat asks /v1/chat/completions, the rest completions"
    )
    base_url: str = Field(default="", description="server; empty = http://HOST:PORT")
    host: str = Field(default="127.0.0.1", description="server's host")
    port: int = Field(default=8000, gt=0, le=65535, description="server's port")
    endpoint: str = Field(default="", description="path of the route; empty = by backend")
    api_key: str = Field(default="", repr=False, description="bearer token")
    header: Several = Field(default=(), description="extra headers, NAME=VALUE")
    model: str = Field(default="", description="model name in requests; empty = the server's first")
    tokenizer: str = Field(
        default="", description="folder or GGUF for exact prompt lengths; empty = default model's"
    )
    ready_check_timeout_sec: float = Field(
        default=60.0, ge=0, description="wait so long for the server to answer"
    )
    timeout_s: float = Field(default=600.0, gt=0, description="a request fails after so long")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.headers()
        return self

    def headers(self) -> dict[str, str]:
        """The headers of every request. ValueError for one that is no NAME=VALUE."""
        bearer = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {**_pairs("header", self.header), **bearer}


class LoadOptions(BaseModel):
    """Which requests are sent, and when."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset_name: Dataset = Field(default="random", description="where prompts come from")
    dataset_path: Path | None = Field(
        default=None, description=f"file of {', '.join(FILE_DATASETS)}"
    )
    trace: Path | None = Field(
        default=None, description="replay this Azure CSV or Mooncake JSONL (implies dataset trace)"
    )
    scale_len: float = Field(default=1.0, gt=0, description="factor for a trace's token counts")
    scale_rate: float = Field(default=1.0, gt=0, description="factor for a trace's arrival rate")
    max_len: int = Field(default=4096, gt=1, description="cap of prompt + output tokens")
    num_prompts: int = Field(default=100, gt=0, description="requests to send")
    input_len: Annotated[int, Parameter(alias="--random-input-len")] = Field(
        default=256, gt=0, description="prompt tokens of random and sonnet"
    )
    output_len: Annotated[int | None, Parameter(alias="--random-output-len")] = Field(
        default=None, gt=0, description="completion tokens; empty = the dataset's, else 64"
    )
    random_range_ratio: float = Field(
        default=0.0, ge=0, lt=1, description="random lengths vary by +- this share"
    )
    random_prefix_len: int = Field(default=0, ge=0, description="tokens that all prompts share")
    prefix_repetition_prefix_len: int = Field(default=256, gt=0, description="tokens of a prefix")
    prefix_repetition_suffix_len: int = Field(default=256, gt=0, description="tokens after it")
    prefix_repetition_num_prefixes: int = Field(
        default=10, gt=0, description="different prefixes, used in turn"
    )
    request_rate: float = Field(default=math.inf, gt=0, description="requests/s; inf = all at once")
    burstiness: float = Field(
        default=1.0, gt=0, description="gamma shape of the gaps: 1 = Poisson, less = burstier"
    )
    max_concurrency: int | None = Field(default=None, gt=0, description="closed loop of so many")
    self_timed: bool = Field(
        default=True, description="a trace's own arrival times, unless a request rate is set"
    )
    ramp_up_strategy: Literal["linear", "exponential"] | None = Field(
        default=None, description="grow the rate from start to end over the run"
    )
    ramp_up_start_rps: float | None = Field(default=None, gt=0, description="first rate")
    ramp_up_end_rps: float | None = Field(default=None, gt=0, description="last rate")
    probe_request_rate: float = Field(
        default=0.0, ge=0, description="one-token probes/s beside the load, measured apart"
    )
    num_warmups: int = Field(default=1, ge=0, description="requests sent before, not counted")
    ignore_eos: bool = Field(default=False, description="always generate output_len tokens")
    temperature: float = Field(default=0.0, ge=0, description="0 = greedy")
    seed: int = Field(default=0, description="the same seed sends the same load")

    @model_validator(mode="after")
    def _check(self) -> Self:
        is_ramped = (self.ramp_up_start_rps is not None, self.ramp_up_end_rps is not None)
        if self.ramp_up_strategy is not None and not all(is_ramped):
            raise ValueError("ramp_up_strategy needs ramp_up_start_rps and ramp_up_end_rps")
        if self.ramp_up_strategy is None and any(is_ramped):
            raise ValueError("ramp_up_*_rps have no effect without ramp_up_strategy")
        if self.dataset_name in FILE_DATASETS and self.dataset_path is None:
            raise ValueError(f"dataset {self.dataset_name} needs dataset_path")
        if self.dataset_name == "trace" and self.trace is None:
            raise ValueError("dataset trace needs trace")
        return self

    @property
    def trace_path(self) -> Path | None:
        """The trace to replay, under either of its two names."""
        return self.dataset_path if self.dataset_name == "timed_trace" else self.trace

    def without_effect(self) -> Iterator[str]:
        """Options that were set but change nothing in this load, each with its reason."""
        is_trace = self.trace_path is not None
        is_paced = not math.isinf(self.request_rate) or self.ramp_up_strategy is not None
        kind = "trace" if is_trace else self.dataset_name
        owners = {
            "random": ("input_len", "random_range_ratio", "random_prefix_len"),
            "sonnet": ("input_len",),
            "prefix_repetition": (
                "prefix_repetition_prefix_len",
                "prefix_repetition_suffix_len",
                "prefix_repetition_num_prefixes",
            ),
            "trace": ("scale_len", "scale_rate", "max_len", "self_timed"),
        }
        known = {name for names in owners.values() for name in names}
        for name in sorted(self.model_fields_set & known - set(owners.get(kind, ()))):
            yield f"{name} has no effect on dataset {kind}"
        if self.dataset_path is not None and self.dataset_name not in FILE_DATASETS:
            yield f"dataset_path has no effect on dataset {self.dataset_name}"
        if self.trace is not None and self.dataset_name not in ("random", "trace"):
            yield f"dataset_name {self.dataset_name} has no effect beside a trace"
        if "burstiness" in self.model_fields_set and not is_paced:
            yield "burstiness has no effect without a request rate"


class ReportOptions(BaseModel):
    """What is computed, printed and kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    percentile_metrics: str = Field(
        default="ttft,tpot,itl,e2el", description="metrics to print percentiles of"
    )
    metric_percentiles: str = Field(default="99", description="percentiles, comma-separated")
    goodput: Several = Field(
        default=(), description="service levels in ms, KEY:VALUE with KEY ttft, tpot, e2el"
    )
    sla: str = Field(
        default="2,4,6", description="effective throughput: tokens/s each stream must keep"
    )
    ttft_scale: float = Field(
        default=1.0, gt=0, description="effective throughput: TTFT <= prompt/512 s times this"
    )
    sweep: str = Field(default="", description="several runs: concurrency=1,2,4,8 or rate=0.5,1,2")
    plot: Path | None = Field(default=None, description="latency-throughput curve, a PNG")
    save_result: bool = Field(default=False, description="write a JSON file")
    save_detailed: bool = Field(default=False, description="with lengths and times per request")
    append_result: bool = Field(default=False, description="add a line to an existing file")
    result_dir: Path = Field(default=Path(), description="folder of the JSON file")
    result_filename: str = Field(default="", description="its name; empty = by label and date")
    label: str = Field(default="", description="name of the run; empty = the backend")
    metadata: Several = Field(default=(), description="KEY=VALUE kept in the JSON")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.percentiles()
        self.slas()
        self.service_levels()
        self.sweep_points()
        self.notes()
        if bad := [name for name in self.metrics() if name not in METRICS]:
            raise ValueError(f"unknown metric {bad[0]!r}; known: {', '.join(METRICS)}")
        return self

    def metrics(self) -> tuple[str, ...]:
        """The metrics whose percentiles are wanted."""
        return tuple(name.strip() for name in self.percentile_metrics.split(",") if name.strip())

    def percentiles(self) -> tuple[float, ...]:
        """The wanted percentiles. ValueError for one outside 0..100."""
        found = _numbers("metric_percentiles", self.metric_percentiles)
        if bad := [value for value in found if not 0 <= value <= 100]:
            raise ValueError(f"percentile {bad[0]:g} is not in 0 to 100")
        return found

    def slas(self) -> tuple[float, ...]:
        """Tokens/s of the effective-throughput levels. ValueError unless above 0."""
        return _positive("sla", self.sla)

    def notes(self) -> dict[str, str]:
        """--metadata as a dict. ValueError for an entry that is no KEY=VALUE."""
        return _pairs("metadata", self.metadata)

    def service_levels(self) -> dict[str, float]:
        """{metric: limit in ms} of --goodput. ValueError for an unknown metric or no number."""
        levels: dict[str, float] = {}
        for entry in self.goodput:
            name, _, limit = entry.partition(":")
            if name not in ("ttft", "tpot", "e2el"):
                raise ValueError(f"goodput {entry!r}: KEY must be ttft, tpot or e2el")
            levels[name] = _limit(entry, limit)
        return levels

    def sweep_points(self) -> tuple[str, tuple[float, ...]]:
        """("concurrency" | "rate" | "", values). ValueError for another word."""
        kind, _, values = self.sweep.partition("=")
        if kind not in ("", "concurrency", "rate"):
            raise ValueError(f"sweep {self.sweep!r}: write concurrency=1,2,4 or rate=0.5,1")
        if kind and not values.strip():
            raise ValueError(f"sweep {self.sweep!r} has no values: write {kind}=1,2,4")
        return kind, _positive("sweep", values)


def _numbers(what: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{what} is {text!r}; write numbers separated by commas") from None


def _positive(what: str, text: str) -> tuple[float, ...]:
    found = _numbers(what, text)
    if bad := [value for value in found if not value > 0]:
        raise ValueError(f"{what} has {bad[0]:g}; give numbers above 0")
    return found


def _limit(entry: str, text: str) -> float:
    found = _positive(f"goodput {entry!r}", text)
    if len(found) != 1:
        raise ValueError(f"goodput {entry!r}: write KEY:MILLISECONDS")
    return found[0]


def _pairs(what: str, entries: tuple[str, ...]) -> dict[str, str]:
    if bad := [entry for entry in entries if "=" not in entry]:
        raise ValueError(f"{what} {bad[0]!r} is no NAME=VALUE")
    return dict(entry.split("=", 1) for entry in entries)
