"""A byte tokenizer with a ChatML template, and settings from keywords."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from sterna.data.config import DataConfig
from sterna.text.spec import TokenizerSpec
from sterna.text.token_bytes import byte_alphabet
from sterna.text.tokenizer import Tokenizer

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + \
'<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def byte_tokenizer(template=CHATML, merges=()):
    """A token a byte (and a few merges), an EOS and the marks of ChatML."""
    vocab = {letter: i for i, letter in enumerate(sorted(byte_alphabet()))}
    for a, b in merges:
        vocab[a + b] = len(vocab)
    backend = Backend(BPE(vocab, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>", "<|eos|>"]
    backend.add_special_tokens([AddedToken(m, normalized=False, special=True) for m in marks])
    ids = (backend.token_to_id("<|eos|>"), backend.token_to_id("<|im_end|>"))
    return Tokenizer(TokenizerSpec(backend, ids, chat_template=template))


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


def settings(*paths, seq_len=64, **options):
    """DataConfig of paths (or source tables) with small windows and no threads."""
    sources = [p if isinstance(p, dict) else {"path": str(p)} for p in paths]
    defaults = {"seq_len": seq_len, "window_tokens": 1, "prefetch": 0}
    return DataConfig.model_validate({"sources": sources, **defaults, **options})


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_rows(n, prefix=""):
    return [
        {"messages": [{"role": "user", "content": f"{prefix}{i}?"},
                      {"role": "assistant", "content": f"{prefix}{i}!" + "." * (i % 7)}]}
        for i in range(n)
    ]  # fmt: skip


def texts_of(rows, tokenizer):
    """The documents of packed rows, as text."""
    return [
        tokenizer.decode([int(t) for t in row.tokens[a:b]], skip_special_tokens=False)
        for row in rows
        for a, b in zip(row.starts[:-1], row.starts[1:], strict=True)
    ]


def trained_of(row, tokenizer):
    """The trained targets of a row, as one text."""
    return tokenizer.decode([int(t) for t in row.targets if t >= 0], skip_special_tokens=False)


@pytest.fixture(scope="session")
def kit():
    return SimpleNamespace(
        byte_tokenizer=byte_tokenizer, settings=settings, write_jsonl=write_jsonl,
        chat_rows=chat_rows, texts_of=texts_of, trained_of=trained_of,
    )  # fmt: skip
