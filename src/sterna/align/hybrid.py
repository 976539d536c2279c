"""The hybrid engine: the trainer's weights, read where they are by the serving engine.

There is no weight transfer. The engine runs on the trainer's own Decoder: its kernels read the
plain [N, K] parameters that the optimizer writes in place, with the bits they would give of packed
ones. `publish` says that the weights have changed: a new policy version, and no cached prefix is
found again. On a CPU a rollout's log-probs are therefore the trainer's, bit for bit.

With `weights = "packed"` matrices are read from a copy in the kernels' layout, which `publish`
packs anew in place: faster, the same bits (packed.py).
With `weights = "fp6"` (or another format) rollouts run on a quantised copy, with "merged" on one
with the adapter folded in; `publish` makes it anew in place. Its log-probs differ from the
trainer's, and the loop corrects for that.

Between rollouts `sleep` gives the KV cache's memory back.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sterna.align.packed import PackedCopy
from sterna.align.rollout import Rollout
from sterna.align.rollout_weights import RolloutCopy
from sterna.align.siblings import DraftCount, SiblingDrafter
from sterna.core.errors import SternaError, TrainError
from sterna.engine.config import EngineConfig
from sterna.engine.costfile import measure
from sterna.engine.engine import Engine
from sterna.engine.request import (
    Delta,
    EngineRequest,
    FinishReason,
    RequestOutput,
    SamplingParams,
)
from sterna.model.decoder import Decoder
from sterna.quant.formats import WeightFormat, parse_format
from sterna.text.tokenizer import Tokenizer

POLICY = "policy"  # rollouts on the trainer's own weights
PACKED = "packed"  # on a copy of the same bits in the kernels' layout
MERGED = "merged"  # on a copy with the adapter folded in


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. The defaults are what policy gradients assume: all of p."""

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(slots=True)
class _Growing:
    """A sample while it grows."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class HybridEngine:
    """Rollouts from a model in training. One thread; not while a training step runs."""

    def __init__(
        self,
        policy: Decoder,
        tokenizer: Tokenizer,
        config: EngineConfig,
        weights: str = POLICY,
        speculation: bool = False,
    ) -> None:
        """`weights`: "policy", "packed", "merged", or the format of a quantised copy.

        Errors as the engine's, and ConfigError for a copy that this policy cannot have.
        `speculation`: guess tokens ahead (siblings.py); tokens and log-probs stay the same.
        """
        self.version = 0
        self._copy = _copy_of(policy, weights)
        self._served = policy if self._copy is None else self._copy.decoder
        drafters = [SiblingDrafter()] if speculation else []
        self._engine = Engine(self._served, tokenizer, config, drafters=drafters)
        self.drafts = DraftCount()
        self._engine.on_step.append(self.drafts.note)
        self._measure_steps()
        self._ids = itertools.count()
        self._is_asleep = False

    @property
    def engine(self) -> Engine:
        """The engine below, for its statistics and hooks."""
        return self._engine

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence: prompt and completion."""
        limits = self._engine.limits
        return min(limits.max_model_len, limits.max_pool_tokens)

    @property
    def is_exact(self) -> bool:
        """Whether rollouts read the trainer's own weights, or the same bits packed."""
        return self._copy is None or isinstance(self._copy, PackedCopy)

    def publish(self) -> None:
        """The weights have changed: nothing computed with the old ones is used again.

        TrainError while completions are under way: they would mix two policies unnoticed.
        """
        if self._engine.has_work:
            raise TrainError(
                "the weights changed while completions were under way; finish or abort them before "
                "the optimizer step, or ask for versions a token"
            )
        self._engine.pool.clear_cache()
        if self._copy is not None:
            self._copy.renew()
        self.version += 1

    def prepare(self) -> None:
        """Engines of other processes take the weights here; this one reads them where they are."""

    def sleep(self) -> None:
        """Give the KV cache's memory back; the next rollout takes it again by itself."""
        if self._engine.has_work:
            raise TrainError("completions are under way; they need the KV cache")
        self._engine.pool.clear_cache()
        self._engine.runner.discard_cache()
        self._is_asleep = True

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """`group_size` completions of each prompt, ordered by prompt, then sample.

        `seeds`: one a prompt; the same prompt, seed and weights give the same tokens whatever runs
        beside them. `limits`: max_tokens of each prompt, where they differ. Raises RequestError
        for a prompt that does not fit, StepError when a forward failed.
        """
        room = limits or [sampling.max_tokens] * len(seeds)
        params = [
            _params(replace(sampling, max_tokens=most), group_size, seed)
            for most, seed in zip(room, seeds, strict=True)
        ]
        requests = [
            EngineRequest(
                request_id=f"rollout-{next(self._ids)}",
                prompt_token_ids=tuple(int(t) for t in prompt),
                params=each,
            )
            for prompt, each in zip(prompts, params, strict=True)
        ]
        if self._is_asleep:
            self._engine.runner.restore_cache()
            self._is_asleep = False
        samples = self._run(requests)
        return [
            self._rollout(i, j, request, samples[request.request_id, j])
            for i, request in enumerate(requests)
            for j in range(group_size)
        ]

    def close(self) -> None:
        """Free what the engine holds."""
        self._engine.close()

    def _measure_steps(self) -> None:
        """Time steps by their rows, which decides how much is guessed: a second at most."""
        engine = self._engine
        if engine.speculator is not None:
            limit = engine.limits.max_pool_tokens
            rows = min(engine.config.max_draft_rows, limit)
            longest = min(engine.limits.max_model_len, limit)
            engine.speculator.cost = measure(engine.runner.run_verify_probe, rows, longest).cost()

    def _run(self, requests: Sequence[EngineRequest]) -> Mapping[tuple[str, int], _Growing]:
        found: dict[tuple[str, int], _Growing] = {}
        try:
            for request in requests:
                self._engine.add(request)
            while self._engine.has_work:
                for output in self._engine.step():
                    _collect(output, found)
        finally:
            for request in requests:
                self._engine.abort(request.request_id)
        return found

    def _rollout(
        self, prompt_idx: int, sample_idx: int, request: EngineRequest, sample: _Growing
    ) -> Rollout:
        return Rollout(
            prompt_idx=prompt_idx,
            sample_idx=sample_idx,
            prompt=np.array(request.prompt_token_ids, np.int32),
            completion=np.array(sample.tokens, np.int32),
            mask=np.ones(len(sample.tokens), np.bool_),
            logprobs=np.array(sample.logprobs, np.float32),
            policy_version=self.version,
            is_truncated=sample.finish_reason is FinishReason.LENGTH,
        )


def _form(weights: str) -> WeightFormat | None:
    return None if weights == MERGED else parse_format(weights)


def _copy_of(policy: Decoder, weights: str) -> PackedCopy | RolloutCopy | None:
    if weights == POLICY:
        return None
    return PackedCopy(policy) if weights == PACKED else RolloutCopy(policy, _form(weights))


def _params(sampling: Sampling, group_size: int, seed: int) -> SamplingParams:
    return SamplingParams(
        n=group_size,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_tokens,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=0,
        logprobs_mode="processed",
        seed=seed,
        skip_special_tokens=False,
    )


def _collect(output: RequestOutput, found: dict[tuple[str, int], _Growing]) -> None:
    for delta in output.deltas:
        _check(delta)
        sample = found.setdefault((output.request_id, delta.index), _Growing())
        sample.tokens.extend(delta.token_ids)
        sample.logprobs.extend(entry.logprob for entry in delta.logprobs or ())
        sample.finish_reason = delta.finish_reason or sample.finish_reason


def _check(delta: Delta) -> None:
    error: SternaError | None = delta.error
    if error is not None:
        raise error
