"""Choose the next token of each row. The reference of kernels/sampling.py, which does steps 3 to 6.

A row goes through, in this order (V logits l, float32):

    1  grammar bitmask, allowed_token_ids, bad_words, min_tokens (no end token yet)   -> -inf
    2  repetition_penalty r over prompt + output:  l / r if l > 0 else l * r
       presence p and frequency f over output:     l - p * [count > 0] - f * count
       logit_bias:                                 l + bias
    3  temperature: 0 (or below 1e-5) takes the largest, ties to the smallest id; else l / t
    4  min_p: drop what is below min_p * the largest probability
    5  top_k, then top_p over the renormalised rest
    6  one uniform of rng.py, inverse CDF over the survivors in id order

Logprobs are the float32 log-softmax of the raw logits, before any of this. Each row is worked on
alone, so its result cannot depend on its companions. The definitions of the penalties are
OpenAI's (presence, frequency) and CTRL's (repetition, arXiv 1909.05858).

Only survivors are sorted for top_p: tokens with probability below (1 - top_p) / V weigh less than
1 - top_p together, so none of them is in the nucleus. On a 49k vocabulary this leaves a few
hundred to sort instead of 49k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sterna.core.errors import RequestError, StepError, SternaError
from sterna.engine.request import SamplingParams, TokenLogprob
from sterna.engine.rng import uniform
from sterna.kernels.sampling import Draw, draw, draw_scored
from sterna.kernels.scores import PLAIN, Distribution, score

# Below this a softmax over float32 logits is one-hot anyway, and l / t would overflow.
GREEDY_BELOW = 1e-5
# Width of the blocks whose maxima narrow down a top-k search: about the root of a vocabulary.
BLOCK = 64
_NEG_INF = np.float32(-np.inf)


@dataclass(slots=True, eq=False)
class RowPlan:
    """What the sampler must know about one sequence. `output` is the live list of its tokens."""

    params: SamplingParams
    seed: int
    sample_idx: int
    prompt: NDArray[np.int32]
    output: list[int]
    end_ids: tuple[int, ...] = ()  # not allowed before min_tokens
    bad_words: tuple[tuple[int, ...], ...] = ()
    bitmask: NDArray[np.int32] | None = None  # bit i of word i // 32: token i is allowed
    is_free: bool = field(init=False)  # steps 1 and 2 do nothing, now and later
    is_plain_greedy: bool = field(init=False)
    is_told: bool = field(init=False)  # the draw itself says the log-prob that was asked for

    def ahead(self, tokens: Sequence[int]) -> RowPlan:
        """The plan of the row behind `tokens`, as if they were committed."""
        bitmask = None if self.bitmask is None else self.bitmask.copy()
        return replace(self, output=[*self.output, *tokens], bitmask=bitmask)

    def __post_init__(self) -> None:
        p = self.params
        ids = p.allowed_token_ids or self.bad_words or p.logit_bias or p.min_tokens
        self.is_free = not (ids or has_penalties(p) or p.structured or self.bitmask is not None)
        self.is_plain_greedy = self.is_free and is_greedy(p) and p.logprobs is None
        self.is_told = self.is_free and not is_greedy(p) and _tells_drawn(p)


class Sampled(NamedTuple):
    """The chosen token of one row, or why there is none."""

    token_id: int
    logprob: TokenLogprob | None = None
    error: SternaError | None = None


def is_greedy(params: SamplingParams) -> bool:
    """The largest logit is taken."""
    return params.temperature < GREEDY_BELOW


def has_penalties(params: SamplingParams) -> bool:
    """Any of the three penalties is on."""
    return bool(
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    )


def _tells_drawn(params: SamplingParams) -> bool:
    """The log-prob that is wanted is the one of the distribution the token is drawn from."""
    if params.logprobs is None:
        return False
    return params.logprobs_mode == "processed" or (
        params.logprobs == 0 and _distribution(params) == PLAIN
    )


def _distribution(params: SamplingParams) -> Distribution:
    return Distribution(params.temperature, params.top_k, params.top_p, params.min_p)


def sample(
    logits: NDArray[np.float32], rows: Sequence[int], plans: Sequence[RowPlan]
) -> list[Sampled]:
    """One token a plan; plan i reads row `rows[i]` of `logits` [R, V].

    Never raises for a bad row (NaN or infinite logits, nothing allowed): that row's `Sampled`
    carries a StepError, or a RequestError when its own constraints exclude each other.
    """
    if all(plan.is_plain_greedy for plan in plans):
        return _sample_greedy(logits, rows)
    drawn = _draw_free(logits, rows, plans)
    jobs = enumerate(zip(rows, plans, strict=True))
    return [drawn.get(i) or _sample_row(logits[row], plan) for i, (row, plan) in jobs]


def draw_tokens(
    logits: NDArray[np.float32],
    rows: Sequence[int],
    plans: Sequence[RowPlan],
    ahead: Sequence[int],
) -> list[int]:
    """Tokens of rows whose plans are free, -1 for a broken row; row i is `ahead[i]` tokens further
    than its plan's output.
    """
    if all(is_greedy(plan.params) for plan in plans):
        return [_greedy_token(logits[row]) for row in rows]
    jobs = list(zip(rows, plans, ahead, strict=True))
    tokens = draw(logits, [_as_draw(*job) for job in jobs])
    if tokens is None:
        return [_draw_alone(logits[row], plan, num_ahead) for row, plan, num_ahead in jobs]
    return tokens


def sampled(raw: NDArray[np.float32], plan: RowPlan, token_id: int) -> Sampled:
    """A drawn token with the logprobs that were asked for; an error for -1."""
    if token_id == -1:
        return _broken_row()
    return Sampled(token_id, chosen_logprob(raw, plan.params, token_id))


def chosen_logprob(
    raw: NDArray[np.float32], params: SamplingParams, token_id: int
) -> TokenLogprob | None:
    """What the request wants to know of the token's probability. raw: [V], as the model gave it."""
    if params.logprobs is None:
        return None
    if params.logprobs_mode == "raw" or is_greedy(params):
        return token_logprob(raw, token_id, params.logprobs)
    scores = score(raw[None], np.array([token_id], np.int32), [_distribution(params)])
    return TokenLogprob(token_id, float(scores.logprobs[0]), _rank(raw, token_id))


