"""From an EngineRequest to the state the engine keeps: checks, seeds, tokenised bad words."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from sterna.engine.request import EngineRequest, SamplingParams
from sterna.engine.rng import mix
from sterna.engine.sampler import RowPlan
from sterna.engine.sequence import RequestState, Sequence
from sterna.engine.stopping import StopChecker
from sterna.engine.validate import Limits, check_params, check_prompt, max_output_tokens
from sterna.text.tokenizer import Tokenizer


@dataclass(slots=True)
class RequestFactory:
    """Builds request states and sequences. `eos_ids` are the tokenizer's and the model's."""

    tokenizer: Tokenizer
    limits: Limits
    eos_ids: frozenset[int]
    engine_seed: int
    num_requests: int = 0

    def check(self, request: EngineRequest) -> None:
        """Raise RequestError or ContextLengthError for a request that cannot be served."""
        check_params(request.params, self.limits.vocab_size)
        check_prompt(request, self.limits)

    def new_state(self, request: EngineRequest) -> RequestState:
        """The state of a checked request, with its first sequence."""
        prompt = np.array(request.prompt_token_ids, np.int32)
        self.num_requests += 1
        state = RequestState(
            request=request,
            arrival_order=self.num_requests,
            arrival=time.monotonic(),
            prompt=prompt,
            max_output=max_output_tokens(request, self.limits),
        )
        if request.params.prompt_logprobs is not None:
            state.prompt_logprobs = [None] * len(prompt)
        state.sequences.append(self.new_sequence(state, 0))
        return state

    def new_sequence(self, state: RequestState, index: int) -> Sequence:
        """Sample `index` of a request, without blocks and output."""
        params = state.request.params
        decoder = self.tokenizer.incremental(params.skip_special_tokens, keep_leading_space=True)
        stop = StopChecker(params, decoder, self.eos_ids, state.max_output)
        output: list[int] = []
        plan = RowPlan(
            params=params,
            seed=self._seed(state),
            sample_idx=index,
            prompt=state.prompt,
            output=output,
            end_ids=stop.end_ids,
            bad_words=self._bad_words(params),
        )
        order = (state.request.priority, state.arrival_order, index)
        return Sequence(state, index, plan, stop, order, output)

    def _seed(self, state: RequestState) -> int:
        seed = state.request.params.seed
        return mix(mix(0, self.engine_seed), state.arrival_order) if seed is None else seed

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each word at the start of a text and after a space; these are different tokens."""
        words = [form for word in params.bad_words for form in (word, f" {word.lstrip()}")]
        ids = (tuple(self.tokenizer.encode(w, add_special_tokens=False)) for w in words)
        return tuple(dict.fromkeys(filter(None, ids)))
