"""Log-probabilities in OpenAI's two shapes, and prompt log-probabilities in vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sterna.engine.request import TokenLogprob
from sterna.server.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    TokenLogprobReply,
    TopLogprob,
)

if TYPE_CHECKING:
    from sterna.text.tokenizer import Tokenizer

# JSON has no infinity; OpenAI and vLLM write this for a token of probability zero.
_LEAST = -9999.0


Entries = Sequence[TokenLogprob | None]


def with_top(entries: Entries, num_top: int) -> Entries:
    """The entries with at most `num_top` candidates each."""
    return [None if one is None else replace(one, top=one.top[:num_top]) for one in entries]


@dataclass(frozen=True, slots=True)
class LogprobWriter:
    """Names tokens. A token that is half a UTF-8 character shows as U+FFFD; `bytes` is exact."""

    tokenizer: Tokenizer

    def chat(self, entries: Sequence[TokenLogprob]) -> ChatLogprobs:
        """OpenAI's chat shape."""
        return ChatLogprobs(content=[self._chat_entry(entry) for entry in entries])

    def prompt(self, entries: Entries) -> PromptLogprobs:
        """vLLM's prompt_logprobs: one dict a token, null for the first."""
        return [None if entry is None else self._prompt_entry(entry) for entry in entries]

    def text(self, token_id: int) -> str:
        """The token's text."""
        return self.tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def _chat_entry(self, entry: TokenLogprob) -> TokenLogprobReply:
        chosen = self._top(entry.token_id, entry.logprob)
        tops = [self._top(token_id, logprob) for token_id, logprob in entry.top]
        return TokenLogprobReply(**chosen.model_dump(), top_logprobs=tops)

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        raw = self.tokenizer.token_bytes(token_id)
        return TopLogprob(
            token=raw.decode("utf-8", "replace"), logprob=max(logprob, _LEAST), bytes=list(raw)
        )

    def _prompt_entry(self, entry: TokenLogprob) -> dict[int, dict[str, Any]]:
        # Only the chosen token's rank is known beside the top list, whose ranks are its order.
        ranked = [(token_id, logprob, i + 1) for i, (token_id, logprob) in enumerate(entry.top)]
        ranked.append((entry.token_id, entry.logprob, entry.rank))
        return {
            token_id: {
                "logprob": max(logprob, _LEAST),
                "rank": rank,
                "decoded_token": self.text(token_id),
            }
            for token_id, logprob, rank in ranked
        }


@dataclass(slots=True)
class CompletionLogprobList:
    """Grows with a completion; `take` gives what is new, so streams and whole answers agree."""

    writer: LogprobWriter
    _offset: int = 0
    _new: list[tuple[int, TokenLogprob | None, int]] = field(default_factory=list)

    def add_prompt(self, token_ids: Sequence[int], entries: Entries | None) -> None:
        """Add the echoed prompt; the first token has no log-probability."""
        for i, token_id in enumerate(token_ids):
            self._add(token_id, entries[i] if entries is not None else None)

    def add(self, entries: Sequence[TokenLogprob]) -> None:
        """Add completion tokens."""
        for entry in entries:
            self._add(entry.token_id, entry)

    def take(self) -> CompletionLogprobs:
        """Everything added since the last call."""
        new, self._new = self._new, []
        text = self.writer.text
        return CompletionLogprobs(
            text_offset=[offset for _, _, offset in new],
            tokens=[text(token_id) for token_id, _, _ in new],
            token_logprobs=[None if entry is None else _finite(entry) for _, entry, _ in new],
            top_logprobs=[self._tops(entry) for _, entry, _ in new],
        )

    def _add(self, token_id: int, entry: TokenLogprob | None) -> None:
        self._new.append((token_id, entry, self._offset))
        self._offset += len(self.writer.text(token_id))

    def _tops(self, entry: TokenLogprob | None) -> dict[str, float] | None:
        if entry is None:
            return None
        tops = {self.writer.text(token_id): max(value, _LEAST) for token_id, value in entry.top}
        # vLLM lists the chosen token too, whatever its rank.
        return {**tops, self.writer.text(entry.token_id): _finite(entry)}


def _finite(entry: TokenLogprob) -> float:
    return max(entry.logprob, _LEAST)