def token_logprob(row: NDArray[np.float32], token_id: int, num_top: int) -> TokenLogprob:
    """Log-probability and rank of `token_id` in raw logits [V], with the `num_top` best."""
    scores = score(row[None], np.array([token_id], np.int32), [PLAIN])
    top_logit, log_sum = row.max(), float(scores.log_sums[0])
    return TokenLogprob(
        token_id=token_id,
        logprob=float(scores.logprobs[0]),
        rank=_rank(row, token_id),
        top=tuple((int(i), float(row[i] - top_logit) - log_sum) for i in _largest(row, num_top)),
    )


def _rank(row: NDArray[np.float32], token_id: int) -> int:
    return 1 + int(np.count_nonzero(row > row[token_id]))


def _sample_greedy(logits: NDArray[np.float32], rows: Sequence[int]) -> list[Sampled]:
    """All rows at once. argmax propagates NaN, so one look at the winner finds any NaN."""
    best = logits.argmax(axis=1)
    values = logits[np.arange(len(best)), best]
    sound = np.isfinite(values).tolist()
    tokens = best.tolist()
    return [Sampled(tokens[row]) if sound[row] else _broken_row() for row in rows]


def _draw_free(
    logits: NDArray[np.float32], rows: Sequence[int], plans: Sequence[RowPlan]
) -> dict[int, Sampled]:
    """The rows that need no processing, by one native call on all threads; or none.

    Log-probs come with the draw where they can: 32 rows of 49,152 that are asked for theirs one by
    one cost more than drawing them.
    """
    found: dict[int, Sampled] = {}
    told = [i for i, plan in enumerate(plans) if plan.is_told]
    scored = draw_scored(logits, [_as_draw(rows[i], plans[i]) for i in told]) if told else None
    for i, (token_id, logprob, rank) in zip(told, scored or (), strict=scored is not None):
        is_sound = token_id != -1
        found[i] = (
            Sampled(token_id, TokenLogprob(token_id, logprob, rank)) if is_sound else _broken_row()
        )
    free = [i for i, plan in enumerate(plans) if plan.is_free and i not in found]
    tokens = draw(logits, [_as_draw(rows[i], plans[i]) for i in free]) if free else None
    for i, token_id in zip(free, tokens or (), strict=tokens is not None):
        found[i] = sampled(logits[rows[i]], plans[i], token_id)
    return found


