"""Text to token ids and back: one class over a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sterna.core.errors import ModelNotFoundError, RequestError
from sterna.text.gguf_vocab import read_vocab
from sterna.text.hf_folder import read_folder
from sterna.text.incremental import ByteDecoder, IncrementalDecoder, WholeDecoder
from sterna.text.spec import TokenizerSpec
from sterna.text.token_bytes import scheme_from_decoder


class Tokenizer:
    """Encodes and decodes. Holds no state that a call changes, so threads may share one.

    `vocab_size` counts the ids this tokenizer knows, up to the highest; a model's embedding may be
    padded beyond it, and ids up there decode to nothing.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        self._backend = spec.backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_token_ids = spec.eos_token_ids
        self.bos_token_id = spec.bos_token_id
        self.chat_template = spec.chat_template
        self.special_tokens = dict(spec.special_tokens)
        self._added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        highest = max(self._added, default=-1) + 1
        self.vocab_size = max(self._backend.get_vocab_size(with_added_tokens=True), highest)
        decoder = self._backend.decoder
        self._scheme = scheme_from_decoder(decoder.__getstate__() if decoder else None)
        self._pieces = _Pieces(self._compute_bytes)
        self._unspecial = _Pieces(lambda i: b"" if i in self.special_ids else self._pieces[i])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written in the text become their ids.

        `add_special_tokens` adds what the model puts around every text (BOS, for example); a
        rendered chat contains it already. Raises RequestError for text that is not Unicode.
        """
        try:
            # Not a batch of one: that would wake the thread pool of `tokenizers` for every request.
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise _not_unicode() from error

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        try:
            encoded = self._backend.encode_batch_fast(
                list(texts), add_special_tokens=add_special_tokens
            )
        except (TypeError, UnicodeEncodeError) as error:
            raise _not_unicode() from error
        return [encoding.ids for encoding in encoded]

    def token_starts(self, text: str, ids: Sequence[int]) -> NDArray[np.int64]:
        """The character of `text` at which each token starts; `ids` are its encoding without
        special tokens around it. A token that is a part of a character starts at that character.

        Exact where the tokens' bytes join to the text, which is checked; a tokenizer that changes
        the text (a normaliser, added tokens that strip) is asked for its own offsets.
        """
        pieces = [self._pieces[i] for i in ids]
        raw = text.encode()
        joined = b"".join(pieces)
        lead = len(joined) - len(raw)  # SentencePiece puts a space before every text
        if lead not in (0, 1) or joined != b" " * lead + raw:
            offsets = self._backend.encode(text, add_special_tokens=False).offsets
            return np.array([start for start, _ in offsets], np.int64)
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        starts: NDArray[np.int64] = np.maximum(np.concatenate([[0], ends])[: len(ids)] - lead, 0)
        if len(raw) == len(text):
            return starts
        is_first = (np.frombuffer(raw, np.uint8) & 0xC0) != 0x80
        characters = np.append(np.cumsum(is_first, dtype=np.int64) - 1, len(text))
        in_text: NDArray[np.int64] = characters[starts]
        return in_text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD."""
        decoder = self.incremental(skip_special_tokens)
        return decoder.push(ids) + decoder.flush()

    def incremental(
        self, skip_special_tokens: bool = True, *, keep_leading_space: bool = False
    ) -> IncrementalDecoder:
        """A decoder of one sequence, token by token.

        SentencePiece models put a space before every text and drop it when decoding. For a
        completion that continues a prompt that space is real: pass `keep_leading_space=True`.
        """
        if self._scheme is None:
            return WholeDecoder(
                lambda ids: self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
            )
        pieces = self._unspecial if skip_special_tokens else self._pieces
        return ByteDecoder(pieces.__getitem__, 0 if keep_leading_space else self._scheme.lead)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token adds to a text; empty for ids outside the vocabulary."""
        return self._pieces[token_id]

    def token_text(self, token_id: int) -> str:
        """The token as text, U+FFFD for bytes that are not a whole character."""
        return self._pieces[token_id].decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary (`<|im_end|>`), or None."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def to_json(self) -> str:
        """The `tokenizers` JSON of this tokenizer (1.5 MB for 49k tokens, 30 ms)."""
        return str(self._backend.to_str())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what decides a text's tokens: vocabulary, special tokens, chat template."""
        parts = (
            self.to_json(),
            self.chat_template or "",
            repr(sorted(self.special_tokens.items())),
        )
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()

    def _compute_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        return self._scheme.to_bytes(token) if self._scheme else token.encode()


def _not_unicode() -> RequestError:
    return RequestError(
        "the text holds lone surrogates (half of a UTF-16 pair); send valid Unicode"
    )


class _Pieces(dict[int, bytes]):
    """Bytes by token id, each computed when first met: a start-up that builds no table, and
    lookups at the speed of a dict. Racing threads compute the same value."""

    def __init__(self, compute: Callable[[int], bytes]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, token_id: int) -> bytes:
        piece = self[token_id] = self._compute(token_id)
        return piece


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model: a GGUF file or a folder in Hugging Face layout.

    Raises ModelNotFoundError when there is nothing at `path`, ModelFileError for damaged files and
    UnsupportedModelError, naming the kind, for vocabularies Sterna cannot read.
    """
    path = Path(path)
    if path.is_dir():
        return Tokenizer(read_folder(path))
    if not path.is_file():
        raise ModelNotFoundError(f"no model at {path}; give a folder or a .gguf file")
    return Tokenizer(read_vocab(path))
