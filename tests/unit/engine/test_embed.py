"""The embedder: order, batching, pooling, pairs, and the queue behind asyncio."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
import transformers as tf

from sterna.core.errors import (
    ConfigError,
    ContextLengthError,
    OverloadedError,
    RequestError,
    ShuttingDownError,
    StepError,
    TaskError,
)
from sterna.engine.build import build_engine
from sterna.engine.build_embed import build_embedder
from sterna.engine.config import EngineConfig
from sterna.engine.embed_aio import AsyncEmbedder, _Job, take_fairly
from sterna.engine.embed_texts import embed_inputs, pair_scores
from sterna.engine.llm import LLM
from sterna.engine.pack import pack_arrays, plan_steps
from sterna.engine.task import resolve_task
from sterna.kernels.load import load_kernels
from sterna.text.inputs import EncodedText

TEXTS = ["the tern flies", "from pole to pole and back", "tax law", "a", "the sea of ice " * 8]


def settings(**values) -> EngineConfig:
    return EngineConfig.model_validate({"threads": 1, "dtype": "float32", **values})


def theirs(folder, texts, kind="mean"):
    model = tf.BertModel.from_pretrained(folder).eval()
    tokenizer = LLM(str(folder), threads=1).embedder.encoder.tokenizer
    rows = []
    for text in texts:
        with torch.inference_mode():
            hidden = model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0]
        pooled = hidden.mean(0) if kind == "mean" else hidden[0]
        rows.append(torch.nn.functional.normalize(pooled, dim=0).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_vectors_are_those_of_sentence_transformers_steps(mode, encoder_folder):
    folder = encoder_folder(mode=mode)
    embedder = build_embedder(str(folder), settings())
    found = embed_inputs(embedder, TEXTS)
    assert np.abs(found - theirs(folder, TEXTS, mode)).max() < 1e-5
    assert embedder.is_captured == (load_kernels().level == "cpu")


def test_any_batching_gives_the_same_bits(encoder_folder):
    if load_kernels().level != "cpu":
        pytest.skip("PyTorch's products depend on the number of rows")
    folder = str(encoder_folder())
    for extra in ({}, {"dtype": "bfloat16"}, {"weights": "int8", "activations": "int8"},
                  {"weights": "fp6", "dtype": "bfloat16"}):  # fmt: skip
        embedder = build_embedder(folder, settings(**extra))
        small = build_embedder(folder, settings(token_budget=48, capture=False, **extra))
        whole = embed_inputs(embedder, TEXTS * 3)
        assert np.array_equal(whole, embed_inputs(small, TEXTS * 3))
        for i, text in enumerate(TEXTS):
            assert np.array_equal(embed_inputs(embedder, [text])[0], whole[i])


def test_token_ids_and_texts_mix_and_keep_their_order(encoder_folder):
    embedder = build_embedder(str(encoder_folder()), settings())
    ids = embedder.encoder.tokenizer.encode(TEXTS[1])
    found = embed_inputs(embedder, [TEXTS[0], ids, TEXTS[2]])
    assert np.array_equal(found, embed_inputs(embedder, TEXTS[:3]))
    with pytest.raises(RequestError, match=r"token id 9999 is not in the vocabulary"):
        embed_inputs(embedder, [[9999]])


def test_long_texts_are_refused_or_cut_as_asked(encoder_folder):
    embedder = build_embedder(str(encoder_folder(max_tokens=10)), settings())
    text = "the tern " * 20
    with pytest.raises(ContextLengthError, match=r"42 tokens, the model takes 10"):
        embed_inputs(embedder, [text])
    cut = embed_inputs(embedder, [text], truncate=-1)
    assert np.array_equal(cut, embed_inputs(embedder, ["the tern " * 4]))
    assert np.array_equal(embed_inputs(embedder, [text], truncate=4),
                          embed_inputs(embedder, ["the tern"]))  # fmt: skip
    for wrong in (0, 11, 1):
        with pytest.raises(RequestError, match=r"truncate_prompt_tokens is"):
            embed_inputs(embedder, [text], truncate=wrong)


def test_dimensions_are_cut_and_normed_again(encoder_folder):
    embedder = build_embedder(str(encoder_folder()), settings())
    whole, cut = embed_inputs(embedder, TEXTS), embed_inputs(embedder, TEXTS, dimensions=16)
    want = whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True)
    assert np.abs(cut - want).max() < 1e-6
    with pytest.raises(RequestError, match=r"dimensions is 65, the model has 64"):
        embed_inputs(embedder, TEXTS, dimensions=65)


def test_prompts_stand_before_texts(encoder_folder):
    folder = encoder_folder(prompts={"query": "the law of "}, default_prompt_name=None)
    with LLM(str(folder), threads=1) as llm:
        asked = llm.embed("ice", prompt_name="query")
        assert np.array_equal(asked, llm.embed("the law of ice"))
        with pytest.raises(ConfigError, match=r"prompt_name 'queri'.*query"):
            llm.embed("ice", prompt_name="queri")


def test_cross_encoders_score_pairs(encoder_folder):
    folder = encoder_folder(num_labels=1)
    embedder = build_embedder(str(folder), settings())
    pairs = [("the tern", "flies from pole to pole"), ("law", "tax"), ("sea", "a gull")]
    model = tf.BertForSequenceClassification.from_pretrained(folder).eval()
    texts = embedder.encoder.pairs(pairs)
    with torch.inference_mode():
        want = [
            model(torch.tensor([t.ids]), token_type_ids=torch.tensor([t.types])).logits[0, 0]
            for t in texts
        ]
    found = pair_scores(embedder, pairs)
    assert np.abs(found - torch.stack(want).sigmoid().numpy()).max() < 1e-5
    assert 1 in texts[0].types
    with pytest.raises(TaskError, match=r"scores pairs"):
        embed_inputs(embedder, ["a"])


def test_embedding_models_score_by_cosine(encoder_folder):
    with LLM(str(encoder_folder()), threads=1, dtype="float32") as llm:
        vectors = llm.embed(TEXTS[:3])
        ranked = llm.rerank(TEXTS[0], TEXTS[1:3])
        want = {i: float(vectors[0] @ vectors[i + 1]) for i in range(2)}
        assert [i for i, _ in ranked] == sorted(want, key=lambda i: -want[i])
        assert all(abs(score - want[i]) < 1e-5 for i, score in ranked)
        with pytest.raises(TaskError, match=r"loaded to embed"):
            llm.generate("the")


def test_a_decoder_embeds_its_last_token(tmp_path):
    config = tf.Qwen3Config(
        vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.Qwen3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"w{i}": i for i in range(80)}, "w0")).save(
        str(tmp_path / "tokenizer.json")
    )
    ids = [[5, 6, 7], [8, 9, 10, 11, 12]]
    for pooling in ("auto", "mean"):
        embedder = build_embedder(str(tmp_path), settings(task="embed", pooling=pooling))
        found = embed_inputs(embedder, ids)
        for row, one in zip(found, ids, strict=True):
            with torch.inference_mode():
                hidden = model.model(torch.tensor([one])).last_hidden_state[0]
            want = hidden[-1] if pooling == "auto" else hidden.mean(0)
            assert np.abs(row - want.numpy()).max() < 1e-5
    assert resolve_task(tmp_path, "auto") == "generate"


def test_tasks_follow_the_files_and_refuse_what_cannot_be(encoder_folder):
    folder = encoder_folder()
    assert resolve_task(folder, "auto") == "embed"
    with pytest.raises(ConfigError, match=r"is an encoder"):
        resolve_task(folder, "generate")
    with pytest.raises(TaskError, match=r"embeds and writes no text"):
        build_engine(str(folder), settings())
    with pytest.raises(ConfigError, match=r"64 positions"):
        build_embedder(str(folder), settings(max_model_len=65))


def test_steps_hold_every_text_once_within_the_budget():
    lengths = [5, 30, 7, 7, 100, 1, 64, 33]
    steps = plan_steps(lengths, 64, 3)
    assert sorted(i for step in steps for i in step) == list(range(8))
    assert all(len(s) <= 3 and (len(s) == 1 or sum(lengths[i] for i in s) <= 64) for s in steps)


def test_pack_places_types_behind_positions():
    packed = pack_arrays([EncodedText([4, 5, 6], [0, 0, 1]), EncodedText([7])], 100)
    assert packed.positions.tolist() == [0, 1, 102, 0]
    assert packed.starts.tolist() == [0, 3, 4]


# ---- behind asyncio ------------------------------------------------------------------------------


def texts_of(embedder, count, text="the tern flies from pole to pole"):
    return embedder.encoder.texts([text] * count)


def test_requests_of_many_coroutines_get_their_own_rows(encoder_folder):
    embedder = build_embedder(str(encoder_folder()), settings(token_budget=64))
    want = embed_inputs(embedder, TEXTS)

    async def main():
        engine = AsyncEmbedder(embedder, settings())
        await engine.start()
        every = [embedder.encoder.texts([text]) for text in TEXTS] * 4
        found = await asyncio.gather(*(engine.run(texts) for texts in every))
        assert engine.load().num_running + engine.load().num_waiting == 0
        assert await engine.drain(1)
        with pytest.raises(ShuttingDownError):
            await engine.run(every[0])
        await engine.shutdown()
        return found

    for i, rows in enumerate(asyncio.run(main())):
        assert np.array_equal(rows[0], want[i % len(TEXTS)])


def test_a_cancelled_request_leaves_the_queue(encoder_folder):
    embedder = build_embedder(str(encoder_folder()), settings(token_budget=64))

    async def main():
        engine = AsyncEmbedder(embedder, settings())
        await engine.start()
        work = asyncio.ensure_future(engine.run(texts_of(embedder, 2000)))
        await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert (await engine.run(texts_of(embedder, 1))).shape == (1, 64)
        assert engine._queued_tokens == 0 and not engine._jobs and not engine._open
        await engine.shutdown()

    asyncio.run(main())


def test_a_full_queue_is_refused_with_the_predicted_wait(encoder_folder):
    embedder = build_embedder(str(encoder_folder()), settings(token_budget=64))

    async def main():
        engine = AsyncEmbedder(embedder, settings(max_queued_tokens=100))
        await engine.start()
        work = asyncio.ensure_future(engine.run(texts_of(embedder, 2000)))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match=r"limit 100") as caught:
            await engine.run(texts_of(embedder, 1))
        assert caught.value.retry_after_s > 0
        work.cancel()
        await engine.shutdown()

    asyncio.run(main())


def test_only_the_guilty_request_of_a_step_fails(encoder_folder, monkeypatch):
    embedder = build_embedder(str(encoder_folder()), settings())
    honest = embedder.run

    def run(texts):
        if any(len(text) == 3 for text in texts):
            raise StepError("not finite")
        return honest(texts)

    monkeypatch.setattr(embedder, "run", run)

    async def main():
        engine = AsyncEmbedder(embedder, settings())
        good, bad = texts_of(embedder, 2), texts_of(embedder, 1, "a")
        works = [asyncio.ensure_future(engine.run(t)) for t in (good, bad, good)]
        engine._loop = asyncio.get_running_loop()
        await asyncio.sleep(0)  # all three wait before the thread starts
        await engine.start()
        found = await asyncio.gather(*works, return_exceptions=True)
        await engine.shutdown()
        return found

    first, second, third = asyncio.run(main())
    assert isinstance(second, StepError)
    assert np.array_equal(first, third)


def test_a_small_request_does_not_wait_for_a_large_one():
    def job(*lengths):
        return _Job([EncodedText([0] * n) for n in lengths], np.empty((0,)), None)

    large, small = job(*[10] * 50), job(10)
    step = take_fairly([large, small], 40, 100)
    assert [len(part) for _, part in step] == [3, 1]
    assert not small.order and len(large.order) == 47
    alone = take_fairly([job(30)], 10, 4)
    assert alone == []  # longer than a step: the embedder's budget is never below its longest text
