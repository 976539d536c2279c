"""Tokenizers from Hugging Face folders, against transformers on the same folder."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer

from sterna.core.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from sterna.text.tokenizer import load_tokenizer

CORPUS = [
    "the tern flies from pole to pole",
    "one flat batch, one forward",
    "caf\u00e9 \u65e5\u672c",
] * 4
TEXTS = [
    "the tern",
    " two  terns\n",
    "caf\u00e9 \U0001f426 \u65e5\u672c\u8a9e",
    "<s>pole</s> <turn|>",
    "",
]


def train():
    backend = Backend(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture
def folder(tmp_path):
    backend = train()
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], pair=None, special_tokens=[("<s>", 0)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", bos_token="<s>", eos_token={"content": "</s>"})
    return tmp_path


def write(folder, name, **content):
    (folder / name).write_text(json.dumps(content))


def test_equal_to_transformers(folder):
    transformers = pytest.importorskip("transformers")
    write(
        folder,
        "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<s>",
        eos_token="</s>",
        added_tokens_decoder={
            "400": {"content": "<late>", "special": True, "normalized": False},
            "401": {"content": "<plain>", "special": False, "normalized": False},
        },
    )
    ours = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "a<late>b<plain>"]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == ids[1:]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.bos_token_id == theirs.bos_token_id == 0


def test_truncation_and_padding_of_the_file_are_off(folder):
    assert len(load_tokenizer(folder).encode("the tern flies from pole to pole " * 9)) > 16


def test_end_ids(folder):
    assert load_tokenizer(folder).eos_token_ids == (1,)
    write(folder, "config.json", eos_token_id=7)
    assert load_tokenizer(folder).eos_token_ids == (1, 7)
    write(folder, "generation_config.json", eos_token_id=[1, 9])
    assert load_tokenizer(folder).eos_token_ids == (1, 9)
    (folder / "chat_template.jinja").write_text("{{ messages }}<turn|>")
    assert load_tokenizer(folder).eos_token_ids == (1, 9, 2)


def test_chat_template_sources(folder):
    config = {"bos_token": "<s>"}
    named = [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]
    assert load_tokenizer(folder).chat_template is None
    write(folder, "tokenizer_config.json", **config, chat_template=named)
    assert load_tokenizer(folder).chat_template == "D"
    write(folder, "tokenizer_config.json", **config, chat_template="C")
    assert load_tokenizer(folder).chat_template == "C"
    write(folder, "chat_template.json", chat_template="J")
    assert load_tokenizer(folder).chat_template == "J"
    (folder / "chat_template.jinja").write_text("F\u00e9")
    assert load_tokenizer(folder).chat_template == "F\u00e9"


def test_vocab_and_merges_of_older_models(tmp_path):
    backend = train()
    backend.model.save(str(tmp_path))
    write(tmp_path, "tokenizer_config.json", bos_token="</s>", eos_token="</s>", add_bos_token=True)
    ours = load_tokenizer(tmp_path)
    for text in ("the tern", " caf\u00e9 pole\n"):
        assert ours.encode(text) == [1, *backend.encode(text).ids]
        assert ours.decode(ours.encode(text)) == text


def test_tokens_that_depend_on_neighbours_decode_whole(tmp_path):
    words = {"[UNK]": 0, "tern": 1, "##s": 2, "fly": 3}
    backend = Backend(WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("terns fly")
    assert ids == [1, 2, 3]
    assert tokenizer.decode(ids) == "terns fly"
    decoder = tokenizer.incremental()
    assert decoder.push(ids[:2]) + decoder.push(ids[2:]) + decoder.flush() == "terns fly"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "{oops"),
        ("tokenizer_config.json", "[1]"),
        ("generation_config.json", b"\xff\xfe"),
    ],
)
def test_damaged_files_are_named(folder, name, content):
    raw = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(raw)
    with pytest.raises(ModelFileError, match=name):
        load_tokenizer(folder)


def test_folders_without_a_tokenizer(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"found: tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelNotFoundError):
        load_tokenizer(tmp_path / "absent")
