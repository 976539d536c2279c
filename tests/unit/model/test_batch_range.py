"""Tokens and positions beyond the model's tables are refused before a kernel reads them."""

from __future__ import annotations

import pytest
import torch

from sterna.core.errors import DataError
from sterna.model.batch import Batch
from sterna.model.config import parse_config
from sterna.model.decoder import Decoder
from sterna.train.trialmodel import initialise

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
}


def hidden(tokens, positions):
    model = Decoder(parse_config(LLAMA, "tiny"))
    initialise(model, 0)
    count = len(tokens)
    starts = torch.tensor([0, count], dtype=torch.int32)
    lens = torch.tensor([count], dtype=torch.int32)
    ints = [torch.tensor(x, dtype=torch.int32) for x in (tokens, positions)]
    return model.hidden(Batch(*ints, starts, lens))


def test_the_last_row_of_each_table_is_read():
    assert hidden([49, 0], [15, 15]).isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "positions", "message"),
    [
        ([1, 50], [0, 1], "token 50.*0 to 49"),
        ([-1, 5], [0, 1], "token -1"),
        ([1, 2], [0, 16], "position 16.*0 to 15"),
        ([1, 2], [0, 70_000], "position 70000"),
    ],
)
def test_a_row_beyond_the_end_is_refused(tokens, positions, message):
    with pytest.raises(DataError, match=message):
        hidden(tokens, positions)
