"""When a sample ends, and which text may already be shown.

Text comes from the tokenizer's incremental decoder, which itself holds back incomplete UTF-8. On
top of it, text is held back while it could be the beginning of a stop string, so that a stop
string is found across token borders and never shown in part.

End tokens (eos, stop_token_ids) are part of `token_ids` but not of the text, unless
`include_stop_str_in_output` asks for them. Before `min_tokens` nothing ends a sample: end tokens
are not sampled, and stop strings are not looked for.
"""

from __future__ import annotations

from typing import NamedTuple

from sterna.engine.request import FinishReason, SamplingParams
from sterna.text.incremental import IncrementalDecoder


class Progress(NamedTuple):
    """What one token did: new text, and the end if it is one."""

    text: str
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class StopChecker:
    """Follows one sample, token by token. After a finish it must not be called again."""

    def __init__(
        self,
        params: SamplingParams,
        decoder: IncrementalDecoder,
        eos_ids: frozenset[int],
        max_output: int,
    ) -> None:
        self._decoder = decoder
        self._stop = params.stop
        self._stop_ids = frozenset(params.stop_token_ids)
        self._eos_ids = frozenset() if params.ignore_eos else eos_ids
        self._min_tokens = params.min_tokens
        self._max_output = max_output
        self._include_stop = params.include_stop_str_in_output
        self._held = ""
        self._num_tokens = 0

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end the sample."""
        return tuple(sorted(self._stop_ids | self._eos_ids))

    def push(self, token_id: int) -> Progress:
        """Take the next token."""
        self._num_tokens += 1
        if self._num_tokens > self._min_tokens:
            if token_id in self._stop_ids:
                return self._end_token(token_id, token_id)
            if token_id in self._eos_ids:
                return self._end_token(token_id, None)
        progress = self._add_text(self._decoder.push((token_id,)))
        if progress.finish_reason is None and self._num_tokens >= self._max_output:
            return self._end_length(progress.text)
        return progress

    def finish_grammar(self) -> Progress:
        """The grammar accepts nothing more: the sample is complete."""
        return self._end(FinishReason.STOP)

    def flush(self) -> str:
        """All text held back; for a sample that is aborted."""
        text = self._held + self._decoder.flush()
        self._held = ""
        return text

    def _end_token(self, token_id: int, reason: int | None) -> Progress:
        text = self._decoder.push((token_id,)) if self._include_stop else ""
        return self._end(FinishReason.STOP, text, reason)

    def _end_length(self, shown: str) -> Progress:
        rest = self._end(FinishReason.LENGTH)
        return Progress(shown + rest.text, rest.finish_reason, rest.stop_reason)

    def _end(
        self, reason: FinishReason, text: str = "", stop_reason: int | None = None
    ) -> Progress:
        """Release what is held back; the flushed text may still complete a stop string."""
        progress = self._add_text(text + self._decoder.flush())
        if progress.finish_reason is not None:
            return progress
        held, self._held = self._held, ""
        return Progress(progress.text + held, reason, stop_reason)

    def _add_text(self, text: str) -> Progress:
        if not self._stop or self._num_tokens <= self._min_tokens:
            return Progress(text)
        if not text:
            return Progress("")
        buffer = self._held + text
        found = self._first_stop(buffer)
        if found is not None:
            start, stop = found
            end = start + len(stop) if self._include_stop else start
            self._held = ""
            return Progress(buffer[:end], FinishReason.STOP, stop)
        keep = self._num_held(buffer)
        self._held = buffer[len(buffer) - keep :]
        return Progress(buffer[: len(buffer) - keep])

    def _first_stop(self, buffer: str) -> tuple[int, str] | None:
        """The stop string that begins first; of two at one place the one that ends first."""
        hits = [(at, len(stop), stop) for stop in self._stop if (at := buffer.find(stop)) >= 0]
        if not hits:
            return None
        at, _, stop = min(hits)
        return at, stop

    def _num_held(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that begins a stop string."""
        longest = max(map(len, self._stop)) - 1
        for size in range(min(longest, len(buffer)), 0, -1):
            tail = buffer[-size:]
            if any(stop.startswith(tail) for stop in self._stop):
                return size
        return 0