def _greedy_token(row: NDArray[np.float32]) -> int:
    best = int(row.argmax())
    return best if np.isfinite(row[best]) else -1


def _draw_alone(row: NDArray[np.float32], plan: RowPlan, ahead: int) -> int:
    """Without a native draw."""
    if is_greedy(plan.params) or not np.isfinite(row.max()):
        return _greedy_token(row)
    return reference_draw(row, plan, ahead)


def _as_draw(row: int, plan: RowPlan, ahead: int = 0) -> Draw:
    p = plan.params
    share = 0.0 if is_greedy(p) else uniform(plan.seed, plan.sample_idx, len(plan.output) + ahead)
    return Draw(row, p.temperature, p.top_k, p.top_p, p.min_p, share)


def _sample_row(raw: NDArray[np.float32], plan: RowPlan) -> Sampled:
    """A row that no native call has drawn."""
    if not np.isfinite(raw.max()):  # max propagates NaN
        return _broken_row()
    row = raw if plan.is_free else _process(raw, plan)
    if row is None:
        return Sampled(-1, error=_nothing_left())
    token_id = int(row.argmax()) if is_greedy(plan.params) else _draw(row, plan)
    return sampled(raw, plan, token_id)


def _process(raw: NDArray[np.float32], plan: RowPlan) -> NDArray[np.float32] | None:
    """Steps 1 and 2; None when no token is left."""
    row = _constrain(raw, plan, with_bans=True)
    if row.max() == _NEG_INF:
        # The grammar allows only what min_tokens or bad_words forbid: the grammar wins.
        row = _constrain(raw, plan, with_bans=False)
    return None if row.max() == _NEG_INF else _adjust(row, plan)


def _constrain(raw: NDArray[np.float32], plan: RowPlan, with_bans: bool) -> NDArray[np.float32]:
    """Step 1: a copy of the row with forbidden tokens at -inf."""
    row = raw.copy()
    if plan.bitmask is not None:
        bits = np.unpackbits(plan.bitmask.view(np.uint8), bitorder="little")
        row[: len(bits)][bits[: len(row)] == 0] = _NEG_INF
        row[len(bits) :] = _NEG_INF  # rows that pad the vocabulary have no bit
    if plan.params.allowed_token_ids:
        keep = np.array(plan.params.allowed_token_ids)
        kept = row[keep]
        row.fill(_NEG_INF)
        row[keep] = kept
    if with_bans:
        row[_banned(plan)] = _NEG_INF
    return row


def _banned(plan: RowPlan) -> list[int]:
    """End tokens before min_tokens, and last tokens of bad words whose start was just produced."""
    output = plan.output
    banned = list(plan.end_ids) if len(output) < plan.params.min_tokens else []
    for word in plan.bad_words:
        start = len(output) - len(word) + 1
        if start >= 0 and tuple(output[start:]) == word[:-1]:
            banned.append(word[-1])
    return banned


def _adjust(row: NDArray[np.float32], plan: RowPlan) -> NDArray[np.float32]:
    """Step 2, in place."""
    params = plan.params
    if has_penalties(params):
        _penalise(row, plan)
    for token_id, bias in params.logit_bias.items():
        row[token_id] += np.float32(bias)
    return row


def _penalise(row: NDArray[np.float32], plan: RowPlan) -> None:
    params = plan.params
    output = np.array(plan.output, np.int64)
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.concatenate([plan.prompt, output]))
        penalty = np.float32(params.repetition_penalty)
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    ids, counts = np.unique(output, return_counts=True)
    frequency = np.float32(params.frequency_penalty) * counts.astype(np.float32)
    row[ids] -= frequency + np.float32(params.presence_penalty)


