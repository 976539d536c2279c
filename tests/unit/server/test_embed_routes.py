"""The routes of an embedding model, and the refusals of a server of the other kind."""

from __future__ import annotations

import base64
from contextlib import asynccontextmanager

import httpx
import numpy as np
import pytest

from sterna.engine.build_embed import build_embedder
from sterna.engine.config import EngineConfig
from sterna.engine.embed_aio import AsyncEmbedder
from sterna.engine.embed_texts import embed_inputs, pair_scores
from sterna.server.config import ServerConfig
from sterna.server.embed_app import create_embed_app

SETTINGS = EngineConfig.model_validate({"threads": 1, "dtype": "float32"})
TEXTS = ["the tern flies", "tax law", "ice"]


@pytest.fixture(scope="module")
def embedder(encoder_folder):
    folder = encoder_folder()
    found = build_embedder(str(folder), SETTINGS)
    found.folder = str(folder)
    return found


@pytest.fixture(scope="module")
def scorer(encoder_folder):
    folder = encoder_folder(num_labels=1)
    found = build_embedder(str(folder), SETTINGS)
    found.folder = str(folder)
    return found


@asynccontextmanager
async def client_of(embedder, **settings):
    config = ServerConfig.model_validate(
        {"served_model_name": ("tern",), "model": embedder.folder, **settings}
    )
    app = create_embed_app(AsyncEmbedder(embedder, SETTINGS), config)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        client.app = app
        yield client


def run(coroutine):
    import asyncio

    return asyncio.run(coroutine)


def post(embedder, path, **body):
    async def main():
        async with client_of(embedder) as client:
            return await client.post(path, json=body)

    return run(main())


def test_numbers_and_base64_are_the_same_floats(embedder):
    want = embed_inputs(embedder, TEXTS)
    as_numbers = post(embedder, "/v1/embeddings", input=TEXTS, model="tern").json()
    as_base64 = post(embedder, "/v1/embeddings", input=TEXTS, encoding_format="base64").json()
    for reply, read in (
        (as_numbers, lambda v: np.array(v, np.float32)),
        (as_base64, lambda v: np.frombuffer(base64.b64decode(v), "<f4")),
    ):
        assert reply["object"] == "list" and reply["model"] == "tern"
        assert [item["index"] for item in reply["data"]] == [0, 1, 2]
        found = np.stack([read(item["embedding"]) for item in reply["data"]])
        assert np.array_equal(found, want)
        tokens = sum(len(embedder.encoder.tokenizer.encode(text)) for text in TEXTS)
        assert reply["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_one_text_token_ids_and_dimensions(embedder):
    ids = [embedder.encoder.tokenizer.encode(text) for text in TEXTS]
    want = embed_inputs(embedder, TEXTS, dimensions=8)
    for given, rows in ((TEXTS[0], want[:1]), (ids[0], want[:1]), (ids, want)):
        reply = post(embedder, "/v1/embeddings", input=given, dimensions=8).json()
        found = np.array([item["embedding"] for item in reply["data"]], np.float32)
        assert np.array_equal(found, rows)


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "says"),
    [
        ("/v1/embeddings", {"input": []}, 400, "invalid_request", "0 texts"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, 400, "invalid_request", "2,049 texts"),
        ("/v1/embeddings", {"input": "a", "dimensions": 99}, 400, "invalid_request", "dimensions"),
        ("/v1/embeddings", {"input": "a", "model": "x"}, 404, "model_not_found", "tern"),
        ("/v1/embeddings", {"input": "a", "inptu": 1}, 400, "invalid_request", "'input'"),
        ("/v1/embeddings", {"input": "the " * 60}, 400, "context_length_exceeded", "62 tokens"),
        ("/v1/embeddings", {"input": "\ud800"}, 400, "invalid_request", ""),
        ("/v1/embeddings", {"input": [[99999]]}, 400, "invalid_request", "vocabulary"),
        (
            "/v1/embeddings",
            {"input": "a", "prompt_name": "q"},
            400,
            "invalid_config",
            "prompt_name",
        ),
        (
            "/v1/score",
            {"text_1": ["a", "b"], "text_2": ["a"] * 3},
            400,
            "invalid_request",
            "text_1",
        ),
        ("/v1/rerank", {"query": "a", "documents": []}, 400, "invalid_request", "documents"),
        ("/v1/chat/completions", {"messages": []}, 400, "unsupported_task", "embedding model"),
        ("/v1/completions", {"prompt": "a"}, 400, "unsupported_task", "embedding model"),
    ],
)
def test_errors_say_what_to_change(embedder, path, body, status, code, says):
    import json

    async def main():
        async with client_of(embedder) as client:
            return await client.post(path, content=json.dumps(body))

    reply = run(main())
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code), error
    assert says in error["message"]


