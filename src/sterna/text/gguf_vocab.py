"""The tokenizer inside a GGUF file: metadata keys `tokenizer.ggml.*`, rebuilt for `tokenizers`.

Two kinds exist among the models Sterna serves: `gpt2` (byte-level BPE with a merge list) and
`llama` (SentencePiece BPE: scores instead of merges, bytes as a last resort). SmolLM2's 49k tokens
take 0.15 s from the file to a working tokenizer, about what its tokenizer.json would take, so
there is no cache to go stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from sterna.core.errors import ModelFileError, UnsupportedModelError
from sterna.core.gguf import read_gguf
from sterna.core.log import get_logger
from sterna.core.lookup import unknown
from sterna.text.pretokenizers import word_rule
from sterna.text.spec import TokenizerSpec, turn_end_ids, unique
from sterna.text.token_bytes import SPACE_MARK

_log = get_logger(__name__)

_PREFIX = "tokenizer.ggml."
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_ROLE_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",  # misspelt so in the GGUF specification
}


class TokenKind(IntEnum):
    """`tokenizer.ggml.token_type`, SentencePiece's piece types."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class _Vocab:
    """The metadata of one file, with typed access and errors that name the file."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self._metadata = metadata
        self.tokens: list[str] = self.need("tokens")
        self.kinds: list[int] = self.get("token_type") or [TokenKind.NORMAL] * len(self.tokens)
        if len(self.kinds) != len(self.tokens):
            raise ModelFileError(
                f"{path}: {len(self.tokens)} tokens, {len(self.kinds)} token types; fetch it again"
            )

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(_PREFIX + key, default)

    def need(self, key: str) -> Any:
        """A value the tokenizer cannot do without."""
        value = self.get(key)
        if value is None:
            raise ModelFileError(f"{self.path}: no {_PREFIX}{key}; the file holds no tokenizer")
        return value

    def token_at(self, key: str) -> str | None:
        """The token whose id is stored under `key`; None when the key is absent."""
        token_id: int | None = self.get(key)
        if token_id is None:
            return None
        if not 0 <= token_id < len(self.tokens):
            raise ModelFileError(
                f"{self.path}: {_PREFIX}{key} is {token_id}, the vocabulary has {len(self.tokens)}"
            )
        return self.tokens[token_id]

    def chat_template(self) -> str | None:
        template = self._metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None


def read_vocab(path: Path) -> TokenizerSpec:
    """The tokenizer of a GGUF file.

    Raises ModelFileError for a damaged file and UnsupportedModelError for a tokenizer model or
    word rule other than those of this module and `pretokenizers`.
    """
    vocab = _Vocab(path, read_gguf(path).metadata)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = vocab.need("model")
    if kind not in builders:
        raise UnsupportedModelError(f"{path}: {unknown('tokenizer model', str(kind), builders)}")
    try:
        backend, adds_bos = builders[kind](vocab)
    except ValueError as error:
        raise ModelFileError(f"{path}: damaged vocabulary: {error}") from error
    _add_special(backend, vocab)
    _add_around(backend, vocab, adds_bos)
    return _spec(backend, vocab)


def _byte_level(vocab: _Vocab) -> tuple[Backend, bool]:
    """Byte-level BPE, and whether texts begin with BOS unless the file says otherwise."""
    name = vocab.get("pre")
    if name is None:
        _log.warning("%s: no tokenizer.ggml.pre; words are cut by the default rule", vocab.path)
        name = "default"
    rule = word_rule(name)
    merges = [_pair(merge) for merge in vocab.need("merges")]
    ids = {token: index for index, token in enumerate(vocab.tokens)}
    backend = Backend(_bpe(ids, merges, ignore_merges=rule.whole_words))
    backend.pre_tokenizer = rule.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    if normalizer := rule.normalizer():
        backend.normalizer = normalizer
    return backend, rule.add_bos


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece(vocab: _Vocab) -> tuple[Backend, bool]:
    """SentencePiece BPE with byte fallback."""
    ids = {token: index for index, token in enumerate(vocab.tokens)}
    merges = _merges_from_scores(vocab, ids)
    unk = vocab.token_at("unknown_token_id")
    backend = Backend(_bpe(ids, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE_MARK)
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocab.get("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(steps)
    return backend, True


def _bpe(ids: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> BPE:
    try:
        return BPE(vocab=ids, merges=merges, **options)
    except (
        Exception
    ) as error:  # `tokenizers` raises bare Exception, for example a merge of no token
        raise ValueError(str(error)) from error


def _merges_from_scores(vocab: _Vocab, ids: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose token scores highest; as a merge list that is every split
    of every token into two tokens, in order of score, then of id."""
    scores = vocab.need("scores")
    mergeable = [i for i, kind in enumerate(vocab.kinds) if kind == TokenKind.NORMAL]
    mergeable.sort(key=lambda index: -scores[index])
    merges: list[tuple[str, str]] = []
    for index in mergeable:
        token = vocab.tokens[index]
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        merges.extend(sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]])))
    return merges


def _add_special(backend: Backend, vocab: _Vocab) -> None:
    """Tokens that are matched in the text before any merging."""
    special_kinds = (TokenKind.CONTROL, TokenKind.UNKNOWN)
    special, plain = [], []
    for token, kind in zip(vocab.tokens, vocab.kinds, strict=True):
        if kind in special_kinds:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == TokenKind.USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _add_around(backend: Backend, vocab: _Vocab, adds_bos: bool) -> None:
    """What every encoded text begins and ends with."""
    bos, eos = vocab.token_at("bos_token_id"), vocab.token_at("eos_token_id")
    around = ["$A"]
    if vocab.get("add_bos_token", adds_bos) and bos is not None:
        around.insert(0, bos)
    if vocab.get("add_eos_token", False) and eos is not None:
        around.append(eos)
    named = [(token, backend.token_to_id(token)) for token in around if token != "$A"]
    if named:
        backend.post_processor = processors.TemplateProcessing(
            single=around, pair=None, special_tokens=list(dict.fromkeys(named))
        )


def _spec(backend: Backend, vocab: _Vocab) -> TokenizerSpec:
    template = vocab.chat_template()
    ends = [vocab.get(key) for key in _END_KEYS if vocab.token_at(key) is not None]
    roles = {role: vocab.token_at(key) for role, key in _ROLE_KEYS.items()}
    return TokenizerSpec(
        backend=backend,
        eos_token_ids=unique([*ends, *turn_end_ids(backend, template)]),
        bos_token_id=vocab.get("bos_token_id"),
        chat_template=template,
        special_tokens={role: token for role, token in roles.items() if token is not None},
    )
