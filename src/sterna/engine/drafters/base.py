"""What a drafter is: it guesses a sequence's next tokens; verification decides which were right.

Drafters never change output. A wrong draft costs rows of one step, so each brings its own estimate
of how likely its tokens are, and `speculate` weighs that against the price of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

from torch import Tensor

from sterna.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Draft:
    """A linear continuation after a sequence's last token."""

    tokens: list[int]
    probs: list[float]  # estimated P(token i is accepted | the ones before it were)
    source: str  # name of the drafter

    @property
    def expected_accepted(self) -> float:
        """Tokens expected to survive verification: the sum of the prefixes' probabilities."""
        return sum(accumulate(self.probs, lambda path, prob: path * prob))


@runtime_checkable
class ReadsHidden(Protocol):
    """A drafter that also wants the target's hidden states.

    `num_drafts`: tokens of its longest draft. Where others have promised as many it is not asked.
    `observes`: it wants the states of all tokens, asked or not.
    """

    num_drafts: int
    observes: bool

    def read(self, hidden: Tensor | None, rows: Mapping[Sequence, int]) -> None:
        """Before a proposal: row `rows[seq]` of `hidden` [R, D] is the final normed state that the
        last token of `seq` was drawn from. Good for that proposal only; sequences that were not
        in the last step have no row.

        Preemption, prefix hits, chunked prompts and forks change nothing: a token is always drawn
        from a state, and that is the one.
        """

    def observe(self, seq: Sequence, hidden: Tensor) -> None:
        """[tokens, D]: the states that the tokens were drawn from with which `seq.output` now ends;
        the memory is the engine's and good for this call only.
        """


class Drafter(Protocol):
    """Proposes drafts. Called from the engine thread only; one drafter serves one engine.

    Nobody tells it what sequences gain: it reads that from `seq.output` when it is asked, and does
    nothing for as long as it is not.
    """

    name: str

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft | None]:
        """One draft a sequence, of 1 to `limits[i]` tokens; None where there is nothing to say.

        A sequence that it has not seen is new to it. A limit of 0 gives None.
        """

    def finish(self, seq: Sequence) -> None:
        """The sequence ended (also by abort): forget it. It may never have been proposed for."""
