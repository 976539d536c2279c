"""Input statistics against a hand-made pass, and texts that cannot serve."""

from __future__ import annotations

import pytest
import torch

from sterna.core.errors import QuantizeError
from sterna.model.batch import Batch
from sterna.model.load import load_model
from sterna.quant.calibrate import MIN_TOKENS, input_mean_squares


def test_means_are_those_of_the_forward(plain_folder):
    decoder = load_model(plain_folder, "float32").decoder
    tokens = torch.randint(0, 70, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    found = input_mean_squares(decoder, tokens, "text")
    names = {f"layers.{i}.{m}" for i in range(2)
             for m in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")}  # fmt: skip
    assert set(found) == names | {"lm_head"}
    total = torch.zeros(40)
    for part in (tokens[i : i + 64] for i in range(0, 700, 64)):  # the model has 64 positions
        n = len(part)
        batch = Batch(torch.tensor(part).int(), torch.arange(n).int(),
                      torch.tensor([0, n]).int(), torch.tensor([n]).int())  # fmt: skip
        with torch.no_grad():
            total += decoder.hidden(batch).square().sum(0)
    assert torch.allclose(found["lm_head"], total / 700, rtol=1e-5)
    assert not any(module._forward_pre_hooks for module in decoder.modules())


@pytest.mark.parametrize("count", [0, 1, MIN_TOKENS - 1])
def test_an_empty_or_short_text_is_refused(plain_folder, count):
    decoder = load_model(plain_folder, "float32").decoder
    with pytest.raises(QuantizeError, match=f"text.txt: {count} tokens, at least {MIN_TOKENS}"):
        input_mean_squares(decoder, [1] * count, "text.txt")


def test_a_model_that_fails_on_the_text_is_named(plain_folder):
    decoder = load_model(plain_folder, "float32").decoder
    decoder.layers[0].mlp.down.weight.data[0, 0] = float("nan")
    with pytest.raises(QuantizeError, match=r"inputs of layers\.1\.attn\.qkv are not finite"):
        input_mean_squares(decoder, [1] * MIN_TOKENS, "text.txt")
