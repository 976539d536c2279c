"""Drafts from a small head on the target's own hidden states (model/speculator.py).

The engine's last step holds the state that each sequence's last token was drawn from; nothing is
computed twice, and nothing copied while nobody asks. All sequences are drafted in one batch, and
all drafts of a proposal are one captured step (draft_step.py).

A head says of each token how likely it is by its own softmax. Every committed token tells whether
the last proposal was right at its place, verified or not, and a factor a place corrects what is
announced: a head that was trained on the text's own tokens believes too much in its later drafts.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from sterna.core.errors import ConfigError
from sterna.engine.config import EngineConfig
from sterna.engine.drafters.base import Draft
from sterna.engine.drafters.draft_step import DraftStep
from sterna.engine.drafters.learner import Learner
from sterna.engine.sequence import Sequence
from sterna.model.decoder import Decoder
from sterna.model.load import DTypeName
from sterna.model.speculator import Speculator
from sterna.model.speculator_file import load_speculator

# A place begins as if it had seen so many tokens come true as announced, and forgets at this rate.
PRIOR_WEIGHT: Final = 16.0
MEMORY: Final = 0.998


class PlaceFactors:
    """What was accepted at each place of the drafts, against what was announced there."""

    def __init__(self, num_drafts: int) -> None:
        self._hits = [PRIOR_WEIGHT] * num_drafts
        self._announced = [PRIOR_WEIGHT] * num_drafts

    def corrected(self, probs: Seq[float]) -> list[float]:
        """The softmax's probabilities as they should be announced."""
        pairs = zip(probs, self._hits, self._announced, strict=False)
        return [min(p * hits / said, 1.0) for p, hits, said in pairs]

    def note(self, place: int, prob: float, is_hit: bool) -> None:
        """Take what became of a draft whose softmax said `prob`, those before it being right."""
        self._hits[place] = self._hits[place] * MEMORY + is_hit
        self._announced[place] = self._announced[place] * MEMORY + prob


class Said(NamedTuple):
    """A proposal: the place in the output that it began at."""

    place: int
    tokens: list[int]
    probs: list[float]


class LearnedDrafter:
    """See the module docstring. `name` is the cell's: "mlp" or "lstm".

    ConfigError when the speculator was not made for `decoder`, which is prepared for inference.
    """

    def __init__(
        self,
        speculator: Speculator,
        decoder: Decoder,
        *,
        max_num_seqs: int,
        replay: bool = True,
        learner: Learner | None = None,
    ) -> None:
        self.name: str = speculator.config.cell
        self.num_drafts = speculator.config.num_drafts
        self.step = DraftStep(speculator, decoder, max_num_seqs, replay)
        self.learner = learner
        self._max_seqs = max_num_seqs
        self._hidden: Tensor | None = None
        self._rows: Mapping[Sequence, int] = {}
        self._said: dict[Sequence, Said] = {}
        self._factors = PlaceFactors(speculator.config.num_drafts)

    @property
    def observes(self) -> bool:
        """See ReadsHidden: what it learns from."""
        return self.learner is not None

    def read(self, hidden: Tensor | None, rows: Mapping[Sequence, int]) -> None:
        """See ReadsHidden."""
        self._hidden, self._rows = hidden, rows

    def observe(self, seq: Sequence, hidden: Tensor) -> None:
        """See ReadsHidden."""
        if self.learner is not None:
            self.learner.observe(seq, hidden)

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft | None]:
        """See Drafter."""
        if self.learner is not None:
            self.learner.take_update(self.step.load)
        found: list[Draft | None] = [None] * len(seqs)
        wanted = [i for i, s in enumerate(seqs) if limits[i] > 0 and s in self._rows]
        for begin in range(0, len(wanted), self._max_seqs):
            some = wanted[begin : begin + self._max_seqs]
            for i, tokens, probs in zip(some, *self._draft([seqs[i] for i in some]), strict=True):
                self._check(seqs[i])
                self._said[seqs[i]] = Said(len(seqs[i].output), tokens, probs)
                count = limits[i]
                announced = self._factors.corrected(probs[:count])
                found[i] = Draft(tokens[:count], announced, self.name)
        return found

    def finish(self, seq: Sequence) -> None:
        """See Drafter."""
        self._check(seq)
        if self.learner is not None:
            self.learner.finish(seq)

    def _check(self, seq: Sequence) -> None:
        """What became of the last proposal, verified or not."""
        said = self._said.pop(seq, None)
        if said is None:
            return
        right = seq.output[said.place : said.place + len(said.tokens)]
        for place, (token, prob) in enumerate(
            zip(said.tokens[: len(right)], said.probs, strict=False)
        ):
            self._factors.note(place, prob, token == right[place])
            if token != right[place]:
                break

    @torch.inference_mode()
    def _draft(self, seqs: list[Sequence]) -> tuple[list[list[int]], list[list[float]]]:
        """Each sequence's tokens and probabilities."""
        assert self._hidden is not None, "there are rows"
        inputs, count = self.step.inputs, len(seqs)
        rows = torch.tensor([self._rows[seq] for seq in seqs], device=self._hidden.device)
        torch.index_select(self._hidden, 0, rows, out=inputs.hidden[:count])
        inputs.tokens[:count] = torch.tensor([seq.output[-1] for seq in seqs], dtype=torch.int32)
        tokens, probs = self.step.run(count)
        return tokens.T.tolist(), probs.T.tolist()


def build_learned_drafter(decoder: Decoder, config: EngineConfig) -> LearnedDrafter:
    """The drafter of `config.speculator` beside `decoder`, with a learner if asked for.

    ModelError for a folder that is none, ConfigError for one made for another model.
    """
    folder = Path(config.speculator or "")
    speculator = load_speculator(folder, _dtype_name(decoder), decoder.device)
    learner = None
    if config.speculator_learns:
        if config.device != "cpu":
            raise ConfigError(
                "speculator_learns trains on the CPU beside an engine on the CPU; this one is on "
                f"{config.device}. Use `sterna train` with kind = 'distill'",
                param="speculator_learns",
            )
        learner = Learner(speculator, decoder, config.speculator_rows)
    return LearnedDrafter(
        speculator,
        decoder,
        max_num_seqs=config.max_num_seqs,
        replay=config.capture,
        learner=learner,
    )


def _dtype_name(decoder: Decoder) -> DTypeName:
    names: dict[torch.dtype, DTypeName] = {
        torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16",
    }  # fmt: skip
    return names[decoder.dtype]
