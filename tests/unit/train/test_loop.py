"""`train(recipe)` on a tiny model: outcomes, files, resume, refusals."""

from __future__ import annotations

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

from sterna.core.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from sterna.data.pack import Document, filler, join
from sterna.data.prepare import pack_shards
from sterna.model.load import load_model
from sterna.text.tokenizer import load_tokenizer
from sterna.train import checkpoint
from sterna.train.baddump import name_rows
from sterna.train.hooks import Hook
from sterna.train.loop import train
from sterna.train.metrics import read_metrics


def weights(folder):
    return {n: p.detach() for n, p in load_model(folder, "float32").decoder.named_parameters()}


def same(first, second):
    a, b = weights(first), weights(second)
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


class Call(Hook):
    """Calls a function after step n."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def after_step(self, trainer, stats):
        if stats.step == self.step:
            self.function(trainer)


def step_lines(folder):
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "step"]


def test_a_run_learns_and_leaves_a_model_that_loads(tiny, tmp_path):
    recipe = tiny.recipe(
        tmp_path, run={"steps": 20}, data={"held_out": 0.1}, eval={"every": 5, "max_rows": 3},
        checkpoint={"every": 4, "keep_last": 2}, log={"report": True, "sample_prompts": ["abc"]},
    )  # fmt: skip
    asked = []

    def generate(model, prompts, max_tokens):
        asked.append((model, tuple(prompts), max_tokens))
        return ["<b>cba</b>"]

    result = train(recipe, generate=generate)
    assert (result.outcome, result.steps) == ("done", 20)
    lines = step_lines(result.output)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["loss"] == result.loss < lines[0]["loss"] - 2
    evals = [
        x["loss"] for x in read_metrics(result.output / "metrics.jsonl") if x["kind"] == "eval"
    ]
    assert len(evals) == 5 and evals[-1] == result.eval_loss < evals[0] - 2
    kept = [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path / "run/checkpoints")]
    assert kept == [16, 20]
    assert same(result.model, result.checkpoint)
    assert asked == [(result.model, ("abc",), 64)]
    page = (result.output / "report.html").read_text()
    assert "&lt;b&gt;cba&lt;/b&gt;" in page and "<svg" in page and "optim.lr" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"model": {"dtype": "bfloat16"}, "optim": {"ema_decay": 0.9, "weight_decay": 0.1}},
        {"model": {"dtype": "bfloat16"}, "optim": {"states": "8bit", "master": False}},
        {
            "model": {"neftune_alpha": 5.0},
            "optim": {"states": "bfloat16"},
            "run": {"micro_rows": 2},
        },
    ],
    ids=["float32", "bf16-ema", "8bit", "neftune"],
)
def test_a_resumed_run_ends_in_the_same_bits(tiny, tmp_path, changed):
    whole = tiny.recipe(tmp_path, **changed, checkpoint={"every": 3})
    train(whole)
    parts = whole.model_copy(
        update={"run": whole.run.model_copy(update={"output": tmp_path / "b"})}
    )
    halt = Call(4, lambda trainer: trainer.stop("interrupted"))
    first = train(parts, hooks=[halt])
    assert (first.outcome, first.steps) == ("interrupted", 4)
    second = train(parts, resume=True)
    assert second.steps == 6
    assert same(tmp_path / "run/model", tmp_path / "b/model")
    keep = ("step", "loss", "grad_norm", "lr", "tokens")
    a, b = ([[x[k] for k in keep] for x in step_lines(tmp_path / f)] for f in ("run", "b"))
    assert a == b


def test_a_resumed_run_drops_lines_after_its_checkpoint(tiny, tmp_path):
    recipe = tiny.recipe(tmp_path, checkpoint={"every": 2})
    train(recipe, hooks=[Call(4, lambda trainer: trainer.stop("interrupted"))])
    path = tmp_path / "run/metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "step", "step": 5, "loss": 9}\n{"kind": "st')
    train(recipe, resume=True)
    assert [line["step"] for line in step_lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_what_a_resumed_recipe_may_change(tiny, tmp_path):
    recipe = tiny.recipe(tmp_path)
    train(recipe, hooks=[Call(2, lambda trainer: trainer.stop("interrupted"))])
    with pytest.raises(ConfigError, match=r"optim\.lr \(0\.003, now 0\.1\)"):
        train(tiny.recipe(tmp_path, optim={"lr": 0.1}), resume=True)
    with pytest.raises(ConfigError, match=r"run\.rows_per_step \(4, now 8\)"):
        train(tiny.recipe(tmp_path, run={"rows_per_step": 8}), resume=True)
    with pytest.raises(ConfigError, match=r"holds a run already .*--resume"):
        train(recipe)
    free = {"run": {"steps": 3}, "log": {"every": 2}, "checkpoint": {"keep_last": 5}}
    assert train(tiny.recipe(tmp_path, **free), resume=True).steps == 3


def test_a_damaged_newest_checkpoint_is_passed_over(tiny, tmp_path, caplog):
    recipe = tiny.recipe(tmp_path, checkpoint={"every": 2}, run={"steps": 4})
    train(recipe)
    newest = tmp_path / "run/checkpoints/step-00000004"
    weights_file = newest / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-10])
    assert checkpoint.newest(newest.parent) == newest.with_name("step-00000002")
    assert "model.safetensors is missing or not" in checkpoint.faults(newest)
    assert train(recipe, resume=True).steps == 4
    assert checkpoint.newest(newest.parent) == newest


def test_a_nan_stops_the_run_keeps_the_state_and_names_the_batch(tiny, tmp_path):
    recipe = tiny.recipe(tmp_path)

    class Poison(Hook):
        def before_step(self, trainer, rows):
            if trainer.counters.step == 3:
                with torch.no_grad():
                    self.kept = trainer.parts.model.norm.weight.clone()
                    trainer.parts.model.norm.weight[0] = float("nan")

    with pytest.raises(NonFiniteError, match="step 4: loss nan in row 12 ") as failed:
        train(recipe, hooks=[Poison()])
    dumped = list((tmp_path / "run/bad").glob("*.npz"))
    assert [p.name for p in dumped] == ["bad-step-00000004-rank-0.npz"]
    _check_places(failed.value.message, np.load(dumped[0]), tmp_path / "chats.jsonl")
    newest = checkpoint.newest(tmp_path / "run/checkpoints")
    assert newest is not None and checkpoint.step_of(newest) == 3


def _check_places(message, dump, chats):
    """The line that the message names for each document of the row is the one it was made of."""
    lines = chats.read_text().splitlines()
    tokens, starts = dump["tokens_0"], dump["starts_0"]
    numbers = [int(place.rpartition(":")[2]) for place in dump["places_0"]]
    assert f"({chats}:{', '.join(map(str, numbers))});" in message
    alphabet = sorted(ByteLevel.alphabet())
    for number, begin in zip(numbers, starts, strict=False):
        word = json.loads(lines[number - 1])["messages"][0]["content"]
        found = [alphabet[token] for token in tokens[begin + 1 : begin + 1 + len(word)]]
        assert "".join(found) == word


def test_a_nan_in_token_shards_names_the_document(tiny, tmp_path):
    data = tiny.data(tmp_path, sources=[{"path": str(tmp_path / "chats.jsonl")}])
    pack_shards(data, load_tokenizer(tmp_path / "model"), tmp_path / "shards")
    recipe = tiny.recipe(tmp_path, data={"sources": [{"path": str(tmp_path / "shards")}]})

    class Poison(Hook):
        def before_step(self, trainer, rows):
            with torch.no_grad():
                trainer.parts.model.norm.weight[0] = float("inf")

    named = r"step 1: loss nan in row 0 \(.*tokens-00000\.safetensors: document \d+, document \d+"
    with pytest.raises(NonFiniteError, match=named):
        train(recipe, hooks=[Poison()])


def test_many_documents_are_named_in_short():
    row = join([Document(np.zeros(1, np.int32), np.zeros(1, np.int32), 0, f"a.jsonl:{i}")
                for i in range(50)])  # fmt: skip
    named = name_rows([row, filler()], 6, 2)
    assert named.startswith("rows 6, 8 (a.jsonl:0, 1, 2, ") and named.endswith(" 39 and 10 more)")


def test_documents_beyond_the_models_positions_are_too_long(tiny, tmp_path, caplog):
    """The rope table has 256 rows: longer ones were read beyond it."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text((json.dumps({"text": "abcdef" * 100}) + "\n") * 20)
    data = {"sources": [{"path": str(texts)}], "seq_len": 600}
    run = {"steps": 2, "rows_per_step": 2}
    longest = []

    class Look(Hook):
        def before_step(self, trainer, rows):
            longest.extend(int(row.positions.max()) for row in rows)

    with caplog.at_level("WARNING", logger="sterna"):
        train(tiny.recipe(tmp_path, kind="pretrain", data=data, run=run), hooks=[Look()])
    assert max(longest) == 255
    assert "data.seq_len is 600, the model has 256 positions" in caplog.text
    assert "20 documents too long" in caplog.text
    strict = {**data, "too_long": "fail"}
    run = {**run, "output": str(tmp_path / "strict")}
    with pytest.raises(
        DataError, match=r"texts.jsonl:\d+: has 601 tokens, the model's positions are 256"
    ):
        train(tiny.recipe(tmp_path, kind="pretrain", data=strict, run=run))


