"""The engine: requests in, tokens out. `step` is the whole story.

Failures stay with the request that caused them: see forward.py (steps that raise) and sampler.py
(NaN logits). Blocks of a failed request are wiped and never found in the prefix cache.

Not thread-safe: one thread calls add, abort and step (see aio.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait

import numpy as np

from sterna.core.errors import ConfigError, DeadlineError, RequestError
from sterna.engine.adapters import AdapterTable
from sterna.engine.admit import RequestFactory
from sterna.engine.budget import least_budget
from sterna.engine.commit import Committer
from sterna.engine.config import EngineConfig
from sterna.engine.drafters.base import Drafter
from sterna.engine.drafters.learner import Learner
from sterna.engine.forward import as_request_error, choose_isolated, run_isolated
from sterna.engine.kv import BlockPool
from sterna.engine.memory import EngineShape, engine_shape, kv_dtype
from sterna.engine.outputs import StepOutputs
from sterna.engine.request import EngineRequest, FinishReason, RequestOutput, StepStats
from sterna.engine.runner import InferenceModel, Logits, Runner
from sterna.engine.scheduler import Chunk, ScheduledStep, Scheduler
from sterna.engine.sequence import RequestState
from sterna.engine.speculate import Speculator
from sterna.engine.stats import SpeedMeter
from sterna.engine.structured import GrammarCompiler, check_spec
from sterna.engine.tables import BlockTables
from sterna.engine.validate import Limits
from sterna.engine.verify import Draw, is_tainted
from sterna.text.tokenizer import Tokenizer

# Used when nothing was measured or configured (tests, tools).
DEFAULT_BUDGET = 256
# Prompt tokens a second until something was measured.
START_SPEED = 1000.0
# Input buffers hold at least this many tokens, so that any budget can be measured and set later.
MIN_BUFFER_TOKENS = 1024
# How long a step with nothing to compute waits for a grammar to compile before it returns.
GRAMMAR_WAIT_S = 0.005


class Engine:
    """Schedules and computes requests on one model; see EngineConfig for the settings."""

    def __init__(
        self,
        decoder: InferenceModel,
        tokenizer: Tokenizer,
        config: EngineConfig,
        shape: EngineShape | None = None,
        grammars: GrammarCompiler | None = None,
        drafters: Sequence[Drafter] = (),
        adapters: AdapterTable | None = None,
    ) -> None:
        """`drafters` guess tokens (speculate.py); without any there is no speculation.

        `adapters`: what requests may name, on `decoder` (adapters.py).
        """
        shape = shape or engine_shape(decoder, config)
        budget = config.token_budget or DEFAULT_BUDGET
        pool = BlockPool(shape.num_kv_blocks, config.block_size)
        max_blocks = -(-shape.max_model_len // config.block_size)
        tables = BlockTables(pool, max_blocks, config.enable_prefix_cache)
        self.config = config
        self.tokenizer = tokenizer
        self.limits = Limits(
            shape.vocab_size,
            shape.max_model_len,
            pool.num_usable * config.block_size,
            decoder.skips_prompt_rows,
        )
        max_drafts = config.max_draft_rows if drafters else 0
        self.scheduler = Scheduler(tables, budget, config.max_num_seqs, config.policy, max_drafts)
        self.runner = Runner(
            decoder,
            num_blocks=shape.num_kv_blocks,
            block_size=config.block_size,
            max_tokens=buffer_tokens(config, shape),
            max_seqs=config.max_num_seqs,
            max_blocks=max_blocks,
            max_drafts=max_drafts,
            kv_dtype=kv_dtype(decoder, config),
            device=config.device,
            replay=config.capture,
            slots=None if adapters is None else adapters.rows,
        )
        self.adapters = adapters
        # Each hook is called with every finished step's statistics.
        self.on_step: list[Callable[[StepStats], None]] = []
        # Called before each forward with its chunks; what a hook raises is a failed forward.
        self.on_forward: list[Callable[[Sequence[Chunk]], None]] = []
        # Called by `close`.
        self.on_close: list[Callable[[], None]] = []
        self.learner: Learner | None = None  # refreshes the speculator; for its statistics
        self.step_idx = 0
        self.speed = SpeedMeter(START_SPEED)
        self._decoder = decoder
        self._grammars = grammars
        eos_ids = shape.eos_ids | frozenset(tokenizer.eos_token_ids)
        self._factory = RequestFactory(tokenizer, self.limits, eos_ids, config.seed)
        self._outputs = StepOutputs()
        self.speculator = Speculator(drafters, config) if drafters else None
        self._committer = Committer(
            self.scheduler, self.runner, self._factory, self._outputs, self.speculator
        )
        if self.speculator is not None:
            self.scheduler.on_finish.append(self.speculator.finish)
        self._requests: dict[str, RequestState] = {}
        self._deadlines: dict[str, float] = {}  # request id -> monotonic seconds
        self._compiling: dict[str, RequestState] = {}

    @property
    def has_work(self) -> bool:
        """Some request is unfinished: call `step` again."""
        return bool(self._requests)

    @property
    def drafter_names(self) -> list[str]:
        """Who guesses tokens; empty without speculation."""
        return [] if self.speculator is None else [d.name for d in self.speculator.drafters]

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self.scheduler.waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens that the queue's sequences have to compute."""
        return self.scheduler.num_waiting_tokens

    @property
    def prompt_layers(self) -> str:
        """For people: how many layers a prompt token runs."""
        return self._decoder.prompt_layers

    @property
    def pool(self) -> BlockPool:
        """The KV blocks' bookkeeping."""
        return self.scheduler.tables.pool

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds: all usable ones whenever no request is in flight."""
        return self.pool.num_free

    @property
    def request_ids(self) -> list[str]:
        """Requests in flight, in order of arrival."""
        return list(self._requests)

    def predict_wait_s(self, num_queued: int, queued_tokens: int) -> float:
        """Seconds until a request behind such a queue would get its first chunk."""
        has_free_place = self.num_running < self.scheduler.max_running
        return self.speed.predict_wait_s(num_queued, queued_tokens, has_free_place)

    def check(self, request: EngineRequest) -> None:
        """Raise what `add` would raise about the request itself. Safe from any thread."""
        self._factory.check(request)
        if request.adapter:
            self._table().find(request.adapter)
        spec = request.params.structured
        if spec is None:
            return
        if self._grammars is None:
            raise RequestError(
                "this engine was built without structured output; remove the response format",
                param="response_format",
            )
        check_spec(spec)

    def add(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises RequestError (a field is out of range, or the id is in use) and
        ContextLengthError (prompt and completion do not fit); then nothing was queued.
        """
        name = request.request_id
        if name in self._requests:
            raise RequestError(f"request id {name!r} is in use; choose another", param="request_id")
        self.check(request)
        state = self._factory.new_state(request)
        state.rope_offset = self._decoder.rope_row_offset(len(state.prompt) + state.max_output)
        if request.adapter:
            state.adapter = self._table().acquire(request.adapter)
        spec = request.params.structured
        if spec is not None and self._grammars is not None:
            state.grammar = self._grammars.submit(spec)
            self._compiling[name] = state
        self._requests[name] = state
        if request.deadline_s is not None:
            self._deadlines[name] = state.arrival + request.deadline_s
        self.scheduler.add(state.sequences[0])

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request and free its blocks at once.

        Returns its last output, or None when the request is unknown or already finished.
        """
        state = self._requests.get(request_id)
        if state is None:
            return None
        self._committer.end_request(state, FinishReason.ABORT, None)
        return self._collect()[-1]

    def step(self) -> list[RequestOutput]:
        """Run one step; returns an output for every request that something happened to."""
        started = time.monotonic()
        self._end_overdue(started)
        self._hand_out_grammars()
        if self.speculator is not None:
            self.speculator.propose(self.scheduler)
        step = self.scheduler.schedule()
        if step.chunks:
            self._compute(step, started)
        elif self._compiling:
            self._wait_for_grammar()
        return self._collect()

    def set_token_budget(self, token_budget: int, idle_budget: int | None = None) -> None:
        """Change the budget between steps. ConfigError beyond the input buffers.

        `idle_budget` is that of steps without decodes; None = the same.
        """
        limit = self.runner.buffers.max_tokens
        if not 0 < max(token_budget, idle_budget or 0) <= limit:
            raise ConfigError(f"token_budget is {token_budget}; allowed is 1 to {limit}")
        self.scheduler.set_token_budget(token_budget, self.config.max_num_seqs, idle_budget)

    def close(self) -> None:
        """End the threads beside the engine. Requests in flight are lost: abort them first."""
        for hook in self.on_close:
            hook()
        if self._grammars is not None:
            self._grammars.shutdown()

    def check_integrity(self) -> None:
        """Assert that every block is accounted for; for tests."""
        self.pool.check_integrity([seq.blocks for seq in self.scheduler.running])
        assert all(not seq.blocks for seq in self.scheduler.waiting), "a queued sequence has blocks"
        assert self.has_work or self.num_free_blocks == self.pool.num_usable, "idle but not free"

    def _compute(self, step: ScheduledStep, started: float) -> None:
        """Build and run the forward, sample, commit."""
        _note_scheduled(step, started)
        tables = self.scheduler.tables
        if tables.copies:
            self.runner.copy_blocks(tables.copies)
            tables.copies.clear()
        begun = time.monotonic()
        forward = run_isolated(self._run, step.chunks)
        forward_s = time.monotonic() - begun
        draws = self._committer.draws(forward)
        self._committer.advance(forward)
        self._committer.end_without_tokens([d for d in draws if not d.seq.state.max_output])
        draws = [draw for draw in draws if draw.seq.state.max_output]
        if self.speculator is not None:
            self.speculator.see(forward.logits.hidden)
        self._committer.append(draws, choose_isolated(forward.logits.values, draws))
        self._restart_tainted(forward.logits, draws)
        if self.speculator is not None:
            self.speculator.note_step(step, time.monotonic() - started, forward_s)
        self._report(step, started)

    def _run(self, chunks: Sequence[Chunk]) -> Logits:
        for hook in self.on_forward:
            hook(chunks)
        return self.runner.run(chunks)

    def _restart_tainted(self, logits: Logits, draws: list[Draw]) -> None:
        """A rejected draft that made NaN left it in the cache: compute that sequence anew."""
        for draw in draws:
            if self.speculator is not None and is_tainted(logits.values, draw):
                self._committer.restart(draw.seq)
                self.speculator.exclude(draw.seq)

    def _collect(self) -> list[RequestOutput]:
        outputs = self._outputs.collect()
        for output in outputs:
            if output.is_finished:
                self.speed.note_finished(1)
                state = self._requests.pop(output.request_id)
                if state.adapter is not None:
                    self._table().release(state.adapter)
                self._deadlines.pop(output.request_id, None)
                self._compiling.pop(output.request_id, None)
        return outputs

    def _table(self) -> AdapterTable:
        if self.adapters is None:
            raise RequestError(
                "this engine serves no adapters; set max_loras or lora", param="model"
            )
        return self.adapters

    def _end_overdue(self, now: float) -> None:
        for name in [name for name, at in self._deadlines.items() if at <= now]:
            state = self._requests[name]
            limit = state.request.deadline_s
            error = DeadlineError(f"the request was not finished within its {limit:g} s")
            self._committer.end_request(state, FinishReason.ABORT, error)
            del self._deadlines[name]

    def _hand_out_grammars(self) -> None:
        """Give compiled grammars to their sequences, which become ready."""
        for name, state in list(self._compiling.items()):
            future = state.grammar
            if future is None or self._grammars is None or not future.done():
                continue
            del self._compiling[name]
            state.grammar = None
            error = future.exception()
            if error is not None:
                self._committer.end_request(state, FinishReason.ERROR, as_request_error(error))
                continue
            (leader,) = state.sequences
            leader.grammar = future.result().new_state()
            leader.plan.bitmask = np.zeros(self._grammars.num_words, np.int32)

    def _wait_for_grammar(self) -> None:
        pending = [state.grammar for state in self._compiling.values() if state.grammar]
        wait(pending, timeout=GRAMMAR_WAIT_S, return_when=FIRST_COMPLETED)

    def _report(self, step: ScheduledStep, started: float) -> None:
        self.step_idx += 1
        stats = StepStats(
            step=self.step_idx,
            started=started,
            duration=time.monotonic() - started,
            num_decode_tokens=step.num_decode_tokens,
            num_prompt_tokens=step.num_prompt_tokens,
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_preempted=step.num_preempted,
            kv_usage=1 - self.pool.num_free / self.pool.num_usable,
            token_budget=step.token_budget,
            num_draft_tokens=step.num_draft_tokens,
            drafts=() if self.speculator is None else self.speculator.take_results(),
        )
        self.speed.note_step(stats)
        for hook in self.on_step:
            hook(stats)


def _note_scheduled(step: ScheduledStep, now: float) -> None:
    for chunk in step.chunks:
        state = chunk.seq.state
        if state.scheduled is None:
            state.scheduled = now
            state.num_cached_tokens = chunk.start


def buffer_tokens(config: EngineConfig, shape: EngineShape) -> int:
    """Longest step, now or with a measured budget: whole-prompt takes the first prompt whole.

    More tokens than a step has output rows, which adapters.py relies on.
    """
    budget = config.token_budget or DEFAULT_BUDGET
    longest = shape.max_model_len if config.policy == "whole-prompt" else 0
    rows = config.max_num_seqs + config.max_draft_rows
    return max(budget, longest, least_budget(config.max_num_seqs), MIN_BUFFER_TOKENS, rows + 1)
