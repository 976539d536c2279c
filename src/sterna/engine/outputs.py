"""Collects what a step did, sample by sample, into one RequestOutput a request."""

from __future__ import annotations

from sterna.engine.request import Delta, RequestOutput
from sterna.engine.sequence import RequestState


class StepOutputs:
    """The deltas of the current step. `collect` hands them out and starts anew."""

    def __init__(self) -> None:
        self._deltas: dict[RequestState, list[Delta]] = {}

    def add(self, state: RequestState, delta: Delta) -> None:
        """Note what one sample gained."""
        self._deltas.setdefault(state, []).append(delta)

    def collect(self) -> list[RequestOutput]:
        """One output for every request that something happened to."""
        found = [build_output(state, tuple(deltas)) for state, deltas in self._deltas.items()]
        self._deltas.clear()
        return found


def build_output(state: RequestState, deltas: tuple[Delta, ...]) -> RequestOutput:
    """A request's output of one step. Its prompt logprobs go with the first one."""
    prompt_logprobs = state.prompt_logprobs
    state.prompt_logprobs = None
    return RequestOutput(
        request_id=state.request.request_id,
        deltas=deltas,
        num_prompt_tokens=len(state.prompt),
        num_cached_tokens=state.num_cached_tokens,
        timing=state.timing(),
        is_finished=state.finished is not None,
        prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
    )
