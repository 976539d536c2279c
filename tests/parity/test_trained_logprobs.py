"""After optimizer steps the trainer's log-probs are still the engine's, to the bit, on the CPU."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from sterna.engine.llm import LLM
from sterna.engine.request import SamplingParams
from sterna.kernels.load import load_kernels
from sterna.model.load import load_model
from sterna.train.hooks import Hook
from sterna.train.longseq.head import chunked_logprobs
from sterna.train.loop import train
from sterna.train.step import as_batch

_TINY = Path(__file__).parents[1] / "unit" / "train" / "tiny.py"


class Last(Hook):
    """Keeps the log-probs of one step's rows under the weights after it."""

    def before_step(self, trainer, rows):
        self.rows = rows

    def after_step(self, trainer, stats):
        batch, _ = as_batch(self.rows, torch.device("cpu"))
        model = trainer.parts.model
        targets = batch.tokens.long().roll(-1)
        with torch.no_grad():
            found = chunked_logprobs(model.hidden(batch), model.head_weight(), targets)
        starts = batch.query_starts.tolist()
        tokens = batch.tokens.tolist()
        self.documents = [
            (tokens[a:b], found[0][a : b - 1].tolist()) for a, b in itertools.pairwise(starts)
        ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logprobs_of_the_trained_model_are_the_engines(tmp_path, dtype):
    if load_kernels().level != "cpu":
        pytest.skip("equal bits are promised by the C++ kernels only")
    spec = importlib.util.spec_from_file_location("train_tiny", _TINY)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    last = Last()
    result = train(tiny.recipe(tmp_path, model={"dtype": dtype}, run={"steps": 4}), hooks=[last])
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    first = load_model(tmp_path / "model", dtype).decoder
    trained = load_model(result.model, dtype).decoder
    assert not torch.equal(first.norm.weight, trained.norm.weight)
    assert len(last.documents) > 4
    with LLM(str(result.model), dtype=dtype, token_budget=32, threads=1, num_kv_blocks=64) as llm:
        for tokens, wanted in last.documents:
            served = llm.generate([tokens], params, progress=False)[0].prompt_logprobs
            # the engine reports float64 of the same sums; training keeps float32
            found = torch.tensor([entry.logprob for entry in served[1:]]).float()
            assert torch.equal(found, torch.tensor(wanted))
