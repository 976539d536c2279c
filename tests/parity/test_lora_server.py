"""Adapters by name over HTTP: routing, listing, load and unload while requests run, refusals."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest

from sterna.engine.aio import AsyncEngine
from sterna.kernels.load import load_kernels
from sterna.server.app import create_app
from sterna.server.config import ServerConfig

from .lora_tiny import make, table_of, write_all

KEY = {"authorization": "Bearer secret"}
PROMPT = list(range(30, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if load_kernels().level != "cpu":
        pytest.skip("equal bits are promised by the C++ kernels only")
    return write_all(tmp_path_factory.mktemp("lora-server"))


@asynccontextmanager
async def served(folder, names=("all", "attention"), **settings):
    engine = make(folder, names)
    given = {"served_model_name": ("tern",), "model": str(folder / "model"), "api_key": ("secret",)}
    app = create_app(AsyncEngine(engine), ServerConfig.model_validate({**given, **settings}))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", headers=KEY) as client,
    ):
        client.engine = engine
        yield client


def body(model, **more):
    given = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    return {"model": model, **given, **more}


def check(act, folder, **settings):
    async def main():
        async with served(folder, **settings) as client:
            await act(client)

    asyncio.run(main())


def test_names_route_together_and_alone_to_the_same_answers(folder):
    async def act(client):
        names = ["tern", "all", "attention"]
        asked = [client.post("/v1/completions", json=body(name)) for name in names * 2]
        together = [reply.json() for reply in await asyncio.gather(*asked)]
        assert [reply["model"] for reply in together] == names * 2
        choices = [reply["choices"] for reply in together]
        assert choices[:3] == choices[3:]
        assert choices[0] != choices[1] != choices[2]
        alone = [(await client.post("/v1/completions", json=body(n))).json() for n in names]
        assert [reply["choices"] for reply in alone] == choices[:3]
        chat = {"model": "all", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        reply = (await client.post("/v1/chat/completions", json=chat)).json()
        assert reply["model"] == "all"

    check(act, folder)


def test_models_are_listed_with_their_parent(folder):
    async def act(client):
        cards = (await client.get("/v1/models")).json()["data"]
        assert [(c["id"], c["parent"]) for c in cards] == [
            ("tern", None), ("all", "tern"), ("attention", "tern"),
        ]  # fmt: skip
        assert cards[1]["root"] == str(folder / "all")
        one = (await client.get("/v1/models/attention")).json()
        assert one["parent"] == "tern"
        missing = await client.post("/v1/completions", json=body("nothing"))
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"

    check(act, folder)


def test_load_and_unload_while_requests_run(folder):
    async def act(client):
        new = {"lora_name": "new", "lora_path": str(folder / "one-layer")}
        long = asyncio.create_task(client.post("/v1/completions", json=body("all", max_tokens=100)))
        while not client.engine.has_work:
            await asyncio.sleep(0.001)
        reply = await client.post("/v1/load_lora_adapter", json=new)
        assert reply.status_code == 200
        assert "new" in reply.text
        gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "all"})
        assert gone.status_code == 200
        assert (await client.post("/v1/completions", json=body("all"))).status_code == 404
        fresh = (await client.post("/v1/completions", json=body("new"))).json()
        assert fresh["model"] == "new"
        assert (await long).json()["usage"]["completion_tokens"] > 0
        assert set(table_of(client.engine).loaded) == {"attention", "new"}
        again = {"lora_name": "all", "lora_path": str(folder / "all")}
        assert (await client.post("/v1/load_lora_adapter", json=again)).status_code == 200

    check(act, folder)


def test_refusals_are_typed_and_behind_the_key(folder):
    async def act(client):
        load = "/v1/load_lora_adapter"
        good = {"lora_name": "x", "lora_path": str(folder / "one-layer")}
        cases = [
            ({**good, "lora_name": "tern"}, "base model"),
            ({**good, "lora_name": "all"}, "loaded already"),
            ({**good, "lora_path": str(folder / "missing")}, "missing"),
            ({**good, "lora_path": str(folder / "model")}, "missing"),
        ]
        for case, words in cases:
            reply = await client.post(load, json=case)
            assert reply.status_code == 400
            assert reply.json()["error"]["code"] == "invalid_adapter"
            assert words in reply.json()["error"]["message"]
        assert (await client.post(load, json={"lora_name": ""})).status_code == 400
        gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "nothing"})
        assert gone.json()["error"]["code"] == "invalid_adapter"
        closed = await client.post(load, json=good, headers={"authorization": "Bearer other"})
        assert closed.status_code == 401
        assert "x" not in table_of(client.engine).loaded

    check(act, folder)


def test_a_server_without_places_says_how_to_get_them(folder):
    async def act(client):
        new = {"lora_name": "new", "lora_path": str(folder / "all")}
        reply = await client.post("/v1/load_lora_adapter", json=new)
        assert reply.status_code == 400
        assert "max-loras" in reply.json()["error"]["message"]

    check(act, folder, names=())


def test_the_metric_names_what_runs(folder):
    async def act(client):
        task = asyncio.create_task(client.post("/v1/completions", json=body("all", max_tokens=100)))
        while not table_of(client.engine).loaded["all"].num_requests:
            await asyncio.sleep(0.001)
        text = (await client.get("/metrics")).text
        await task
        line = next(x for x in text.splitlines() if x.startswith("sterna:lora_requests_info{"))
        assert 'max_lora="3"' in line
        assert 'running_lora_adapters="all"' in line

    check(act, folder)