def test_a_folder_that_cannot_be_written_is_refused_at_once(tiny, tmp_path):
    recipe = tiny.recipe(tmp_path, run={"output": str(tmp_path / "chats.jsonl")})
    with pytest.raises(ConfigError, match="cannot be a run's folder: File exists"):
        train(recipe)


def test_a_second_run_into_the_same_folder_is_refused(tiny, tmp_path):
    recipe = tiny.recipe(tmp_path, run={"steps": 2})

    def again(trainer):
        with pytest.raises(ConfigError, match="another process is training into"):
            train(recipe)

    assert train(recipe, hooks=[Call(1, again)]).steps == 2
    assert len(step_lines(tmp_path / "run")) == 2  # the second wrote nothing there
    longer = tiny.recipe(tmp_path, run={"steps": 3})
    assert train(longer, resume=True).steps == 3  # free again


def test_rows_that_were_skipped_are_counted_at_the_end(tiny, tmp_path, caplog):
    recipe = tiny.recipe(tmp_path, data={"on_bad_row": "skip"}, run={"steps": 1})
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "assistant"}]}\n{"messages": []}\n' * 3)
    with caplog.at_level("WARNING", logger="sterna"):
        train(recipe)
    assert "messages[0] has no content and no tool_calls" in caplog.text
    assert re.search(r"data: of \d+ rows \d malformed", caplog.text)


