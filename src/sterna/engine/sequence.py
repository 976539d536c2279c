"""The mutable state of a request in flight: one RequestState, and one Sequence a sample.

A sequence knows its tokens (prompt + output) and how many of them have keys and values in the
cache (`num_computed`). There are no phases: whatever is not computed yet is work for the
scheduler. A decode is a sequence with one token to compute; a preempted sequence simply has
`num_computed = 0` again and keeps its output, its place in the random stream and its grammar.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sterna.engine.request import EngineRequest, RequestTiming, TokenLogprob
from sterna.engine.sampler import RowPlan
from sterna.engine.stopping import StopChecker

if TYPE_CHECKING:
    from sterna.engine.adapters import LoadedAdapter
    from sterna.engine.structured import CompiledGrammar, GrammarState


class Status(Enum):
    """Where a sequence is. Only RUNNING sequences hold blocks."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class RequestState:
    """What the samples of one request share."""

    request: EngineRequest
    arrival_order: int  # counts requests; ties in priority are FIFO
    arrival: float  # monotonic seconds
    prompt: NDArray[np.int32]
    max_output: int  # tokens a sample may generate: max_tokens or what the context leaves
    adapter: LoadedAdapter | None = None  # None = the base model
    rope_offset: int = 0  # added to every position: which LongRope table (0 for other models)
    sequences: list[Sequence] = field(default_factory=list)
    grammar: Future[CompiledGrammar] | None = None  # compiling; None once handed out
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    last_timing: RequestTiming | None = None

    @property
    def salt(self) -> str:
        """The tenant's prefix-cache salt."""
        return self.request.cache_salt

    @property
    def adapter_slot(self) -> int:
        """Where the adapter's weights are; -1 = none."""
        return -1 if self.adapter is None else self.adapter.slot

    @property
    def adapter_serial(self) -> int:
        """Tells the keys and values of one adapter from those of another; 0 = none."""
        return 0 if self.adapter is None else self.adapter.serial

    @property
    def is_finished(self) -> bool:
        """All samples have ended."""
        return all(seq.status is Status.FINISHED for seq in self.sequences)

    def timing(self) -> RequestTiming:
        """A frozen copy of the time stamps; the same one until a stamp is added."""
        last = self.last_timing
        if last is None or last.finished is not self.finished or last.first_token is None:
            last = self.last_timing = RequestTiming(
                arrival=self.arrival,
                scheduled=self.scheduled,
                first_token=self.first_token,
                finished=self.finished,
            )
        return last


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request. The scheduler, the tables and `commit` change it; nobody else."""

    state: RequestState
    index: int
    plan: RowPlan
    stop: StopChecker
    order: tuple[int, int, int]  # (priority, arrival, index): smaller runs first, yields last
    output: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    table: NDArray[np.int32] | None = None  # `blocks`, then zeros up to the table's width
    keys: list[bytes] = field(default_factory=list)  # names of the first full blocks
    num_published: int = 0
    num_queued_tokens: int = 0  # what this sequence adds to the queue's token count
    num_bypassed: int = 0  # admissions of later sequences while this one did not fit
    status: Status = Status.WAITING
    draft: list[int] = field(default_factory=list)  # what may follow; not committed
    grammar: GrammarState | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.state.prompt)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens."""
        return self.num_prompt_tokens + len(self.output)

    @property
    def num_remaining(self) -> int:
        """Tokens without keys and values; at least 1 while the sequence is alive."""
        return self.num_prompt_tokens + len(self.output) - self.num_computed

    @property
    def num_left(self) -> int:
        """Tokens that it may still generate."""
        return self.state.max_output - len(self.output)

    @property
    def is_ready(self) -> bool:
        """False while the grammar compiles: the scheduler skips such a sequence."""
        return self.state.grammar is None

    @property
    def may_draft(self) -> bool:
        """This is a decode, which may carry guesses of the tokens after the next one."""
        return self.num_remaining == 1 and bool(self.output)

    @property
    def is_leader(self) -> bool:
        """This sequence computes the prompt that its siblings will be forked from."""
        return self.index == 0 and len(self.state.sequences) < self.state.request.params.n

    @property
    def skips_prefix_cache(self) -> bool:
        """Prompt logprobs need every prompt row's logits, so nothing may come from the cache."""
        return self.state.request.params.prompt_logprobs is not None and not self.output

    def tokens(self, start: int, count: int) -> NDArray[np.int32]:
        """Tokens `start .. start + count` of prompt and output, int32."""
        end, split = start + count, self.num_prompt_tokens
        if end <= split:
            return self.state.prompt[start:end]
        output = np.array(self.output[max(0, start - split) : end - split], np.int32)
        if start >= split:
            return output
        return np.concatenate([self.state.prompt[start:], output])
