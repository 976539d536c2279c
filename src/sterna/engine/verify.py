"""Choose the tokens of a step's sequences, those with drafts included. Lossless by construction.

What plain decoding draws at a place is a function of (logits row, request, place): greedy takes the
largest, sampling uses the uniform that rng.py names by (seed, sample, place). And a row's logits do
not depend on how many rows were computed beside it. So a draft is verified by drawing, at each of
its rows, the token that plain decoding would draw there: while it is the draft's token, the next
row is looked at too. The tokens are then those of plain decoding, bit by bit, greedy and sampled;
rejection sampling (arXiv 2211.17192), which keeps the distribution only, is not needed.

Rows of plans without constraints are drawn by one native call (`is_free`). Penalties, bans and
grammars depend on the tokens before: such rows are worked on one after the other, each as if the
drafts before it had been committed, and no further than the first mismatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sterna.core.errors import GrammarError
from sterna.core.log import get_logger
from sterna.engine.sampler import Sampled, draw_tokens, sample, sampled
from sterna.engine.sequence import Sequence as EngineSequence
from sterna.engine.structured import stuck_grammar

log = get_logger(__name__)

Rows = NDArray[np.float32]


class Draw(NamedTuple):
    """Tokens to choose: `seq` reads logits rows `row` .. `row + num_drafts`. A fork knows its
    parent.
    """

    seq: EngineSequence
    row: int
    parent: EngineSequence | None = None
    num_drafts: int = 0


def choose(logits: Rows, draws: Sequence[Draw]) -> list[list[Sampled]]:
    """For each draw its tokens in order, at least one; an error is the last of its list.

    Never raises for a bad row, as `sampler.sample`.
    """
    drafted = [draw for draw in draws if draw.num_drafts]
    if not drafted:
        return [[one] for one in choose_next(logits, draws)]
    plain = [draw for draw in draws if not draw.num_drafts]
    found = dict(zip(plain, choose_next(logits, plain), strict=True))
    verified = _verify_free(logits, [draw for draw in drafted if draw.seq.plan.is_free])
    for draw in drafted:
        if draw not in verified:
            verified[draw] = _verify_in_order(logits, draw)
    return [verified[draw] if draw in verified else [found[draw]] for draw in draws]


def choose_next(logits: Rows, draws: Sequence[Draw]) -> list[Sampled]:
    """One token a draw, whatever is drafted."""
    stuck = {i: error for i, draw in enumerate(draws) if (error := _fill_mask(draw.seq))}
    tokens = sample(logits, [draw.row for draw in draws], [draw.seq.plan for draw in draws])
    for i, error in stuck.items():
        tokens[i] = Sampled(-1, error=error)
    return tokens


def is_tainted(logits: Rows, draw: Draw) -> bool:
    """A draft's row is NaN or infinite, and so may be what it left in the cache.

    Every later row reads the keys and values of those before it, so the last row tells of all.
    """
    return bool(draw.num_drafts) and not np.isfinite(logits[draw.row + draw.num_drafts].max())


def _verify_free(logits: Rows, draws: Sequence[Draw]) -> dict[Draw, list[Sampled]]:
    """All rows of all draws at once; logprobs only of what is accepted."""
    rows = [draw.row + i for draw in draws for i in range(draw.num_drafts + 1)]
    plans = [draw.seq.plan for draw in draws for _ in range(draw.num_drafts + 1)]
    ahead = [i for draw in draws for i in range(draw.num_drafts + 1)]
    tokens = draw_tokens(logits, rows, plans, ahead)
    found, end = {}, 0
    for draw in draws:
        part = tokens[end : end + draw.num_drafts + 1]
        end += draw.num_drafts + 1
        count = 1 + _num_equal(part, draw.seq.draft)
        found[draw] = [sampled(logits[draw.row + i], draw.seq.plan, part[i]) for i in range(count)]
    return found


def _num_equal(tokens: Sequence[int], draft: Sequence[int]) -> int:
    """How many drafts are the tokens drawn in their places."""
    for i, token in enumerate(draft):
        if tokens[i] != token:
            return i
    return len(draft)


def _verify_in_order(logits: Rows, draw: Draw) -> list[Sampled]:
    """Row after row, as if the drafts before it were committed."""
    found = choose_next(logits, [draw])
    grammar = draw.seq.grammar.copy() if draw.seq.grammar is not None else None
    for i, token in enumerate(draw.seq.draft):
        if found[-1].token_id != token:
            break
        plan = draw.seq.plan.ahead(draw.seq.draft[: i + 1])
        if grammar is not None and plan.bitmask is not None:
            if not grammar.accept(token) or grammar.is_finished:
                break  # the end of this sample; commit finds it
            grammar.fill_bitmask(plan.bitmask)
            if grammar.error is not None:
                found.append(Sampled(-1, error=stuck_grammar(grammar)))
                break
        found.extend(sample(logits, [draw.row + i + 1], [plan]))
    return found


def _fill_mask(seq: EngineSequence) -> GrammarError | None:
    """Write the tokens that may come next. A grammar that met a limit would allow the end only,
    and an answer cut short would look whole: its error instead.
    """
    if seq.grammar is None or seq.plan.bitmask is None:
        return None
    seq.grammar.fill_bitmask(seq.plan.bitmask)
    return None if seq.grammar.error is None else stuck_grammar(seq.grammar)
