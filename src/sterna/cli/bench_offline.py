"""The in-process benchmarks: requests straight into the engine, no server and no text."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from sterna.core.machine import fingerprint
from sterna.engine.config import EngineConfig
from sterna.engine.request import EngineRequest, SamplingParams

# Ids below this are special tokens in the vocabularies in use.
_FIRST_PLAIN_ID = 300


@dataclass(frozen=True, slots=True)
class OfflineRun:
    """Seconds and token counts of one batch. `decode_s` runs from the last first token on."""

    num_sequences: int
    input_len: int
    output_len: int
    first_token_s: float  # when the last sequence had its first token
    total_s: float
    decode_tokens: int  # tokens generated after `first_token_s`

    @property
    def decode_rate(self) -> float:
        """Tokens/s after every sequence has its first token; 0 with one token each."""
        decode_s = self.total_s - self.first_token_s
        return self.decode_tokens / decode_s if self.decode_tokens else 0.0

    @property
    def output_rate(self) -> float:
        """Generated tokens/s end to end, prefill included."""
        return self.num_sequences * self.output_len / self.total_s

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens/s until the last first token."""
        return self.num_sequences * self.input_len / self.first_token_s


class OfflineBench:
    """A loaded engine and a source of random prompts. `clock` tells seconds."""

    def __init__(
        self, model: str, config: EngineConfig, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        from sterna.engine.build import build_engine

        self._engine = build_engine(model, config)
        self._random = random.Random(0)
        self._num_requests = 0
        self._clock = clock

    def run(self, num_sequences: int, input_len: int, output_len: int) -> OfflineRun:
        """Run one batch of random prompts to its end, greedy, never stopping early."""
        requests = [self._request(input_len, output_len) for _ in range(num_sequences)]
        waiting = {request.request_id for request in requests}
        started = self._clock()
        for request in requests:
            self._engine.add(request)
        first_token_at = started
        decode_tokens = 0
        while self._engine.has_work:
            is_prefilling = bool(waiting)
            for output in self._engine.step():
                gained = sum(len(delta.token_ids) for delta in output.deltas)
                if not is_prefilling:
                    decode_tokens += gained
                elif gained:
                    waiting.discard(output.request_id)
            if is_prefilling:
                first_token_at = self._clock()
        ended = self._clock()
        return OfflineRun(
            num_sequences,
            input_len,
            output_len,
            first_token_at - started,
            ended - started,
            decode_tokens,
        )

    def _request(self, input_len: int, output_len: int) -> EngineRequest:
        self._num_requests += 1
        # Random ids: no two prompts share a prefix block, so no cache hit flatters the figure.
        ids = self._random.choices(range(_FIRST_PLAIN_ID, 16_000), k=input_len)
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        request_id = f"bench-{self._num_requests}"
        return EngineRequest(request_id=request_id, prompt_token_ids=tuple(ids), params=params)


def print_latency(runs: Sequence[OfflineRun], as_json: bool) -> None:
    """Medians over the runs."""
    first = runs[0]
    figures: dict[str, Any] = {
        "batch_size": first.num_sequences,
        "input_len": first.input_len,
        "output_len": first.output_len,
        "median_ttft_ms": median(run.first_token_s for run in runs) * 1000,
        "median_latency_s": median(run.total_s for run in runs),
        "decode_tokens_per_s": median(run.decode_rate for run in runs),
        "prefill_tokens_per_s": median(run.prefill_rate for run in runs),
        "runs": [asdict(run) for run in runs],
    }
    _print(figures, as_json)


def print_throughput(run: OfflineRun, as_json: bool) -> None:
    """The figures of the one run."""
    figures: dict[str, Any] = {
        "num_prompts": run.num_sequences,
        "elapsed_s": run.total_s,
        "requests_per_s": run.num_sequences / run.total_s,
        "output_tokens_per_s": run.output_rate,
        "total_tokens_per_s": run.num_sequences * (run.input_len + run.output_len) / run.total_s,
    }
    _print(figures, as_json)


def _print(figures: dict[str, Any], as_json: bool) -> None:
    machine = fingerprint()
    if as_json:
        print(json.dumps({**figures, "machine": machine.as_dict()}))
        return
    print(f"machine: {machine.line()}")
    for name, value in figures.items():
        if isinstance(value, int | float):
            print(f"{name.replace('_', ' ') + ':':<28}{value:>12.2f}")