def test_smoothing_and_z_loss_are_trained_and_not_evaluated(tiny, tmp_path):
    runs = {}
    for name, section in {"plain": {}, "more": {"label_smoothing": 0.1, "z_loss": 0.01}}.items():
        run = {"steps": 1, "output": str(tmp_path / name)}
        recipe = tiny.recipe(
            tmp_path, loss=section, run=run, data={"held_out": 0.1}, optim={"lr": 1e-30}
        )
        runs[name] = train(recipe)
    assert runs["more"].eval_loss == runs["plain"].eval_loss  # of the first weights
    # log-sums are near ln 272 = 5.6 at random weights: 0.01 of their square is 0.31
    assert 0.2 < runs["more"].loss - runs["plain"].loss < 0.5
    with pytest.raises(ConfigError, match="kind = distill has a loss of its own"):
        tiny.recipe(tmp_path, kind="distill", loss={"z_loss": 1e-4})


def test_the_best_checkpoint_is_kept_and_patience_ends_the_run(tiny, tmp_path):
    """A huge learning rate makes every later eval worse than the first after warmup."""
    recipe = tiny.recipe(
        tmp_path, run={"steps": 30}, optim={"lr": 0.3, "grad_clip": 0.0},
        schedule={"kind": "constant", "warmup_steps": 30}, data={"held_out": 0.1},
        eval={"every": 1, "max_rows": 2, "patience": 3}, checkpoint={"keep_last": 1},
    )  # fmt: skip
    result = train(recipe)
    assert result.outcome == "stopped early"
    best = checkpoint.read_meta(result.checkpoint)["counters"]["best_step"]
    assert result.steps == best + 3
    kept = [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path / "run/checkpoints")]
    assert kept == [best, best + 3]


def test_the_end_of_the_data_ends_the_run(tiny, tmp_path):
    recipe = tiny.recipe(tmp_path, run={"steps": 10_000, "rows_per_step": 40}, optim={"lr": 1e-3})
    sources = [{"path": str(tmp_path / "chats.jsonl"), "epochs": 1}]
    result = train(tiny.recipe(tmp_path, data={"sources": sources}, run=recipe.run.model_dump()))
    assert result.outcome == "data ended" and 1 <= result.steps < 10


