"""Tokenizers from GGUF metadata, on small vocabularies written for the purpose."""

from __future__ import annotations

import random
from itertools import pairwise

import gguf
import pytest

from sterna.core.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from sterna.text.pretokenizers import word_rule
from sterna.text.token_bytes import SPACE_MARK, byte_alphabet
from sterna.text.tokenizer import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def write(path, model, tokens, kinds, **fields):
    """A GGUF file that holds a tokenizer and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for key, value in fields.items():
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_bpe(path, *, merges=("a b", "ab c"), extra=("ab", "abc"), **fields):
    letters = list(byte_alphabet())
    special = ["<s>", "</s>", "<|im_end|>", "<think>"]
    tokens = [*letters, *extra, *special]
    kinds = [NORMAL] * (len(letters) + len(extra)) + [CONTROL] * 3 + [USER]
    first = len(letters) + len(extra)
    options = {"pre": "gpt-2", "bos_token_id": first, "eos_token_id": first + 1} | fields
    return write(path, "gpt2", tokens, kinds, merges=list(merges), **options), first


SPM_PIECES = {
    f"{SPACE_MARK}": -1.0, "a": -2.0, "b": -3.0, "c": -4.0, "ab": -5.0, "bc": -4.5,
    "abc": -9.0, f"{SPACE_MARK}a": -6.0, f"{SPACE_MARK}ab": -7.0, "ca": -8.0, "aa": -8.5,
    SPACE_MARK * 2: -3.5,
}  # fmt: skip


def spm(path, **fields):
    head = ["<unk>", "<s>", "</s>", "<mark>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*head, *bytes_, *SPM_PIECES]
    kinds = [UNKNOWN, CONTROL, CONTROL, USER] + [BYTE] * 256 + [NORMAL] * len(SPM_PIECES)
    scores = [0.0] * 260 + list(SPM_PIECES.values())
    options = {"scores": scores, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return write(path, "llama", tokens, kinds, **(options | fields)), tokens


def spm_by_definition(text, tokens):
    """SentencePiece BPE: join the adjacent pair whose piece scores best, leftmost first."""
    pieces = list(SPACE_MARK + text.replace(" ", SPACE_MARK)) if text else []
    while True:
        pairs = [
            (-SPM_PIECES[a + b], i)
            for i, (a, b) in enumerate(pairwise(pieces))
            if a + b in SPM_PIECES
        ]
        if not pairs:
            break
        _, i = min(pairs)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids = []
    for piece in pieces:
        if piece in SPM_PIECES:
            ids.append(tokens.index(piece))
        else:
            ids.extend(tokens.index(f"<0x{byte:02X}>") for byte in piece.encode())
    return ids


def test_sentencepiece_equals_its_definition(tmp_path):
    path, tokens = spm(tmp_path / "m.gguf")
    tokenizer = load_tokenizer(path)
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(
            rng.choices(["a", "b", "c", " ", "\u00e9", "\U0001f426"], k=rng.randint(0, 12))
        )
        ids = spm_by_definition(text, tokens)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == text


def test_sentencepiece_bytes_and_spaces(tmp_path):
    path, tokens = spm(tmp_path / "m.gguf")
    tokenizer = load_tokenizer(path)
    assert tokenizer.token_bytes(tokens.index("<0xC3>")) == b"\xc3"
    assert tokenizer.token_bytes(tokens.index(f"{SPACE_MARK}ab")) == b" ab"
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.encode("a<mark>b", add_special_tokens=False)[1] == 3
    first = [tokens.index(f"{SPACE_MARK}a")]
    assert tokenizer.decode([1, *first]) == "a"
    continued = tokenizer.incremental(keep_leading_space=True)
    assert continued.push(first) == " a"


def test_sentencepiece_without_space_prefix(tmp_path):
    path, _ = spm(tmp_path / "m.gguf", add_space_prefix=False, add_bos_token=False)
    tokenizer = load_tokenizer(path)
    for text in ("ab", " ab", "  ab c"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_level_with_bos_eos_and_user_tokens(tmp_path):
    path, first = byte_bpe(tmp_path / "m.gguf", add_bos_token=True, add_eos_token=True)
    tokenizer = load_tokenizer(path)
    abc = first - 1
    assert tokenizer.encode("abc") == [first, abc, first + 1]
    assert tokenizer.encode("abc", add_special_tokens=False) == [abc]
    assert tokenizer.special_ids == {first, first + 1, first + 2}
    assert tokenizer.decode(tokenizer.encode("<think>abc")) == "<think>abc"


def test_end_ids_come_from_keys_and_template(tmp_path):
    template = "{{ messages[0]['content'] }}<|im_end|>"
    path, first = byte_bpe(tmp_path / "m.gguf", chat_template=template, eot_token_id=3)
    assert load_tokenizer(path).eos_token_ids == (first + 1, 3, first + 2)


def test_missing_rule_warns_and_uses_the_default(tmp_path, caplog):
    letters = list(byte_alphabet())
    path = write(tmp_path / "m.gguf", "gpt2", [*letters, "ab"], [NORMAL] * 257, merges=["a b"])
    with caplog.at_level("WARNING", "sterna"):
        tokenizer = load_tokenizer(path)
    assert "tokenizer.ggml.pre" in caplog.text
    assert tokenizer.encode("ab") == [256]
    assert tokenizer.eos_token_ids == ()
    assert tokenizer.bos_token_id is None


@pytest.mark.parametrize(
    ("fields", "error", "found"),
    [
        ({"pre": "smolm"}, UnsupportedModelError, "did you mean 'smollm'"),
        ({"merges": ("x nosuch",)}, ModelFileError, "damaged vocabulary"),
        ({"bos_token_id": 9999}, ModelFileError, "bos_token_id is 9999"),
    ],
)
def test_bad_metadata_is_named(tmp_path, fields, error, found):
    path, _ = byte_bpe(tmp_path / "m.gguf", **fields)
    with pytest.raises(error, match=found):
        load_tokenizer(path)


def test_other_tokenizer_models_are_refused_by_name(tmp_path):
    path = write(tmp_path / "m.gguf", "rwkv", ["a"], [NORMAL])
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf.*rwkv.*known: gpt2, llama"):
        load_tokenizer(path)


def test_wrong_number_of_types(tmp_path):
    path = write(tmp_path / "m.gguf", "gpt2", ["a", "b"], [NORMAL], merges=["a b"])
    with pytest.raises(ModelFileError, match="2 tokens, 1 token types"):
        load_tokenizer(path)


def test_nothing_there(tmp_path):
    with pytest.raises(ModelNotFoundError, match="absent"):
        load_tokenizer(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    ("rule", "text", "words"),
    [
        ("gpt-2", "I've 123", ["I", "'ve", " 123"]),
        ("smollm", "I've 123", ["I", "'ve", " ", "1", "2", "3"]),
        ("llama-bpe", "I'VE 12345", ["I", "'VE", " ", "123", "45"]),
        ("qwen2", "x 12", ["x", " ", "1", "2"]),
        ("tekken", "CamelCase 12", ["Camel", "Case", " ", "1", "2"]),
        ("gpt-4o", "CamelCase's 1234", ["Camel", "Case's", " ", "123", "4"]),
        ("default", "a.b 12345", ["a", ".", "b", " ", "123", "45"]),
        ("deepseek-v3", "ab 1234", ["ab", " ", "123", "4"]),
    ],
)
def test_word_rules(rule, text, words):
    cut = word_rule(rule).pre_tokenizer().pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == words