def test_truncation_is_asked_for(embedder):
    long = post(embedder, "/v1/embeddings", input="the " * 60, truncate_prompt_tokens=-1).json()
    assert long["usage"]["prompt_tokens"] == 48


@pytest.mark.parametrize("kind", ["embedder", "scorer"])
def test_rerank_and_score_agree(kind, request):
    model = request.getfixturevalue(kind)
    documents = ["the gull and the tern", "tax law", "a sea of ice"]
    want = pair_scores(model, [("the tern", text) for text in documents])
    scored = post(model, "/v1/score", text_1="the tern", text_2=documents).json()
    assert [item["score"] for item in scored["data"]] == pytest.approx(want.tolist(), abs=1e-6)
    ranked = post(
        model, "/v1/rerank", query="the tern", documents=[*documents[:2], {"text": documents[2]}],
        top_n=2,
    ).json()  # fmt: skip
    order = np.argsort(-want)[:2].tolist()
    assert [item["index"] for item in ranked["results"]] == order
    assert [item["document"]["text"] for item in ranked["results"]] == [documents[i] for i in order]
    assert scored["usage"]["total_tokens"] > 0


def test_a_scorer_has_no_embeddings(scorer):
    reply = post(scorer, "/v1/embeddings", input="a")
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported_task")


def test_keys_metrics_models_and_docs_are_those_of_every_server(embedder):
    async def main():
        async with client_of(embedder, api_key=("secret",)) as client:
            bare = await client.post("/v1/embeddings", json={"input": "a"})
            assert bare.status_code == 401
            client.headers["authorization"] = "Bearer secret"
            assert (await client.post("/v1/embeddings", json={"input": "a"})).status_code == 200
            metrics = (await client.get("/metrics")).text
            models = (await client.get("/v1/models")).json()
            document = (await client.get("/openapi.json")).json()
            health = (await client.get("/health")).status_code
            ids = (await client.post("/tokenize", json={"prompt": "the tern"})).json()
            return metrics, models, document, health, ids

    metrics, models, document, health, ids = run(main())
    assert 'sterna:prompt_tokens_total{model_name="tern"} 3.0' in metrics
    assert 'finished_reason="stop"' in metrics
    assert models["data"][0]["id"] == "tern" and models["data"][0]["max_model_len"] == 48
    assert {"/v1/embeddings", "/v1/rerank", "/v1/score"} <= set(document["paths"])
    assert health == 200 and ids["count"] == 4


def test_a_client_that_goes_away_takes_its_texts_along(embedder):
    import asyncio

    async def main():
        async with client_of(embedder) as client:
            engine = client.app.state.service.engine
            body = {"input": ["the tern flies from pole to pole"] * 2048}
            scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [],
                     "query_string": b"", "http_version": "1.1", "scheme": "http",
                     "root_path": ""}  # fmt: skip
            import json

            messages = asyncio.Queue()
            await messages.put({"type": "http.request", "body": json.dumps(body).encode()})
            sent = []

            async def send(message):
                sent.append(message)

            call = asyncio.ensure_future(client.app(scope, messages.get, send))
            while not engine._open:
                await asyncio.sleep(0.001)
            await messages.put({"type": "http.disconnect"})
            await asyncio.wait_for(call, 10)
            assert not engine._jobs
            metrics = (await client.get("/metrics")).text
            assert 'finished_reason="abort"' in metrics

    run(main())


def test_a_generating_server_says_that_it_does_not_embed(connect):
    async def main():
        async with connect() as client:
            return await client.post("/v1/embeddings", json={"input": "a"})

    reply = run(main())
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported_task")
    assert "--task embed" in reply.json()["error"]["message"]
