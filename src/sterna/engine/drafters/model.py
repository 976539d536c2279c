"""Drafts from a small model of the same tokenizer: greedy, all sequences in one batch.

It has a KV cache and a Runner of its own. Each sequence has a shadow: the same prompt, and as
output what was committed and then what was drafted. Keys and values of drafts that came true are
kept; the shadow is cut back to where it differs from the sequence. A long prompt is computed over
several proposals, `MAX_CATCH_UP` tokens each, so that no step of the engine waits for all of it;
until then the sequence gets no draft.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sterna.core.errors import ConfigError
from sterna.engine.config import EngineConfig
from sterna.engine.drafters.base import Draft
from sterna.engine.kv import BlockPool
from sterna.engine.runner import InferenceModel, Runner
from sterna.engine.scheduler import Chunk
from sterna.engine.sequence import Sequence
from sterna.model.hub import resolve_model
from sterna.model.load import DTypeName
from sterna.quant.load import load_quantized
from sterna.text.tokenizer import Tokenizer, load_tokenizer

BLOCK_SIZE: Final = 16
# Tokens of prompts computed in one proposal: about one prompt chunk of the engine itself.
MAX_CATCH_UP: Final = 256
# Its KV cache at most. Two layers of SmolLM2-135M's width take 1.5 KB a token.
MAX_KV_BYTES: Final = 256 << 20


def check_vocabulary(draft: Tokenizer, target: Tokenizer) -> None:
    """ConfigError unless both give every id the same bytes."""
    if draft.fingerprint == target.fingerprint:
        return
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"the draft model's tokenizer has {draft.vocab_size:,} tokens, the model's "
            f"{target.vocab_size:,}; a draft model needs the same tokenizer"
        )
    ids = range(target.vocab_size)
    differing = next((i for i in ids if draft.token_bytes(i) != target.token_bytes(i)), None)
    if differing is not None:
        raise ConfigError(
            f"token {differing} is {draft.token_bytes(differing)!r} in the draft model's tokenizer "
            f"and {target.token_bytes(differing)!r} in the model's; a draft model needs the same "
            "tokenizer"
        )


@dataclass(slots=True, eq=False)
class Growing:
    """A draft in the making."""

    seq: Sequence
    shadow: Sequence
    limit: int
    draft: Draft
    path: float = 1.0  # probability that all of it is accepted


def build_model_drafter(model: str, tokenizer: Tokenizer, config: EngineConfig) -> ModelDrafter:
    """A drafter from a model folder, GGUF file or hub name, for a target with `tokenizer`.

    Raises ModelError (not found, damaged, unsupported) and ConfigError for another vocabulary.
    """
    path = resolve_model(model)
    check_vocabulary(load_tokenizer(path), tokenizer)
    dtype: DTypeName = "bfloat16" if config.dtype == "auto" else config.dtype
    decoder = load_quantized(path, dtype, config.device).decoder
    decoder.prepare_inference()
    layers = decoder.new_kv_layers(1, BLOCK_SIZE)
    num_blocks = MAX_KV_BYTES // sum(layer.nbytes for layer in layers)
    longest = -(-decoder.config.num_positions // BLOCK_SIZE)
    return ModelDrafter(
        decoder,
        max_num_seqs=config.max_num_seqs,
        num_blocks=max(2, min(num_blocks, longest * config.max_num_seqs + 1)),
        device=config.device,
        replay=config.capture,
    )


class ModelDrafter:
    """See the module docstring.

    `decoder`: prepared for inference. `num_blocks` of BLOCK_SIZE tokens are its KV cache; sequences
    that find no block get no draft. Call `check_vocabulary` before: ids are passed on unchanged.
    """

    name = "model"

    def __init__(
        self,
        decoder: InferenceModel,
        *,
        max_num_seqs: int,
        num_blocks: int,
        min_prob: float = 0.1,
        device: str = "cpu",
        replay: bool = True,
    ) -> None:
        self._decoder = decoder
        self._max_len = decoder.config.num_positions
        self._min_prob = min_prob
        self._max_seqs = max_num_seqs
        self._pool = BlockPool(num_blocks, BLOCK_SIZE)
        self._max_blocks = min(-(-self._max_len // BLOCK_SIZE), num_blocks)
        self._runner = Runner(
            decoder,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_tokens=MAX_CATCH_UP + max_num_seqs,
            max_seqs=max_num_seqs,
            max_blocks=self._max_blocks,
            device=device,
            replay=replay,
        )
        self._shadows: dict[Sequence, Sequence] = {}

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft | None]:
        """See Drafter."""
        growing = [
            Growing(seq, self._shadow_of(seq), limit, Draft([], [], self.name))
            for seq, limit in zip(seqs, limits, strict=True)
            if limit > 0
        ][: self._max_seqs]
        for each in growing:
            _follow(each.shadow, each.seq.output)
        left = MAX_CATCH_UP
        steps: list[tuple[Growing, Chunk]] = []
        for each in sorted(growing, key=lambda each: each.shadow.num_remaining):
            chunk = self._catch_up(each.shadow, left)
            if chunk is not None:
                steps.append((each, chunk))
                left -= chunk.num_tokens - 1
        while steps:
            steps = self._grow(steps)
        made = {each.seq: each.draft for each in growing if each.draft.tokens}
        return [made.get(seq) for seq in seqs]

    def finish(self, seq: Sequence) -> None:
        """See Drafter."""
        shadow = self._shadows.pop(seq, None)
        if shadow is not None:
            self._pool.free(shadow.blocks)

    def check_integrity(self) -> None:
        """Assert that every block is accounted for; for tests."""
        self._pool.check_integrity([shadow.blocks for shadow in self._shadows.values()])

    def _shadow_of(self, seq: Sequence) -> Sequence:
        shadow = self._shadows.get(seq)
        if shadow is None:
            offset = self._decoder.rope_row_offset(seq.num_prompt_tokens + seq.state.max_output)
            state = replace(seq.state, sequences=[], rope_offset=offset, prompt_logprobs=None)
            shadow = Sequence(state, seq.index, seq.plan, seq.stop, seq.order)
            shadow.table = np.zeros(self._max_blocks, np.int32)
            self._shadows[seq] = shadow
        return shadow

    def _catch_up(self, shadow: Sequence, left: int) -> Chunk | None:
        """The first chunk of this proposal; it samples when nothing is left to compute after it."""
        count = min(shadow.num_remaining, left + 1)
        return self._chunk(shadow, count, samples=count == shadow.num_remaining)

    def _chunk(self, shadow: Sequence, count: int, samples: bool) -> Chunk | None:
        """`count` tokens with blocks to write to; None when they do not fit."""
        end = shadow.num_computed + count
        if end > self._max_len or not self._reserve(shadow, end):
            return None
        return Chunk(shadow, shadow.num_computed, count, samples)

    def _reserve(self, shadow: Sequence, num_tokens: int) -> bool:
        held = len(shadow.blocks)
        needed = -(-num_tokens // BLOCK_SIZE)
        if needed <= held:
            return True
        fresh = self._pool.allocate(needed - held) if needed <= self._max_blocks else None
        if fresh is None:
            return False
        assert shadow.table is not None, "made with the shadow"
        shadow.blocks.extend(fresh)
        shadow.table[held:needed] = fresh
        return True

    def _grow(self, steps: list[tuple[Growing, Chunk]]) -> list[tuple[Growing, Chunk]]:
        """Run the chunks; returns those of the next step, of drafts that go on."""
        chunks = [chunk for _, chunk in steps]
        logits = self._runner.run(chunks)
        for chunk in chunks:
            chunk.seq.num_computed += chunk.num_tokens
        sampling = [each for each, chunk in steps if chunk.samples]
        following: list[tuple[Growing, Chunk]] = []
        for each, row in zip(sampling, logits.rows, strict=True):
            if not self._append(each, logits.values[row]):
                continue
            if next_chunk := self._chunk(each.shadow, 1, samples=True):
                following.append((each, next_chunk))
        return following

    def _append(self, each: Growing, logits: NDArray[np.float32]) -> bool:
        """Add the likeliest token; False when the draft ends here."""
        token = int(logits.argmax())
        prob = float(1 / np.exp(logits - logits[token]).sum())
        each.path *= prob
        if not each.path >= self._min_prob:  # also NaN
            return False
        each.draft.tokens.append(token)
        each.draft.probs.append(prob)
        each.shadow.output.append(token)
        return len(each.draft.tokens) < each.limit


def _follow(shadow: Sequence, output: list[int]) -> None:
    """Let the shadow's output be `output`; what was computed of another one is void."""
    pairs = zip(shadow.output, output, strict=False)
    same = next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, (shadow.output, output)))
    )
    del shadow.output[same:]
    shadow.output.extend(output[same:])
    shadow.num_computed = min(shadow.num_computed, shadow.num_prompt_tokens + same)
    # The last token's logits begin the draft: it is computed again if it was drafted before.
    shadow.num_computed = min(shadow.num_computed, shadow.num_tokens - 1)


def _common_length(a: list[int], b: list[int]) -> int:
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
