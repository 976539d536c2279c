"""Structured output: which tokens may come next so that the completion belongs to a language.

llguidance does the parsing. This module decides what surrounds it: compiling happens on threads of
its own, results are kept in an LRU cache, every sequence has its own state, and what can go wrong
with a client's grammar is a GrammarError. JSON may hold white space between tokens, but no more
than one space or one line break with indentation: without a bound a small model can emit blanks
until it runs out of tokens.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sterna.core.errors import GrammarError, UnsupportedModelError
from sterna.engine.request import StructuredSpec
from sterna.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # the package is loaded with the first grammar, not at start-up
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Measured: 45 kB of JSON schema compile in 40 ms; llguidance bounds the work a byte can cause.
MAX_GRAMMAR_BYTES = 262_144
MAX_CHOICES = 10_000
CACHE_SIZE = 64
NUM_THREADS = 1
_MAX_ERROR_CHARS = 500

_JSON_OPTIONS = {"whitespace_pattern": r"( |\n {0,16})"}


class GrammarState:
    """Where one sequence stands in its grammar. One owner, not shared between threads."""

    def __init__(self, matcher: LLMatcher, num_words: int) -> None:
        self._matcher = matcher
        self._num_words = num_words

    def fill_bitmask(self, out: npt.NDArray[np.int32]) -> None:
        """Write the allowed tokens into a row int32 `[ceil(vocab_size / 32)]`, bit i % 32 of word
        i // 32 for token i. End tokens are allowed exactly when the grammar may end here, and are
        all that is allowed when it must. Takes 5-50 us, the first row of a grammar up to 2 ms."""
        if out.dtype != np.int32 or out.shape != (self._num_words,) or not out.flags.c_contiguous:
            raise ValueError(
                f"the bit mask is {out.dtype}{list(out.shape)}, it has to be a contiguous "
                f"int32[{self._num_words}]"
            )
        self._matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)

    def accept(self, token_id: int) -> bool:
        """Go on by one token. False (and `error` is set) when the grammar does not allow it."""
        return bool(self._matcher.consume_token(token_id))

    def validate_prefix(self, ids: Sequence[int]) -> int:
        """How many of `ids` in order could be accepted. Changes nothing: a check of drafts."""
        return int(self._matcher.validate_tokens(list(ids)))

    @property
    def is_finished(self) -> bool:
        """True when nothing but an end token can follow: the completion is whole."""
        return bool(self._matcher.is_stopped()) and self.error is None

    @property
    def may_end(self) -> bool:
        """True when the text so far belongs to the language."""
        return bool(self._matcher.is_accepting())

    @property
    def error(self) -> str | None:
        """Why this state cannot go on (a refused token, a limit of the parser), else None."""
        return _short(self._matcher.get_error()) if self._matcher.is_error() else None

    def copy(self) -> GrammarState:
        """An independent state at the same place (3 us)."""
        return GrammarState(self._matcher.deep_copy(), self._num_words)


class CompiledGrammar:
    """A grammar ready for use. Threads may share it."""

    def __init__(self, matcher: LLMatcher, num_words: int) -> None:
        self._start = GrammarState(matcher, num_words)
        self._lock = threading.Lock()

    def new_state(self) -> GrammarState:
        """A state at the beginning, for one sequence."""
        with self._lock:
            return self._start.copy()


class GrammarCompiler:
    """Compiles grammars for one tokenizer, off the caller's thread.

    `vocab_size` is the model's (logits columns); the tokenizer's own if not given. The first
    grammar also loads llguidance and its view of the vocabulary (0.3 s for 49k tokens).
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int | None = None, *, cache_size: int = CACHE_SIZE
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = max(vocab_size or 0, tokenizer.vocab_size)
        self.num_words = (self._vocab_size + 31) // 32
        self._cache_size = cache_size
        self._cache: OrderedDict[StructuredSpec, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()  # guards the cache
        self._ll_lock = threading.Lock()
        self._ll_tokenizer: LLTokenizer | None = None
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="sterna-grammar")

    def submit(self, spec: StructuredSpec) -> Future[CompiledGrammar]:
        """Start compiling; done at once when the grammar is cached. The future raises GrammarError
        for a bad grammar. It is the caller's own: cancelling it disturbs nobody."""
        cached = self._cached(spec)
        if cached is None:
            return self._pool.submit(self.compile, spec)
        future: Future[CompiledGrammar] = Future()
        future.set_result(cached)
        return future

    def compile(self, spec: StructuredSpec) -> CompiledGrammar:
        """Compile on this thread. Raises GrammarError with llguidance's reason."""
        cached = self._cached(spec)
        if cached is not None:
            return cached
        check_spec(spec)
        grammar = CompiledGrammar(self._matcher(spec), self.num_words)
        with self._lock:
            self._cache[spec] = grammar
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return grammar

    def warm(self) -> Future[Any]:
        """Load llguidance and its vocabulary now, in the background."""
        return self._pool.submit(self._load_tokenizer)

    def shutdown(self) -> None:
        """Drop waiting work and end the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _cached(self, spec: StructuredSpec) -> CompiledGrammar | None:
        with self._lock:
            if spec in self._cache:
                self._cache.move_to_end(spec)
            return self._cache.get(spec)

    def _matcher(self, spec: StructuredSpec) -> LLMatcher:
        from llguidance import LLMatcher

        try:
            grammar = _grammar_text(spec)
        except ValueError as error:  # nested deeper than llguidance reads, about 120 levels
            raise _bad(spec, f"is refused: {error}") from error
        matcher = LLMatcher(self._load_tokenizer(), grammar, log_level=0, limits=_limits())
        if matcher.is_error():
            raise GrammarError(f"{spec.kind}: {_short(matcher.get_error())}", param=spec.kind)
        return matcher

    def _load_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._ll_lock:
            if self._ll_tokenizer is None:
                if not self._tokenizer.eos_token_ids:
                    raise UnsupportedModelError(
                        "the model declares no end token, so structured output could never end"
                    )
                self._ll_tokenizer = LLTokenizer(
                    self._tokenizer.to_json(),
                    n_vocab=self._vocab_size,
                    eos_token=list(self._tokenizer.eos_token_ids),
                )
            return self._ll_tokenizer


def stuck_grammar(state: GrammarState) -> GrammarError:
    """For a grammar that compiles but cannot be followed: a limit of the parser, mostly."""
    return GrammarError(f"the grammar cannot go on: {state.error}; simplify it", param="grammar")


def check_spec(spec: StructuredSpec) -> None:
    """The checks that need no compiling: size, encoding, JSON. Raises GrammarError."""
    try:
        size = len(spec.value.encode())
    except UnicodeEncodeError as error:
        raise _bad(spec, "holds lone surrogates; send valid Unicode") from error
    if size > MAX_GRAMMAR_BYTES:
        raise _bad(spec, f"has {size:,} bytes, at most {MAX_GRAMMAR_BYTES:,} are allowed")
    if spec.kind == "json_schema":
        _schema(spec)
    elif spec.kind == "choice":
        _choices(spec)
    elif spec.kind != "json_object" and not spec.value:
        raise _bad(spec, "is empty")


def _grammar_text(spec: StructuredSpec) -> str:
    """llguidance's form of a specification."""
    from llguidance import LLMatcher

    match spec.kind:
        case "json_object":
            return _json_grammar({"type": "object"})
        case "json_schema":
            return _json_grammar(_schema(spec))
        case "regex":
            return str(LLMatcher.grammar_from_regex(spec.value))
        case "grammar":
            return str(LLMatcher.grammar_from_lark(spec.value))
        case "choice":
            words = " | ".join(json.dumps(c, ensure_ascii=False) for c in _choices(spec))
            return str(LLMatcher.grammar_from_lark(f"start: {words}"))


def _json_grammar(schema: Any) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS))


def _schema(spec: StructuredSpec) -> dict[str, Any]:
    """The JSON schema as an object. `true` and `{}` mean any JSON value."""
    try:
        schema = json.loads(spec.value)
    except (ValueError, RecursionError) as error:
        raise _bad(spec, f"is not valid JSON ({error})") from error
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise _bad(spec, f"is a JSON {type(schema).__name__}, it has to be an object")
    return schema


def _choices(spec: StructuredSpec) -> list[str]:
    try:
        choices = json.loads(spec.value)
    except (ValueError, RecursionError) as error:
        raise _bad(spec, f"is not valid JSON ({error})") from error
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise _bad(spec, "has to be a list of strings that are not empty")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise _bad(spec, f"has {len(choices)} entries, 1 to {MAX_CHOICES:,} are allowed")
    return choices


def _bad(spec: StructuredSpec, what: str) -> GrammarError:
    return GrammarError(f"{spec.kind} {what}", param=spec.kind)


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    # Verbose errors would put the parser's tables into a client's error message.
    return LLParserLimits(verbose_errors=False)


def _short(message: str) -> str:
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line if len(line) <= _MAX_ERROR_CHARS else line[:_MAX_ERROR_CHARS] + "..."
