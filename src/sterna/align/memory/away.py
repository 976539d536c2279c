"""Frozen models whose weights wait elsewhere while nobody asks them.

    disk    a file without a name: the blocks are read one ahead of the one that computes, through
            two buffers; the tables are mapped and their pages dropped afterwards
    host    (GPU) pinned memory: the blocks likewise on a stream of their own; the tables are moved
            in for as long as the model is asked

Only where the bytes lie changes, so what a model says is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from sterna.align.config import RlRecipe
from sterna.align.experience import PerToken
from sterna.align.rollout import Rollout
from sterna.core.errors import UnsupportedModelError
from sterna.model.decoder import Decoder
from sterna.model.value import ValueModel
from sterna.train.longseq.config import Tier
from sterna.train.offload.homes import TierHome, new_home
from sterna.train.offload.weights import LEAST, WeightTier, hold

_FOLDER = "memory.folder"


class Away:
    """A frozen model in a tier. Within `here` it can be asked; blocks come by themselves."""

    def __init__(self, decoder: Decoder, tier: Tier, folder: Path) -> None:
        """Moves the weights. TrainError when there is no room, ConfigError for host on a CPU."""
        if decoder.config.swiftkv is not None:
            raise UnsupportedModelError(
                "a SwiftKV model's blocks are not read one by one; leave memory.reference and "
                "memory.rewards out"
            )
        home = new_home(tier, decoder.device, folder, _FOLDER)
        assert isinstance(home, TierHome), "asked with a tier"
        self._home = home
        self._tables = [hold(table, home) for table in _tables(decoder)]
        self._device = decoder.device
        blocks = list(decoder.layers)
        self._blocks = WeightTier(blocks, home, lambda tensor: tensor.numel() >= LEAST)
        for i, block in enumerate(blocks):
            block.forward = partial(self._forward, i, block.forward)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Within it the tables are where they are used; afterwards no memory is kept."""
        if self._device.type != "cpu":
            for one in self._tables:
                one.tensor.data = one.at_home.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            for one in self._tables:
                one.tensor.data = one.at_home
            self._blocks.release()

    def _forward(self, index: int, plain: Callable[..., Tensor], *args: object) -> Tensor:
        with self._blocks.resident(index, index + 1):
            return plain(*args)


@dataclass(frozen=True, slots=True)
class Frozen:
    """A model that is asked and never trained, wherever it waits."""

    model: Decoder | ValueModel
    away: Away | None = None

    @staticmethod
    def of(model: Decoder | ValueModel, recipe: RlRecipe, tier: Tier) -> Frozen:
        """Frozen, and moved to its tier. Errors as Away."""
        model.requires_grad_(False)
        if tier == "memory":
            return Frozen(model)
        decoder = model.trunk if isinstance(model, ValueModel) else model
        assert isinstance(decoder, Decoder), "the loop's models are native"
        return Frozen(model, Away(decoder, tier, recipe.memory.folder or recipe.run.output))

    def here(self) -> AbstractContextManager[None]:
        """Within it the model can be asked."""
        return nullcontext() if self.away is None else self.away.here()

    def asked(self, scored: PerToken) -> PerToken:
        """`scored`, which asks this model, within `here`."""

        def found(rollouts: Sequence[Rollout]) -> Tensor:
            with self.here():
                return scored(rollouts)

        return found


def _tables(decoder: Decoder) -> list[nn.Parameter]:
    heads = (decoder.embed_tokens, decoder.embed_positions, decoder.lm_head)
    return [p for head in heads if head is not None for p in head.parameters()]