def _draw(row: NDArray[np.float32], plan: RowPlan) -> int:
    """Steps 3 to 6: natively where that is possible, so that one request has one sampler."""
    tokens = draw(row[None], [_as_draw(0, plan)])
    return reference_draw(row, plan) if tokens is None else tokens[0]


def reference_draw(row: NDArray[np.float32], plan: RowPlan, ahead: int = 0) -> int:
    """Steps 3 to 6 in numpy, `ahead` tokens further than the plan's output."""
    ids, probs = _probabilities(row, plan.params)
    place = _invert_cdf(probs, uniform(plan.seed, plan.sample_idx, len(plan.output) + ahead))
    return place if ids is None else int(ids[place])


def _invert_cdf(probs: NDArray[np.float32], share: float) -> int:
    """The first index whose running sum exceeds `share` of the whole; 0 <= share < 1.

    By blocks, because a running sum over 49k floats waits 0.2 ms for its own last addition.
    """
    num_blocks = len(probs) // BLOCK
    sums = probs[: num_blocks * BLOCK].reshape(num_blocks, BLOCK).sum(axis=1, dtype=np.float64)
    tail = probs[num_blocks * BLOCK :].sum(dtype=np.float64)
    cdf = np.cumsum(np.append(sums, tail))
    point = share * cdf[-1]
    block = _exceeding(cdf, point)
    before = cdf[block - 1] if block else 0.0
    inner = np.cumsum(probs[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    return block * BLOCK + _exceeding(inner, point - before)


def _exceeding(cdf: NDArray[np.float64], point: float) -> int:
    """First index with cdf > point. Below the end, so what has no weight is never found."""
    return int(cdf.searchsorted(min(point, np.nextafter(cdf[-1], 0)), side="right"))


def _probabilities(
    row: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.int64] | None, NDArray[np.float32]]:
    """Ids in ascending order (None: all) and unnormalised probabilities (largest = 1)."""
    ids = None
    top_logit = row.max()
    if 0 < params.top_k < len(row):
        ids = np.sort(_largest(row, params.top_k))
        row = row[ids]
    probs = np.exp((row - top_logit) / np.float32(params.temperature))
    if params.min_p > 0:
        ids, probs = _only(np.flatnonzero(probs >= np.float32(params.min_p)), ids, probs)
    if params.top_p < 1:
        ids, probs = _only(_nucleus(probs, params.top_p), ids, probs)
    return ids, probs


def _only(
    keep: NDArray[np.int64], ids: NDArray[np.int64] | None, probs: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return keep if ids is None else ids[keep], probs[keep]


def _nucleus(probs: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Sorted indices of the smallest set of largest probabilities that weighs >= top_p."""
    total = float(probs.sum(dtype=np.float64))
    large = np.flatnonzero(probs >= (1 - top_p) * total / len(probs) * 0.999)
    by_prob = large[np.argsort(-probs[large], kind="stable")]
    before = np.cumsum(probs[by_prob], dtype=np.float64) - probs[by_prob]
    count = max(1, int(np.count_nonzero(before < top_p * total)))
    return np.sort(by_prob[:count])


def _largest(row: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Ids of the `count` largest, largest first, ties to the smaller id.

    The count-th largest of the block maxima bounds the count-th largest value from below, so only
    what reaches it is sorted: 20 of 49k for a top 5, 10 times faster than a partition of all.
    """
    if count == 0:
        return np.empty(0, np.int64)
    maxima = row[: len(row) // BLOCK * BLOCK].reshape(-1, BLOCK).max(axis=1)
    if 2 * count < len(maxima):
        bound = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
        ids = np.flatnonzero(row >= bound)
    else:
        ids = np.arange(len(row))
    return ids[np.argsort(-row[ids], kind="stable")[:count]]


def _nothing_left() -> RequestError:
    return RequestError(
        "the request's constraints leave no token to choose: allowed_token_ids and the structured "
        "output exclude each other here; loosen one"
    )


def _broken_row() -> Sampled:
    return Sampled(
        -1,
        error=StepError(
            "the model's logits are not finite (NaN or infinity) for this request; "
            "it was ended, others go on"
        ),
    )
