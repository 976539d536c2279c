"""The engine of a run's rollouts: the trainer's own process, or a group of ranks behind one face.

A group splits a step by prompts, so that a group of completions stays on one rank and shares its
prefix. A completion's tokens follow from weights, prompt and seed alone: the same for any number
of ranks. Weights reach other processes when `prepare` is called, by a transport with checksums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from sterna.align.adapted import load_policy
from sterna.align.carry import Room, carried
from sterna.align.config import RlRecipe
from sterna.align.hybrid import PACKED, POLICY, HybridEngine, Sampling
from sterna.align.rollout import Rollout
from sterna.align.rollout_engine import engine_config, rollout_weights
from sterna.align.siblings import DraftCount
from sterna.align.spawn import spawn
from sterna.align.transport import WeightTransport
from sterna.align.workers import WorkerGroup, everyone
from sterna.core.machine import num_usable_cpus
from sterna.kernels.device import set_threads
from sterna.model.decoder import Decoder
from sterna.model.hub import resolve_model
from sterna.text.tokenizer import Tokenizer, load_tokenizer
from sterna.train.parts import trained


class RolloutEngine(Protocol):
    """What the loop asks of an engine; see HybridEngine for each."""

    version: int
    drafts: DraftCount

    @property
    def is_exact(self) -> bool:
        """Whether log-probs are those of the policy's own weights."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """By the weights of the last `prepare`."""
        ...

    def publish(self) -> None:
        """The weights have changed; the next `prepare` shows them to the engine."""
        ...

    def prepare(self) -> None:
        """Bring the engine to the present weights; not while another thread draws."""
        ...

    def sleep(self) -> None:
        """Give back memory that training needs."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class EngineActor:
    """One rank's engine, called by name from an EngineGroup."""

    def __init__(self, hybrid: HybridEngine, weights: Mapping[str, Tensor]) -> None:
        self._hybrid = hybrid
        self._weights = weights
        self._transport: WeightTransport | None = None

    def max_model_len(self) -> int:
        """The engine's."""
        return self._hybrid.max_model_len

    def connect(self, transport: WeightTransport) -> None:
        """Where weights come from."""
        self._transport = transport

    def join(self, room: Room, rank: int) -> None:
        """Weights come by broadcast from the trainer, which is rank 0."""
        self._transport = room.join(rank)

    def load(self, version: int) -> None:
        """Take the weights of a version. TransportError where they are not that."""
        assert self._transport is not None, "connected first"
        self._transport.receive(self._weights, version)
        self.publish(version)

    def publish(self, version: int) -> None:
        """The weights are those of a version now."""
        self._hybrid.publish()
        self._hybrid.version = version

    def generate(self, *args: Any) -> tuple[list[Rollout], DraftCount]:
        """The engine's, and what was guessed."""
        return self._hybrid.generate(*args), self._hybrid.drafts.take()

    def sleep(self) -> None:
        """The engine's."""
        self._hybrid.sleep()

    def close(self) -> None:
        """The engine's."""
        self._hybrid.close()


class Show(Protocol):
    """How the ranks of a group come to a version of the weights."""

    def __call__(self, group: WorkerGroup, version: int) -> None:
        """Errors name what does not fit."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class EngineGroup:
    """Ranks that draw together. Calls from one thread at a time, `publish` from any."""

    def __init__(
        self, group: WorkerGroup, show: Show, is_exact: bool, *, sleeps: bool = False
    ) -> None:
        """`sleeps`: the ranks' KV memory is wanted for training."""
        self.version = 0
        self.drafts = DraftCount()
        self._group = group
        self._show = show
        self._is_exact = is_exact
        self._sleeps = sleeps
        self._loaded: int | None = None
        self._max_model_len: int = min(everyone(group, "max_model_len"))

    @property
    def is_exact(self) -> bool:
        """See RolloutEngine."""
        return self._is_exact

    @property
    def max_model_len(self) -> int:
        """See RolloutEngine."""
        return self._max_model_len

    def publish(self) -> None:
        """See RolloutEngine. Nothing moves: ranks may be drawing by the old weights."""
        self.version += 1

    def prepare(self) -> None:
        """See RolloutEngine. TransportError, WorkerError."""
        if self._loaded != self.version:
            self._show(self._group, self.version)
            self._loaded = self.version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """See RolloutEngine; order as HybridEngine's. WorkerError names a rank that failed."""
        size = self._group.size
        cuts = [len(prompts) * i // size for i in range(size + 1)]
        shares = [slice(begin, end) for begin, end in pairwise(cuts)]
        calls = [
            (
                prompts[own],
                group_size,
                sampling,
                seeds[own],
                None if limits is None else limits[own],
            )
            for own in shares
        ]
        self._group.start("generate", calls)
        found: list[Rollout] = []
        for own, (rollouts, count) in zip(shares, self._group.finish(), strict=True):
            found += [replace(r, prompt_idx=r.prompt_idx + own.start) for r in rollouts]
            self.drafts.num_drafted += count.num_drafted
            self.drafts.num_accepted += count.num_accepted
        return found

    def sleep(self) -> None:
        """See RolloutEngine. Ranks whose memory is not the trainer's keep it."""
        if self._sleeps:
            everyone(self._group, "sleep")

    def close(self) -> None:
        """See RolloutEngine."""
        self._group.close()
        self._show.close()


def make_engine(recipe: RlRecipe, policy: Decoder, tokenizer: Tokenizer) -> RolloutEngine:
    """As the recipe's `rollout` asks. WorkerError when a process cannot build its engine."""
    rollout, kind = recipe.rollout, rollout_weights(recipe, policy)
    if not rollout.workers:
        return HybridEngine(policy, tokenizer, engine_config(recipe), kind, rollout.speculation)
    threads = worker_threads(recipe)
    args = (recipe.model_dump_json(), threads)
    group = spawn(
        "sterna.align.engines:engine_actor", [args] * rollout.workers, recipe.run.timeout_s, threads
    )
    weights = dict(trained(policy))  # of an adapted policy the adapter alone
    show = carried(rollout.transport, weights, rollout.workers, recipe.run.timeout_s)
    return EngineGroup(group, show, kind in (POLICY, PACKED))


def worker_threads(recipe: RlRecipe) -> int:
    """CPU threads of one worker: an even share, of the trainer's too where it works meanwhile."""
    busy = recipe.rollout.workers + recipe.rollout.staleness
    return recipe.run.threads or max(1, num_usable_cpus() // busy)


def engine_actor(text: str, threads: int) -> EngineActor:
    """The actor of a worker, from a recipe as JSON. Its first weights are those of model.path."""
    recipe = RlRecipe.model_validate_json(text)
    set_threads(threads)
    base = resolve_model(recipe.model.path)
    tokenizer = load_tokenizer(
        resolve_model(recipe.model.tokenizer) if recipe.model.tokenizer else base
    )
    device = torch.device(recipe.model.device)
    policy = load_policy(recipe, base, None, device)
    weights = dict(trained(policy))
    policy.requires_grad_(False)
    kind, has_guesses = rollout_weights(recipe, policy), recipe.rollout.speculation
    hybrid = HybridEngine(policy, tokenizer, engine_config(recipe), kind, has_guesses)
    return EngineActor(hybrid, weights)
