"""Settings every test shares."""

from __future__ import annotations

import json
import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

_WORDS = (
    *("the", "tern", "flies", "from", "pole", "to", "and", "back", "gull", "sea", "law"),
    *("tax", "of", "in", "ice", "wind", "north", "south"),
)


@pytest.fixture(autouse=True)
def sterna_log_reaches_caplog(monkeypatch):
    """A command run by an earlier test may have ended propagation; caplog listens at the root."""
    monkeypatch.setattr(logging.getLogger("sterna"), "propagate", True)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """make(num_labels=0, **pooling): a folder of a tiny random BERT with a WordPiece tokenizer."""

    def make(num_labels: int = 0, mode: str = "mean", max_tokens: int = 48, **texts):
        import torch
        import transformers as tf
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

        folder = tmp_path_factory.mktemp("encoder")
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS, *"abcdefghijklmnopqrstuvwxyz"]
        tokens += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
        backend = Tokenizer(
            models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]")
        )
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        backend.save(str(folder / "tokenizer.json"))
        torch.manual_seed(0)
        config = tf.BertConfig(
            vocab_size=len(tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, initializer_range=0.1,
            num_labels=max(num_labels, 1),
        )  # fmt: skip
        kind = tf.BertForSequenceClassification if num_labels else tf.BertModel
        kind(config).eval().save_pretrained(folder)
        if not num_labels:
            _write_modules(folder, mode, max_tokens, texts)
        return folder

    return make


def _write_modules(folder, mode, max_tokens, texts) -> None:
    modules = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(
            [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
        )
    ]
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": mode == "mean", "pooling_mode_cls_token": mode == "cls"}
    for name, value in (
        ("modules.json", modules),
        ("1_Pooling/config.json", pooling),
        ("sentence_bert_config.json", {"max_seq_length": max_tokens}),
        ("config_sentence_transformers.json", texts),
    ):
        (folder / name).write_text(json.dumps(value))
