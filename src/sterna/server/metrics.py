"""Prometheus metrics under the names that vLLM's dashboards know, in a registry of this app.

The prefix is `sterna:` or, in alias mode, `vllm:`. Every name carries the label `model_name`.
Observations happen once a request or once an output, about 2 us each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sterna.engine.drafters.learner import LearnStats
from sterna.engine.request import (
    DraftResult,
    EngineRequest,
    FinishReason,
    RequestOutput,
    StepStats,
)

# A speculator that learns while serving, as gauges.
LEARNING = {
    "num_rows": "Rows of served text kept to learn from.",
    "num_rounds": "Comparisons of a trained copy with the head in use.",
    "num_swaps": "Copies that were right more often and are used.",
    "num_rollbacks": "Copies that were thrown away.",
    "served_accepted": "Accepted drafts a proposal of the head in use, on rows kept aside.",
    "learned_accepted": "The same of the copy that was compared with it.",
}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds. Steps of a small model last 2 ms, a request behind a long queue minutes.
_FINE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
_COARSE = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)


class ServerMetrics:
    """All metrics of one app; `render` is the body of GET /metrics."""

    def __init__(self, prefix: str, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._prefix = prefix
        self._model_name = model_name
        self._gauges()
        self._counters()
        self._histograms()

    def _gauges(self) -> None:
        self.running = self._gauge("num_requests_running", "Requests in the running batch.")
        self.waiting = self._gauge("num_requests_waiting", "Requests in the queue.")
        self.kv_usage = self._gauge("kv_cache_usage_perc", "Share of KV blocks held, 0 to 1.")
        self._learning: dict[str, Gauge] = {}
        self._adapters: Gauge | None = None

    def _counters(self) -> None:
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found cached.")
        self.preemptions = self._counter("num_preemptions", "Sequences preempted.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests.")
        self.generation_tokens = self._counter("generation_tokens", "Completion tokens.")
        self._drafts = self._by_source("spec_decode_num_drafts", "Drafts verified.")
        self._draft_tokens = self._by_source("spec_decode_num_draft_tokens", "Tokens in drafts.")
        self._accepted = self._by_source(
            "spec_decode_num_accepted_tokens", "Tokens of drafts that were right."
        )
        self._accepted_at = self._by_source(
            "spec_decode_num_accepted_tokens_per_pos",
            "By place in the draft.",
            "position",
        )
        self._success = Counter(
            f"{self._prefix}:request_success",
            "Finished requests.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._refused = Counter(
            f"{self._prefix}:request_refused",
            "Requests answered by an error, by its code.",
            ("model_name", "code"),
            registry=self.registry,
        )

    def _histograms(self) -> None:
        make = self._histogram
        self.iteration_tokens = make("iteration_tokens_total", "Tokens in one step.", _TOKENS)
        self.step_time = make("step_duration_seconds", "Duration of one step.", _FINE)
        self.req_prompt = make("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.req_generation = make("request_generation_tokens", "Its completion tokens.", _TOKENS)
        self.req_longest = make(
            "request_max_num_generation_tokens", "Of its longest sample.", _TOKENS
        )
        self.req_max_tokens = make("request_params_max_tokens", "Its max_tokens.", _TOKENS)
        self.req_n = make("request_params_n", "Its n.", (1, 2, 5, 10, 20, 50, 128))
        self.ttft = make("time_to_first_token_seconds", "Arrival to first token.", _COARSE)
        self.itl = make("inter_token_latency_seconds", "Gap between outputs.", _FINE)
        self.tpot = make("request_time_per_output_token_seconds", "Mean gap.", _FINE)
        self.e2e = make("e2e_request_latency_seconds", "Arrival to end.", _COARSE)
        self.queue_time = make("request_queue_time_seconds", "Arrival to schedule.", _COARSE)
        self.inference_time = make("request_inference_time_seconds", "Schedule to end.", _COARSE)
        self.prefill_time = make("request_prefill_time_seconds", "Schedule to token.", _COARSE)
        self.decode_time = make("request_decode_time_seconds", "First token to end.", _COARSE)

    def describe_cache(self, **facts: object) -> None:
        """The constant facts of the KV cache, as labels of `cache_config_info`."""
        labels = {name: str(value) for name, value in facts.items()}
        Gauge(
            f"{self._prefix}:cache_config_info",
            "The KV cache's settings.",
            (*labels, "model_name"),
            registry=self.registry,
        ).labels(**labels, model_name=self._model_name).set(1)

    def note_adapters(self, places: int, running: str, waiting: str) -> None:
        """vLLM's `lora_requests_info`: names in labels, the time of the reading as value."""
        if self._adapters is None:
            self._adapters = Gauge(
                f"{self._prefix}:lora_requests_info",
                "Adapters of requests: places, running and waiting names.",
                ("model_name", "max_lora", "running_lora_adapters", "waiting_lora_adapters"),
                registry=self.registry,
            )
        self._adapters.clear()
        labels = (self._model_name, str(places), running, waiting)
        self._adapters.labels(*labels).set(time.time())

    def succeeded(self, reason: str) -> None:
        """Count one finished sequence."""
        self._success.labels(self._model_name, reason).inc()

    def refused(self, code: str) -> None:
        """Count one request that was answered by an error."""
        self._refused.labels(self._model_name, code).inc()

    def note_step(self, step: StepStats) -> None:
        """Add one engine step."""
        num_tokens = step.num_decode_tokens + step.num_prompt_tokens + step.num_draft_tokens
        self.iteration_tokens.observe(num_tokens)
        self.step_time.observe(step.duration)
        self.preemptions.inc(step.num_preempted)
        for draft in step.drafts:
            self._note_draft(draft)

    def note_learning(self, stats: LearnStats) -> None:
        """Set the gauges of a speculator that learns while serving; made at the first call."""
        for name, value in asdict(stats).items():
            if name not in self._learning:
                self._learning[name] = self._gauge(f"speculator_{name}", LEARNING[name])
            self._learning[name].set(value)

    def _note_draft(self, draft: DraftResult) -> None:
        name, source = self._model_name, draft.source
        self._drafts.labels(name, source).inc()
        self._draft_tokens.labels(name, source).inc(draft.num_tokens)
        self._accepted.labels(name, source).inc(draft.num_accepted)
        for position in range(draft.num_accepted):
            self._accepted_at.labels(name, source, str(position)).inc()

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        full = f"{self._prefix}:{name}"
        return Gauge(full, text, ("model_name",), registry=self.registry).labels(self._model_name)

    def _counter(self, name: str, text: str) -> Counter:
        full = f"{self._prefix}:{name}"
        return Counter(full, text, ("model_name",), registry=self.registry).labels(self._model_name)

    def _by_source(self, name: str, text: str, *labels: str) -> Counter:
        full = f"{self._prefix}:{name}"
        return Counter(full, text, ("model_name", "source", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        full = f"{self._prefix}:{name}"
        family = Histogram(
            full, text, ("model_name",), registry=self.registry, buckets=tuple(buckets)
        )
        return family.labels(self._model_name)


class RequestMeter:
    """Measures one engine request from its outputs; `finish` is called exactly once."""

    __slots__ = (
        "_last_output", "_metrics", "_request", "_sample_tokens", "completion_tokens", "itls",
        "last", "ttft",
    )  # fmt: skip

    def __init__(self, metrics: ServerMetrics, request: EngineRequest) -> None:
        self._metrics = metrics
        self._request = request
        self._last_output: float | None = None
        self.completion_tokens = 0
        self._sample_tokens = [0] * request.params.n
        self.ttft: float | None = None
        self.itls: list[float] = []
        self.last: RequestOutput | None = None

    def note(self, output: RequestOutput) -> None:
        """Account for one output."""
        self.last = output
        num_tokens = 0
        for delta in output.deltas:
            self._sample_tokens[delta.index] += len(delta.token_ids)
            num_tokens += len(delta.token_ids)
        if num_tokens:
            self.completion_tokens += num_tokens
            self._metrics.generation_tokens.inc(num_tokens)
            self._note_gap(output)
        for delta in output.deltas:
            if delta.finish_reason is not None:
                self._metrics.succeeded(delta.finish_reason.value)

    def _note_gap(self, output: RequestOutput) -> None:
        now = time.monotonic()
        if self._last_output is None:
            self.ttft = (output.timing.first_token or now) - output.timing.arrival
            self._metrics.ttft.observe(self.ttft)
        else:
            self.itls.append(now - self._last_output)
            self._metrics.itl.observe(now - self._last_output)
        self._last_output = now

    def finish(self) -> None:
        """Account for the whole request, also when it was cut short."""
        if self.last is None:
            return
        self._note_sizes(self.last)
        self._note_times(self.last)

    def _note_sizes(self, output: RequestOutput) -> None:
        metrics, params = self._metrics, self._request.params
        metrics.prompt_tokens.inc(output.num_prompt_tokens)
        metrics.prefix_queries.inc(output.num_prompt_tokens)
        metrics.prefix_hits.inc(output.num_cached_tokens)
        metrics.req_prompt.observe(output.num_prompt_tokens)
        metrics.req_generation.observe(self.completion_tokens)
        metrics.req_longest.observe(max(self._sample_tokens))
        metrics.req_n.observe(params.n)
        if params.max_tokens is not None:
            metrics.req_max_tokens.observe(params.max_tokens)

    def _note_times(self, output: RequestOutput) -> None:
        metrics, timing = self._metrics, output.timing
        end = timing.finished or time.monotonic()
        metrics.e2e.observe(end - timing.arrival)
        if timing.scheduled is None:
            return
        metrics.queue_time.observe(timing.scheduled - timing.arrival)
        metrics.inference_time.observe(end - timing.scheduled)
        if timing.first_token is not None:
            metrics.prefill_time.observe(timing.first_token - timing.scheduled)
            metrics.decode_time.observe(end - timing.first_token)
            if self.completion_tokens > 1:
                metrics.tpot.observe((end - timing.first_token) / (self.completion_tokens - 1))

    @property
    def is_complete(self) -> bool:
        """True when the engine has said its last word on this request."""
        return self.last is not None and self.last.is_finished

    @property
    def reasons(self) -> list[FinishReason]:
        """The finish reasons in the last output."""
        deltas = () if self.last is None else self.last.deltas
        return [delta.finish_reason for delta in deltas if delta.finish_reason is not None]
