"""An AsyncEngine without a model: says scripted words, so that the wire is tested alone."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace

from sterna.core.errors import SternaError
from sterna.engine.config import EngineConfig
from sterna.engine.drafters.learner import LearnStats
from sterna.engine.request import (
    Delta,
    EngineRequest,
    FinishReason,
    RequestOutput,
    RequestTiming,
    StepStats,
    TokenLogprob,
)
from sterna.engine.validate import Limits, check_params, check_prompt

EOS = 256


class ByteTokenizer:
    """Token = byte; 256 ends."""

    vocab_size = 257
    eos_token_ids = (EOS,)
    bos_token_id = None
    special_ids = frozenset({EOS})
    special_tokens = MappingProxyType({})
    chat_template = None

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())

    def decode(self, ids, skip_special_tokens=True):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def token_bytes(self, token_id):
        return b"<eos>" if token_id == EOS else bytes([token_id])

    def token_text(self, token_id):
        return self.token_bytes(token_id).decode("utf-8", "replace")


def default_script(request: EngineRequest) -> list[str | SternaError]:
    count = request.params.max_tokens
    words = ["Hello", " w\u00f6rld", ",", " how", " are", " you", "?"]
    return words if count is None else [words[i % 7] for i in range(count)]


@dataclass
class FakeAsyncEngine:
    """Each entry of the script is one step's text, or the error that ends the request."""

    script: Callable[[EngineRequest], list[str | SternaError]] = default_script
    step_s: float = 0.0
    max_model_len: int = 4096
    admission_error: SternaError | None = None
    health_error: SternaError | None = None
    requests: list[EngineRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    is_started: bool = False
    is_shut_down: bool = False
    steps: list[StepStats] = field(default_factory=list)
    learn_stats: LearnStats | None = None

    def __post_init__(self):
        self.limits = Limits(ByteTokenizer.vocab_size, self.max_model_len, 8192)
        self.tokenizer = ByteTokenizer()
        self.engine = SimpleNamespace(
            tokenizer=self.tokenizer,
            adapters=None,
            config=EngineConfig(token_budget=64, num_kv_blocks=512),
            limits=self.limits,
            scheduler=SimpleNamespace(token_budget=64),
            pool=SimpleNamespace(num_usable=511),
            prompt_layers="all 1",
            drafter_names=[],
        )

    async def start(self):
        self.is_started = True

    async def shutdown(self):
        self.is_shut_down = True

    async def drain(self, timeout_s):
        return True

    def health(self):
        if self.health_error:
            raise self.health_error

    def load(self):
        return SimpleNamespace(num_running=len(self.running), num_waiting=0, kv_usage=0.0)

    def learning(self):
        return self.learn_stats

    async def subscribe(self):
        for step in self.steps:
            yield step
        await asyncio.Event().wait()

    def abort(self, request_id):
        if request_id in self.running:
            self.aborted.append(request_id)
            self.running.discard(request_id)

    def check_room(self):
        """Room for any request at all."""

    def check_admission(self, request):
        check_params(request.params, self.limits.vocab_size)
        check_prompt(request, self.limits)
        if self.admission_error:
            raise self.admission_error

    async def generate(self, request: EngineRequest) -> AsyncIterator[RequestOutput]:
        self.check_admission(request)
        self.requests.append(request)
        self.running.add(request.request_id)
        arrival = time.monotonic()
        i = -1
        for i, text in enumerate(self.script(request)):
            await asyncio.sleep(self.step_s)
            if request.request_id not in self.running:
                yield self._output(request, arrival, i, "", FinishReason.ABORT)
                return
            if isinstance(text, SternaError):
                self.running.discard(request.request_id)
                yield self._output(request, arrival, i, "", FinishReason.ERROR, text)
                return
            yield self._output(request, arrival, i, text)
        self.running.discard(request.request_id)
        limit = request.params.max_tokens is not None
        yield self._output(
            request, arrival, i + 1, "", FinishReason.LENGTH if limit else FinishReason.STOP
        )

    def _output(self, request, arrival, i, text, finish=None, error=None):
        params = request.params
        ids = tuple(text.encode())
        logprobs = None
        if params.logprobs is not None:
            logprobs = tuple(_logprob(token, params.logprobs) for token in ids)
        deltas = tuple(
            Delta(
                index=index,
                token_ids=ids,
                text=text,
                logprobs=logprobs,
                finish_reason=finish,
                error=error,
            )
            for index in range(params.n)
        )
        now = time.monotonic()
        prompt_logprobs = None
        if i == 0 and params.prompt_logprobs is not None:
            rest = request.prompt_token_ids[1:]
            prompt_logprobs = (None, *(_logprob(t, params.prompt_logprobs) for t in rest))
        return RequestOutput(
            request_id=request.request_id,
            deltas=deltas,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=2,
            timing=RequestTiming(
                arrival=arrival,
                scheduled=arrival,
                first_token=now,
                finished=now if finish else None,
            ),
            is_finished=finish is not None,
            prompt_logprobs=prompt_logprobs,
        )


def _logprob(token, num_top):
    top = tuple((i, math.log(0.5) - i) for i in range(num_top))
    return TokenLogprob(token_id=token, logprob=math.log(0.5), rank=1, top=top)