@pytest.mark.parametrize(
    ("name", "outcome"), [("SIGINT", "interrupted"), ("SIGTERM", "terminated")]
)
def test_signals_end_the_run_with_a_checkpoint(tiny, tmp_path, name, outcome):
    recipe = tiny.recipe(tmp_path, run={"steps": 50})
    send = Call(2, lambda trainer: os.kill(os.getpid(), getattr(signal, name)))
    result = train(recipe, hooks=[send])
    assert (result.outcome, result.steps) == (outcome, 2)
    assert checkpoint.step_of(result.checkpoint) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait(tiny, tmp_path):
    def twice(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny.recipe(tmp_path), hooks=[Call(2, twice)])


@pytest.mark.parametrize("is_async", [True, False])
def test_a_full_disk_is_an_error_and_the_last_checkpoint_is_whole(
    tiny, tmp_path, monkeypatch, is_async
):
    recipe = tiny.recipe(tmp_path, checkpoint={"every": 2, "is_async": is_async})
    real = checkpoint.save_tensors

    def full(tensors, config, folder, *rest):
        if "00000004" in folder.name:
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, config, folder, *rest)

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    message = r"No space left on device; the last good one is .*step-00000002; free space"
    with pytest.raises(CheckpointError, match=message):
        train(recipe)
    left = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert left == ["step-00000002"]
    monkeypatch.setattr(checkpoint, "save_tensors", real)
    assert train(recipe, resume=True).steps == 6


def test_bad_settings_are_named(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"needs 2|whose product is 1"):
        train(tiny.recipe(tmp_path, parallel={"dp": 2}))
    with pytest.raises(ConfigError, match="a model from scratch has no tokenizer"):
        config = tmp_path / "model/config.json"
        model = {"path": "", "config": str(config)}
        train(tiny.recipe(tmp_path, kind="pretrain", model=model))
    with pytest.raises(ConfigError, match="kind = sft continues from a model"):
        train(tiny.recipe(tmp_path, model={**model, "tokenizer": str(tmp_path / "model")}))
    small = tiny.write_model(tmp_path / "small", vocab_size=100)
    with pytest.raises(ConfigError, match="the tokenizer has 259 tokens, the model 100"):
        train(tiny.recipe(tmp_path, model={"path": str(small)}))


def test_pretraining_from_a_config(tiny, tmp_path):
    tiny.recipe(tmp_path)
    (tmp_path / "text.txt").write_text("abcdefgh " * 900)
    folder = tmp_path / "model"
    recipe = tiny.recipe(
        tmp_path, kind="pretrain",
        model={"path": "", "config": str(folder / "config.json"), "tokenizer": str(folder)},
        data={"sources": [{"path": str(tmp_path / "text.txt"), "epochs": 0}], "too_long": "split"},
        run={"steps": 12},
    )  # fmt: skip
    result = train(recipe)
    lines = step_lines(result.output)
    assert abs(lines[0]["loss"] - 5.6) < 0.2  # ln 272
    assert result.loss < 4
    again = recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": 13})})
    assert train(again, resume=True).steps == 13


def test_averaged_weights_are_evaluated_and_exported(tiny, tmp_path):
    recipe = tiny.recipe(tmp_path, optim={"ema_decay": 0.5}, run={"steps": 3})
    seen = [weights(tmp_path / "model")]

    class Watch(Hook):
        def after_step(self, trainer, stats):
            named = trainer.parts.model.named_parameters()
            seen.append({name: p.detach().clone() for name, p in named})

    result = train(recipe, hooks=[Watch()])
    average = seen[0]
    for live in seen[1:]:
        average = {n: average[n].lerp(live[n], 0.5) for n in live}
    exported = weights(result.model)
    for name, value in exported.items():
        torch.testing.assert_close(value, average[name], rtol=1e-6, atol=1e-7)
    assert not same(result.model, result.checkpoint)
    config = json.loads((result.model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    "longseq",
    [
        {"head_rows": 7},
        {"checkpoint": True, "mlp_tile": 40, "attention_tile": 33},
        {"checkpoint": True, "every": 2, "tier": "disk"},
    ],
    ids=["head", "tiles", "disk"],
)
def test_long_row_settings_change_memory_not_the_run(tiny, tmp_path, longseq):
    plain = train(tiny.recipe(tmp_path))
    output = {"output": str(tmp_path / "long")}
    result = train(tiny.recipe(tmp_path, longseq=longseq, run=output))
    found, wanted = step_lines(result.output), step_lines(plain.output)
    assert found[0]["loss"] == pytest.approx(wanted[0]["loss"], rel=1e-6)
    assert [x["loss"] for x in found] == pytest.approx([x["loss"] for x in wanted], rel=1e-4)
    assert not list(tmp_path.glob("long/.activations*"))
