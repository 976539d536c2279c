"""Token shards give the rows that the texts give."""

from __future__ import annotations

import numpy as np
import pytest

from sterna.core.errors import DataError
from sterna.data.loader import Loader
from sterna.data.prepare import pack_shards
from sterna.data.shards import TokenShard


def rows_of(tokenizer, data):
    with Loader(data, tokenizer) as loader:
        return list(loader)


def test_same_rows_as_from_the_text(tmp_path, kit, tokenizer):
    path = kit.write_jsonl(tmp_path / "a.jsonl", kit.chat_rows(40))
    data = kit.settings(path)
    ticks = []
    counts = pack_shards(
        data, tokenizer, tmp_path / "s", shard_tokens=500,
        tick=lambda so_far: ticks.append(so_far.of["documents"]),
    )  # fmt: skip
    assert counts.of["documents"] == 40 == ticks[-1]
    assert len(list((tmp_path / "s").iterdir())) > 2
    for one, two in zip(rows_of(tokenizer, data), rows_of(tokenizer, kit.settings(tmp_path / "s")),
                        strict=True):  # fmt: skip
        assert np.array_equal(one.tokens, two.tokens)
        assert np.array_equal(one.targets, two.targets)
        assert np.array_equal(one.starts, two.starts)
    (row, *_) = rows_of(tokenizer, kit.settings(tmp_path / "s", train_on="all"))
    assert row.num_targets == len(row.tokens) - len(row.starts) + 1


def test_refusals(tmp_path, kit, tokenizer):
    path = kit.write_jsonl(tmp_path / "a.jsonl", kit.chat_rows(3))
    pack_shards(kit.settings(path), tokenizer, tmp_path / "s")
    with pytest.raises(DataError, match="holds shards already"):
        pack_shards(kit.settings(path), tokenizer, tmp_path / "s")
    with pytest.raises(DataError, match="another tokenizer or chat template"):
        rows_of(kit.byte_tokenizer(None), kit.settings(tmp_path / "s"))
    with pytest.raises(DataError, match="pack them with train_on"):
        rows_of(tokenizer, kit.settings(tmp_path / "s", train_on="last"))
    (tmp_path / "s" / "b.jsonl").write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="token shards and other files"):
        rows_of(tokenizer, kit.settings(tmp_path / "s"))
    shard = tmp_path / "s" / "tokens-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DataError, match="tokens-00000"):
        TokenShard(shard)
